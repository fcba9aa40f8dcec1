"""Divergences between the student's and the teacher's token distributions (SPEC: divergences on masked positions).

Shapes: N positions that are masked and aligned, V student vocabulary, U teacher vocabulary.
"""

import torch

from .denoising import as_full_precision, weighted_sum


def forward_kl_loss(
    student_logits_NV: torch.Tensor,
    teacher_logits_NU: torch.Tensor,
    *,
    num_items: torch.Tensor | float | None,
    temperature: float = 1.0,
    weights_N: torch.Tensor | float = 1.0,
    shared_vocab_size: int | None = None,
) -> torch.Tensor:
    """`T² · Σ_i w_i Σ_v p_T (log p_T − log p_S) / num_items`, p = softmax(z / T). The teacher gets no gradient.

    Args:
        student_logits_NV (`torch.Tensor` of shape `(N, V)`): student logits.
        teacher_logits_NU (`torch.Tensor` of shape `(N, U)`): teacher logits at the aligned positions.
        num_items (`torch.Tensor` or `float`): positions that are masked and aligned, in the whole global batch.
        temperature (`float`): T > 0.
        weights_N (`torch.Tensor` of shape `(N,)` or `float`): weight of each position.
        shared_vocab_size (`int`, *optional*): only the first ids mean the same on both sides; both logits are cut to
            them before the softmax. None uses all (V must equal U then).

    Returns:
        `torch.Tensor`: scalar in nats per position, float32. No position: zero, with a graph.

    Raises:
        ValueError: if the vocabularies differ and `shared_vocab_size` is None.
    """
    log_s, log_t = _log_probs(student_logits_NV, teacher_logits_NU, temperature, shared_vocab_size)
    return _reduce(kl_divergence(log_t, log_s), weights_N, num_items, temperature)


def reverse_kl_loss(
    student_logits_NV: torch.Tensor,
    teacher_logits_NU: torch.Tensor,
    *,
    num_items: torch.Tensor | float | None,
    temperature: float = 1.0,
    weights_N: torch.Tensor | float = 1.0,
    shared_vocab_size: int | None = None,
) -> torch.Tensor:
    """`T² · Σ_i w_i Σ_v p_S (log p_S − log p_T) / num_items`. Arguments and result as [`forward_kl_loss`]."""
    log_s, log_t = _log_probs(student_logits_NV, teacher_logits_NU, temperature, shared_vocab_size)
    return _reduce(kl_divergence(log_s, log_t), weights_N, num_items, temperature)


def jsd_loss(
    student_logits_NV: torch.Tensor,
    teacher_logits_NU: torch.Tensor,
    *,
    num_items: torch.Tensor | float | None,
    beta: float = 0.5,
    temperature: float = 1.0,
    weights_N: torch.Tensor | float = 1.0,
    shared_vocab_size: int | None = None,
) -> torch.Tensor:
    """Generalised Jensen-Shannon: `β KL(p_T ‖ m) + (1−β) KL(p_S ‖ m)`, `m = β p_T + (1−β) p_S`, times T².

    `beta` in (0, 1); the other arguments and the result as [`forward_kl_loss`].
    """
    if not 0 < beta < 1:
        raise ValueError(f"jsd needs 0 < beta < 1, got {beta}; use forward_kl or reverse_kl for the limits.")
    log_s, log_t = _log_probs(student_logits_NV, teacher_logits_NU, temperature, shared_vocab_size)
    log_beta = torch.tensor([beta, 1 - beta], dtype=log_s.dtype, device=log_s.device).log()
    log_m = torch.logaddexp(log_beta[0] + log_t, log_beta[1] + log_s)
    return _reduce(
        beta * kl_divergence(log_t, log_m) + (1 - beta) * kl_divergence(log_s, log_m),
        weights_N,
        num_items,
        temperature,
    )


def kl_divergence(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor) -> torch.Tensor:
    """`Σ_v p (log p − log q)` for each row, nats, shape `(N,)`; entries with p = 0 count as 0."""
    p_NV = log_p_NV.exp()
    return torch.where(p_NV > 0, p_NV * (log_p_NV - log_q_NV), 0.0).sum(-1)


def shared_logits(
    student_logits_NV: torch.Tensor, teacher_logits_NU: torch.Tensor, shared_vocab_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both logits in float32, cut to the ids that mean the same on both sides; the teacher's detached."""
    if shared_vocab_size is None and student_logits_NV.shape[-1] != teacher_logits_NU.shape[-1]:
        raise ValueError(
            f"The student has {student_logits_NV.shape[-1]} logits and the teacher {teacher_logits_NU.shape[-1]}: "
            "pass shared_vocab_size, the number of first ids that mean the same on both sides."
        )
    student_NV = as_full_precision(student_logits_NV[..., :shared_vocab_size])
    return student_NV, as_full_precision(teacher_logits_NU[..., :shared_vocab_size]).detach()


def _log_probs(student_logits_NV, teacher_logits_NU, temperature, shared_vocab_size):
    """log softmax(z / T) of both sides."""
    student_NV, teacher_NV = shared_logits(student_logits_NV, teacher_logits_NU, shared_vocab_size)
    return (student_NV / temperature).log_softmax(-1), (teacher_NV / temperature).log_softmax(-1)


def _reduce(values_N, weights_N, num_items, temperature):
    """T² Σ w · value / num_items."""
    return temperature**2 * weighted_sum(values_N * weights_N, num_items)
