"""The one way from hidden states and a head weight to a loss: logits exist for a slice of positions at a time.

Each slice's rows of hidden states go through the head, the loss of the slice is differentiated while its logits are
there, and only its share of the two gradients that are asked for is kept, `(N, H)` and `(V, H)`. Losses are plain
functions of logits; autograd differentiates them. Analytic gradients written beside them were measured and dropped:
they saved 2 to 20 % of the head's time on a CPU (recipes/README.md, costs).

Shapes: N positions, H student hidden, V vocabulary, R rows of a slice.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .chunks import true_token_log_probs
from .denoising import as_full_precision
from .products import gradient_dtype, gradient_product, product_dtype

# logits of one slice, in bytes: large enough for fast matrix products, small beside a model. A GPU takes a slice's
# elementwise operations at once, and each keeps some logits for the backward pass
SLICE_BYTES = {"cpu": 2**25, "cuda": 2**27}
# a CPU takes them for a few rows at a time: so many logits stay in its caches over a dozen passes
CACHED_LOGITS = 2**18


@dataclass(frozen=True)
class Segment:
    """Consecutive positions that share one loss.

    Args:
        rows (`slice`): start and stop among the N positions.
        loss (`Callable`): `(logits (r, V), positions, *frozen logits (r, U)) -> scalar`, differentiable in the first;
            `positions` is the slice of the N positions that the r rows are. It is called for a few rows at a time.
        frozen (`Sequence[Callable]`): each `(positions) -> (r, U)`: further inputs of the loss, from other networks,
            without gradient; called for a slice at a time.
        ends (`Sequence[int]`, *optional*): where the positions may be cut, in ascending order up to `rows.stop`; by
            default anywhere.
    """

    rows: slice
    loss: Callable[..., torch.Tensor]
    frozen: Sequence[Callable[[slice], torch.Tensor]] = ()
    ends: Sequence[int] | None = None


def sliced_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    segments: Sequence[Segment],
    *,
    slice_rows: int | None = None,
) -> torch.Tensor:
    """The sum of the segments' losses of `logits = hidden · weightᵀ`.

    Args:
        hidden_NH (`torch.Tensor` of shape `(N, H)`): hidden states, inputs of the head.
        weight_VH (`torch.Tensor` of shape `(V, H)`): the head's weight.
        segments (`Sequence[Segment]`): they cover the positions that count, without overlap.
        slice_rows (`int`, *optional*): positions whose logits exist at once; from `SLICE_BYTES` by default. A slice is
            longer where `ends` leaves no place to cut.

    Returns:
        `torch.Tensor`: scalar, differentiable once in `hidden_NH` and `weight_VH`; float32, float64 for float64 input.
        Zero, with a graph, if there are no positions. Matrix products run in the inputs' precision, or in autocast's.
    """
    slice_rows = slice_rows or default_slice_rows(weight_VH.device, len(weight_VH))
    return _SlicedLoss.apply(hidden_NH, weight_VH, segments, slice_rows, torch.is_grad_enabled())


@torch.no_grad()
def sliced_log_probs(
    hidden_NK: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], targets_N: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """[`true_token_log_probs`] of a frozen network's hidden states, a slice of positions at a time; `(N,)`.

    Args:
        hidden_NK (`torch.Tensor` of shape `(N, K)`): hidden states.
        head (`Callable`): `(R, K) -> (R, U)` logits.
        targets_N (`torch.LongTensor` of shape `(N,)`): true token ids.
        vocab_size (`int`): about U; how many positions a slice has depends on it.
    """
    device, values = hidden_NK.device, [as_full_precision(hidden_NK.new_zeros(0))]
    for rows in _cuts(slice(0, len(targets_N)), default_slice_rows(device, vocab_size)):
        logits = head(hidden_NK[rows])
        for part in _cuts(rows, _cached_rows(device, vocab_size)):
            values.append(true_token_log_probs(logits[_within(rows, part)], targets_N[part]))
    return torch.cat(values)


class _SlicedLoss(torch.autograd.Function):
    """[`sliced_loss`]; gradients are formed in the forward pass and multiplied by the outer one in the backward."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, segments, slice_rows, grad_enabled):
        wants_hidden, wants_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        dtype = product_dtype(weight_VH)
        hidden, weight = hidden_NH.to(dtype), weight_VH.to(dtype)
        # positions that are in no segment stay 0
        grad_hidden = torch.zeros_like(hidden, dtype=gradient_dtype(dtype)) if wants_hidden else None
        grad_weight = None  # made by the first slice: filling it with zeros would be a pass over (V, H)
        slices = _Slices(hidden, weight, wants_hidden or wants_weight)
        for segment in segments:
            for rows in _cuts(segment.rows, slice_rows, segment.ends):
                gradient = slices.run(segment, rows)
                if wants_hidden:
                    grad_hidden[rows] = gradient_product(gradient, weight)
                if wants_weight:
                    grad_weight = _plus_product(grad_weight, gradient.T, hidden[rows])
        if wants_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype
        ctx.gradients = [
            None if gradient is None else gradient.to(gradient_dtype(given))
            for gradient, given in zip((grad_hidden, grad_weight), ctx.dtypes, strict=True)
        ]
        return slices.total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of sliced_loss are freed by the first backward pass through it: call sliced_loss again "
                "for another one."
            )
        gradients, ctx.gradients = zip(ctx.gradients, ctx.dtypes, strict=True), None
        # float16 is made here: only the outer gradient, a scaler's, lifts these into its range
        scaled = (None if gradient is None else gradient.mul_(grad_loss).to(dtype) for gradient, dtype in gradients)
        return *scaled, *[None] * 3


