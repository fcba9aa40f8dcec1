"""Noise that belongs to a row: the same in every batch, order, padding, process and on every device.

Random numbers are hashes of (row, draw, position), made of integer operations on 32-bit values that are held in int64
and never overflow: no generator has a state that a batch's shape could move, and no device is waited for. This file
travels with checkpoints: it imports torch alone.

Shapes: B rows, L positions.
"""

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIER = 0x45D9F3B  # below 2^27, so that a product with a 32-bit value fits into int64


def row_keys(input_ids: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """A key of each row's content, blind to padding: rows of equal tokens and labels share it, in any batch.

    Args:
        input_ids, labels (`torch.LongTensor` of shape `(B, L)`): tokens, and what is trained on (−100 elsewhere).
        valid (`torch.BoolTensor` of shape `(B, L)`): False at padding.

    Returns:
        `torch.LongTensor` of shape `(B,)`, in [0, 2³²).
    """
    tokens_BL = _mixed(_mixed(_mixed(row_positions(valid)) ^ input_ids.long()) ^ (labels.long() & _WORD))
    return _mixed((tokens_BL * valid).sum(-1) & _WORD)


def row_positions(valid: torch.Tensor) -> torch.Tensor:
    """Each position's number among its row's own, from 1; `(B, L)`. What stands at padding says nothing."""
    return valid.long().cumsum(-1)


def fresh_keys(keys_B: torch.Tensor) -> torch.Tensor:
    """Keys for one training step: one number of torch's generator, each row's content, and its place in the batch.

    The content lets processes of one seed draw differently; the place, equal rows of one batch.
    """
    call = torch.randint(0, 1 << 31, (1,), device=keys_B.device)
    place_B = torch.arange(len(keys_B), device=keys_B.device)
    return _mixed(_mixed(_mixed(call) ^ place_B) ^ keys_B)


def uniforms(keys_B: torch.Tensor, draw: int, positions_BL: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1), a multiple of 2⁻²⁴ each, for the given draw at the given positions; `(B, L)`."""
    return (_words(keys_B, draw, positions_BL) >> 8).float() / (1 << 24)


def random_tokens(keys_B: torch.Tensor, draw: int, positions_BL: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Tokens drawn uniformly from the vocabulary, `(B, L)`."""
    return (_words(keys_B, draw, positions_BL) * vocab_size) >> 32


def stratified_times(keys_B: torch.Tensor, draw: int, number: int, num_times: int) -> torch.Tensor:
    """The `number`-th of `num_times` uniform numbers, each in its own of as many equal parts of [0, 1); `(B, 1)`."""
    at_BL = torch.zeros(len(keys_B), 1, dtype=torch.long, device=keys_B.device)
    return (number + uniforms(keys_B, draw, at_BL)) / num_times


def _words(keys_B, draw: int, positions_BL):
    """32 random bits of each position."""
    stream_B1 = _mixed(_mixed(keys_B) ^ (draw + 1))[:, None]
    return _mixed(_mixed(_mixed(positions_BL) ^ stream_B1) + stream_B1 & _WORD)


def _mixed(word):
    """A permutation of the 32-bit numbers that leaves no pattern behind (two rounds of multiply and shift)."""
    for _ in range(2):
        word = ((word >> 16) ^ word) * _MULTIPLIER & _WORD
    return (word >> 16) ^ word


def mean_nats(nats_B: torch.Tensor, num_trained_B: torch.Tensor, num_items_in_batch, training: bool) -> torch.Tensor:
    """The loss of a call: in training a mean over tokens, in evaluation a mean over rows of each row's own mean.

    An evaluation loop averages the calls' losses by their number of rows, so that a mean over tokens would depend on
    which rows met in a batch. A row without trained-on tokens counts 0 there, for the same reason.

    Args:
        nats_B (`torch.Tensor` of shape `(B,)`): weighted nats of each row, summed over its tokens.
        num_trained_B (`torch.LongTensor` of shape `(B,)`): trained-on tokens of each row.
        num_items_in_batch (`torch.Tensor` or `float`, *optional*): trained-on tokens of the whole batch, of which this
            call may be a part; in training the divisor, in evaluation what this call's share of the loss follows from.
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
