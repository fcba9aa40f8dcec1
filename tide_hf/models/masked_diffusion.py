"""The forward process (MDLM 2406.07524) and the block visibility rule (BD3LM 2503.09573).

This file travels with checkpoints: it imports torch alone.

Shapes: B rows, Q queries, K keys. Time t lies in [ε, 1], one value per row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

TIME_EPSILON = 1e-3
# stream of each position of a packed input: padding, the clean copy x0, then the noised copies 1, 2, …; the streams of
# the second row on the same line count from STREAMS_PER_ROW, those of the third from 2 · STREAMS_PER_ROW, …
PADDING_STREAM, CLEAN_STREAM, NOISED_STREAM = -1, 0, 1
STREAMS_PER_ROW = 4


@dataclass(frozen=True)
class NoiseSchedule:
    """α(t), the probability that a trained-on position is still clean at time t, by what training needs of it.

    Both functions take and return a tensor of any shape, t in (0, 1]. They are written without 1 − α: that loses its
    digits in float32 at small t, where the weight is largest.

    Args:
        masked_probability (`Callable`): 1 − α(t), rising from 0 at t = 0 to 1 at t = 1.
        loss_weight (`Callable`): −α′(t) / (1 − α(t)), the weight of a masked position's nats (MDLM 2406.07524 eq. 10).
    """

    masked_probability: Callable[[torch.Tensor], torch.Tensor]
    loss_weight: Callable[[torch.Tensor], torch.Tensor]


# a new schedule is an entry here: configurations, trainers and forward(labels=…) know it by its name
SCHEDULES = {
    "linear": NoiseSchedule(masked_probability=lambda t: t, loss_weight=lambda t: 1 / t),
    "cosine": NoiseSchedule(  # α = 1 − cos(π(1 − t)/2)
        masked_probability=lambda t: torch.sin(math.pi / 2 * t),
        loss_weight=lambda t: (math.pi / 2) / torch.tan(math.pi / 2 * t),
    ),
}


def masked_probability(t: torch.Tensor, schedule: str = "linear") -> torch.Tensor:
    """1 − α(t), the probability that a trained-on position is masked.

    Args:
        t (`torch.Tensor`): times in (0, 1], of any shape.
        schedule (`str`): a name in [`SCHEDULES`].

    Returns:
        `torch.Tensor` of the shape of `t`.

    Raises:
        ValueError: for an unknown schedule.
    """
    return named_schedule(schedule).masked_probability(t)


def loss_weight(t: torch.Tensor, schedule: str = "linear") -> torch.Tensor:
    """w(t) = −α′(t) / (1 − α(t)), the weight of the denoising loss; `t`, `schedule` as in [`masked_probability`].

    Source: MDLM 2406.07524 eq. 10.
    """
    return named_schedule(schedule).loss_weight(t)


def named_schedule(name: str, setting: str = "schedule") -> NoiseSchedule:
    """The schedule of a name; ValueError, in terms of the `setting` it came from, where there is none."""
    if name not in SCHEDULES:
        raise ValueError(f"{setting} must be one of {', '.join(SCHEDULES)}, got {name!r}.")
    return SCHEDULES[name]


def block_visibility(
    query_stream: torch.Tensor,
    query_block: torch.Tensor,
    key_stream: torch.Tensor,
    key_block: torch.Tensor,
    causal: bool = False,
) -> torch.Tensor:
    """Who sees whom under block diffusion.

    A query sees the keys of its own block in its own stream, and the clean keys of earlier blocks of its own row.
    Padding sees padding alone, so that no line of the mask is empty. With streams [xt ; x0] this is BD3LM's training
    mask; any order, several noised copies, several rows in a line, and a subset of the blocks follow the same rule.

    Args:
        query_stream, query_block (`torch.Tensor` of shape `(B, Q)`): stream and block number of each query.
        key_stream, key_block (`torch.Tensor` of shape `(B, K)`): the same of each key.
        causal (`bool`): whether a query sees no key of its own block that stands in a later column; the queries are
            the last Q of the K columns.

    Returns:
        `torch.BoolTensor` of shape `(B, 1, Q, K)`: True where the query may attend.

    Source: BD3LM 2503.09573 §3.2.
    """
    query_row, is_clean = query_stream // STREAMS_PER_ROW, key_stream % STREAMS_PER_ROW == CLEAN_STREAM
    # −2 equals no query's row: PADDING_STREAM // STREAMS_PER_ROW is −1, and rows count from 0
    row_of_clean_key = torch.where(is_clean, key_stream // STREAMS_PER_ROW, -2)
    query_block, key_block = query_block[:, :, None], key_block[:, None, :]
    own_block = (query_stream[:, :, None] == key_stream[:, None, :]) & (query_block == key_block)
    if causal:
        column = torch.arange(key_block.shape[-1], device=key_block.device)
        own_block &= column <= column[-query_block.shape[1] :, None]
    clean_past = (query_row[:, :, None] == row_of_clean_key[:, None, :]) & (query_block > key_block)
    return (own_block | clean_past)[:, None]


def predicting_columns(valid: torch.Tensor, shifted: bool) -> torch.Tensor:
    """The column whose logits are those of each column, `(B, L)`.

    Args:
        valid (`torch.BoolTensor` of shape `(B, L)`): False at padding.
        shifted (`bool`): False: its own; True: the valid column before it, and its own where there is none.
    """
    own = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    if not shifted:
        return own
    last_valid = torch.where(valid, own, -1).cummax(1).values
    before = torch.cat([torch.full_like(own[:, :1], -1), last_valid[:, :-1]], 1)
    return torch.where(before < 0, own, before)


def attention_mask_for(visible: torch.Tensor, attn_implementation: str, dtype: torch.dtype):
    """A boolean mask in the form that an attention implementation applies.

    sdpa takes it as it is. Eager attention would add True as 1 and so hide nothing: it gets 0 and the smallest finite
    number. flex_attention aborts on dense masks: it gets a BlockMask.

    Args:
        visible (`torch.BoolTensor` of shape `(B, 1, Q, K)`): True where the query may attend.
        attn_implementation (`str`): `config._attn_implementation` of the model.
        dtype (`torch.dtype`): of the hidden states, for eager.

    Raises:
        ValueError: for an implementation that cannot apply such a mask (flash attention).
    """
    if attn_implementation == "sdpa":
        return visible
    if attn_implementation == "eager":
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    if attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        rows, _, queries, keys = visible.shape
        return create_block_mask(
            lambda b, h, q, k: visible[b, 0, q, k], rows, None, queries, keys, device=str(visible.device)
        )
    raise ValueError(
        f"attn_implementation={attn_implementation!r} cannot express the block-diffusion mask; "
        "load the model with attn_implementation='sdpa', 'eager' or 'flex_attention'."
    )
