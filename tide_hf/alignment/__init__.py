"""What belongs to what in two tokenisations: answers in a rendered chat, chunks of tokens, shared vocabularies."""

from .chat import Answer, render_chat
from .chunks import align_equal_tokens, answer_tokens
from .vocabulary import resolve_alignment, shared_vocab_size

__all__ = [
    "Answer",
    "align_equal_tokens",
    "answer_tokens",
    "render_chat",
    "resolve_alignment",
    "shared_vocab_size",
]
