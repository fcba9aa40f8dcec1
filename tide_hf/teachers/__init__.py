"""A frozen model and its contract: from packed inputs to logits at the asked positions."""

from .contract import CONTEXTS, FAMILIES, REFUSED, Family, View, contract_for, family_of
from .loading import check_rotary_frequencies, load_teacher, resolve_mask_token_id
from .teacher import Teacher

__all__ = [
    "CONTEXTS",
    "FAMILIES",
    "REFUSED",
    "Family",
    "Teacher",
    "View",
    "check_rotary_frequencies",
    "contract_for",
    "family_of",
    "load_teacher",
    "resolve_mask_token_id",
]
