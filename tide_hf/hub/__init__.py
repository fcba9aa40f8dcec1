"""The Hub: checks before a run starts, the card that the run writes, and pushes that lose nothing."""

from .availability import NotAvailableError, require_available
from .card import write_card
from .check import check_card, python_blocks
from .data_card import answers_card, dataset_card
from .pushing import PushError
from .record import Decoding, Measurement, RunFacts, RunRecord, named_model
from .sources import Source, find_source
from .trainer_mixin import HubTrainerMixin

__all__ = [
    "Decoding",
    "HubTrainerMixin",
    "Measurement",
    "NotAvailableError",
    "PushError",
    "RunFacts",
    "RunRecord",
    "Source",
    "answers_card",
    "check_card",
    "dataset_card",
    "find_source",
    "named_model",
    "python_blocks",
    "require_available",
    "write_card",
]
