"""Which positions are masked: functions of uniform draws, so that tests, recorded cases and runs share them.

Shapes: B rows, L positions, C chunks. All on the host.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..models.masked_diffusion import TIME_EPSILON, loss_weight, masked_probability


def row_uniforms(
    seed: int, epoch: int | None, row_keys: Sequence[int], length: int, stream: int | None = None
) -> tuple[torch.Tensor, ...]:
    """Uniform draws in [0, 1), keyed by (seed, epoch, row key): the same on any machine, in any batch, after a resume.

    Each row draws its positions in order, so that its first numbers do not depend on how far the batch is padded.

    Args:
        seed (`int`): of the run.
        epoch (`int`, *optional*): number of the pass over the data, from 0; None for evaluation, whose noise is the
            same in every epoch and differs from that of every training epoch.
        row_keys (`Sequence[int]`): 64-bit integers, one per row: see [`~tide_hf.data.row_key`].
        length (`int`): L, columns of the padded batch.
        stream (`int`, *optional*): number of an independent set of draws, for methods that noise a row more than once.

    Returns:
        three float32 tensors: time draws `(B,)`, mask draws `(B, L)`, CompDemo draws `(B, L)`. Across tokenizers,
        CompDemo splits chunks and uses the first C of the last.
    """
    draws = np.empty((len(row_keys), 2 * length + 1), dtype=np.float32)
    # numpy pads shorter keys with zeros, so every key has all five numbers, and 0 stands for "none"
    purpose = [0 if epoch is None else epoch + 1, 0 if stream is None else stream + 1]
    for index, row_key in enumerate(row_keys):
        low, high = int(row_key) & 0xFFFFFFFF, int(row_key) >> 32 & 0xFFFFFFFF
        generator = np.random.default_rng([seed, low, high, *purpose])
        # position by position (mask, demo), so that padding at the end leaves the draws of real positions alone
        draws[index] = generator.random(2 * length + 1, dtype=np.float32)
    draws = torch.from_numpy(draws)
    return draws[:, 0], draws[:, 1::2], draws[:, 2::2]


def diffusion_time(uniform_B: torch.Tensor, time_epsilon: float = TIME_EPSILON) -> torch.Tensor:
    """t = ε + (1 − ε) u, in [ε, 1), of draws `uniform_B` in [0, 1) and ε = `time_epsilon`."""
    return time_epsilon + (1 - time_epsilon) * uniform_B


def mask_positions(
    uniform_BL: torch.Tensor, t_B: torch.Tensor, labels_BL: torch.Tensor, schedule: str = "linear"
) -> torch.Tensor:
    """Masks each trained-on position with probability 1 − α(t), independently of the others; never a prompt.

    Args:
        uniform_BL (`torch.Tensor` of shape `(B, L)`): draws in [0, 1).
        t_B (`torch.Tensor` of shape `(B,)`): times in (0, 1].
        labels_BL (`torch.LongTensor` of shape `(B, L)`): −100 where not trained on.
        schedule (`str`): a name in [`~tide_hf.models.SCHEDULES`].

    Returns:
        `torch.BoolTensor` of shape `(B, L)`.

    Source: MDLM 2406.07524 §3.
    """
    return (uniform_BL < masked_probability(t_B, schedule)[:, None]) & (labels_BL != -100)


def suffix_masks(
    uniform_BL: torch.Tensor, block_BL: torch.Tensor, labels_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks the end of each block: of its n trained-on tokens those from a cut on, which is uniform on 0 … n−1.

    The j-th of them, from 0, is masked with probability (j+1)/n. Weighted by the reciprocal, its nats count once on
    average, as under −α′/(1−α) at random times.

    Args:
        uniform_BL (`torch.Tensor` of shape `(B, L)`): draws in [0, 1); the b-th is that of block b.
        block_BL (`torch.LongTensor` of shape `(B, L)`): block number of each position, never decreasing along a row.
        labels_BL (`torch.LongTensor` of shape `(B, L)`): −100 where not trained on.

    Returns:
        the mask, bool `(B, L)`, and the probability with which each trained-on position is masked, `(B, L)`, 0
        elsewhere.
    """
    trained = (labels_BL != -100).long()
    size_BK = torch.zeros_like(block_BL).scatter_add_(1, block_BL, trained)
    before_BK = size_BK.cumsum(1) - size_BK
    rank = trained.cumsum(1) - 1 - before_BK.gather(1, block_BL)
    # a product with a draw just below 1 may be rounded to n
    cut_BK = torch.minimum((uniform_BL * size_BK).long(), (size_BK - 1).clamp(min=0))
    masked = (trained == 1) & (rank >= cut_BK.gather(1, block_BL))
    return masked, trained * (rank + 1) / size_BK.gather(1, block_BL).clamp(min=1)


