"""What a teacher that was run before predicted, looked up for one noised batch.

A row's predictions are those at some of the teacher's tokens, in the order of the row: of an autoregressive teacher at
every token that it can predict; of a diffusion teacher at those that some noise asked for. There may be several such
parts one after the other, each for other noise.

Shapes: B rows, L teacher positions, M_T asked teacher positions, E predictions of a row, W parts, k tokens of which
log-probabilities are known, J outcomes (those, and all other tokens if there are any).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .autoregressive import predictable_chunks
from .corruption import chunk_member

# keys of a batch: predictions of each part (B, W); of a row, padded: (B, E), (B, E · k) and (B, E · J)
COUNTS = "teacher_counts"
LOG_PROBS, TOP_IDS, TOP_LOG_PROBS = "teacher_log_probs", "teacher_top_ids", "teacher_top_log_probs"
PREDICTIONS = (LOG_PROBS, TOP_IDS, TOP_LOG_PROBS)


class CachedPredictions(NamedTuple):
    """A teacher's predictions at the asked positions of a batch.

    Args:
        log_probs (`torch.Tensor` of shape `(M_T,)`, *optional*): of the true tokens.
        top_ids (`torch.LongTensor` of shape `(M_T, k)`, *optional*): the likeliest tokens.
        top_log_probs (`torch.Tensor` of shape `(M_T, J)`, *optional*): their log-probabilities and that of the rest.
    """

    log_probs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_log_probs: torch.Tensor | None = None


def predictable_positions(
    input_ids_BL: torch.Tensor, valid_BL: torch.Tensor, chunk_ids_BL: torch.Tensor
) -> torch.Tensor:
    """The tokens that an autoregressive teacher's predictions are kept of: all that it could be asked for.

    Args:
        input_ids_BL (`torch.LongTensor` of shape `(B, L)`), valid_BL (`torch.BoolTensor` of shape `(B, L)`),
            chunk_ids_BL (`torch.LongTensor` of shape `(B, L)`): see [`predictable_chunks`].

    Returns:
        `torch.BoolTensor` of shape `(B, L)`.
    """
    num_chunks = max(int(chunk_ids_BL.max()), 0) + 1 if chunk_ids_BL.numel() else 1
    every_BC = torch.ones(len(chunk_ids_BL), num_chunks, dtype=torch.bool)
    return chunk_member(predictable_chunks(input_ids_BL, valid_BL, chunk_ids_BL, every_BC), chunk_ids_BL)


def look_up(
    batch: Mapping[str, torch.Tensor], position_M: torch.Tensor, part: int, kept_BL: torch.Tensor | None
) -> CachedPredictions:
    """The predictions at the asked positions of a batch.

    Args:
        batch (`Mapping`): with the keys above.
        position_M (`torch.LongTensor` of shape `(M_T,)`): flat index (row · L + position) of each asked teacher token,
            row by row.
        part (`int`): which part of a row's predictions.
        kept_BL (`torch.BoolTensor` of shape `(B, L)`, *optional*): tokens whose predictions the part holds; by default
            those that are asked.

    Raises:
        ValueError: if the rows hold no such part, or one for other noise.
    """
    counts_BW = batch[COUNTS]
    length = batch["teacher_input_ids"].shape[1]
    row_M = position_M // length
    num_asked_B = torch.bincount(row_M, minlength=len(counts_BW))
    if kept_BL is None:
        rank_M = torch.arange(len(row_M)) - (num_asked_B.cumsum(0) - num_asked_B)[row_M]
        expected_B = num_asked_B
    else:
        rank_M = (kept_BL.flatten().long().cumsum(0) - 1)[position_M]
        expected_B = kept_BL.sum(1)
        rank_M = rank_M - (expected_B.cumsum(0) - expected_B)[row_M]
    if part >= counts_BW.shape[1] and len(position_M):
        raise ValueError(
            f"The rows carry a teacher's predictions for {counts_BW.shape[1] - 1} passes over them, and this is "
            f"pass {part}: train less, or prepare them with more --cache_passes."
        )
    found_B = counts_BW[:, part] if part < counts_BW.shape[1] else torch.zeros_like(expected_B)
    if ((num_asked_B > 0) & (found_B != expected_B)).any():
        raise ValueError(
            "The teacher's predictions that the rows carry were not made for this noise: the rows, or the settings of "
            "the noise, are others than those the predictions were made with. Prepare them again with --teacher_cache."
        )
    first_M = counts_BW[:, :part].sum(1)[row_M] + rank_M
    values = {}
    for field, name in zip(CachedPredictions._fields, PREDICTIONS, strict=True):
        if name in batch:
            width = _width(batch, name)
            index_MX = first_M[:, None] * width + torch.arange(width)
            values[field] = batch[name][row_M[:, None], index_MX]
    if LOG_PROBS in batch:
        values["log_probs"] = values["log_probs"].flatten()
    return CachedPredictions(**values)


def _width(batch: Mapping[str, torch.Tensor], name: str) -> int:
    """Values of one prediction."""
    num_predictions = int(batch[COUNTS].sum(1).max())
    return batch[name].shape[1] // max(num_predictions, 1)