class _Slices:
    """The logits of one slice after the other, in one buffer, in which each becomes its own gradient."""

    def __init__(self, hidden, weight, wants_grad):
        self.hidden, self.weight, self.wants_grad = hidden, weight, wants_grad
        self.precision = as_full_precision(hidden[:0]).dtype
        self.total = torch.zeros((), dtype=self.precision, device=hidden.device)
        self.cached_rows = _cached_rows(hidden.device, len(weight))
        self._buffer = torch.empty(0, len(weight), dtype=self.precision, device=hidden.device)

    def run(self, segment: Segment, rows: slice) -> torch.Tensor:
        """Adds the loss of some rows; returns the gradient of their logits `(R, V)` for [`gradient_product`]."""
        frozen = [logits_of(rows) for logits_of in segment.frozen]  # in autocast, where that is on
        with torch.autocast(self.hidden.device.type, enabled=False):
            logits = self._logits(rows)
            for part in _cuts(rows, self.cached_rows, segment.ends):
                here = _within(rows, part)
                self._differentiate(segment.loss, logits[here], part, [other[here] for other in frozen])
            return logits.to(gradient_dtype(self.hidden.dtype))

    def _logits(self, rows: slice) -> torch.Tensor:
        """In full precision, in the buffer: memory that is new to a process costs a CPU more than the product."""
        num_rows, hidden = rows.stop - rows.start, self.hidden[rows]
        if len(self._buffer) < num_rows:
            self._buffer = self._buffer.new_empty(num_rows, len(self.weight))
        logits = self._buffer[:num_rows]
        if hidden.dtype == self.precision:
            return torch.mm(hidden, self.weight.T, out=logits)
        return logits.copy_(hidden @ self.weight.T)

    def _differentiate(self, loss_fn, logits, positions: slice, frozen: list) -> None:
        """Adds one loss, and writes its gradient over the logits."""
        with torch.set_grad_enabled(self.wants_grad):
            # the same memory: it is overwritten when the graph that needs it is gone
            leaf = logits.detach().requires_grad_(self.wants_grad)
            loss = loss_fn(leaf, positions, *frozen)
            self.total += loss.detach()
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss, leaf)
                del loss
                logits.copy_(gradient)
            else:
                logits.zero_()


def _plus_product(total_VH: torch.Tensor | None, gradient_VR, hidden_RH) -> torch.Tensor:
    """total + gradient · hidden, in place and in full precision: half would lose the small shares of single slices."""
    if total_VH is None:
        return as_full_precision(gradient_product(gradient_VR, hidden_RH))
    if total_VH.dtype == hidden_RH.dtype:
        return total_VH.addmm_(gradient_VR, hidden_RH)
    return total_VH.add_(gradient_product(gradient_VR, hidden_RH))


def _cuts(rows: slice, size: int, ends: Sequence[int] | None = None) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows, cut at `ends` only; longer where none is near enough."""
    start = rows.start
    while start < rows.stop:
        stop = min(start + size, rows.stop)
        if ends is not None and stop < rows.stop:
            last = bisect_right(ends, stop) - 1
            stop = ends[last] if last >= 0 and ends[last] > start else ends[last + 1]
        yield slice(start, stop)
        start = stop


def _within(rows: slice, part: slice) -> slice:
    """A part of some rows, counted from the first of them."""
    return slice(part.start - rows.start, part.stop - rows.start)


def _cached_rows(device: torch.device, vocab_size: int) -> int:
    """Rows that elementwise operations process together; on a GPU a whole slice."""
    if device.type != "cpu":
        return default_slice_rows(device, vocab_size)
    return max(torch.get_num_threads(), CACHED_LOGITS // vocab_size)


def default_slice_rows(device: torch.device, vocab_size: int) -> int:
    """Positions of a slice on a `device`, for a vocabulary of `vocab_size`."""
    return max(SLICE_BYTES.get(device.type, SLICE_BYTES["cpu"]) // (4 * vocab_size), 1)
