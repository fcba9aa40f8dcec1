"""What belongs to what in two tokenisations: answers in a rendered chat, chunks of tokens, shared vocabularies."""

from .chat import Answer, render_chat
from .chunks import align_chunks, align_equal_tokens, answer_tokens, cut_equal_bytes, drop_cut_chunks
from .token_bytes import LocatedTokens, TokenBytes, answers_in_bytes, character_spans, require_fast
from .vocabulary import resolve_alignment, shared_vocab_size

__all__ = [
    "Answer",
    "LocatedTokens",
    "TokenBytes",
    "align_chunks",
    "align_equal_tokens",
    "answer_tokens",
    "answers_in_bytes",
    "character_spans",
    "cut_equal_bytes",
    "drop_cut_chunks",
    "render_chat",
    "require_fast",
    "resolve_alignment",
    "shared_vocab_size",
]
