"""Likelihoods of chunks: spans of equal bytes, compared across tokenizers (ALM 2503.20083; TIDE 2604.26951 §2.3).

A chunk's log-likelihood is the sum of its true tokens' log-probabilities; its tempered probability p = exp(ℓ / T) is
clamped to [`PROBABILITY_FLOOR`, `PROBABILITY_CEILING`].

Shapes: N tokens, C chunks, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F

from .denoising import as_full_precision

PROBABILITY_FLOOR = 1e-7
PROBABILITY_CEILING = 1 - 2.0**-23  # what 1 − 1e-7 is in float32


def true_token_log_probs(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """`log softmax(z)[target]` of each position, float32 at least, shape `(N,)`. Temperature acts on chunks, not here.

    Args:
        logits_NV (`torch.Tensor` of shape `(N, V)`): of any float dtype.
        targets_N (`torch.LongTensor` of shape `(N,)`): true token ids.
    """
    return -F.cross_entropy(as_full_precision(logits_NV), targets_N, reduction="none")


def chunk_log_likelihood(log_probs_N: torch.Tensor, chunk_ids_N: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Sums token log-probabilities by chunk.

    Args:
        log_probs_N (`torch.Tensor` of shape `(N,)`): log-probability of each true token.
        chunk_ids_N (`torch.LongTensor` of shape `(N,)`): chunk of each token, −1 for none. Tokens in no chunk are left
            out before the sum, so a NaN there does not spread.
        num_chunks (`int`): C.

    Returns:
        `torch.Tensor` of shape `(C,)`: ℓ of each chunk in nats; 0 for a chunk without tokens.
    """
    inside = chunk_ids_N >= 0
    log_probs_N = torch.where(inside, as_full_precision(log_probs_N), 0.0)
    # tokens outside go to a slot of their own, so that no shape depends on the data
    sums = log_probs_N.new_zeros(num_chunks + 1).index_add(
        0, torch.where(inside, chunk_ids_N, num_chunks), log_probs_N
    )
    return sums[:num_chunks]


def chunk_log_probability(log_likelihood_C: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log p = ℓ / T clamped to the logarithms of the probability limits; no gradient outside them, shape `(C,)`.

    Args:
        log_likelihood_C (`torch.Tensor` of shape `(C,)`): ℓ in nats.
        temperature (`float`): T > 0.
    """
    return (as_full_precision(log_likelihood_C) / temperature).clamp(
        math.log(PROBABILITY_FLOOR), math.log(PROBABILITY_CEILING)
    )


def log1mexp(log_p: torch.Tensor) -> torch.Tensor:
    """log(1 − p) from `log_p` < 0, accurate near both ends, of any shape.

    Each branch sees only inputs it is good for, so that the gradient of the other is never NaN.
    """
    near_one = log_p > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near_one, log_p, -math.log(2))))
    large = torch.log1p(-torch.exp(torch.where(near_one, -math.log(2), log_p)))
    return torch.where(near_one, small, large)


def binary_cross_entropy(label_C: torch.Tensor, log_p_C: torch.Tensor) -> torch.Tensor:
    """`−[label log p + (1 − label) log(1 − p)]` of each chunk, nats, shape `(C,)`.

    Args:
        label_C (`torch.Tensor` of shape `(C,)`): probabilities.
        log_p_C (`torch.Tensor` of shape `(C,)`): log-probabilities, below 0.
    """
    return -(label_C * log_p_C + (1 - label_C) * log1mexp(log_p_C))
