"""Which positions a network is run on: noised copies and a clean copy of each row, packed.

A block of a noised copy that holds no masked position carries no loss and is seen by nobody; a clean block behind the
last such block is seen by nobody either. Both are left out, which changes no logit that is asked for.

Shapes: B rows, L positions, P packed columns, N asked positions. All on the host.
"""

from dataclasses import dataclass, fields

import torch

from ..models.masked_diffusion import CLEAN_STREAM, NOISED_STREAM, PADDING_STREAM


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
        input_ids, position_ids, stream, block (`torch.LongTensor` of shape `(B, P)`): token, position in the row, copy
            (see `models.masked_diffusion`) and block number of each column.
        asked (`torch.LongTensor` of shape `(N,)`): flat index (row · P + column) of the column that predicts each
            masked position, row by row, and in each row by position: its own column, or the one before (`shifted`).
        asked_position (`torch.LongTensor` of shape `(N,)`): flat index (row · L + position) of the same in the rows.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    stream: torch.Tensor
    block: torch.Tensor
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
    """Lays out [x_t …; x0]: one noised copy per mask, then the clean copy.

    Args:
        input_ids_BL (`torch.LongTensor` of shape `(B, L)`): clean tokens, padded anywhere.
        valid_BL (`torch.BoolTensor` of shape `(B, L)`): False at padding. Positions count the valid columns from 0.
        masks_BL (`list[torch.BoolTensor]`): masked positions of each noised copy, disjoint, inside `valid_BL`.
        spec ([`LayoutSpec`]): how the network is fed.
        pack (`bool`): False keeps every block and every padding column: the textbook [xt ; x0].

    Returns:
        [`PackedLayout`]
    """
    num_rows, length = input_ids_BL.shape
    position = valid_BL.long().cumsum(-1).sub(1).clamp(min=0)
    block = position // spec.block_size if spec.block_size else torch.zeros_like(position)
    num_blocks = int(block.max()) + 1 if block.numel() else 1

    copies = _copies(input_ids_BL, valid_BL, masks_BL, block, num_blocks, spec, pack)
    ids, stream, keep, asked = (torch.cat(parts, 1) for parts in zip(*copies, strict=True))
    column = torch.arange(length).repeat(len(copies)).expand(num_rows, -1)

    # kept columns first, in order; at least one column, so that an empty batch still runs and has a graph
    width = max(int(keep.sum(1).max()), 1)
    rank = torch.zeros_like(ids)
    if spec.causal:
        # unmasked columns of a noised block before its masked ones: the order in which a causal network may see them
        copy_number = torch.arange(len(copies)).repeat_interleave(length)
        rank = 2 * (copy_number * num_blocks + block.repeat(1, len(copies))) + asked
    order = torch.argsort(rank.masked_fill(~keep, torch.iinfo(rank.dtype).max), dim=1, stable=True)[:, :width]
    keep, column = keep.gather(1, order), column.gather(1, order)
    asked = asked.gather(1, order) & keep
    row, packed_column = asked.nonzero(as_tuple=True)
    asked_position = row * length + column[row, packed_column]
    by_position = asked_position.argsort()
    stream = torch.where(keep, stream.gather(1, order), PADDING_STREAM)
    if spec.shifted:
        previous = _previous_column(stream, position.gather(1, column))
        packed_column = previous[row, packed_column]
    return PackedLayout(
        input_ids=ids.gather(1, order),
        position_ids=position.gather(1, column),
        stream=stream,
        block=torch.where(keep & valid_BL.gather(1, column), block.gather(1, column), -1),
        asked=(row * width + packed_column)[by_position],
        asked_position=asked_position[by_position],
    )


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


def _previous_column(stream_BP: torch.Tensor, position_BP: torch.Tensor) -> torch.Tensor:
    """The column that holds the position before, in the same copy; at position 0 the column itself."""
    own = torch.arange(stream_BP.shape[1]).expand_as(stream_BP)
    last_real = torch.where(stream_BP == PADDING_STREAM, -1, own).cummax(1).values
    before = torch.cat([own[:, :1], last_real[:, :-1]], 1)
    return torch.where(position_BP == 0, own, before)
