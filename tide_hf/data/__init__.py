"""From conversations to the tensors of a step: preparation and collation."""

from .collator import DistillationCollator, without_weight
from .dataset import is_prepared, prepare_dataset
from .formats import RowSkipped
from .preparation import COLUMNS, EOS_FILLS, TRAINED_TURNS, RowPreparation, row_key
from .record import PreparationRecord, require_same_preparation, tokenizer_fingerprint
from .report import DataError, PreparationReport
from .shards import write_prepared
from .streams import RowStream, StreamLoader
from .written import Prompt, align_written, holds_prompts_alone, prompt_of, with_stand_ins

__all__ = [
    "COLUMNS",
    "EOS_FILLS",
    "TRAINED_TURNS",
    "DataError",
    "DistillationCollator",
    "PreparationRecord",
    "PreparationReport",
    "Prompt",
    "RowPreparation",
    "RowSkipped",
    "RowStream",
    "StreamLoader",
    "align_written",
    "holds_prompts_alone",
    "is_prepared",
    "prepare_dataset",
    "prompt_of",
    "require_same_preparation",
    "row_key",
    "tokenizer_fingerprint",
    "with_stand_ins",
    "without_weight",
    "write_prepared",
]
