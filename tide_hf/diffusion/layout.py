"""Which positions a network is run on: noised copies and a clean copy of each row, packed.

A block of a noised copy that holds no masked position carries no loss and is seen by nobody; a clean block behind the
last such block is seen by nobody either. Both are left out, which changes no logit that is asked for. What is left of
short rows then shares lines as long as what is left of the longest, without seeing one another.

Shapes: B rows, L positions, D lines of P packed columns, N asked positions. All on the host.
"""

from dataclasses import dataclass, fields

import torch

from ..models.masked_diffusion import CLEAN_STREAM, NOISED_STREAM, PADDING_STREAM, STREAMS_PER_ROW


@dataclass(frozen=True)
class LayoutSpec:
    """How one network is fed.

    Args:
        mask_token_id (`int`): its [MASK].
        block_size (`int`, *optional*): tokens per block, counted from position 0; None: the whole row is one block.
        clean_copy (`bool`): whether the clean copy of earlier blocks stands beside the noised sequence.
        shifted (`bool`): whether its logits at position i − 1 are those of position i (position 0 asks itself).
        causal (`bool`): whether inside a block everything is causal, with the unmasked tokens first and every token at
            its own position; otherwise a block is bidirectional.

    Raises:
        ValueError: for a shifted network with blocks: the position before a block lies in another one, which a packed
            layout may leave out.
    """

    mask_token_id: int
    block_size: int | None
    clean_copy: bool = True
    shifted: bool = False
    causal: bool = False

    def __post_init__(self):
        if self.shifted and self.block_size is not None:
            raise ValueError(
                f"A network whose logits are shifted by one position is fed whole rows, not blocks of "
                f"{self.block_size}: the position that predicts a block's first token lies in the block before."
            )


@dataclass
class PackedLayout:
    """Inputs of one forward.

    Args:
        input_ids, position_ids, stream, block (`torch.LongTensor` of shape `(D, P)`): token, position in the row, copy
            (see `models.masked_diffusion`) and block number of each column.
        source (`torch.LongTensor` of shape `(D, P)`): flat index (row · L + position) of each column's token in the
            rows, −1 for padding.
        asked (`torch.LongTensor` of shape `(N,)`): flat index (line · P + column) of the column that predicts each
            masked position, row by row, and in each row by position: its own column, or the one before (`shifted`).
        asked_position (`torch.LongTensor` of shape `(N,)`): flat index (row · L + position) of the same in the rows.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    stream: torch.Tensor
    block: torch.Tensor
    source: torch.Tensor
    asked: torch.Tensor
    asked_position: torch.Tensor

    def to(self, device: torch.device) -> "PackedLayout":
        """The same on a device."""
        return PackedLayout(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def block_layout(
    input_ids_BL: torch.Tensor,
    valid_BL: torch.Tensor,
    masks_BL: list[torch.Tensor],
    spec: LayoutSpec,
    pack: bool = True,
) -> PackedLayout:
    """Lays out [x_t …; x0] of each row: one noised copy per mask, then the clean copy.

    Args:
        input_ids_BL (`torch.LongTensor` of shape `(B, L)`): clean tokens, padded anywhere.
        valid_BL (`torch.BoolTensor` of shape `(B, L)`): False at padding. Positions count the valid columns from 0.
        masks_BL (`list[torch.BoolTensor]`): masked positions of each noised copy, disjoint, inside `valid_BL`; at most
            three copies.
        spec ([`LayoutSpec`]): how the network is fed.
        pack (`bool`): False keeps every block and every padding column: the textbook [xt ; x0].

    Returns:
        [`PackedLayout`]
    """
    assert len(masks_BL) < STREAMS_PER_ROW
    num_rows, length = input_ids_BL.shape
    position = valid_BL.long().cumsum(-1).sub(1).clamp(min=0)
    block = position // spec.block_size if spec.block_size else torch.zeros_like(position)
    num_blocks = int(block.max()) + 1 if block.numel() else 1

    copies = _copies(input_ids_BL, valid_BL, masks_BL, block, num_blocks, spec, pack)
    ids, stream, keep, asked = (torch.cat(parts, 1) for parts in zip(*copies, strict=True))
    rank = torch.zeros_like(ids)
    if spec.causal:
        # unmasked columns of a noised block before its masked ones: the order in which a causal network may see them
        copy_number = torch.arange(len(copies)).repeat_interleave(length)
        rank = 2 * (copy_number * num_blocks + block.repeat(1, len(copies))) + asked
    # kept columns first, in order
    order = torch.argsort(rank.masked_fill(~keep, torch.iinfo(rank.dtype).max), dim=1, stable=True)
    widths = keep.sum(1)
    kept = torch.arange(order.shape[1]) < widths[:, None]
    row, order = kept.nonzero(as_tuple=True)[0], order[kept]
    line, start, place = _lines(widths)
    # at least one column, so that an empty batch still runs and has a graph
    shape = int(line.max()) + 1 if num_rows else 1, max(int(widths.max()) if num_rows else 0, 1)
    column = start[row] + kept.nonzero(as_tuple=True)[1]
    source = row * length + order % length
    stream = stream[row, order]
    stream = torch.where(stream == PADDING_STREAM, stream, stream + STREAMS_PER_ROW * place[row])

    def on_lines(values: torch.Tensor, fill: int) -> torch.Tensor:
        lines = torch.full(shape, fill)
        lines[line[row], column] = values
        return lines

    is_asked = asked[row, order]
    asked_position, flat = source[is_asked], line[row] * shape[1] + column
    by_position = asked_position.argsort()
    layout = PackedLayout(
        input_ids=on_lines(ids[row, order], 0),
        position_ids=on_lines(position.flatten()[source], 0),
        stream=on_lines(stream, PADDING_STREAM),
        block=on_lines(torch.where(valid_BL.flatten()[source], block.flatten()[source], -1), -1),
        source=on_lines(source, -1),
        asked=flat[is_asked][by_position],
        asked_position=asked_position[by_position],
    )
    if spec.shifted:
        layout.asked = _previous_column(layout.stream, layout.position_ids).flatten()[layout.asked]
    return layout


def _lines(widths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Line, first column, and place among the rows of that line of each row, (B,): the widest row first, each into the
    first line that has room for it beside the others."""
    widths, room, rows_of = widths_B.tolist(), [], []
    places = torch.zeros(3, len(widths), dtype=torch.long)
    for row in sorted(range(len(widths)), key=lambda row: -widths[row]):
        line = next((line for line, left in enumerate(room) if left >= widths[row]), len(room))
        if line == len(room):
            room.append(max(widths))
            rows_of.append(0)
        places[:, row] = torch.tensor([line, max(widths) - room[line], rows_of[line]])
        room[line] -= widths[row]
        rows_of[line] += 1
    return places[0], places[1], places[2]


