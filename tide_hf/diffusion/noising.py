"""The forward process of a distillation step, on the host: one micro-batch of token rows -> a [`NoisedBatch`].

Everything that depends on the noise is known here, before any network runs: which positions each network is run on,
whose hidden states go through the head, how they pair up, and the counts that divide each term.

Shapes: B rows, L positions, N masked positions of the student, the first M of them paired with M_T of the teacher's,
C active chunks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..models.masked_diffusion import TIME_EPSILON
from .autoregressive import exact_chunks, predictable_chunks
from .batch import Counts, NetworkInputs, NoisedBatch, Pairs, Written
from .cached import COUNTS, CachedPredictions, look_up, predictable_positions
from .corruption import (
    chunk_member,
    complementary_split,
    complete_chunks,
    diffusion_time,
    mask_positions,
    masked_chunks,
    row_uniforms,
    suffix_loss_weight,
    suffix_masks,
)
from .layout import LayoutSpec, PackedLayout, block_layout, block_numbers, causal_layout

SUFFIX_STREAM = 0  # draws of suffix masks, apart from those of random ones


@dataclass(frozen=True)
class Noising:
    """What a run fixes about its noise; a call noises one batch.

    Args:
        student (`LayoutSpec`), teacher (`LayoutSpec`, *optional*): how each network is fed; without a teacher no pairs
            are made.
        schedule (`str`): α(t), a name in [`~tide_hf.models.SCHEDULES`].
        time_epsilon (`float`): smallest t.
        comp_demo (`bool`), demo_ratio (`float`): CompDemo's two teacher views and the share of the first.
        pack (`bool`): leave out blocks that carry no loss; False is the textbook layout, for comparison.
        exact_targets (`bool`): with an autoregressive teacher, compare only chunks with no token to their right that
            the student sees in their block.
        suffix_mask_fraction (`float`): share of the rows that suffix masks are drawn for, if draws for them are given.
    """

    student: LayoutSpec
    teacher: LayoutSpec | None = None
    schedule: str = "linear"
    time_epsilon: float = TIME_EPSILON
    comp_demo: bool = False
    demo_ratio: float = 0.5
    pack: bool = True
    exact_targets: bool = False
    suffix_mask_fraction: float = 0.0

    def keyed(
        self,
        batch: Mapping[str, torch.Tensor],
        seed: int,
        epoch: int | None,
        t: float | None = None,
        given: Written | None = None,
    ) -> NoisedBatch:
        """Noises one collated batch by draws keyed by (seed, epoch, row).

        Args:
            batch (`Mapping`), t (`float`, *optional*), given ([`Written`], *optional*): as in a call.
            seed (`int`): of the noise.
            epoch (`int`, *optional*): the pass over the rows; None for the noise of evaluation, which has no suffix
                masks. Rows that carry a teacher's predictions have a part for each, see [`~tide_hf.diffusion.cached`].

        Returns:
            [`NoisedBatch`] on the host.
        """
        keys, length, suffix = batch["row_key"].tolist(), batch["labels"].shape[1], None
        if epoch is not None and self.suffix_mask_fraction:
            suffix = row_uniforms(seed, epoch, keys, length, stream=SUFFIX_STREAM)[:2]
        return self(batch, row_uniforms(seed, epoch, keys, length), t, given, suffix, epoch)

    def __call__(
        self,
        batch: Mapping[str, torch.Tensor],
        uniforms: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        t: float | None = None,
        given: Written | None = None,
        suffix_uniforms: tuple[torch.Tensor, torch.Tensor] | None = None,
        epoch: int | None = None,
    ) -> NoisedBatch:
        """Noises one collated batch.

        Args:
            batch (`Mapping`): see [`~tide_hf.data.DistillationCollator`].
            uniforms: draws of [`~tide_hf.diffusion.row_uniforms`]: `(B,)`, `(B, L)`, `(B, L)`.
            t (`float`, *optional*): one diffusion time for all rows, instead of the drawn ones.
            given ([`Written`], *optional*): rows whose masks are not drawn, and which are counted apart.
            suffix_uniforms (*optional*): draws `(B,)` and `(B, L)`: which rows get suffix masks, and the cut of each
                of their blocks. The diffusion time of such a row is the share of its trained-on tokens that is masked.
            epoch (`int`, *optional*): which of a diffusion teacher's predictions, if the rows carry any.

        Returns:
            [`NoisedBatch`] on the host.

        Raises:
            ValueError: if there is a teacher and the rows were prepared without one.
        """
        ids, labels, chunk_ids = batch["input_ids"], batch["labels"], batch["chunk_ids"]
        if self.teacher is None:
            # only a teacher needs chunks: without one, aligned rows train as if they were not aligned
            chunk_ids = torch.full_like(chunk_ids, -1)
        # at least one column, so that rows without any chunk need no case of their own
        num_chunks = max(int(chunk_ids.max()), int(batch.get("teacher_chunk_ids", chunk_ids).max()), 0) + 1
        t_B = diffusion_time(uniforms[0], self.time_epsilon) if t is None else torch.full_like(uniforms[0], t)
        masked, suffix_weight_BL = mask_positions(uniforms[1], t_B, labels, self.schedule), None
        if suffix_uniforms is not None:
            masked, suffix_weight_BL = self._with_suffix_masks(batch, masked, suffix_uniforms, chunk_ids, num_chunks)
        is_written = None if given is None else given.is_written_B
        if given is not None:
            masked = torch.where(is_written[:, None], given.masked_BL, masked)
            if suffix_weight_BL is not None:
                suffix_weight_BL = suffix_weight_BL.masked_fill(is_written[:, None], 0.0)
        masked, hit_BC = complete_chunks(masked, chunk_ids, labels, num_chunks)
        row_tokens = (labels != -100).sum(1)
        if suffix_weight_BL is not None:
            share_B = (masked.sum(1) / row_tokens.clamp(min=1)).clamp(min=self.time_epsilon)
            t_B = torch.where((suffix_weight_BL > 0).any(1), share_B, t_B)
        layout = block_layout(ids, batch["attention_mask"].bool(), [masked], self.student, self.pack)
        order, teacher, pairs, cached = torch.arange(len(layout.asked)), None, None, None
        if self.teacher is not None:
            sides = self._teacher_side(batch, layout, masked, hit_BC, uniforms[2], is_written)
            order, teacher, pairs, asked = sides
            cached = self._cached(batch, asked, epoch) if COUNTS in batch else None
        position = layout.asked_position[order]
        return NoisedBatch(
            student=_inputs(layout, layout.asked[order], ids.flatten()[position]),
            teacher=teacher,
            pairs=pairs,
            t=t_B,
            row_tokens=row_tokens,
            row_key=batch["row_key"],
            row=position // labels.shape[1],
            chunk_tokens=_trained_chunk_tokens(labels, chunk_ids, num_chunks).flatten()[position],
            counts=_counts(row_tokens, position // labels.shape[1], pairs, is_written),
            is_written=is_written,
            suffix_weight=None if suffix_weight_BL is None else suffix_weight_BL.flatten()[position],
            cached=cached,
        )

    def _with_suffix_masks(self, batch, masked, uniforms, chunk_ids, num_chunks: int) -> tuple:
        """The masks `(B, L)`, those of some rows replaced by suffix masks, and the weights in these rows, `(B, L)`."""
        block = block_numbers(batch["attention_mask"].bool(), self.student.block_size)
        suffix, probability = suffix_masks(uniforms[1], block, batch["labels"])
        is_suffix = (uniforms[0] < self.suffix_mask_fraction)[:, None]
        weight = suffix_loss_weight(probability, block, chunk_ids, num_chunks)
        return torch.where(is_suffix, suffix, masked), weight * is_suffix

    def _teacher_side(self, batch, student: PackedLayout, masked, hit_BC, demo_BL, is_written) -> tuple:
        """The order in which the student's positions are asked, those without a partner last; what the teacher is run
        on; the pairs; and the positions in the teacher's rows of their tokens."""
        if "teacher_input_ids" not in batch:
            raise ValueError(
                "The rows have no teacher side: this dataset was prepared without a teacher tokenizer. Prepare it "
                "again with the teacher's, or give the trainer the raw rows."
            )
        ids, valid = batch["teacher_input_ids"], batch["teacher_attention_mask"].bool()
        is_exact_BC = None
        if self.teacher.autoregressive:
            is_real, teacher_chunks = batch["attention_mask"].bool(), batch["teacher_chunk_ids"]
            block = block_numbers(is_real, self.student.block_size)
            # behind the end of an answer that the student wrote its row holds [MASK]
            visible = is_real & ~masked & (batch["input_ids"] != self.student.mask_token_id)
            is_exact_BC = exact_chunks(visible, block, batch["chunk_ids"], hit_BC)
            wanted_BC = is_exact_BC if self.exact_targets else hit_BC
            if is_written is not None:
                wanted_BC = torch.where(is_written[:, None], is_exact_BC, wanted_BC)
            asked_BC = predictable_chunks(ids, valid, teacher_chunks, wanted_BC)
            layout = causal_layout(ids, valid, chunk_member(asked_BC, teacher_chunks))
        else:
            layout = block_layout(ids, valid, self._teacher_masks(batch, hit_BC, demo_BL), self.teacher, self.pack)
        pair, teacher_pair, pairs, chunks = self._pairs(
            batch, student.asked_position, layout.asked_position, hit_BC.shape[1]
        )
        if is_exact_BC is not None:
            pairs.is_exact = is_exact_BC.flatten()[chunks]
        order = torch.cat([pair, _complement(pair, len(student.asked))])
        asked = layout.asked_position[teacher_pair]
        return order, _inputs(layout, layout.asked[teacher_pair], ids.flatten()[asked]), pairs, asked

    def _cached(self, batch, asked: torch.Tensor, epoch: int | None) -> CachedPredictions:
        """What the rows carry of the teacher's predictions at the asked positions."""
        if not self.teacher.autoregressive:
            return look_up(batch, asked, 0 if epoch is None else epoch + 1, None)
        valid = batch["teacher_attention_mask"].bool()
        kept = predictable_positions(batch["teacher_input_ids"], valid, batch["teacher_chunk_ids"])
        return look_up(batch, asked, 0, kept)

    def _teacher_masks(self, batch, hit_BC, demo_BL) -> list[torch.Tensor]:
        """Masked teacher positions of each view: one view, or CompDemo's two (B masked first, then A)."""
        teacher_chunks = batch["teacher_chunk_ids"]
        if not self.comp_demo:
            return [chunk_member(hit_BC, teacher_chunks)]
        # the split is drawn per chunk: with one token per chunk that is per token
        part_a, part_b = complementary_split(hit_BC, demo_BL[:, : hit_BC.shape[1]], self.demo_ratio)
        return [chunk_member(part_b, teacher_chunks), chunk_member(part_a, teacher_chunks)]

    def _pairs(self, batch, student_position, teacher_position, num_chunks) -> tuple:
        """Asked student and teacher positions of the active chunks, both ordered by row and chunk; the [`Pairs`]; and
        the number of each active chunk, counted over all rows.

        A masked chunk that holds an untrained-on token, or has no token on one side, is inactive.
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
            # stable: inside a chunk the tokens stay in the order of the row
            order = key.argsort(stable=True)
            order = order[key[order] >= 0]
            sides.append((order, *key[order].unique_consecutive(return_inverse=True, return_counts=True)))
        (pair, chunks, student_chunk, sizes), (teacher_pair, teacher_chunks, teacher_chunk, _) = sides
        assert torch.equal(chunks, teacher_chunks), "both sides hold the same active chunks"
        pairs = Pairs(student_chunk, teacher_chunk, chunks // num_chunks, sizes.cumsum(0).tolist())
        return pair, teacher_pair, pairs, chunks


def _counts(
    row_tokens: torch.Tensor, row: torch.Tensor, pairs: Pairs | None, is_written: torch.Tensor | None
) -> Counts:
    """What a batch holds; `row` is that of each asked position."""
    drawn = torch.ones_like(row_tokens, dtype=torch.bool) if is_written is None else ~is_written
    pair_rows, chunk_rows = row[:0], row[:0]
    if pairs is not None:
        pair_rows, chunk_rows = row[: len(pairs.student_chunk)], pairs.chunk_row
    counts = (
        row_tokens[drawn].sum(),
        drawn[pair_rows].sum(),
        drawn[chunk_rows].sum(),
        (row_tokens[drawn] > 0).sum(),
        (~drawn[pair_rows]).sum(),
        (~drawn[chunk_rows]).sum(),
    )
    return Counts(*torch.tensor([int(count) for count in counts], dtype=torch.float64).unbind())


def _inputs(layout: PackedLayout, asked: torch.Tensor, targets: torch.Tensor) -> NetworkInputs:
    return NetworkInputs(layout.input_ids, layout.position_ids, layout.stream, layout.block, asked, targets)


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
