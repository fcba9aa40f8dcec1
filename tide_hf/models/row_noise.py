"""Noise that belongs to a row: the same in every batch, order, padding and process, and on every device.

Random numbers are hashes of (row, draw, position), made of integer operations on 32-bit values that are held in int64
and never overflow. Nothing here has a state that the shape of a batch could advance, as torch's generators have, and
the host never waits for the device. This file travels with checkpoints: it imports torch alone.

Shapes: B rows, L positions.
"""

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIER = 0x45D9F3B  # below 2^27, so that a product with a 32-bit value fits into int64


def row_keys(input_ids: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A key of each row's content, whatever its padding: rows of equal tokens and labels share it, in any batch.

    Args:
        input_ids, labels (`torch.LongTensor` of shape `(B, L)`): tokens, and what is trained on (−100 elsewhere).
        valid (`torch.BoolTensor` of shape `(B, L)`): False at padding.

    Returns:
        `torch.LongTensor` of shape `(B,)`, in [0, 2³²).
    """
    # each token is hashed with its position and label, and the row is their sum: addition needs no order
    tokens_BL = _mixed(_mixed(_mixed(row_positions(valid)) ^ input_ids.long()) ^ (labels.long() & _WORD))
    return _mixed((tokens_BL * valid).sum(-1) & _WORD)


def row_positions(valid: torch.Tensor) -> torch.Tensor:
    """Each position's number among the valid ones of its row, from 1; `(B, L)`. At padding it has no meaning.

    Args:
        valid (`torch.BoolTensor` of shape `(B, L)`): False at padding.
    """
    return valid.long().cumsum(-1)


def fresh_keys(keys_B: torch.Tensor) -> torch.Tensor:
    """Keys for one training step: one number of torch's generator, each row's content, and its place in the batch.

    Thanks to the content, processes with the same seed draw different noise; thanks to the place, so do equal rows of
    one batch.

    Args:
        keys_B (`torch.LongTensor` of shape `(B,)`): of [`row_keys`].
    """
    call = torch.randint(0, 1 << 31, (1,), device=keys_B.device)
    place_B = torch.arange(len(keys_B), device=keys_B.device)
    return _mixed(_mixed(_mixed(call) ^ place_B) ^ keys_B)


def uniforms(keys_B: torch.Tensor, draw: int, positions_BL: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1), multiples of 2⁻²⁴, `(B, L)`.

    Args:
        keys_B (`torch.LongTensor` of shape `(B,)`): of the rows.
        draw (`int`): which of a row's independent draws, from 0.
        positions_BL (`torch.LongTensor` of shape `(B, L)`): of [`row_positions`].
    """
    return (_words(keys_B, draw, positions_BL) >> 8).float() / (1 << 24)


def random_tokens(keys_B: torch.Tensor, draw: int, positions_BL: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Tokens drawn uniformly from [0, vocab_size), `(B, L)`; `keys_B`, `draw`, `positions_BL` as in [`uniforms`]."""
    # the upper 32 bits of bits · V: uniform in [0, V) without a division
    return (_words(keys_B, draw, positions_BL) * vocab_size) >> 32


def stratified_times(keys_B: torch.Tensor, draw: int, number: int, num_times: int) -> torch.Tensor:
    """A uniform number from part `number` of the `num_times` equal parts of [0, 1), `(B, 1)`.

    Position 0, which no token has, is the one that `keys_B` and `draw` are hashed with.
    """
    at_BL = torch.zeros(len(keys_B), 1, dtype=torch.long, device=keys_B.device)
    return (number + uniforms(keys_B, draw, at_BL)) / num_times


class RowDraws:
    """Draws of a decoder that belong to its rows: to be given to [`Decoder`] instead of a `torch.Generator`.

    Args:
        keys_B (`torch.LongTensor` of shape `(B,)`): of the rows, in [0, 2³²).
    """

    def __init__(self, keys_B: torch.LongTensor):
        self.keys_B = keys_B

    def tokens(
        self, probability_NV: torch.Tensor, row_N: torch.LongTensor, position_N: torch.LongTensor, draw: int
    ) -> torch.LongTensor:
        """A token for each of N positions, `(N,)`: the inverse of the cumulative distribution, in float64.

        Args:
            probability_NV (`torch.Tensor` of shape `(N, V)`): of each token.
            row_N, position_N (`torch.LongTensor` of shape `(N,)`): where in the batch each position is.
            draw (`int`): which of a position's independent draws, from 0.
        """
        keys_N, at_N1 = self.keys_B[row_N], position_N[:, None]
        # 24 bits alone could not tell apart the rarest tokens of a large vocabulary
        coarse, fine = (uniforms(keys_N, 2 * draw + part, at_N1).double() for part in (0, 1))
        below_NV = probability_NV.double().cumsum(-1)
        # the first token beyond the draw: one of probability 0 adds nothing and is never the first
        return torch.searchsorted(below_NV, (coarse + fine / (1 << 24)) * below_NV[:, -1:], right=True).squeeze(-1)


def _words(keys_B, draw: int, positions_BL):
    """32 random bits of each position."""
    stream_B1 = _mixed(_mixed(keys_B) ^ (draw + 1))[:, None]
    return _mixed(_mixed(_mixed(positions_BL) ^ stream_B1) + stream_B1 & _WORD)


def _mixed(word):
    """A permutation of the 32-bit numbers that leaves no visible pattern (two rounds of shift, xor and multiply)."""
    for _ in range(2):
        word = ((word >> 16) ^ word) * _MULTIPLIER & _WORD
    return (word >> 16) ^ word


def mean_nats(nats_B: torch.Tensor, num_trained_B: torch.Tensor, num_items_in_batch, training: bool) -> torch.Tensor:
    """The loss of a call: in training a mean over tokens, in evaluation a mean over rows of each row's own mean.

    An evaluation loop averages the calls' losses, weighted by their numbers of rows; a mean over tokens would
    therefore depend on which rows share a batch. For the same reason, a row without trained-on tokens counts as 0.

    Args:
        nats_B (`torch.Tensor` of shape `(B,)`): weighted nats of each row, summed over its tokens.
        num_trained_B (`torch.LongTensor` of shape `(B,)`): trained-on tokens of each row.
        num_items_in_batch (`torch.Tensor` or `float`, *optional*): trained-on tokens of the whole batch, of which this
            call may be a part. In training it is the divisor; in evaluation it gives this call's share of the loss.
        training (`bool`): of the model.
    """
    num_own = num_trained_B.sum()
    if training:
        return nats_B.sum() / (num_own.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    loss = (nats_B / num_trained_B.clamp(min=1)).mean()
    if num_items_in_batch is None:
        return loss
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    num_processes = torch.distributed.get_world_size() if distributed else 1
    if num_processes == 1:
        return loss * (num_own / num_items_in_batch)
    # Trainer counts the tokens of all processes, multiplies each one's loss by their number, and takes the mean
    return loss * torch.where(num_own == num_items_in_batch, 1.0, 1.0 / num_processes)
