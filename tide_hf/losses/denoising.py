"""Masked denoising loss (MDLM 2406.07524, BD3LM 2503.09573).

Shapes: N selected positions, V vocabulary.
"""

import torch
import torch.nn.functional as F


def denoising_loss(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor | float = 1.0,
    *,
    num_items: torch.Tensor | float | None,
) -> torch.Tensor:
    """Weighted negative log-likelihood of the clean tokens at masked positions.

    `loss = Σ_i w_i · (−log softmax(z_i)[x0_i]) / num_items`

    Args:
        logits_NV (`torch.Tensor` of shape `(N, V)`): student logits at masked, trained-on positions; any float dtype.
        targets_N (`torch.LongTensor` of shape `(N,)`): clean token ids.
        weights_N (`torch.Tensor` of shape `(N,)` or `float`): w(t) of each position's row, `−α′(t)/(1−α(t))` or 1.
        num_items (`torch.Tensor` or `float`): what the sum is divided by. A number (token normalisation: the
            trained-on tokens of the whole global batch), or one divisor per position (sequence and batch
            normalisation). Values below 1 count as 1. None: no sum, one value per position.

    Returns:
        `torch.Tensor`: scalar in nats, float32 (float64 for float64 logits). No position: zero, with a graph.

    Source: BD3LM 2503.09573 eq. 8, MDLM 2406.07524 eq. 10.
    """
    nll_N = F.cross_entropy(as_full_precision(logits_NV), targets_N, reduction="none")
    return weighted_sum(nll_N * weights_N, num_items)


def as_full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """A `tensor` in float32 at least: float64 stays, half precisions are raised."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def weighted_sum(values_N: torch.Tensor, num_items: torch.Tensor | float | None) -> torch.Tensor:
    """Σ `values_N` / max(`num_items`, 1), where `num_items` is a number or one per value; None: no sum, the values."""
    if num_items is None:
        return values_N
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.clamp(min=1)
        return (values_N / num_items).sum() if num_items.ndim else values_N.sum() / num_items
    return values_N.sum() / max(num_items, 1)