def _copies(ids, valid, masks, block, num_blocks, spec, pack) -> list[tuple[torch.Tensor, ...]]:
    """Ids, stream, columns to keep and asked columns (B, L) of each noised copy and of the clean one."""
    copies = []
    last_block = torch.full((len(ids), 1), -1)
    for index, mask in enumerate(masks):
        kept_blocks = torch.zeros(len(ids), num_blocks, dtype=torch.long).scatter_add_(1, block, mask.long()) > 0
        block_numbers = torch.where(kept_blocks, torch.arange(num_blocks), -1)
        last_block = torch.maximum(last_block, block_numbers.amax(1, keepdim=True))
        keep = valid & kept_blocks.gather(1, block) if pack else torch.ones_like(valid)
        stream = torch.where(valid, NOISED_STREAM + index, PADDING_STREAM)
        copies.append((torch.where(mask, spec.mask_token_id, ids), stream, keep, mask))
    if spec.clean_copy:
        keep = valid & (block < last_block) if pack else torch.ones_like(valid)
        copies.append((ids, torch.where(valid, CLEAN_STREAM, PADDING_STREAM), keep, torch.zeros_like(valid)))
    return copies


def _previous_column(stream_DP: torch.Tensor, position_DP: torch.Tensor) -> torch.Tensor:
    """Flat index of the column that holds the position before, in the same copy; at position 0 the column itself."""
    own = torch.arange(stream_DP.shape[1]).expand_as(stream_DP)
    last_real = torch.where(stream_DP == PADDING_STREAM, -1, own).cummax(1).values
    before = torch.cat([own[:, :1], last_real[:, :-1]], 1)
    line = torch.arange(len(stream_DP))[:, None]
    return line * stream_DP.shape[1] + torch.where(position_DP == 0, own, before)
