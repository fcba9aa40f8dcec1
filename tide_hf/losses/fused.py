"""The terms of a step straight from hidden states and a head weight (SPEC §1 to §5): the logits of all positions never
exist at once.

Rows of hidden states meet the vocabulary a slice at a time. A slice's gradient is formed while its logits are there,
in buffers that all slices share, and leaves only its share of the two gradients that are asked for, (N, H) and (V, H).
The results are those of the plain functions beside this file, which define the terms.

Shapes: N positions, the first M of them paired with a teacher's, C chunks of them, H student hidden, K teacher hidden,
V student vocabulary, U teacher vocabulary, S ids that mean the same on both sides, R rows at a time.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .calm import chunk_log_likelihood, true_token_log_probs
from .denoising import as_full_precision
from .divergence import shared_logits
from .products import gradient_dtype, gradient_product, product_dtype

# logits of one slice, in bytes: large enough for fast matrix products, small beside a model
SLICE_BYTES = {"cpu": 2**25, "cuda": 2**28}
# logits that a CPU keeps in its caches over the dozen elementwise passes
CACHED_LOGITS = 2**18


@dataclass(frozen=True)
class TokenTerm:
    """A divergence between the token distributions of the first M positions and the teacher's.

    Args:
        kind (`str`): `"forward_kl"`, `"reverse_kl"`, `"jsd"`; or `"tidal"`, with `lambda_M`.
        teacher_hidden_MK (`torch.Tensor` of shape `(M, K)`): the teacher's hidden states.
        teacher_head (`Callable`): `(R, K) -> (R, U)` logits; they must be finite.
        weights (`torch.Tensor` of shape `(M,)`): what each position's value is multiplied by in the loss.
        temperature (`float`), beta (`float`), shared_vocab_size (`int`, *optional*): as in [`forward_kl_loss`] and
            [`jsd_loss`].
        lambda_M (`torch.Tensor` of shape `(M,)`, *optional*): see [`tidal_loss`].
    """

    kind: str
    teacher_hidden_MK: torch.Tensor
    teacher_head: Callable[[torch.Tensor], torch.Tensor]
    weights: torch.Tensor
    temperature: float = 1.0
    lambda_M: torch.Tensor | None = None
    beta: float = 0.5
    shared_vocab_size: int | None = None

    def __len__(self) -> int:
        return len(self.weights)


@dataclass(frozen=True)
class ChunkTerm:
    """An objective over chunk likelihoods of the first M positions, whose chunks stand one behind the other.

    Args:
        loss (`Callable`): `(log_likelihood (c,), slice of the C chunks) -> (c,)` values, differentiable: one of
            `losses.calm` with `num_items=None`.
        chunk_ids_M (`torch.LongTensor` of shape `(M,)`): chunk of each position, 0 … C−1, in order.
        chunk_ends (`Sequence[int]`): on the host, the position behind each chunk's last one.
        weights (`torch.Tensor` of shape `(C,)`): what each chunk's value is multiplied by in the loss.
    """

    loss: Callable[[torch.Tensor, slice], torch.Tensor]
    chunk_ids_M: torch.Tensor
    chunk_ends: Sequence[int]
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.chunk_ids_M)


def fused_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    term: TokenTerm | ChunkTerm | None = None,
    *,
    slice_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`Σ_i weights_i · (−log softmax(h_i Wᵀ)[target_i])`, plus the weighted values of a distillation term.

    Args:
        hidden_NH (`torch.Tensor` of shape `(N, H)`): student hidden states in front of its head.
        weight_VH (`torch.Tensor` of shape `(V, H)`): the head's weight.
        targets_N (`torch.LongTensor` of shape `(N,)`): clean token ids.
        weights_N (`torch.Tensor` of shape `(N,)`): w(t) of each position over the global count, and any other weight.
        term ([`TokenTerm`] or [`ChunkTerm`], *optional*): of the first M positions.
        slice_rows (`int`, *optional*): positions whose logits exist at once; from `SLICE_BYTES` by default. A slice of
            chunks is longer where a single chunk is.

    Returns:
        the scalar loss, differentiable once in `hidden_NH` and `weight_VH`; each position's negative log-likelihood
        `(N,)`; and each position's or chunk's value, `(M,)` or `(C,)`, detached and without weights. float32, float64
        for float64 input. Matrix products run in the inputs' precision, or in autocast's.
    """
    slice_rows = slice_rows or _slice_rows(weight_VH.device, len(weight_VH))
    return _FusedLoss.apply(hidden_NH, weight_VH, targets_N, weights_N, term, slice_rows, torch.is_grad_enabled())


