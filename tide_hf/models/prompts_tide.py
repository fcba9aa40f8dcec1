"""Checks of what a decoder is given: token ids, and which of them are padding.

This file travels with checkpoints: it imports torch and transformers alone.

Shapes: B rows, L columns.
"""

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


def token_rows(ids, name: str = "input_ids") -> torch.LongTensor:
    """Token ids `(B, L)` as int64.

    Args:
        ids (`torch.Tensor` of shape `(B, L)`): of any integer type.
        name (`str`): of the argument, for messages.

    Raises:
        ValueError: anything but a two-dimensional tensor of integers.
    """
    if not isinstance(ids, torch.Tensor):
        raise ValueError(
            f"{name} must be a tensor of token ids, rows × tokens, got a {type(ids).__name__}: pass "
            'tokenizer(text, return_tensors="pt").input_ids.'
        )
    if ids.ndim != 2 or len(ids) == 0:
        hint = f": {name}[None] makes one row of it" if ids.ndim == 1 else ""
        raise ValueError(f"{name} must have the shape (rows, tokens), got {tuple(ids.shape)}{hint}.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integer token ids, got {ids.dtype}.")
    return ids.long()


def padding_mask(
    ids: torch.LongTensor, attention_mask, settings, vocab_size: int, name: str = "input_ids"
) -> torch.BoolTensor:
    """True at tokens, `(B, L)`, whose ids are checked against the vocabulary.

    Without an attention mask the `pad_token_id`s at either end of a row are padding, unless padding is EOS or [MASK]
    as well; if it is BOS as well, one of them stays in front of each row. A token that a mask hides between others is
    left out, as if it had not been given.

    Args:
        ids (`torch.LongTensor` of shape `(B, L)`): the rows.
        attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 at tokens and 0 at padding.
        settings (`GenerationConfig`): its ids of padding, EOS, BOS and [MASK] are read.
        vocab_size (`int`): of the network.
        name (`str`): of the argument `ids`, for messages.

    Raises:
        ValueError: a mask of another shape or with other values than 0 and 1, a row without any token, an id that
            the embedding has no row for.
    """
    if attention_mask is None:
        valid = _without_padding(ids, settings, name)
    else:
        mask_name = name.replace("input_ids", "attention_mask").replace("_ids", "_attention_mask")
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != ids.shape:
            shape = tuple(getattr(attention_mask, "shape", ())) or type(attention_mask).__name__
            raise ValueError(
                f"{mask_name} must have the shape of {name}, {tuple(ids.shape)}, got {shape}: 1 at each token and 0 "
                "at padding."
            )
        valid = attention_mask.to(ids.device) != 0
        if not bool((valid.to(attention_mask.dtype) == attention_mask.to(ids.device)).all()):
            raise ValueError(f"{mask_name} must hold 1 at each token and 0 at padding, got other values.")
    if ids.shape[1]:
        empty = (~valid.any(-1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"Row {empty[0]} of {name} is all padding: give it a token, such as BOS, or leave it out."
            )
        check_ids(torch.where(valid, ids, 0), vocab_size, name)
    return valid


def check_ids(ids: torch.Tensor, vocab_size: int, name: str) -> None:
    """Raises ValueError for one of the `ids` of the argument `name` that is not in [0, vocab_size)."""
    for id_ in (int(ids.min()), int(ids.max())):
        if not 0 <= id_ < vocab_size:
            raise ValueError(
                f"{name} holds the token id {id_}, and the model's vocabulary has {vocab_size}, 0 to "
                f"{vocab_size - 1}: is the tokenizer this model's?"
            )


def _without_padding(ids: torch.LongTensor, settings, name: str) -> torch.BoolTensor:
    """True but for the padding at the ends of the rows, as far as it can be told from text."""
    eos = settings.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = settings.pad_token_id if settings.pad_token_id is not None else next(iter(eos), None)
    if pad is None:
        return torch.ones_like(ids, dtype=torch.bool)
    is_pad = ids == pad
    at_the_left = is_pad.long().cumprod(-1).bool()
    at_the_right = is_pad.long().flip(-1).cumprod(-1).flip(-1).bool()
    is_edge = at_the_left | at_the_right
    if pad not in (*eos, settings.mask_token_id):
        if pad == settings.bos_token_id and ids.shape[1]:
            # the longest row has no padding: if even that one begins with BOS, all of them do
            num_left = at_the_left.sum(-1, keepdim=True)
            column = torch.arange(ids.shape[1], device=ids.device)
            is_edge &= ~((column == num_left - 1) & (num_left.min() > 0))
        return ~is_edge
    if len(ids) > 1 and pad in eos and bool(is_edge.any()):
        logger.warning_once(
            f"{name} holds pad_token_id={pad} at the end of a row, and EOS is the same token, so that padding cannot "
            "be told from text: it is read as text. Pass the tokenizer's attention_mask."
        )
    return torch.ones_like(ids, dtype=torch.bool)
