"""The forward process and the block visibility rule (SPEC §1; MDLM 2406.07524, BD3LM 2503.09573).

This file travels with checkpoints: it imports torch alone.

Shapes: B rows, Q queries, K keys. Time t lies in [ε, 1], one value per row.
"""

import math

import torch

TIME_EPSILON = 1e-3
SCHEDULES = ("linear", "cosine")
# stream of each position of a packed input: padding, the clean copy x0, then the noised copies 1, 2, …; those of the
# second row that lies in the same line count from STREAMS_PER_ROW on, and so forth
PADDING_STREAM, CLEAN_STREAM, NOISED_STREAM = -1, 0, 1
STREAMS_PER_ROW = 4


def masked_probability(t: torch.Tensor, schedule: str = "linear") -> torch.Tensor:
    """1 − α(t), the probability that a trained-on position is masked: `t` (linear) or `sin(πt/2)` (cosine).

    The second is SPEC's `cos(π(1−t)/2)`, written so that nothing cancels at small t.
    """
    _check_schedule(schedule)
    return t if schedule == "linear" else torch.sin(math.pi / 2 * t)


def loss_weight(t: torch.Tensor, schedule: str = "linear") -> torch.Tensor:
    """w(t) = −α′(t) / (1 − α(t)): `1/t` (linear) or `(π/2) / tan(πt/2)` (cosine). Source: MDLM eq. 10."""
    _check_schedule(schedule)
    return 1 / t if schedule == "linear" else (math.pi / 2) / torch.tan(math.pi / 2 * t)


def block_visibility(
    query_stream: torch.Tensor, query_block: torch.Tensor, key_stream: torch.Tensor, key_block: torch.Tensor
) -> torch.Tensor:
    """Who sees whom under block diffusion.

    A query sees the keys of its own block in its own stream, and the clean keys of earlier blocks of its own row.
    Padding sees padding alone, so that no line of the mask is empty. With streams [xt ; x0] this is BD3LM's training
    mask; any order, several noised copies, several rows in a line, and a subset of the blocks follow the same rule.

    Args:
        query_stream, query_block (`torch.Tensor` of shape `(B, Q)`): stream and block number of each query.
        key_stream, key_block (`torch.Tensor` of shape `(B, K)`): the same of each key.

    Returns:
        `torch.BoolTensor` of shape `(B, 1, Q, K)`: True where the query may attend.

    Source: BD3LM 2503.09573 §3.2; SPEC §1.
    """
    query_row, is_clean = query_stream // STREAMS_PER_ROW, key_stream % STREAMS_PER_ROW == CLEAN_STREAM
    row_of_clean_key = torch.where(is_clean, key_stream // STREAMS_PER_ROW, -2)  # −1 is padding's
    query_block, key_block = query_block[:, :, None], key_block[:, None, :]
    own_block = (query_stream[:, :, None] == key_stream[:, None, :]) & (query_block == key_block)
    clean_past = (query_row[:, :, None] == row_of_clean_key[:, None, :]) & (query_block > key_block)
    return (own_block | clean_past)[:, None]


def attention_mask_for(visible: torch.Tensor, attn_implementation: str, dtype: torch.dtype):
    """A boolean mask in the form an attention implementation honours.

    sdpa takes it as it is. Eager attention would add True as 1 and so see everything: it gets 0 and the smallest
    finite number. flex_attention aborts on dense masks: it gets a BlockMask.

    Args:
        visible (`torch.BoolTensor` of shape `(B, 1, Q, K)`): True where the query may attend.
        attn_implementation (`str`): `config._attn_implementation` of the model.
        dtype (`torch.dtype`): of the hidden states, for eager.

    Raises:
        ValueError: for an implementation that takes no mask of this kind (flash attention).
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


def _check_schedule(schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