def suffix_loss_weight(
    probability_BL: torch.Tensor, block_BL: torch.Tensor, chunk_ids_BL: torch.Tensor, num_chunks: int
) -> torch.Tensor:
    """1/P, P the probability with which a position is masked by [`suffix_masks`] and the completion of its chunk.

    The cuts of blocks are independent, and inside a block a chunk is hit as soon as its last token there is: P = 1 −
    Π (1 − p) over the last token of the chunk in each of its blocks.

    Args:
        probability_BL (`torch.Tensor` of shape `(B, L)`): of [`suffix_masks`].
        block_BL (`torch.LongTensor` of shape `(B, L)`): block number of each position.
        chunk_ids_BL (`torch.LongTensor` of shape `(B, L)`): chunk of each position, −1 for none; a chunk's trained-on
            tokens are consecutive.
        num_chunks (`int`): C.

    Returns:
        `torch.Tensor` of shape `(B, L)`, 0 where not trained on.
    """
    trained = probability_BL > 0
    same = (chunk_ids_BL[:, 1:] == chunk_ids_BL[:, :-1]) & (block_BL[:, 1:] == block_BL[:, :-1]) & trained[:, 1:]
    is_last = trained & ~torch.nn.functional.pad(same, (0, 1))
    index = torch.where(is_last & (chunk_ids_BL >= 0), chunk_ids_BL, num_chunks)
    log_missed = torch.zeros(len(trained), num_chunks + 1).scatter_add_(1, index, torch.log1p(-probability_BL))
    hit_BL = -torch.expm1(log_missed.gather(1, index.where(chunk_ids_BL < 0, chunk_ids_BL)))
    probability = torch.where(chunk_ids_BL >= 0, hit_BL, probability_BL)
    return torch.where(trained, 1 / probability, 0.0)


def complete_chunks(
    masked_BL: torch.Tensor, chunk_ids_BL: torch.Tensor, labels_BL: torch.Tensor, num_chunks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks every chunk as a whole as soon as one of its tokens is masked.

    Args:
        masked_BL (`torch.BoolTensor` of shape `(B, L)`): token-wise mask.
        chunk_ids_BL (`torch.LongTensor` of shape `(B, L)`): chunk of each student token, −1 for none.
        labels_BL (`torch.LongTensor` of shape `(B, L)`): −100 where not trained on.
        num_chunks (`int`): C.

    Returns:
        the completed mask `(B, L)`: all trained-on tokens of a hit chunk; and `(B, C)`, the chunks that were hit.
    """
    hit_BC = masked_chunks(masked_BL, chunk_ids_BL, num_chunks)
    return masked_BL | (chunk_member(hit_BC, chunk_ids_BL) & (labels_BL != -100)), hit_BC


def masked_chunks(selected_BL: torch.Tensor, chunk_ids_BL: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Chunks that hold a selected position.

    Args:
        selected_BL (`torch.BoolTensor` of shape `(B, L)`): positions.
        chunk_ids_BL (`torch.LongTensor` of shape `(B, L)`): chunk of each position, −1 for none.
        num_chunks (`int`): C.

    Returns:
        `torch.BoolTensor` of shape `(B, C)`.
    """
    # positions without a chunk go into one more column, which is dropped
    index = torch.where(selected_BL & (chunk_ids_BL >= 0), chunk_ids_BL, num_chunks)
    hit = torch.zeros(len(selected_BL), num_chunks + 1, dtype=torch.bool)
    return hit.scatter_(1, index, True)[:, :num_chunks]


def chunk_member(flag_BC: torch.Tensor, chunk_ids_BL: torch.Tensor) -> torch.Tensor:
    """Positions whose chunk has the flag, bool `(B, L)`; False for positions in no chunk.

    Args:
        flag_BC (`torch.BoolTensor` of shape `(B, C)`): of each chunk.
        chunk_ids_BL (`torch.LongTensor` of shape `(B, L)`): chunk of each position, −1 for none.
    """
    padded = torch.cat([flag_BC, flag_BC.new_zeros(len(flag_BC), 1)], dim=1)
    return padded.gather(1, torch.where(chunk_ids_BL >= 0, chunk_ids_BL, flag_BC.shape[1]))


def complementary_split(
    masked: torch.Tensor, uniform: torch.Tensor, demo_ratio: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """CompDemo's parts A and B of the masked positions (or chunks): A with probability `demo_ratio`, else B.

    Teacher pass 1 sees A revealed and B masked, pass 2 the reverse.

    Args:
        masked (`torch.BoolTensor`): positions `(B, L)` or chunks `(B, C)`.
        uniform (`torch.Tensor` of the same shape): draws in [0, 1).
        demo_ratio (`float`): share of A.

    Source: TIDE 2604.26951 §2.2.
    """
    part_a = masked & (uniform < demo_ratio)
    return part_a, masked & ~part_a


def chunk_loss_weight(t: torch.Tensor, num_tokens: torch.Tensor, schedule: str = "linear") -> torch.Tensor:
    """−α′(t) / (1 − α(t)^k): the exact weight of a position masked by completion of a chunk of k trained-on tokens.

    A chunk is masked whole as soon as one of its k tokens is, which has probability 1 − α^k.

    Args:
        t (`torch.Tensor`): times in (0, 1], of any shape.
        num_tokens (`torch.Tensor`): k, at least 1, of the same shape.
        schedule (`str`): a name in [`~tide_hf.models.SCHEDULES`].
    """
    masked = masked_probability(t, schedule)
    return loss_weight(t, schedule) * masked / -torch.expm1(num_tokens * torch.log1p(-masked))