def fused_true_token_log_probs(
    hidden_NK: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], targets_N: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """[`true_token_log_probs`] of a frozen network's hidden states, a slice of positions at a time; `(N,)`.

    Args:
        hidden_NK (`torch.Tensor` of shape `(N, K)`): hidden states.
        head (`Callable`): `(R, K) -> (R, U)` logits.
        targets_N (`torch.LongTensor` of shape `(N,)`): true token ids.
        vocab_size (`int`): about U; how many positions a slice has depends on it.
    """
    device, values = hidden_NK.device, []
    with torch.no_grad():
        for rows in _parts(len(targets_N), _slice_rows(device, vocab_size)):
            logits, targets = head(hidden_NK[rows]), targets_N[rows]
            for part in _parts(len(targets), _cached_rows(device, vocab_size)):
                values.append(true_token_log_probs(logits[part], targets[part]))
    return torch.cat(values) if values else as_full_precision(hidden_NK.new_zeros(0))


class _FusedLoss(torch.autograd.Function):
    """[`fused_loss`]; gradients are formed in the forward pass and multiplied by the outer one in the backward."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, targets_N, weights_N, term, slice_rows, grad_enabled):
        wants_hidden, wants_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        dtype = product_dtype(weight_VH)
        hidden, weight = hidden_NH.to(dtype), weight_VH.to(dtype)
        grad_hidden = torch.empty_like(hidden, dtype=gradient_dtype(dtype)) if wants_hidden else None
        new = torch.empty_like if len(hidden) else torch.zeros_like  # the first slice fills it
        grad_weight = as_full_precision(new(weight)) if wants_weight else None
        slices = _Slices(hidden, weight, targets_N, weights_N, term, wants_hidden or wants_weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, is_paired in _cuts(len(hidden), slice_rows, term):
                gradient = slices.run(rows, is_paired)
                if wants_hidden:
                    _write_product(grad_hidden[rows], gradient, weight)
                if wants_weight:
                    _add_product(grad_weight, gradient.T, hidden[rows], is_first=rows.start == 0)
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype
        ctx.gradients = [
            None if gradient is None else gradient.to(gradient_dtype(given))
            for gradient, given in zip((grad_hidden, grad_weight), ctx.dtypes, strict=True)
        ]
        loss = (slices.weights_N * slices.nll_N).sum()
        if term is not None:
            loss = loss + (term.weights.to(loss) * slices.values).sum()
        ctx.mark_non_differentiable(slices.nll_N, *([] if term is None else [slices.values]))
        return loss, slices.nll_N, slices.values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of fused_loss are freed by the first backward pass through it: call it again for "
                "another one."
            )
        gradients, ctx.gradients = zip(ctx.gradients, ctx.dtypes, strict=True), None
        # float16 is made here: only the outer gradient, a scaler's, lifts these into its range
        scaled = (None if gradient is None else gradient.mul_(grad_loss).to(dtype) for gradient, dtype in gradients)
        return *scaled, *[None] * 5


class _Slices:
    """One slice's logits become its gradient, in buffers that all slices share.

    The elementwise passes run over a few rows at a time, which a CPU's caches hold.
    """

    def __init__(self, hidden, weight, targets_N, weights_N, term, wants_grad):
        self.hidden, self.weight, self.term, self.wants_grad = hidden, weight, term, wants_grad
        self.precision = as_full_precision(hidden[:0]).dtype
        self.targets_N, self.weights_N = targets_N, weights_N.to(self.precision)
        self.nll_N = torch.empty(len(hidden), dtype=self.precision, device=hidden.device)
        self.values = None if term is None else self.nll_N.new_empty(len(term.weights))
        self.cached_rows = _cached_rows(hidden.device, len(weight))
        self._buffers: dict[str, torch.Tensor] = {}

    def run(self, rows: slice, is_paired: bool) -> torch.Tensor:
        """Fills the results of some rows; returns the gradient of their logits `(R, V)` for [`gradient_product`]."""
        logits = self._product("logits", self.hidden[rows], self.weight)
        if is_paired and isinstance(self.term, TokenTerm):
            self._with_token_term(logits, rows)
        else:
            self._with_chunk_term(logits, rows, is_paired)
        return logits.to(gradient_dtype(self.hidden.dtype))

    def _with_chunk_term(self, logits_RV, rows: slice, is_paired: bool) -> None:
        """Cross-entropy, and chunks that lie whole in these rows: both only know the true tokens' log-probabilities,
        so one softmax times one coefficient per row is the gradient of their sum."""
        targets, nll = self.targets_N[rows], self.nll_N[rows]
        for part in _parts(len(logits_RV), self.cached_rows):
            log_probs = self._log_softmax("log_probs", logits_RV[part])
            torch.neg(log_probs.gather(-1, targets[part, None]).squeeze(-1), out=nll[part])
            logits_RV[part] = log_probs
        coefficient_R = self.weights_N[rows]
        if is_paired:
            coefficient_R = coefficient_R - self._chunk_gradient(-nll, rows)
        if self.wants_grad:
            for part in _parts(len(logits_RV), self.cached_rows):
                logits_RV[part].exp_().mul_(coefficient_R[part, None])
            logits_RV.scatter_add_(-1, targets[:, None], -coefficient_R[:, None])

    def _chunk_gradient(self, log_probs_R: torch.Tensor, rows: slice) -> torch.Tensor:
        """Fills the values of the chunks in some rows; their weighted derivative by each row's log-probability."""
        term = self.term
        chunks = slice(bisect_left(term.chunk_ends, rows.start + 1), bisect_left(term.chunk_ends, rows.stop) + 1)
        chunk_ids_R = term.chunk_ids_M[rows] - chunks.start
        likelihood = chunk_log_likelihood(log_probs_R, chunk_ids_R, chunks.stop - chunks.start)
        with torch.enable_grad():
            likelihood.requires_grad_()
            values = term.loss(likelihood, chunks)
        (slope,) = torch.autograd.grad(values, likelihood, term.weights[chunks].to(values))
        self.values[chunks] = values.detach()
        return slope[chunk_ids_R]

    def _with_token_term(self, logits_RV, rows: slice) -> None:
        """Cross-entropy and the divergence from the teacher's logits, a few rows after the other."""
        term = self.term
        teacher_RU = term.teacher_head(term.teacher_hidden_MK[rows])
        size, T = _shared_size(logits_RV, teacher_RU, term.shared_vocab_size), term.temperature
        for part in _parts(len(logits_RV), self.cached_rows):
            at = slice(rows.start + part.start, rows.start + part.stop)
            student, targets, weights = logits_RV[part], self.targets_N[at, None], self.weights_N[at, None]
            target = self._buffer("target", len(student), size).copy_(teacher_RU[part, :size])
            if term.kind == "tidal":
                torch.lerp(student[:, :size], target, term.lambda_M[at, None].to(target), out=target)
            log_t = self._log_softmax("log_t", target.div_(T))
            log_s = self._log_softmax("log_s", torch.div(student[:, :size], T, out=target))
            values, slope = _DIVERGENCES[term.kind](log_s, log_t, target, term.beta)
            self.values[at] = T**2 * values
            gradient = self._log_softmax("log_probs", student)
            self.nll_N[at] = -gradient.gather(-1, targets).squeeze(-1)
            if self.wants_grad:
                gradient.exp_().mul_(weights).scatter_add_(-1, targets, -weights)
                gradient[:, :size].addcmul_(slope, T * term.weights[at, None].to(slope))
                student.copy_(gradient)

    def _product(self, name: str, left_RH, right_VH) -> torch.Tensor:
        """Logits in full precision."""
        out = self._buffer(name, len(left_RH), len(right_VH))
        if left_RH.dtype == self.precision:
            return torch.mm(left_RH, right_VH.T, out=out)
        return out.copy_(left_RH @ right_VH.T)

    def _log_softmax(self, name: str, logits: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits, -1, out=self._buffer(name, *logits.shape))

    def _buffer(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """The first rows of a buffer that is made once, and again only where more rows are asked for."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < rows:
            buffer = torch.empty(rows, columns, dtype=self.precision, device=self.hidden.device)
            self._buffers[name] = buffer
        return buffer[:rows]


def _forward_kl(log_s, log_t, work, beta) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (R,) and their derivatives by the student's logits over T (R, S); overwrites its arguments."""
    p_t = torch.exp(log_t, out=work)
    values = log_t.sub_(log_s).mul_(p_t).sum(-1)
    return values, log_s.exp_().sub_(p_t)


def _reverse_kl(log_s, log_t, work, beta) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`_forward_kl`]."""
    return _from_student(torch.sub(log_s, log_t, out=log_t), log_s.exp_())


def _jsd(log_s, log_t, work, beta) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`_forward_kl`]."""
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta), out=work)
    from_t = (log_t - log_m).mul_(log_t.exp_()).sum(-1)
    from_s, slope = _from_student(torch.sub(log_s, log_m, out=work), log_s.exp_())
    return beta * from_t + (1 - beta) * from_s, slope.mul_(1 - beta)


