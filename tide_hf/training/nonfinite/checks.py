"""Which tensors hold NaN or infinity."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch.distributed.tensor import DTensor

NAMED = 3  # rows or parameters that a sentence names


class NonFiniteError(RuntimeError):
    """A loss, gradient or weight that is not finite, with its name."""


def local(value: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def norms(tensors: Iterable[torch.Tensor], order: float, device: torch.device | None = None) -> torch.Tensor:
    """One norm per tensor, float32 at least, on one device; 0 of a tensor without elements."""
    tensors = [value if value.numel() else value.new_zeros(1) for value in tensors]
    if not tensors:
        return torch.zeros(0, device=device)
    wide = any(value.dtype == torch.float64 for value in tensors)
    found = torch._foreach_norm(tensors, order, dtype=torch.float64 if wide else torch.float32)
    return torch.stack([norm.to(device or found[0].device) for norm in found])


def gradient_norms(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, float]:
    """2-norms of this process's part of each gradient there is."""
    named = {name: local(value.grad) for name, value in parameters.items() if value.grad is not None}
    return dict(zip(named, norms(named.values(), 2).tolist(), strict=True))


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; other types than floats are passed over."""
    floats = {
        name: local(value.detach())
        for name, value in tensors.items()
        if torch.is_tensor(value) and value.is_floating_point() and not value.is_meta
    }
    finite = norms(floats.values(), torch.inf).isfinite().tolist()
    return [name for name, ok in zip(floats, finite, strict=True) if not ok]


def some(names: list[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def require_finite(
    tensors: Mapping[str, torch.Tensor], what: str, anywhere: Callable[[bool], bool] | None = None
) -> None:
    """Refuses weights that are not finite.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): by name, sharded or not.
        what (`str`): what would be made of them.
        anywhere (`Callable`, *optional*): whether something is so here -> whether it is on any process; where all of
            them are here.

    Raises:
        NonFiniteError: with the first names.
    """
    bad = not_finite(tensors)
    if bool(bad) if anywhere is None else anywhere(bool(bad)):
        holder = some(bad) if bad else "a tensor of another process"
        raise NonFiniteError(
            f"{what} is not written: {holder} holds NaN or infinity. Go on from a checkpoint that was written before."
        )
