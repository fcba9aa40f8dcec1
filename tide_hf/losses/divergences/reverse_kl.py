from dataclasses import dataclass

from ..divergence import Divergence, kl_divergence


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """`KL(student ‖ target) = Σ_v p_S (log p_S − log p_T)`."""

    name = "reverse_kl"
    direction = "reverse"

    def values(self, log_student, log_target):
        return kl_divergence(log_student, log_target)
