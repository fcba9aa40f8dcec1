"""Which positions a network is run on: noised copies and a clean copy of each row, packed.

A block of a noised copy without any masked position carries no loss, and no other block sees it; nothing sees the
clean copy of the last block with masked positions, or of those after it. Both are left out, which changes no logit
that is asked for. What is left of short rows is then packed: several rows share a line as long as what is left of the
longest one, and do not see each other.

Shapes: B rows, L positions, D lines of P packed columns, N asked positions. All on the host.
"""

from dataclasses import dataclass, fields

import torch

from ..models.masked_diffusion import CLEAN_STREAM, NOISED_STREAM, PADDING_STREAM, STREAMS_PER_ROW


@dataclass(frozen=True)
class LayoutSpec:
    """How one network is fed.

    Args:
        mask_token_id (`int`, *optional*): id of its [MASK]; None for an autoregressive network.
        block_size (`int`, *optional*): tokens per block, counted from position 0; None: the whole row is one block.
        clean_copy (`bool`): whether the clean copy of earlier blocks stands beside the noised sequence.
        shifted (`bool`): whether its logits at position i − 1 are those of position i (position 0 predicts itself).
        causal (`bool`): whether inside a block everything is causal, with the unmasked tokens first and every token at
            its own position; otherwise a block is bidirectional.
        autoregressive (`bool`): whether it is run on clean rows, see [`causal_layout`].

    Raises:
        ValueError: for a shifted network with blocks: the position before a block lies in another one, which a packed
            layout may leave out.
    """

    mask_token_id: int | None
    block_size: int | None
    clean_copy: bool = True
    shifted: bool = False
    causal: bool = False
    autoregressive: bool = False

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


def block_numbers(valid_BL: torch.Tensor, block_size: int | None) -> torch.Tensor:
    """The block that each position lies in, `(B, L)`, never decreasing along a row.

    Args:
        valid_BL (`torch.BoolTensor` of shape `(B, L)`): False at padding. Blocks are counted over the valid columns.
        block_size (`int`, *optional*): tokens per block; None: the whole row is block 0.
    """
    position = _positions(valid_BL)
    return position // block_size if block_size else torch.zeros_like(position)


