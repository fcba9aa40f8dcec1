"""From conversations to the tensors of a step: preparation, collation, noise."""

from .collator import DistillationCollator
from .dataset import is_prepared, prepare_dataset
from .formats import RowSkipped
from .noising import Noising
from .preparation import COLUMNS, EOS_FILLS, TRAINED_TURNS, RowPreparation
from .record import PreparationRecord, require_same_preparation, tokenizer_fingerprint
from .report import PreparationReport
from .shards import write_prepared

__all__ = [
    "COLUMNS",
    "EOS_FILLS",
    "TRAINED_TURNS",
    "DistillationCollator",
    "Noising",
    "PreparationRecord",
    "PreparationReport",
    "RowPreparation",
    "RowSkipped",
    "is_prepared",
    "prepare_dataset",
    "require_same_preparation",
    "tokenizer_fingerprint",
    "write_prepared",
]
