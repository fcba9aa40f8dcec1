"""Few-step students: inverse distillation (IDLM 2602.19066)."""

from .config import IDLMConfig
from .noising import InverseNoising, stratified_times
from .trainer import IDLMTrainer

__all__ = ["IDLMConfig", "IDLMTrainer", "InverseNoising", "stratified_times"]