def _from_student(ratio, p_s) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ p_s · ratio, the logarithm of p_s over something, and p_s · (ratio − Σ p_s · ratio)."""
    product = ratio.mul_(p_s)
    values = product.sum(-1)
    return values, product.addcmul_(p_s, values[:, None], value=-1)


# TIDAL is the forward KL from a target that is already mixed
_DIVERGENCES = {"forward_kl": _forward_kl, "tidal": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


def _write_product(out_RH, gradient_RV, weight_VH) -> None:
    """out = gradient · weight."""
    if weight_VH.dtype == out_RH.dtype:
        torch.mm(gradient_RV, weight_VH, out=out_RH)
    else:
        out_RH.copy_(gradient_product(gradient_RV, weight_VH))


def _add_product(total_VH, gradient_VR, hidden_RH, is_first: bool) -> None:
    """total += gradient · hidden, or = for the first."""
    if total_VH.dtype == hidden_RH.dtype:
        total_VH.addmm_(gradient_VR, hidden_RH, beta=0 if is_first else 1)  # with 0 what stands there is not read
    elif is_first:
        total_VH.copy_(gradient_product(gradient_VR, hidden_RH))
    else:
        total_VH.add_(gradient_product(gradient_VR, hidden_RH))


def _cuts(num_positions: int, slice_rows: int, term) -> Iterator[tuple[slice, bool]]:
    """Slices of at most `slice_rows` positions, and whether they are paired; a chunk is never cut."""
    num_paired = 0 if term is None else len(term)
    start = 0
    while start < num_positions:
        end = min(start + slice_rows, num_paired if start < num_paired else num_positions)
        if isinstance(term, ChunkTerm) and end < num_paired:
            last = bisect_right(term.chunk_ends, end) - 1
            fits = last >= 0 and term.chunk_ends[last] > start
            end = term.chunk_ends[last if fits else last + 1]
        yield slice(start, end), start < num_paired
        start = end


def _parts(num_rows: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` rows."""
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _cached_rows(device: torch.device, vocab_size: int) -> int:
    """Rows that elementwise passes work on together; on a GPU all of a slice."""
    if device.type != "cpu":
        return _slice_rows(device, vocab_size)
    return max(torch.get_num_threads(), CACHED_LOGITS // vocab_size)


def _slice_rows(device: torch.device, vocab_size: int) -> int:
    return max(SLICE_BYTES.get(device.type, SLICE_BYTES["cpu"]) // (4 * vocab_size), 1)


def _shared_size(student_RV, teacher_RU, shared_vocab_size: int | None) -> int:
    """S; refuses two vocabularies of which nobody says what they share."""
    student, teacher = shared_logits(student_RV[:0], teacher_RU[:0], shared_vocab_size)
    assert student.shape == teacher.shape, (student.shape, teacher.shape)
    return student.shape[-1]
