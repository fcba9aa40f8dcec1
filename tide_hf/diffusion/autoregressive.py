"""Where the prediction of an autoregressive teacher is a target for a student that sees tokens on both sides.

Shapes: B rows, L positions, C chunks. All on the host.
"""

import torch

from .corruption import masked_chunks


def exact_chunks(
    visible_BL: torch.Tensor, block_BL: torch.Tensor, chunk_ids_BL: torch.Tensor, hit_BC: torch.Tensor
) -> torch.Tensor:
    """Masked chunks with no token to their right that the student sees, in the block or blocks that they lie in.

    There p(token | all tokens before), averaged over those before that the student does not see, is the probability
    of the token given what it does see. A visible token to the right says more than the teacher knows, and its
    prediction is biased.

    Args:
        visible_BL (`torch.BoolTensor` of shape `(B, L)`): tokens that the student sees in its noised copy.
        block_BL (`torch.LongTensor` of shape `(B, L)`): block number of each position, never decreasing along a row.
        chunk_ids_BL (`torch.LongTensor` of shape `(B, L)`): chunk of each student token, −1 for none.
        hit_BC (`torch.BoolTensor` of shape `(B, C)`): masked chunks.

    Returns:
        `torch.BoolTensor` of shape `(B, C)`.
    """
    column = torch.arange(visible_BL.shape[1]).expand_as(block_BL)
    last_BK = torch.full_like(block_BL, -1).scatter_reduce_(
        1, block_BL, torch.where(visible_BL, column, -1), reduce="amax"
    )
    sees_more = column < last_BK.gather(1, block_BL)
    return hit_BC & ~masked_chunks(sees_more, chunk_ids_BL, hit_BC.shape[1])


def predictable_chunks(
    input_ids_BL: torch.Tensor, valid_BL: torch.Tensor, chunk_ids_BL: torch.Tensor, wanted_BC: torch.Tensor
) -> torch.Tensor:
    """Chunks about which an autoregressive teacher has something to say.

    Nothing predicts a row's first token. Behind the end of a text the teacher was never trained on anything: where a
    row ends in several equal tokens, as one filled with EOS does, those after the first of them are left out.

    Args:
        input_ids_BL (`torch.LongTensor` of shape `(B, L)`): the teacher's tokens.
        valid_BL (`torch.BoolTensor` of shape `(B, L)`): False at padding.
        chunk_ids_BL (`torch.LongTensor` of shape `(B, L)`): chunk of each of them, −1 for none.
        wanted_BC (`torch.BoolTensor` of shape `(B, C)`): chunks to choose from.

    Returns:
        `torch.BoolTensor` of shape `(B, C)`.
    """
    if not valid_BL.shape[1]:
        return torch.zeros_like(wanted_BC)
    count = valid_BL.cumsum(1)
    column = torch.arange(valid_BL.shape[1])
    last_B = torch.where(valid_BL, column, 0).amax(1, keepdim=True)
    other = valid_BL & (input_ids_BL != input_ids_BL.gather(1, last_B))
    last_other_B = torch.where(other, column, -1).amax(1, keepdim=True)
    # the first of the equal tokens stands right after the last other one
    first_B = count.gather(1, last_other_B.clamp(min=0)) * (last_other_B >= 0) + 1
    unpredictable = valid_BL & ((count == 1) | (count > first_B))
    return wanted_BC & ~masked_chunks(unpredictable, chunk_ids_BL, wanted_BC.shape[1])
