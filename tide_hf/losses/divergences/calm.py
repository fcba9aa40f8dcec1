from dataclasses import dataclass

from ..chunks import binary_cross_entropy
from ..divergence import Divergence


@dataclass(frozen=True)
class CALM(Divergence):
    """Forward chunk matching: `−[p_T log p_S + (1−p_T) log(1−p_S)]`. At p_S = p_T it is the entropy of p_T, not 0.

    Source: ALM 2503.20083 eq. 4; TIDE 2604.26951 §2.3.
    """

    name = "calm"
    pairs = "chunk"
    direction = "forward"

    def values(self, log_student, log_target):
        return binary_cross_entropy(log_target.exp(), log_student)
