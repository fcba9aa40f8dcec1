from dataclasses import dataclass

from ..chunks import binary_cross_entropy
from ..divergence import Divergence


@dataclass(frozen=True)
class BernoulliReverseKL(Divergence):
    """Reverse CALM plus `p_S log p_S + (1−p_S) log(1−p_S)`: a true divergence, zero at p_S = p_T."""

    name = "bernoulli_reverse_kl"
    pairs = "chunk"
    direction = "reverse"

    def values(self, log_student, log_target):
        p_student = log_student.exp()
        return binary_cross_entropy(p_student, log_target) - binary_cross_entropy(p_student, log_student)
