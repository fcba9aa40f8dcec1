"""Teachers: a frozen model and its contract, from packed inputs to logits at the asked positions."""

from ..models.configuration_tide import TeacherFamily, TeacherView
from .autoregressive import check_logits, is_autoregressive
from .contract import CONTEXTS, FAMILIES, REFUSED, contract_for, family_of, refuse_unknown
from .loading import check_rotary_frequencies, load_teacher, resolve_mask_token_id
from .teacher import Teacher

__all__ = [
    "CONTEXTS",
    "FAMILIES",
    "REFUSED",
    "Teacher",
    "TeacherFamily",
    "TeacherView",
    "check_logits",
    "check_rotary_frequencies",
    "contract_for",
    "family_of",
    "is_autoregressive",
    "load_teacher",
    "refuse_unknown",
    "resolve_mask_token_id",
]
