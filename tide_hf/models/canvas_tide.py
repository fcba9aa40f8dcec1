"""Rows of tokens and masks on shared columns: where a prompt, its answer and their blocks stand while decoding.

This file travels with checkpoints: it imports its siblings, torch and transformers alone.

Shapes: B rows being decoded, R rows in all (B, or 2B with the negative prompts after them), W columns, P prompt
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
        windows (`list[tuple[int, int]]`): column ranges [start, end), denoised one after another.
        block_size (`int`): columns per block of the attention mask; W where everything sees everything.
        answer_column (`torch.LongTensor` of shape `(B,)`): column of each row's first answer token.
        num_answer (`int`): A, the most answer tokens of a row.
        prompt_ids (`torch.LongTensor` of shape `(B, P)`): the prompts, padded on the left.
        eos_ids (`torch.LongTensor`): tokens that end an answer.
        pad_token_id (`int`): what follows an answer's end.
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
        self.num_new = torch.full_like(self.answer_column, self.num_answer)  # up to and including a row's end
        self.reveal_step = torch.zeros_like(self.masked, dtype=torch.long)  # 0 where nothing was revealed
        self.reveal_entropy = torch.zeros_like(self.masked, dtype=torch.float32)  # where the reveal rule asks for it
        self._num_final = torch.zeros_like(self.answer_column)

    @property
    def is_one_block(self) -> bool:
        """Whether every column sees every other, so that no column is ever final for a cache."""
        return self.block_size >= self.ids.shape[1]

    def visible(self, start: int, end: int, causal: bool = False) -> torch.Tensor:
        """Which of the columns [0, end) each of the columns [start, end) sees, `(R, 1, end − start, end)`.

        Args:
            start (`int`), end (`int`): first column of the queries, and the end of all.
            causal (`bool`): whether a column sees none of its own block that stands after it.
        """
        valid = self.valid[:, :end]
        stream = torch.where(valid, CLEAN_STREAM, PADDING_STREAM)
        block = torch.where(valid, torch.arange(end, device=valid.device) // self.block_size, -1)
        return block_visibility(stream[:, start:], block[:, start:], stream, block, causal)

    def masks_last(self, first: int, start: int, end: int, mask_token_id: int) -> torch.LongTensor:
        """The columns [first, end) as a network reads them that is causal inside a block, `(R, end − first)`.

        They count from `first`. In the block [start, end) those with [MASK] come after the others, and padding last.

        Args:
            first (`int`), start (`int`), end (`int`): columns; what stands before `start` is in its place.
            mask_token_id (`int`): id of [MASK].
        """
        kind = (self.ids[:, start:end] == mask_token_id).long() + 2 * ~self.valid[:, start:end]
        order = kind.argsort(dim=1, stable=True) + (start - first)
        before = torch.arange(start - first, device=order.device).expand(len(order), -1)
        return torch.cat([before, order], 1)

    def reveal(
        self,
        start: int,
        end: int,
        chosen: torch.Tensor,
        tokens: torch.Tensor,
        step: int,
        entropy: torch.Tensor | None = None,
    ) -> None:
        """Writes `tokens` where `chosen`, both `(B, end − start)`, into the columns [start, end); notes the `step`
        and, if it is known, the `entropy` of the distributions.

        A row's negative prompt gets the same answer tokens.
        """
        copies = len(self.ids) // len(self.masked)
        window = self.ids[:, start:end]
        self.ids[:, start:end] = torch.where(chosen.repeat(copies, 1), tokens.repeat(copies, 1), window)
        self.masked[:, start:end] &= ~chosen
        self.reveal_step[:, start:end].masked_fill_(chosen, step)
        if entropy is not None:
            here = self.reveal_entropy[:, start:end]
            here.copy_(torch.where(chosen, entropy.to(here), here))

    def answer(self) -> torch.Tensor:
        """Answer tokens `(B, A)`: [MASK] where not revealed, padding after a row's end."""
        index = torch.arange(self.num_answer, device=self.ids.device)
        ids = self.ids[: len(self.masked)].gather(1, self.answer_column[:, None] + index)
        return ids.masked_fill(index >= self.num_new[:, None], self.pad_token_id)

    def sequences(self) -> torch.Tensor:
        """Prompts, padded on the left, and answers so far, `(B, P + A)`: what transformers calls `input_ids`."""
        return torch.cat([self.prompt_ids, self.answer()], 1)

    def end_rows(self, end: int, criteria: StoppingCriteriaList, is_late: bool = False) -> None:
        """Ends rows at an EOS, a stopping criterion or their last token.

        Criteria are called as in token-by-token decoding, once per answer token that has become final since the last
        call: `criteria(input_ids (B, P + n), None)`. What they return for a row counts if its n-th token is final.

        Args:
            end (`int`): the columns before it are final.
            criteria (`StoppingCriteriaList`): transformers' own, or the caller's.
            is_late (`bool`): whether time is up, and every row ends at `end`.
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


def answer_canvas(prompts: list[tuple[torch.LongTensor, torch.BoolTensor]], settings, full: bool) -> Canvas:
    """Prompts, each followed by masks.

    Rows are left-padded. On the absolute grid a row's padding is whole blocks, so its blocks count from its own
    position 0, and the end of the prompt stands clean at the beginning of the first active block. On the
    prompt-aligned grid, and for full-sequence models, all answers start in one column, a block's edge. A negative
    prompt is padded so that its answer stands in the same columns as its row's; where their lengths differ, its first
    block is short.

    Only answer tokens are denoised. On the absolute grid [MASK] stays in the rest of the last block, which the network
    sees whole, as in training. With `denoise_whole_blocks` that rest is denoised too, on either grid.

    Args:
        prompts (`list[tuple]`): ids `(B, P)` and mask `(B, P)`, True at tokens; then, with guidance, the same of the
            negative prompts, `(B, P′)`.
        settings ([`TIDEGenerationConfig`]): with every default filled in.
        full (`bool`): whether every position sees every other.
    """
    size, num_new = settings.block_size or settings.max_new_tokens, settings.max_new_tokens
    lengths = torch.stack([mask.sum(-1) for _, mask in prompts])  # of the prompts and the negative ones, (R // B, B)
    absolute = not full and settings.block_grid == "absolute"
    tail = lengths[0] % size if absolute else torch.zeros_like(lengths[0])
    start = _whole_units(int((lengths - tail).max()), 1 if full else size)
    # on the absolute grid the last block is whole, as trained
    whole = absolute or settings.denoise_whole_blocks
    end = start + (_whole_units(int(tail.max()) + num_new, size) if whole else num_new)
    answer_column = start + tail
    offset = (answer_column - lengths).flatten()
    columns = torch.arange(end, device=lengths.device)
    valid = columns >= offset[:, None]
    ids = torch.where(valid, settings.mask_token_id, settings.pad_token_id)
    for copy, (given_ids, given_mask) in zip(ids.split(lengths.shape[1]), prompts, strict=True):
        _write_before(copy, answer_column, given_ids, given_mask)
    prompt_ids, prompt_mask = prompts[0]
    eos, is_answer = settings.eos_token_id, columns >= answer_column[:, None]
    if not settings.denoise_whole_blocks:
        is_answer &= columns < answer_column[:, None] + num_new
    return Canvas(
        ids=ids,
        position=(columns - offset[:, None]).clamp(min=0),
        valid=valid,
        masked=is_answer,
        windows=[(column, min(column + size, end)) for column in range(start, end, size)],
        block_size=end if full else size,
        answer_column=answer_column,
        num_answer=num_new,
        # a stable sort by "is a token" moves padding to the left and keeps the tokens in order
        prompt_ids=prompt_ids.gather(1, prompt_mask.byte().argsort(dim=-1, stable=True)),
        eos_ids=torch.tensor([] if eos is None else eos, device=ids.device, dtype=torch.long).reshape(-1),
        pad_token_id=settings.pad_token_id,
    )


def _whole_units(number: int, unit: int) -> int:
    """The least multiple of `unit` that is not less than `number`."""
    return -(-number // unit) * unit


def _write_before(ids, column_B, given_ids, given_mask) -> None:
    """Writes each row's given tokens, without what its mask leaves out, so that the last stands before `column_B`."""
    row, given_column = given_mask.nonzero(as_tuple=True)
    to_the_right = given_mask.long().flip(-1).cumsum(-1).flip(-1)  # tokens of the row from here on
    ids[row, column_B[row] - to_the_right[row, given_column]] = given_ids[row, given_column]


def infill_canvas(input_ids: torch.LongTensor, attention_mask: torch.BoolTensor, settings, full: bool) -> Canvas:
    """Rows with masks anywhere in them, from position 0; the windows are the blocks that hold a mask in any row.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, L)`): tokens, and [MASK] where something is missing.
        attention_mask (`torch.BoolTensor` of shape `(B, L)`): True at tokens.
        settings ([`TIDEGenerationConfig`]): with every default filled in.
        full (`bool`): whether every position sees every other.
    """
    lengths = attention_mask.sum(-1)
    width = int(lengths.max())
    size = min(settings.block_size or width, width)
    columns = torch.arange(width, device=input_ids.device)
    valid = columns < lengths[:, None]
    ids = torch.full_like(valid, settings.pad_token_id, dtype=torch.long)
    ids[valid] = input_ids[attention_mask]  # both sides row by row, from left to right
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
        eos_ids=lengths[:0],  # text goes on after a hole
        pad_token_id=settings.pad_token_id,
    )
