import math
from dataclasses import dataclass

import torch

from ..divergence import Divergence, kl_divergence, parameter


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Generalised Jensen-Shannon: `β KL(p_T ‖ m) + (1−β) KL(p_S ‖ m)`, `m = β p_T + (1−β) p_S`.

    Its limits at β → 0 and 1 are 0: use `reverse_kl` or `forward_kl` there.

    Source: Agarwal et al. 2306.13649, eq. 1.
    """

    name = "jsd"
    beta: float = parameter(0.5, "β of the Jensen-Shannon divergence", 0, 1)

    def values(self, log_student, log_target):
        beta = self.beta
        log_m = torch.logaddexp(math.log(beta) + log_target, math.log1p(-beta) + log_student)
        return beta * kl_divergence(log_target, log_m) + (1 - beta) * kl_divergence(log_student, log_m)