def _positions(valid_BL: torch.Tensor) -> torch.Tensor:
    """Each column's position in its row, counted over the valid ones; at padding that of the column before."""
    return valid_BL.long().cumsum(-1).sub(1).clamp(min=0)


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
    position = _positions(valid_BL)
    block = block_numbers(valid_BL, spec.block_size)
    ids, stream, keep, asked = _copies(input_ids_BL, valid_BL, masks_BL, block, spec, pack)
    row, column = _kept_columns(keep, asked, block, spec)

    widths = keep.sum(1)
    line, start, place = _lines(widths)
    # at least one line and one column, so that an empty batch still runs and has a graph
    shape = (int(line.max()) + 1, max(int(widths.max()), 1)) if num_rows else (1, 1)
    rank = torch.arange(len(row)) - (widths.cumsum(0) - widths)[row]  # of each kept column in its row
    target = line[row] * shape[1] + start[row] + rank

    def on_lines(values: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.full((shape[0] * shape[1],), fill).scatter_(0, target, values).view(shape)

    source = row * length + column % length
    stream = stream[row, column]
    # rows on one line tell each other apart by their streams
    stream = torch.where(stream == PADDING_STREAM, stream, stream + STREAMS_PER_ROW * place[row])
    is_asked = asked[row, column]
    by_position = source[is_asked].argsort()  # a position is asked in one copy, and copies come one after the other
    layout = PackedLayout(
        input_ids=on_lines(ids[row, column], 0),
        position_ids=on_lines(position.flatten()[source], 0),
        stream=on_lines(stream, PADDING_STREAM),
        block=on_lines(torch.where(valid_BL, block, -1).flatten()[source], -1),
        source=on_lines(source, -1),
        asked=target[is_asked][by_position],
        asked_position=source[is_asked][by_position],
    )
    if spec.shifted:
        layout.asked = _previous_column(layout.stream, layout.position_ids).flatten()[layout.asked]
    return layout


def causal_layout(input_ids_BL: torch.Tensor, valid_BL: torch.Tensor, asked_BL: torch.Tensor) -> PackedLayout:
    """Lays out clean rows for an autoregressive network, whose prediction of a token stands at the one before.

    Each row has a line of its own and begins in its first column, so that the network needs no mask but its own: what
    pads a line stands behind the row, where no token sees it. Nothing is hidden, so the layout depends on the noise
    only in where a row ends: at the last column that is asked. Rows where nothing is asked are left out.

    Args:
        input_ids_BL (`torch.LongTensor` of shape `(B, L)`): clean tokens, padded anywhere.
        valid_BL (`torch.BoolTensor` of shape `(B, L)`): False at padding.
        asked_BL (`torch.BoolTensor` of shape `(B, L)`): positions to predict, inside `valid_BL`; never a row's first,
            which nothing stands before.

    Returns:
        [`PackedLayout`]
    """
    position = _positions(valid_BL)
    assert not (asked_BL & (position == 0)).any()
    width_B = torch.where(asked_BL, position, 0).amax(1) if asked_BL.numel() else asked_BL.new_zeros(0).long()
    line = (width_B > 0).long().cumsum(0) - 1
    shape = (max(int((width_B > 0).sum()), 1), max(int(width_B.max()) if len(width_B) else 0, 1))
    row, column = (valid_BL & (position < width_B[:, None])).nonzero(as_tuple=True)
    target = line[row] * shape[1] + position[row, column]

    def on_lines(values: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.full((shape[0] * shape[1],), fill).scatter_(0, target, values).view(shape)

    asked_row, asked_column = asked_BL.nonzero(as_tuple=True)
    return PackedLayout(
        input_ids=on_lines(input_ids_BL[row, column], 0),
        position_ids=on_lines(position[row, column], 0),
        stream=on_lines(torch.full_like(row, CLEAN_STREAM), PADDING_STREAM),
        block=on_lines(torch.zeros_like(row), -1),
        source=on_lines(row * input_ids_BL.shape[1] + column, -1),
        asked=line[asked_row] * shape[1] + position[asked_row, asked_column] - 1,
        asked_position=asked_row * input_ids_BL.shape[1] + asked_column,
    )


def _copies(ids, valid, masks, block, spec: LayoutSpec, pack: bool) -> tuple[torch.Tensor, ...]:
    """Ids, stream, columns to keep and asked columns of the noised copies and the clean one, side by side, (B, C · L).

    No asked position sees a noised block without any, nor the clean copy from the row's last asked block on.
    """
    copies = []
    last_block = torch.full((len(ids), 1), -1)
    for index, mask in enumerate(masks):
        # (B, L): block numbers are less than L, so one column per position is enough
        is_asked = torch.zeros_like(block).scatter_add_(1, block, mask.long()) > 0
        last_block = torch.cat([last_block, torch.where(mask, block, -1)], 1).amax(1, keepdim=True)
        keep = valid & is_asked.gather(1, block) if pack else torch.ones_like(valid)
        stream = torch.where(valid, NOISED_STREAM + index, PADDING_STREAM)
        copies.append((torch.where(mask, spec.mask_token_id, ids), stream, keep, mask))
    if spec.clean_copy:
        keep = valid & (block < last_block) if pack else torch.ones_like(valid)
        copies.append((ids, torch.where(valid, CLEAN_STREAM, PADDING_STREAM), keep, torch.zeros_like(valid)))
    return tuple(torch.cat(parts, 1) for parts in zip(*copies, strict=True))


def _kept_columns(keep, asked, block, spec: LayoutSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of what is kept, row by row, in each row copy by copy, in the order in which it is laid out."""
    row, column = keep.nonzero(as_tuple=True)
    if not spec.causal:
        return row, column
    # Inside a block a causal network sees what stands before, so what is masked goes to its end. The key counts blocks
    # over all rows and copies (L of each are enough) and is 1 higher for what is masked; the sort is stable, so that
    # on either side of that line columns stay in the order of the text.
    length = max(block.shape[1], 1)
    number = (row * (keep.shape[1] // length) + column // length) * length + block[row, column % length]
    order = (2 * number + asked[row, column]).argsort(stable=True)
    return row[order], column[order]


def _lines(widths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Line, first column, and place among the rows of that line of each row, (B,).

    First fit, widest first: a line is as long as the widest row, and each row goes into the first line that has room
    for it. That takes at most 11/9 of the fewest possible lines, plus one, and makes no row longer than it is.
    """
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


def _previous_column(stream_DP: torch.Tensor, position_DP: torch.Tensor) -> torch.Tensor:
    """Flat index of the column that holds the position before, in the same copy; at position 0 the column itself."""
    own = torch.arange(stream_DP.shape[1]).expand_as(stream_DP)
    last_real = torch.where(stream_DP == PADDING_STREAM, -1, own).cummax(1).values
    before = torch.cat([own[:, :1], last_real[:, :-1]], 1)
    line = torch.arange(len(stream_DP))[:, None]
    return line * stream_DP.shape[1] + torch.where(position_DP == 0, own, before)
