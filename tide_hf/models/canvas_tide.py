"""Rows of tokens and masks on shared columns: where a prompt, its answer and their blocks stand while decoding.

This file travels with checkpoints: it imports its siblings and torch alone.

Shapes: B rows being decoded, R rows in all (B, or 2B with the negative prompts behind them), W columns, P prompt
columns as given, A answer tokens.
"""

from dataclasses import dataclass

import torch
from transformers.generation import StoppingCriteriaList

from .masked_diffusion import CLEAN_STREAM, PADDING_STREAM, block_visibility


@dataclass
class Canvas:
    """The token at position p of row r stands in column p + offset_r, so that block edges share columns.

    Args:
        ids (`torch.LongTensor` of shape `(R, W)`): tokens, [MASK], and padding where not `valid`.
        position (`torch.LongTensor` of shape `(R, W)`): each column's position in its row, from 0.
        valid (`torch.BoolTensor` of shape `(R, W)`): False at padding.
        masked (`torch.BoolTensor` of shape `(B, W)`): still to be denoised; none in rows that have ended.
        windows (`list[tuple[int, int]]`): column ranges [start, end) denoised one after the other.
        block_size (`int`): columns per block of the attention mask; W where everything sees everything.
        answer_column (`torch.LongTensor` of shape `(B,)`): column of each row's first answer token.
        num_answer (`int`): A, answer tokens per row at most.
        prompt_ids (`torch.LongTensor` of shape `(B, P)`): the prompts, each behind its padding.
        eos_ids (`torch.LongTensor`): tokens that end an answer.
        pad_token_id (`int`): what stands behind an answer's end.
    """

    ids: torch.LongTensor
    position: torch.LongTensor
    valid: torch.BoolTensor
    masked: torch.BoolTensor
    windows: list[tuple[int, int]]
    block_size: int
    answer_column: torch.LongTensor
    num_answer: int
    prompt_ids: torch.LongTensor
    eos_ids: torch.LongTensor
    pad_token_id: int

    def __post_init__(self):
        self.finished = torch.zeros_like(self.answer_column, dtype=torch.bool)
        self.num_new = torch.full_like(self.answer_column, self.num_answer)  # up to and with a row's end
        self._num_final = torch.zeros_like(self.answer_column)

    @property
    def is_one_block(self) -> bool:
        """Whether every column sees every other, so that no column is ever final for a cache."""
        return self.block_size >= self.ids.shape[1]

    def visible(self, start: int, end: int) -> torch.Tensor:
        """Which of the columns [0, end) each of [start, end) sees, `(R, 1, end − start, end)`."""
        valid = self.valid[:, :end]
        stream = torch.where(valid, CLEAN_STREAM, PADDING_STREAM)
        block = torch.where(valid, torch.arange(end, device=valid.device) // self.block_size, -1)
        return block_visibility(stream[:, start:], block[:, start:], stream, block)

    def reveal(self, start: int, end: int, chosen: torch.Tensor, tokens: torch.Tensor) -> None:
        """Writes the chosen tokens, both `(B, end − start)`, into the rows and their negative counterparts."""
        copies = len(self.ids) // len(self.masked)
        window = self.ids[:, start:end]
        self.ids[:, start:end] = torch.where(chosen.repeat(copies, 1), tokens.repeat(copies, 1), window)
        self.masked[:, start:end] &= ~chosen

    def answer(self) -> torch.Tensor:
        """Answer tokens `(B, A)`: [MASK] where not revealed, padding behind a row's end."""
        index = torch.arange(self.num_answer, device=self.ids.device)
        ids = self.ids[: len(self.masked)].gather(1, self.answer_column[:, None] + index)
        return ids.masked_fill(index >= self.num_new[:, None], self.pad_token_id)

    def sequences(self) -> torch.Tensor:
        """Prompts, padded on the left, and answers so far, `(B, P + A)`: what transformers calls `input_ids`."""
        return torch.cat([self.prompt_ids, self.answer()], 1)

    def end_rows(self, end: int, criteria: StoppingCriteriaList, is_late: bool = False) -> None:
        """Ends rows at an EOS, a stopping criterion or their last token, among the columns before `end`; all of them
        at `end` if it is late.

        Criteria are asked as in token-by-token decoding, once per answer token that has become final since the last
        call: `criteria(input_ids (B, P + n), None)`; a row's answer counts if its n-th token is final.
        """
        final = (end - self.answer_column).clamp(0, self.num_answer)
        index = torch.arange(self.num_answer, device=final.device)
        is_end = torch.isin(self.answer(), self.eos_ids) & (index < torch.minimum(final, self.num_new)[:, None])
        self.num_new = torch.where(is_end.any(-1), is_end.long().argmax(-1) + 1, self.num_new)
        if criteria:
            for n in range(int(self._num_final.min()) + 1, int(final.max()) + 1):
                stops = criteria(self.sequences()[:, : self.prompt_ids.shape[1] + n], None)
                stops = stops & (self._num_final < n) & (n <= torch.minimum(final, self.num_new))
                self.num_new = torch.where(stops, n, self.num_new)
        if is_late:
            self.num_new = torch.minimum(self.num_new, final)
        self._num_final = final
        self.finished = self.num_new <= final
        self.masked &= ~self.finished[:, None]


def answer_canvas(
    prompt_ids: torch.LongTensor,
    prompt_mask: torch.BoolTensor,
    settings,
    full: bool,
    negative_ids: torch.LongTensor | None = None,
    negative_mask: torch.BoolTensor | None = None,
) -> Canvas:
    """Prompts, each followed by masks.

    Rows are left-padded. On the absolute grid a row's padding is whole blocks, so its blocks count from its own
    position 0 and the prompt's tail stands clean at the beginning of the first active block. On the prompt-aligned
    grid, and for full-sequence models, all answers start in one column, a block's edge. A negative prompt is padded
    so that its answer stands in the same columns as its row's; where lengths differ its first block is short.

    Only answer tokens are denoised. On the absolute grid [MASK] stays in the rest of the last block, which is read as
    a whole, as in training.
    """
    num_rows, size = len(prompt_ids), settings.block_size or settings.max_new_tokens
    lengths = prompt_mask.sum(-1)
    absolute = not full and settings.block_grid == "absolute"
    tail = lengths % size if absolute else torch.zeros_like(lengths)
    prompts = [(prompt_ids, prompt_mask)]
    if negative_ids is not None:
        prompts.append((negative_ids.expand(num_rows, -1), negative_mask.expand(num_rows, -1)))
    all_lengths = torch.cat([mask.sum(-1) for _, mask in prompts])
    unit = 1 if full else size
    start = -(-int((all_lengths - tail.repeat(len(prompts))).max()) // unit) * unit
    end = start + settings.max_new_tokens
    if absolute:  # trained in whole blocks
        end = start + -(-(int(tail.max()) + settings.max_new_tokens) // size) * size
    answer_column = start + tail
    answer_end = answer_column + settings.max_new_tokens
    offset = answer_column.repeat(len(prompts)) - all_lengths
    columns = torch.arange(end, device=prompt_ids.device)
    valid = columns >= offset[:, None]
    ids = torch.where(valid, settings.mask_token_id, settings.pad_token_id)
    for index, (given_ids, given_mask) in enumerate(prompts):
        row, column = given_mask.nonzero(as_tuple=True)
        rank = given_mask.long().cumsum(-1)[row, column] - 1
        row = row + index * num_rows
        ids[row, rank + offset[row]] = given_ids[row - index * num_rows, column]
    eos = settings.eos_token_id
    return Canvas(
        ids=ids,
        position=(columns - offset[:, None]).clamp(min=0),
        valid=valid,
        masked=(columns >= answer_column[:, None]) & (columns < answer_end[:, None]),
        windows=[(column, min(column + size, end)) for column in range(start, end, size)],
        block_size=end if full else size,
        answer_column=answer_column,
        num_answer=settings.max_new_tokens,
        prompt_ids=prompt_ids.gather(1, prompt_mask.byte().argsort(dim=-1, stable=True)),
        eos_ids=torch.tensor([] if eos is None else eos, device=ids.device, dtype=torch.long).reshape(-1),
        pad_token_id=settings.pad_token_id,
    )


def infill_canvas(input_ids: torch.LongTensor, attention_mask: torch.BoolTensor, settings, full: bool) -> Canvas:
    """Rows with masks anywhere in them, from position 0; the windows are the blocks that hold masks in any row."""
    lengths = attention_mask.sum(-1)
    width = int(lengths.max())
    size = min(settings.block_size or width, width)
    columns = torch.arange(width, device=input_ids.device)
    valid = columns < lengths[:, None]
    ids = torch.full_like(valid, settings.pad_token_id, dtype=torch.long)
    ids[valid] = input_ids[attention_mask]  # both row by row, left to right
    masked = valid & (ids == settings.mask_token_id)
    starts = (masked.any(0).nonzero().flatten() // size * size).unique().tolist()
    return Canvas(
        ids=ids,
        position=columns.expand_as(ids),
        valid=valid,
        masked=masked,
        windows=[(start, min(start + size, width)) for start in starts],
        block_size=width if full else size,
        answer_column=torch.zeros_like(lengths),
        num_answer=width,
        prompt_ids=input_ids[:, :0],
        eos_ids=lengths[:0],  # text goes on behind a hole
        pad_token_id=settings.pad_token_id,
    )
