from dataclasses import dataclass

from ..chunks import binary_cross_entropy
from ..divergence import Divergence


@dataclass(frozen=True)
class ReverseCALM(Divergence):
    """Reverse chunk matching as published: `−[p_S log p_T + (1−p_S) log(1−p_T)]`.

    The gradient is `−(∂p_S/∂θ) · log(p_T / (1−p_T))`: a coefficient that depends on the teacher alone and is at most
    about 16. There is no entropy term, so the optimum is p_S in {0, 1}; `bernoulli_reverse_kl` has it at p_T.

    Source: TIDE 2604.26951 §2.3.
    """

    name = "reverse_calm"
    pairs = "chunk"
    direction = "reverse"

    def values(self, log_student, log_target):
        return binary_cross_entropy(log_student.exp(), log_target)
