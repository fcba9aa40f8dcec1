"""Pads prepared rows to a batch. Padding is never attended and never trained on."""

from dataclasses import dataclass

import numpy as np
import torch

from .report import DataError
from .teacher_cache import CACHE_COLUMNS


@dataclass
class DistillationCollator:
    """Pads rows of token columns to tensors.

    A row without a trained-on token has no weight: it enters no count, whatever a network predicts for it.

    Args:
        pad_token_id, teacher_pad_token_id (`int`): ids to pad the two sides with.
        vocab_size, teacher_vocab_size (`int`, *optional*): number of rows of the two embeddings; larger ids are
            refused with a `DataError`.

    A call returns `row_key (B,)`; `input_ids`, `labels`, `chunk_ids` and `attention_mask (B, L)`; where rows have a
    teacher side, `teacher_input_ids`, `teacher_chunk_ids` and `teacher_attention_mask (B, L_T)`; and, where they carry
    its predictions, the keys of [`~tide_hf.diffusion.cached`].
    """

    pad_token_id: int
    teacher_pad_token_id: int = 0
    vocab_size: int | None = None
    teacher_vocab_size: int | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {
            "row_key": torch.tensor([row["row_key"] for row in rows]),
            "input_ids": _pad([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": _pad([row["labels"] for row in rows], -100),
            "chunk_ids": _pad([row["chunk_ids"] for row in rows], -1),
            "attention_mask": _pad([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        if all(row["teacher_input_ids"] for row in rows):
            batch |= {
                "teacher_input_ids": _pad([row["teacher_input_ids"] for row in rows], self.teacher_pad_token_id),
                "teacher_chunk_ids": _pad([row["teacher_chunk_ids"] for row in rows], -1),
                "teacher_attention_mask": _pad([[1] * len(row["teacher_input_ids"]) for row in rows], 0),
            }
        batch |= _predictions(rows)
        for name, size in (("input_ids", self.vocab_size), ("teacher_input_ids", self.teacher_vocab_size)):
            if size is not None and name in batch and int(batch[name].max()) >= size:
                raise DataError(
                    f"A row's {name} hold the token id {int(batch[name].max())}, and the network's embedding has "
                    f"{size} rows, ids 0 to {size - 1}: the rows were prepared with another tokenizer than its own."
                )
        return batch

    def empty_row(self) -> dict:
        """A row of one token without weight, for a process that has no row left."""
        return {
            "row_key": 0,
            "input_ids": [self.pad_token_id],
            "labels": [-100],
            "chunk_ids": [-1],
            "teacher_input_ids": [self.teacher_pad_token_id],
            "teacher_chunk_ids": [-1],
        }


def without_weight(batch: dict[str, torch.Tensor], first: int) -> dict[str, torch.Tensor]:
    """The same batch, in which repeated rows that only fill it up have no weight: they count elsewhere.

    Args:
        batch (`dict[str, torch.Tensor]`): of a [`DistillationCollator`].
        first (`int`): number of the first repeated row.
    """
    batch = dict(batch)
    for name, nothing in (("row_key", 0), ("labels", -100), ("chunk_ids", -1), ("teacher_chunk_ids", -1)):
        if name in batch:
            batch[name] = batch[name].clone()
            batch[name][first:] = nothing
    return batch


def _predictions(rows: list[dict]) -> dict[str, torch.Tensor]:
    """The teacher's predictions that rows carry, padded; a row that stands in for a missing one has none."""
    names = [name for name in CACHE_COLUMNS if any(name in row for row in rows)]
    values = {name: [np.asarray(row.get(name, ())) for row in rows] for name in names}
    padded = {}
    for name, arrays in values.items():
        dtype = np.int64 if CACHE_COLUMNS[name].feature.dtype == "int32" else np.float32
        table = np.zeros((len(rows), max(map(len, arrays))), dtype)
        for row, array in zip(table, arrays, strict=True):
            row[: len(array)] = array
        padded[name] = torch.from_numpy(table)
    return padded


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Right-padded int64 tensor (B, longest)."""
    longest = max(len(row) for row in rows)
    return torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows], dtype=torch.long)
