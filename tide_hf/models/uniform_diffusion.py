"""The forward process, divergence and reverse step of uniform-state diffusion (Duo 2506.10892).

A position keeps its token with probability α, and otherwise gets one drawn from the whole vocabulary. There is no mask
token: the network has to recognise what is noise, and a step may change any token. This file travels with checkpoints:
it imports torch alone.

Shapes: N positions, V vocabulary.
"""

import torch

NOISE_EPSILON = 1e-3  # α stays in [ε, 1 − ε] in training


def uniform_divergence(
    clean_NV: torch.Tensor,
    predicted_NV: torch.Tensor,
    noised_N: torch.Tensor,
    alpha_N: torch.Tensor,
    rate_N: torch.Tensor | float,
) -> torch.Tensor:
    """Per-position integrand of the uniform-state NELBO, for soft clean distributions too.

    With `x̄ = V α q + 1 − α`, `x̄^f` the same of the prediction and z the noised token:
    `(α′/(Vα)) [V/x̄_z − V/x̄^f_z − Σ_v (x̄_v/x̄_z)(log x̄^f_z − log x̄^f_v + log x̄_v − log x̄_z)]`. As Σ_v x̄_v = V this is
    `(−α′/(Vα)) Σ_v [r log(r/s) − r + s]`, r = x̄/x̄_z, s = x̄^f/x̄^f_z: never negative, and zero where q = f.

    Args:
        clean_NV (`torch.Tensor` of shape `(N, V)`): q, the distribution of the clean token; a one-hot for data.
        predicted_NV (`torch.Tensor` of shape `(N, V)`): f, the network's probabilities.
        noised_N (`torch.LongTensor` of shape `(N,)`): z.
        alpha_N (`torch.Tensor` of shape `(N,)`): α in (0, 1).
        rate_N (`torch.Tensor` of shape `(N,)` or `float`): −dα/dt.

    Returns:
        `torch.Tensor` of shape `(N,)`, nats. Source: Duo 2506.10892 eq. 11; UDLM 2412.10193.
    """
    num_tokens, alpha_N1 = clean_NV.shape[-1], alpha_N[:, None]

    def log_ratios(probabilities_NV):
        log_NV = (num_tokens * alpha_N1 * probabilities_NV + 1 - alpha_N1).log()
        return log_NV - log_NV.gather(1, noised_N[:, None])

    log_r_NV, log_s_NV = log_ratios(clean_NV), log_ratios(predicted_NV)
    r_NV = log_r_NV.exp()
    total_N = (r_NV * (log_r_NV - log_s_NV) - r_NV + log_s_NV.exp()).sum(1)
    return rate_N / (num_tokens * alpha_N) * total_N


def reverse_step(
    predicted_NV: torch.Tensor, noised_N: torch.Tensor, alpha: float | torch.Tensor, next_alpha: float | torch.Tensor
) -> torch.Tensor:
    """P(token at the next, less noised time | token now, prediction of the clean one), `(N, V)`.

    `∝ [α_t/α_s 1(v = z) + (1 − α_t/α_s)/V] · [α_s f_v + (1 − α_s)/V]`: Bayes' rule with the prediction as the prior.

    Args:
        predicted_NV (`torch.Tensor` of shape `(N, V)`): f.
        noised_N (`torch.LongTensor` of shape `(N,)`): z.
        alpha (`float` or `torch.Tensor`): α now.
        next_alpha (`float` or `torch.Tensor`): α after the step, alpha < next_alpha ≤ 1.

    Source: Duo 2506.10892 §2.
    """
    num_tokens, kept = predicted_NV.shape[-1], alpha / next_alpha
    likelihood_NV = torch.full_like(predicted_NV, (1 - kept) / num_tokens)
    likelihood_NV.scatter_add_(1, noised_N[:, None], torch.full_like(predicted_NV[:, :1], kept))
    joint_NV = likelihood_NV * (next_alpha * predicted_NV + (1 - next_alpha) / num_tokens)
    return joint_NV / joint_NV.sum(1, keepdim=True)
