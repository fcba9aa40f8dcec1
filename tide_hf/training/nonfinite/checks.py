"""Which tensors contain NaN or infinity."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch.distributed.tensor import DTensor

NAMED = 3  # rows or parameters that a message names


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight is not finite; the message names it."""


def local(value: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, `value`, sharded or not."""
    return value.to_local() if isinstance(value, DTensor) else value


def norms(tensors: Iterable[torch.Tensor], order: float, device: torch.device | None = None) -> torch.Tensor:
    """Computes one norm per tensor; 0 for a tensor without elements.

    Args:
        tensors (`Iterable[torch.Tensor]`): of any shapes, K of them.
        order (`float`): of the norm, such as 2 or `torch.inf`.
        device (`torch.device`, *optional*): of the result; the first tensor's by default.

    Returns:
        `torch.Tensor` of shape `(K,)`: float32, or float64 if any tensor is.
    """
    tensors = [value if value.numel() else value.new_zeros(1) for value in tensors]
    if not tensors:
        return torch.zeros(0, device=device)
    wide = any(value.dtype == torch.float64 for value in tensors)
    found = torch._foreach_norm(tensors, order, dtype=torch.float64 if wide else torch.float32)
    return torch.stack([norm.to(device or found[0].device) for norm in found])


def gradient_norms(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, float]:
    """2-norm of this process's part of each gradient; `parameters` without one are left out."""
    named = {name: local(value.grad) for name, value in parameters.items() if value.grad is not None}
    return dict(zip(named, norms(named.values(), 2).tolist(), strict=True))


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of those `tensors` that contain NaN or infinity; only floating-point ones can."""
    floats = {
        name: local(value.detach())
        for name, value in tensors.items()
        if torch.is_tensor(value) and value.is_floating_point() and not value.is_meta
    }
    finite = norms(floats.values(), torch.inf).isfinite().tolist()
    return [name for name, ok in zip(floats, finite, strict=True) if not ok]


def some(names: list[str]) -> str:
    """The first few of many `names`, as text."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def require_finite(
    tensors: Mapping[str, torch.Tensor], what: str, anywhere: Callable[[bool], bool] | None = None
) -> None:
    """Refuses weights that are not finite.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): by name, sharded or not.
        what (`str`): what would be written of them, for the message.
        anywhere (`Callable`, *optional*): takes whether something holds on this process and returns whether it holds
            on any; for sharded weights.

    Raises:
        NonFiniteError: with the first names.
    """
    bad = not_finite(tensors)
    if bool(bad) if anywhere is None else anywhere(bool(bad)):
        holder = some(bad) if bad else "a tensor of another process"
        raise NonFiniteError(
            f"{what} is not written: {holder} contains NaN or infinity. Continue from an earlier checkpoint."
        )
