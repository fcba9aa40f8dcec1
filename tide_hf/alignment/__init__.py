"""Which parts of two tokenisations correspond: answers in a rendered chat, chunks of tokens, shared vocabularies."""

from .chat import Answer, Chat, locate_answers, render_chat
from .chunks import align_chunks, align_equal_tokens, answer_tokens, cut_equal_bytes, drop_cut_chunks
from .left_out import dropped_reasoning, left_out
from .templates import read_template, resolve_template_kwargs, unread_setting, without_defaults, write_defaults
from .token_bytes import LocatedTokens, TokenBytes, answers_in_bytes, character_spans, require_fast
from .vocabulary import ALIGNMENTS, resolve_alignment, shared_vocab_size

__all__ = [
    "ALIGNMENTS",
    "Answer",
    "Chat",
    "LocatedTokens",
    "TokenBytes",
    "align_chunks",
    "align_equal_tokens",
    "answer_tokens",
    "answers_in_bytes",
    "character_spans",
    "cut_equal_bytes",
    "drop_cut_chunks",
    "dropped_reasoning",
    "left_out",
    "locate_answers",
    "read_template",
    "render_chat",
    "require_fast",
    "resolve_alignment",
    "resolve_template_kwargs",
    "shared_vocab_size",
    "unread_setting",
    "without_defaults",
    "write_defaults",
]
