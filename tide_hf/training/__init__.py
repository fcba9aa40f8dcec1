"""Distillation as a `transformers.Trainer`: what a run is told, what it decides from that, and its steps."""

from .adapter import prepare_adapter
from .base import DiffusionTrainer
from .config import DiffusionTrainingArguments, TIDEConfig
from .objective import Objective
from .trainer import TIDETrainer

__all__ = [
    "DiffusionTrainer",
    "DiffusionTrainingArguments",
    "Objective",
    "TIDEConfig",
    "TIDETrainer",
    "prepare_adapter",
]
