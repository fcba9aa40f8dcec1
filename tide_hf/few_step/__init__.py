"""Few-step students: inverse distillation (IDLM 2602.19066)."""

from .config import IDLMConfig
from .noising import InverseNoising, stratified_times
from .trainer import IDLMTrainer
from .uniform import UniformIDLMTrainer

__all__ = ["IDLMConfig", "IDLMTrainer", "InverseNoising", "UniformIDLMTrainer", "stratified_times"]
