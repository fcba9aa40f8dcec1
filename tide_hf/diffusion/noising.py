"""One micro-batch of token rows -> the tensors of one distillation step, on the host.

Everything that depends on the noise is known here, before any network runs: which positions each network is run on,
which rows of hidden states meet the head, how they pair up, and the counts that divide each term.

Shapes: B rows, L positions, N masked positions of the student, the first M of them paired with M_T of the teacher's,
C active chunks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..models.masked_diffusion import TIME_EPSILON
from .corruption import (
    chunk_member,
    complementary_split,
    complete_chunks,
    diffusion_time,
    mask_positions,
    masked_chunks,
)
from .layout import LayoutSpec, block_layout


@dataclass(frozen=True)
class Noising:
    """What a run fixes about its noise; a call noises one batch.

    Args:
        student (`LayoutSpec`), teacher (`LayoutSpec`, *optional*): how each network is fed; without a teacher no pairs
            are made.
        schedule (`str`): α(t), `"linear"` or `"cosine"`.
        time_epsilon (`float`): smallest t.
        comp_demo (`bool`), demo_ratio (`float`): CompDemo's two teacher views and the share of the first.
        pack (`bool`): leave out blocks that carry no loss; False is the textbook layout, for comparison.
    """

    student: LayoutSpec
    teacher: LayoutSpec | None = None
    schedule: str = "linear"
    time_epsilon: float = TIME_EPSILON
    comp_demo: bool = False
    demo_ratio: float = 0.5
    pack: bool = True

    def __call__(
        self,
        batch: Mapping[str, torch.Tensor],
        uniforms: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        t: float | None = None,
    ) -> dict[str, torch.Tensor]:
        """Noises one collated batch.

        Args:
            batch (`Mapping`): see [`~tide_hf.data.DistillationCollator`].
            uniforms: draws of [`~tide_hf.diffusion.row_uniforms`]: `(B,)`, `(B, L)`, `(B, L)`.
            t (`float`, *optional*): one diffusion time for all rows, in place of the drawn one.

        Returns:
            `dict` of host tensors. Student: `input_ids, position_ids, stream, block (B, P)`, `asked (N,)` (flat
            columns to put through the head), `targets (N,)`, `row (N,)`, `chunk_tokens (N,)` (trained-on tokens of
            each position's chunk), `t (B,)`. The first M of the N positions are those of active chunks, by row and
            chunk: `pair_chunk (M,)`, each one's number in 0 … C−1; `chunk_row (C,)`; and `chunk_ends`, C integers,
            the position behind each chunk. Teacher: `teacher_input_ids, teacher_position_ids, teacher_stream,
            teacher_block (B, P_T)`; of its positions in active chunks, in the same order, `teacher_asked`,
            `teacher_targets`, `teacher_pair_chunk (M_T,)`. `counts (4,)`: trained-on tokens, pairs, active chunks,
            rows that have any; `row_tokens (B,)`: trained-on tokens of each row.
        """
        time_B, mask_BL, demo_BL = uniforms
        labels, chunk_ids = batch["labels"], batch["chunk_ids"]
        if self.teacher is None:
            # chunks are for the teacher's sake: rows that were aligned with one train alone as if they were not
            chunk_ids = torch.full_like(chunk_ids, -1)
        t_B = diffusion_time(time_B, self.time_epsilon) if t is None else torch.full_like(time_B, t)
        masked = mask_positions(mask_BL, t_B, labels, self.schedule)
        # at least one column, so that rows without any chunk need no case of their own
        num_chunks = max(int(chunk_ids.max()), int(batch.get("teacher_chunk_ids", chunk_ids).max()), 0) + 1
        masked, hit_BC = complete_chunks(masked, chunk_ids, labels, num_chunks)
        valid = batch["attention_mask"].bool()
        layout = block_layout(batch["input_ids"], valid, [masked], self.student, self.pack)
        length = labels.shape[1]
        out = {
            "input_ids": layout.input_ids,
            "position_ids": layout.position_ids,
            "stream": layout.stream,
            "block": layout.block,
            "t": t_B,
            "row_tokens": (labels != -100).sum(1),
        }
        asked, position = layout.asked, layout.asked_position
        num_pairs = num_active = 0
        if self.teacher is not None:
            if "teacher_input_ids" not in batch:
                raise ValueError(
                    "The rows have no teacher side: this dataset was prepared without a teacher tokenizer. Prepare it "
                    "again with the teacher's, or give the trainer the raw rows."
                )
            ids, masks = batch["teacher_input_ids"], self._teacher_masks(batch, hit_BC, demo_BL)
            teacher = block_layout(ids, batch["teacher_attention_mask"].bool(), masks, self.teacher, self.pack)
            pair, teacher_pair, chunks = self._pairs(batch, position, teacher.asked_position, num_chunks)
            # positions without a partner last
            order = torch.cat([pair, _complement(pair, len(asked))])
            asked, position = asked[order], position[order]
            out |= chunks | {
                "teacher_input_ids": teacher.input_ids,
                "teacher_position_ids": teacher.position_ids,
                "teacher_stream": teacher.stream,
                "teacher_block": teacher.block,
                "teacher_asked": teacher.asked[teacher_pair],
                "teacher_targets": ids.flatten()[teacher.asked_position[teacher_pair]],
            }
            num_pairs, num_active = len(pair), len(out["chunk_row"])
        out |= {
            "asked": asked,
            "targets": batch["input_ids"].flatten()[position],
            "row": position // length,
            "chunk_tokens": _trained_chunk_tokens(labels, chunk_ids, num_chunks).flatten()[position],
        }
        trained = int(out["row_tokens"].sum())
        num_rows = int((out["row_tokens"] > 0).sum())
        out["counts"] = torch.tensor([trained, num_pairs, num_active, num_rows], dtype=torch.float64)
        return out

    def _teacher_masks(self, batch, hit_BC, demo_BL) -> list[torch.Tensor]:
        """Masked teacher positions of each view: one view, or CompDemo's two (B masked first, then A)."""
        teacher_chunks = batch["teacher_chunk_ids"]
        if not self.comp_demo:
            return [chunk_member(hit_BC, teacher_chunks)]
        # the split is drawn per chunk: with one token per chunk that is per token
        part_a, part_b = complementary_split(hit_BC, demo_BL[:, : hit_BC.shape[1]], self.demo_ratio)
        return [chunk_member(part_b, teacher_chunks), chunk_member(part_a, teacher_chunks)]

    def _pairs(self, batch, student_position, teacher_position, num_chunks) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Asked student and teacher positions of the active chunks, both ordered by row and chunk; and the chunks.

        A masked chunk that holds an untrained-on token, or has no token on one side, is inactive (SPEC §5).
        """
        untrained_BC = masked_chunks(batch["labels"] == -100, batch["chunk_ids"], num_chunks)
        keys = []
        for chunk_ids, position in (
            (batch["chunk_ids"], student_position),
            (batch["teacher_chunk_ids"], teacher_position),
        ):
            chunk = chunk_ids.flatten()[position]
            row = position // chunk_ids.shape[1]
            active = (chunk >= 0) & ~untrained_BC[row, chunk]
            keys.append(torch.where(active, row * num_chunks + chunk, -1))
        keys = [torch.where(torch.isin(key, other), key, -1) for key, other in zip(keys, keys[::-1], strict=True)]
        sides = []
        for key in keys:
            order = key.argsort(stable=True)
            order = order[key[order] >= 0]
            sides.append((order, *key[order].unique_consecutive(return_inverse=True, return_counts=True)))
        (pair, chunks, pair_chunk, sizes), (teacher_pair, teacher_chunks, teacher_pair_chunk, _) = sides
        assert torch.equal(chunks, teacher_chunks), "both sides hold the same active chunks"
        return (
            pair,
            teacher_pair,
            {
                "pair_chunk": pair_chunk,
                "teacher_pair_chunk": teacher_pair_chunk,
                "chunk_row": chunks // num_chunks,
                "chunk_ends": sizes.cumsum(0).tolist(),
            },
        )


def _complement(index: torch.Tensor, size: int) -> torch.Tensor:
    """0 … size−1 without those in `index`, in order."""
    outside = torch.ones(size, dtype=torch.bool)
    outside[index] = False
    return outside.nonzero().squeeze(-1)


def _trained_chunk_tokens(labels_BL: torch.Tensor, chunk_ids_BL: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Trained-on tokens of each position's chunk, (B, L); 1 where a position is in no chunk."""
    index = torch.where(chunk_ids_BL >= 0, chunk_ids_BL, num_chunks)
    counts = torch.zeros(len(labels_BL), num_chunks + 1, dtype=torch.long)
    counts.scatter_add_(1, index, (labels_BL != -100).long())
    return torch.where(chunk_ids_BL >= 0, counts.gather(1, index), 1)
