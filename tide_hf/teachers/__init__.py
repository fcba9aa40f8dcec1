"""A frozen model and its contract: from packed inputs to logits at the asked positions."""

from .loading import check_rotary_frequencies, load_teacher, resolve_mask_token_id
from .teacher import FAMILIES, Teacher, TeacherContract, contract_for

__all__ = [
    "FAMILIES",
    "Teacher",
    "TeacherContract",
    "check_rotary_frequencies",
    "contract_for",
    "load_teacher",
    "resolve_mask_token_id",
]
