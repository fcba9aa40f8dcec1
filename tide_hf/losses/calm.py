"""Chunk likelihood objectives: CALM, Reverse CALM and chunk TIDAL (SPEC §5; TIDE 2604.26951 §2.3, ALM 2503.20083).

Shapes: N tokens that belong to chunks, C chunks, V vocabulary. A chunk's log-likelihood is the sum of its true tokens'
log-probabilities; its tempered probability p = exp(ℓ / T) is clamped to [`PROBABILITY_FLOOR`, `PROBABILITY_CEILING`].
"""

import math

import torch

from .denoising import as_full_precision, weighted_sum

PROBABILITY_FLOOR = 1e-7
PROBABILITY_CEILING = 1 - 2.0**-23  # what 1 − 1e-7 is in float32


def true_token_log_probs(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """`log softmax(z)[target]` of each position, float32, shape `(N,)`. Temperature acts on chunks, not here."""
    logits_NV = as_full_precision(logits_NV)
    return logits_NV.gather(-1, targets_N[:, None]).squeeze(-1) - logits_NV.logsumexp(-1)


def chunk_log_likelihood(log_probs_N: torch.Tensor, chunk_ids_N: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Sums token log-probabilities by chunk.

    Args:
        log_probs_N (`torch.Tensor` of shape `(N,)`): log-probability of each true token.
        chunk_ids_N (`torch.LongTensor` of shape `(N,)`): chunk of each token, −1 for none. Tokens in no chunk are left
            out before the sum, so a NaN there stays there.
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
    """log p = ℓ / T clamped to the logarithms of the probability limits; no gradient outside them, shape `(C,)`."""
    return (as_full_precision(log_likelihood_C) / temperature).clamp(
        math.log(PROBABILITY_FLOOR), math.log(PROBABILITY_CEILING)
    )


def log1mexp(log_p: torch.Tensor) -> torch.Tensor:
    """log(1 − exp(x)) for x < 0, accurate near both ends.

    Each branch sees only inputs it is good for, so that the gradient of the other is never NaN.
    """
    near_one = log_p > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near_one, log_p, -math.log(2))))
    large = torch.log1p(-torch.exp(torch.where(near_one, -math.log(2), log_p)))
    return torch.where(near_one, small, large)


def calm_loss(
    student_log_likelihood_C: torch.Tensor,
    teacher_log_likelihood_C: torch.Tensor,
    *,
    num_items: torch.Tensor | float | None,
    temperature: float = 1.0,
    weights_C: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Forward chunk matching: `Σ_c w_c · −[p_T log p_S + (1−p_T) log(1−p_S)] / num_items`.

    Args:
        student_log_likelihood_C, teacher_log_likelihood_C (`torch.Tensor` of shape `(C,)`): ℓ of the active chunks,
            see [`chunk_log_likelihood`]; the teacher's gets no gradient.
        num_items (`torch.Tensor` or `float`): active chunks of the whole global batch.
        temperature (`float`): T of both sides. There is no T² factor on chunk losses.
        weights_C (`torch.Tensor` of shape `(C,)` or `float`): weight of each chunk.

    Returns:
        `torch.Tensor`: scalar in nats per chunk; at p_S = p_T it is the entropy of p_T, not 0.

    Source: ALM 2503.20083 eq. 4; TIDE §2.3.
    """
    student, teacher = _both(student_log_likelihood_C, teacher_log_likelihood_C, temperature)
    return weighted_sum(_binary_cross_entropy(teacher.exp(), student) * weights_C, num_items)


def reverse_calm_loss(
    student_log_likelihood_C: torch.Tensor,
    teacher_log_likelihood_C: torch.Tensor,
    *,
    num_items: torch.Tensor | float | None,
    temperature: float = 1.0,
    weights_C: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Reverse chunk matching as published: `Σ_c w_c · −[p_S log p_T + (1−p_S) log(1−p_T)] / num_items`.

    The gradient is `−(∂p_S/∂θ) · log(p_T / (1−p_T))`: a coefficient that depends on the teacher alone and is at most
    about 16. There is no entropy term, so the optimum is p_S in {0, 1}; [`bernoulli_reverse_kl_loss`] has it at p_T.
    Arguments and result as [`calm_loss`]. Source: TIDE §2.3.
    """
    student, teacher = _both(student_log_likelihood_C, teacher_log_likelihood_C, temperature)
    return weighted_sum(_binary_cross_entropy(student.exp(), teacher) * weights_C, num_items)


def bernoulli_reverse_kl_loss(
    student_log_likelihood_C: torch.Tensor,
    teacher_log_likelihood_C: torch.Tensor,
    *,
    num_items: torch.Tensor | float | None,
    temperature: float = 1.0,
    weights_C: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Reverse CALM plus `p_S log p_S + (1−p_S) log(1−p_S)`: a true divergence, zero at p_S = p_T.

    Arguments and result as [`calm_loss`].
    """
    student, teacher = _both(student_log_likelihood_C, teacher_log_likelihood_C, temperature)
    probability_C = student.exp()
    divergence_C = _binary_cross_entropy(probability_C, teacher) - _binary_cross_entropy(probability_C, student)
    return weighted_sum(divergence_C * weights_C, num_items)


def tidal_chunk_loss(
    student_log_likelihood_C: torch.Tensor,
    teacher_log_likelihood_C: torch.Tensor,
    lambda_C: torch.Tensor,
    *,
    num_items: torch.Tensor | float | None,
    temperature: float = 1.0,
    weights_C: torch.Tensor | float = 1.0,
    reverse: bool = False,
) -> torch.Tensor:
    """Chunk TIDAL: CALM with the mixed, detached label `q = (1−λ) p_S + λ p_T` in place of p_T.

    Args:
        lambda_C (`torch.Tensor` of shape `(C,)`): λ of each chunk's row, see [`tidal_lambda`].
        reverse (`bool`): q as the target of Reverse CALM instead: an ablation of the paper's code, which suppresses
            its own signal late in training.

    The other arguments and the result as [`calm_loss`]. Source: TIDE §2.1, §2.3; SPEC §3.
    """
    student, teacher = _both(student_log_likelihood_C, teacher_log_likelihood_C, temperature)
    lambda_C = lambda_C.to(student.dtype)
    label_C = ((1 - lambda_C) * student.exp() + lambda_C * teacher.exp()).detach()
    label_C = label_C.clamp(PROBABILITY_FLOOR, PROBABILITY_CEILING)
    if reverse:
        cross_entropy_C = _binary_cross_entropy(student.exp(), label_C.log())
    else:
        cross_entropy_C = _binary_cross_entropy(label_C, student)
    return weighted_sum(cross_entropy_C * weights_C, num_items)


def _both(student_log_likelihood_C, teacher_log_likelihood_C, temperature):
    """Clamped log-probabilities of both sides, the teacher's detached."""
    return (
        chunk_log_probability(student_log_likelihood_C, temperature),
        chunk_log_probability(teacher_log_likelihood_C, temperature).detach(),
    )


def _binary_cross_entropy(label_C: torch.Tensor, log_p_C: torch.Tensor) -> torch.Tensor:
    """−[label log p + (1 − label) log(1 − p)] from log p."""
    return -(label_C * log_p_C + (1 - label_C) * log1mexp(log_p_C))
