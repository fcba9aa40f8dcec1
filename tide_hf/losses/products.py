"""Matrix products of a head and of its two gradients, in the precision of the inputs or of autocast.

The gradient of a loss with respect to its logits is formed before the loss can be scaled: a `GradScaler`'s factor only
arrives in the backward pass. By then float16 may have underflowed: with a vocabulary of 32,000 and a batch of 1,000
tokens, a flat softmax leaves 3e-8 per logit, half the smallest number that float16 has. So each row is multiplied by a
power of two of its own before it is rounded, and the product is divided by it in float32. bfloat16 has float32's
exponents.

Shapes: M × K times K × N.
"""

import torch

LARGEST_PRODUCT = 2.0**15  # half of what float16 holds


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products with `weight`: autocast's if it is on, as for a plain `hidden @ weight.T`."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a gradient is kept in until the outer one is known: float32 for float16, otherwise `dtype` itself."""
    return torch.float32 if dtype == torch.float16 else dtype


def gradient_product(gradient_MK: torch.Tensor, right_KN: torch.Tensor) -> torch.Tensor:
    """`gradient @ right`, `(M, N)`, in the [`gradient_dtype`] of the right side.

    Args:
        gradient_MK (`torch.Tensor`): float32 where the right side is float16, else of its dtype.
        right_KN (`torch.Tensor`): weights or hidden states, in the products' precision.
    """
    if right_KN.dtype != torch.float16:
        return gradient_MK @ right_KN
    # |Σ_k g_k r_k| ≤ Σ_k |g_k| · max|r|, so that neither a factor nor a sum overflows
    sums_M1 = torch.linalg.vector_norm(gradient_MK, 1, dim=1, keepdim=True).clamp(min=2.0**-100)
    _, exponent_M1 = torch.frexp(LARGEST_PRODUCT / (sums_M1 * right_KN.abs().amax().float().clamp(min=1)))
    scale_M1 = torch.ldexp(torch.ones_like(sums_M1), exponent_M1 - 1)
    return ((gradient_MK * scale_M1).half() @ right_KN).float() / scale_M1
