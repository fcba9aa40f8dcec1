"""Inverse distillation to few steps, masked diffusion (IDLM 2602.19066).

The student predicts clean tokens q at the masks of x_t′; x_t is drawn from q and masked anew; the fake network f
learns to denoise what the student produces, and the student moves q towards tokens that the teacher f* finds likelier
than the fake.

`L(f, q) = Σ_i w_i · (−⟨q_i, log f_i⟩) / num_items` over positions i masked in x_t. Where i is not masked in x_t′,
q_i is the one-hot of the seen token: for the fake that is [`denoising_loss`], for the student a constant.

[MASK] is not a clean token: if `mask_token_id` is given, its logit counts as −∞ in all three networks.

Shapes: N positions masked in x_t and in x_t′, V vocabulary.
"""

import torch

from .denoising import as_full_precision, weighted_sum


def without_mask_token(logits_NV: torch.Tensor, mask_token_id: int | None) -> torch.Tensor:
    """`logits_NV` `(N, V)` in float32 at least, with that of `mask_token_id`, if given, set to −∞."""
    logits_NV = as_full_precision(logits_NV)
    if mask_token_id is None:
        return logits_NV
    return logits_NV.index_fill(-1, torch.tensor([mask_token_id], device=logits_NV.device), -torch.inf)


def clean_token_probabilities(logits_NV: torch.Tensor, mask_token_id: int | None = None) -> torch.Tensor:
    """q = softmax of the student's `logits_NV`, with probability 0 for `mask_token_id`; `(N, V)`, float32 at least."""
    return without_mask_token(logits_NV, mask_token_id).softmax(-1)


def _clean_log_probs(logits_NV: torch.Tensor, mask_token_id: int | None) -> torch.Tensor:
    """log softmax without [MASK], whose own column is 0: no q weighs it, and 0 · (−∞) would be NaN."""
    log_probs_NV = without_mask_token(logits_NV, mask_token_id).log_softmax(-1)
    if mask_token_id is None:
        return log_probs_NV
    return log_probs_NV.index_fill(-1, torch.tensor([mask_token_id], device=logits_NV.device), 0.0)


def soft_denoising_loss(
    logits_NV: torch.Tensor,
    probabilities_NV: torch.Tensor,
    weights_N: torch.Tensor | float = 1.0,
    *,
    num_items: torch.Tensor | float,
    mask_token_id: int | None = None,
) -> torch.Tensor:
    """L(f, q): the fake's denoising loss on the student's soft predictions.

    Args:
        logits_NV (`torch.Tensor` of shape `(N, V)`): of the fake, at positions masked in x_t; it learns.
        probabilities_NV (`torch.Tensor` of shape `(N, V)`): q; no gradient.
        weights_N (`torch.Tensor` of shape `(N,)` or `float`): w(t) = −α′(t)/(1−α(t)) of each position's row.
        num_items (`torch.Tensor` or `float`): rows of the whole global batch, which the sum is divided by.
        mask_token_id (`int`, *optional*): id of [MASK], excluded.

    Returns:
        `torch.Tensor`: scalar in nats. No position: zero, with a graph.

    Source: IDLM 2602.19066.
    """
    log_probs_NV = _clean_log_probs(logits_NV, mask_token_id)
    return weighted_sum(-(probabilities_NV.detach() * log_probs_NV).sum(-1) * weights_N, num_items)


def inverse_distillation_loss(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor,
    fake_logits_NV: torch.Tensor,
    weights_N: torch.Tensor | float = 1.0,
    *,
    num_items: torch.Tensor | float,
    mask_token_id: int | None = None,
) -> torch.Tensor:
    """L(f*, q) − L(f, q): the student's loss, with gradient through q alone.

    `loss = Σ_i w_i · ⟨q_i, log f_i − log f*_i⟩ / num_items`, with q = softmax of the student's logits.

    Args:
        student_logits_NV (`torch.Tensor` of shape `(N, V)`): G(x_t′) at positions masked in x_t and in x_t′.
        teacher_logits_NV, fake_logits_NV (`torch.Tensor` of shape `(N, V)`): f*(x_t) and f(x_t) at the same
            positions; no gradient.
        weights_N, num_items, mask_token_id: as in [`soft_denoising_loss`].

    Returns:
        `torch.Tensor`: scalar in nats, zero with zero gradient where fake = teacher. No position: zero, with a graph.

    Source: IDLM 2602.19066.
    """
    fake_NV = _clean_log_probs(fake_logits_NV.detach(), mask_token_id)
    log_ratio_NV = fake_NV - _clean_log_probs(teacher_logits_NV.detach(), mask_token_id)
    probabilities_NV = clean_token_probabilities(student_logits_NV, mask_token_id)
    return weighted_sum((probabilities_NV * log_ratio_NV).sum(-1) * weights_N, num_items)


def sample_tokens(probabilities_NV: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """One token per position from its distribution, by inverting the cumulative distribution; `(N,)`, no gradient.

    The same draw gives the same token on any machine and in any batch. A token of probability 0 is never drawn.

    Args:
        probabilities_NV (`torch.Tensor` of shape `(N, V)`): rows that add up to about 1.
        uniform_N (`torch.Tensor` of shape `(N,)`): draws in [0, 1).
    """
    cumulative_NV = probabilities_NV.detach().double().cumsum(-1)
    total_N = cumulative_NV[:, -1]
    below_N = torch.minimum(uniform_N.double() * total_N, torch.nextafter(total_N, total_N.new_zeros(())))
    drawn_N = torch.searchsorted(cumulative_NV, below_N[:, None], right=True).squeeze(-1)
    # where a probability is NaN none is found: any token serves, and the loss says NaN
    return drawn_N.clamp(max=probabilities_NV.shape[-1] - 1)
