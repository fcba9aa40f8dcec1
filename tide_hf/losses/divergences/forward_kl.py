from dataclasses import dataclass

from ..divergence import Divergence, kl_divergence


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """`KL(target ‖ student) = Σ_v p_T (log p_T − log p_S)`."""

    name = "forward_kl"
    direction = "forward"

    def values(self, log_student, log_target):
        return kl_divergence(log_target, log_student)
