"""The Hub: what is there before a run starts, the card that it writes, and pushing that loses nothing."""

from .availability import NotAvailableError, require_available
from .card import write_card
from .check import check_card, python_blocks
from .data_card import dataset_card
from .pushing import PushError
from .record import Decoding, Measurement, RunRecord
from .sources import Source, find_source
from .trainer_mixin import HubTrainerMixin

__all__ = [
    "Decoding",
    "HubTrainerMixin",
    "Measurement",
    "NotAvailableError",
    "PushError",
    "RunRecord",
    "Source",
    "check_card",
    "dataset_card",
    "find_source",
    "python_blocks",
    "require_available",
    "write_card",
]
