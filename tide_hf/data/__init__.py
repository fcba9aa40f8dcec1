"""From conversations to the tensors of a step: preparation, collation, noise."""

from .collator import DistillationCollator
from .noising import Noising
from .preparation import (
    COLUMNS,
    EOS_FILLS,
    PreparationReport,
    RowPreparation,
    RowSkipped,
    is_prepared,
    prepare_dataset,
)

__all__ = [
    "COLUMNS",
    "EOS_FILLS",
    "DistillationCollator",
    "Noising",
    "PreparationReport",
    "RowPreparation",
    "RowSkipped",
    "is_prepared",
    "prepare_dataset",
]
