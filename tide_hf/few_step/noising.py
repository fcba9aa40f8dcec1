"""One micro-batch of token rows -> the tensors of one inverse-distillation update, on the host.

The student is shown x_t′; x_t is drawn from what it predicts and masked anew. Which positions are masked in either,
and where a drawn token goes, does not depend on any network and is known here.

Shapes: B rows, L positions, P packed columns of x_t, N positions masked in x_t, M of them masked in x_t′ too, K =
N − M that the student saw, S positions of x_t that get a drawn token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..diffusion import (
    LayoutSpec,
    PackedInputs,
    PackedLayout,
    block_layout,
    diffusion_time,
    mask_positions,
    row_uniforms,
)
from ..models.masked_diffusion import NOISED_STREAM, STREAMS_PER_ROW, TIME_EPSILON, loss_weight
from .batch import Drawn, InverseBatch, Positions


def stratified_times(uniform_B: torch.Tensor) -> torch.Tensor:
    """Draws in [0, 1) that fill it evenly, one in each of B equal parts; each alone is uniform.

    The order is that of the given draws, and the common offset their sum's fraction: both depend on the set of rows
    alone, not on how it is spread over processes and micro-batches.

    Args:
        uniform_B (`torch.Tensor` of shape `(B,)`): independent draws in [0, 1), one per row of the global batch.
    """
    order = uniform_B.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    offset = uniform_B.double().sort().values.sum() % 1
    return ((rank + offset) / len(uniform_B)).float().clamp(max=1 - 2.0**-24)


class ByRow:
    """Values looked up by row key; rows without weight have none and get 0, which no loss reads.

    Args:
        row_keys (`list[int]`): the key of each row, R of them.
        values (`torch.Tensor` of shape `(R,)`): its value.
    """

    def __init__(self, row_keys: list[int], values: torch.Tensor):
        self.index = {key: index for index, key in enumerate(row_keys)}
        self.values = torch.cat([values, values.new_zeros(1)])

    def __getitem__(self, row_keys: list[int]) -> torch.Tensor:
        return self.values[[self.index.get(key, -1) for key in row_keys]]


@dataclass(frozen=True)
class Draws:
    """Uniform draws in [0, 1) of one update.

    Args:
        student_time, time (`torch.Tensor` of shape `(B,)`): of t′ and t.
        student_mask, mask, token (`torch.Tensor` of shape `(B, L)`): of the masks of x_t′ and x_t, and of the tokens.
    """

    student_time: torch.Tensor
    time: torch.Tensor
    student_mask: torch.Tensor
    mask: torch.Tensor
    token: torch.Tensor

    @classmethod
    def of_rows(cls, seed: int, epoch: int | None, row_keys: Sequence[int], length: int, update: int) -> "Draws":
        """Draws that depend on nothing but their key: (seed, epoch, row, update).

        Args:
            seed (`int`), epoch (`int`, *optional*), row_keys (`Sequence[int]` of B), length (`int`, L): see
                [`~tide_hf.diffusion.row_uniforms`].
            update (`int`): number of the update within the step.
        """
        student_time, student_mask, token = row_uniforms(seed, epoch, row_keys, length, stream=2 * update)
        time, mask, _ = row_uniforms(seed, epoch, row_keys, length, stream=2 * update + 1)
        return cls(student_time, time, student_mask, mask, token)


@dataclass(frozen=True)
class InverseNoising:
    """What a run fixes about its noise; a call noises one batch.

    Args:
        spec ([`~tide_hf.diffusion.LayoutSpec`]): how the three networks, which are alike, are fed.
        schedule (`str`): α(t), a name in [`~tide_hf.models.SCHEDULES`].
        time_epsilon (`float`): smallest t, and smallest t′ where no grid is given.
        student_grid (`int`, *optional*): S, t′ from 1/S, 2/S, …, 1; None: from [ε, 1).
        pack (`bool`): leave out blocks that carry no loss; False is the textbook layout, for comparison.
    """

    spec: LayoutSpec
    schedule: str = "linear"
    time_epsilon: float = TIME_EPSILON
    student_grid: int | None = None
    pack: bool = True

    def __call__(self, batch: Mapping[str, torch.Tensor], draws: Draws) -> InverseBatch:
        """Noises one collated batch.

        Args:
            batch (`Mapping`): see [`~tide_hf.data.DistillationCollator`].
            draws ([`Draws`]): of its rows.

        Returns:
            [`InverseBatch`] on the host.
        """
        labels, valid = batch["labels"], batch["attention_mask"].bool()
        length = labels.shape[1]
        student_t = diffusion_time(draws.student_time, self.time_epsilon)
        if self.student_grid is not None:
            student_t = ((draws.student_time * self.student_grid).floor() + 1) / self.student_grid
        t = diffusion_time(draws.time, self.time_epsilon)
        unseen = mask_positions(draws.student_mask, student_t, labels, self.schedule)  # by the student
        masked = mask_positions(draws.mask, t, labels, self.schedule)
        shown = block_layout(batch["input_ids"], valid, [unseen], self.spec, self.pack)
        noised = block_layout(batch["input_ids"], valid, [masked], self.spec, self.pack)

        index = torch.full(labels.shape, -1).flatten()  # of each position among those asked of the student
        index[shown.asked_position] = torch.arange(len(shown.asked))
        source, is_noised = noised.source.flatten(), (noised.stream % STREAMS_PER_ROW == NOISED_STREAM).flatten()
        flat = (is_noised & (unseen & ~masked).flatten()[source]).nonzero().squeeze(-1)
        position = source[flat]

        soft = unseen.flatten()[noised.asked_position]
        row = noised.asked_position // length
        weights = loss_weight(t, self.schedule)[row]
        return InverseBatch(
            shown=_inputs(shown),
            student_asked=shown.asked,
            noised=_inputs(noised),
            drawn=Drawn(flat, index[position], draws.token.flatten()[position]),
            soft=Positions(noised.asked[soft], row[soft], weights[soft], index[noised.asked_position[soft]]),
            seen=Positions(
                noised.asked[~soft],
                row[~soft],
                weights[~soft],
                batch["input_ids"].flatten()[noised.asked_position[~soft]],
            ),
            row_key=batch["row_key"],
            num_rows=torch.tensor(float(len(labels))),
        )


def _inputs(layout: PackedLayout) -> PackedInputs:
    return PackedInputs(layout.input_ids, layout.position_ids, layout.stream, layout.block)
