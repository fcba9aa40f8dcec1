"""The slicing engine against losses of all logits at once: values, gradients, memory, precision."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tide_hf import losses
from tide_hf.losses import Segment, sliced_log_probs, sliced_loss, slices

HIDDEN, VOCAB = 6, 11


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    """Losses are called for two rows at a time, so that a slice has several such parts."""
    monkeypatch.setattr(slices, "CACHED_LOGITS", 2 * VOCAB)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


class Problem:
    """Random hidden states and head: the first M of N positions are compared with frozen logits."""

    def __init__(self, num_positions=13, num_paired=10, dtype=torch.float64):
        generator = torch.Generator().manual_seed(num_positions)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.hidden = draw(num_positions, HIDDEN).to(dtype).requires_grad_()
        self.weight = draw(VOCAB, HIDDEN).to(dtype).requires_grad_()
        self.frozen = draw(num_paired, VOCAB)
        self.targets = torch.randint(VOCAB, (num_positions,), generator=generator)
        self.weights = draw(num_positions).abs()
        self.num_paired, self.calls = num_paired, []

    def paired(self, logits, rows, frozen):
        """Depends on which rows it is given, and on what of the other network."""
        self.calls.append(rows)
        return ((logits - frozen).square().sum(-1) * self.weights[rows]).sum()

    def alone(self, logits, rows):
        self.calls.append(rows)
        return losses.denoising_loss(logits, self.targets[rows], self.weights[rows], num_items=1)

    def segments(self, ends=None):
        boundary = slice(0, self.num_paired), slice(self.num_paired, len(self.hidden))
        return [
            Segment(boundary[1], self.alone),
            Segment(boundary[0], self.paired, [lambda rows: self.frozen[rows]], ends),
        ]

    def sliced(self, ends=None, **kwargs):
        return sliced_loss(self.hidden, self.weight, self.segments(ends), **kwargs)

    def whole(self):
        """Logits of all positions at once."""
        logits, paired = self.hidden @ self.weight.T, slice(0, self.num_paired)
        rest = slice(self.num_paired, len(self.hidden))
        return self.paired(logits[paired], paired, self.frozen) + self.alone(logits[rest], rest)

    def gradients(self, loss, scale=1.0):
        return torch.autograd.grad(loss * scale, [self.hidden, self.weight])


@pytest.mark.parametrize("slice_rows", [1, 4, 100])
@pytest.mark.parametrize(
    ("num_positions", "num_paired"),
    [(13, 10), (10, 10), (7, 0), (1, 1), (1, 0), (0, 0)],
    ids=["some paired", "all paired", "none paired", "one", "one unpaired", "no position"],
)
def test_slices_change_nothing(slice_rows, num_positions, num_paired):
    """Catches a position left out, counted twice, or paired with another's row, and a gradient of the wrong scale."""
    problem = Problem(num_positions, num_paired)
    loss, expected = problem.sliced(slice_rows=slice_rows), problem.whole()
    assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    # the outer gradient counts: accumulation, mixed precision and DDP scale the loss
    for ours, plain in zip(problem.gradients(loss, 3.0), problem.gradients(expected, 3.0), strict=True):
        assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_losses_are_called_for_a_few_rows():
    """Catches elementwise passes over a whole slice, which a CPU's caches do not hold, and rows in another order."""
    problem = Problem()
    problem.sliced(slice_rows=5)
    called = [(rows.start, rows.stop) for rows in problem.calls]
    assert called == [(10, 12), (12, 13), (0, 2), (2, 4), (4, 5), (5, 7), (7, 9), (9, 10)]


@pytest.mark.parametrize("slice_rows", [1, 2, 5, 100])
def test_cuts_at_the_given_ends_alone(slice_rows):
    """Catches a chunk cut in two, whose likelihood would be those of its halves, also one longer than a slice."""
    problem, ends = Problem(), [1, 8, 9, 10]
    loss = problem.sliced(ends, slice_rows=slice_rows)
    paired = [rows for rows in problem.calls if rows.start < 10]
    assert {rows.stop for rows in paired} <= set(ends)
    assert [rows.start for rows in paired] == [0, *(rows.stop for rows in paired[:-1])]
    assert_close(loss, problem.whole(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_precision_of_gradients(dtype, tolerance):
    """Catches sums in half precision: gradients within 1e-5 of their scale in float32, bfloat16 as good as its
    inputs' rounding, against float64 on the same rounded numbers."""
    problem, exact = Problem(dtype=dtype), Problem(dtype=dtype)
    for name in ("hidden", "weight"):
        setattr(exact, name, getattr(exact, name).detach().double().requires_grad_())
    loss, expected = problem.sliced(slice_rows=4), exact.whole()
    assert loss.dtype == torch.float32
    assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    for ours, plain in zip(problem.gradients(loss), exact.gradients(expected), strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), plain, rtol=0, atol=tolerance * float(plain.abs().max()))


def test_autocast_multiplies_as_the_plain_head_does():
    """Catches full-precision products under mixed precision, and gradients of another type than their tensors."""
    problem = Problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, expected = problem.sliced(slice_rows=4), problem.whole()
    assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    assert abs(loss - problem.sliced()) > 1e-4 * loss, "the products were rounded"
    for ours, plain in zip(problem.gradients(loss), problem.gradients(expected), strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, plain, rtol=0, atol=2e-2 * float(plain.abs().max()))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen):
    """Catches a (V, H) gradient formed for a head that an adapter run does not train, and one that is missing."""
    problem = Problem()
    getattr(problem, frozen).requires_grad_(False)
    other = {"hidden": problem.weight, "weight": problem.hidden}[frozen]
    (gradient,) = torch.autograd.grad(problem.sliced(), [other])
    (expected,) = torch.autograd.grad(problem.whole(), [other])
    assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        silent = problem.sliced()
    assert not silent.requires_grad
    assert_close(silent, problem.whole().detach())


def test_a_loss_without_gradient_and_positions_in_no_segment():
    """Catches garbage that a reused buffer hands on as a gradient."""
    problem = Problem()
    first = [Segment(slice(0, 4), problem.alone), Segment(slice(4, 8), lambda logits, rows: logits.detach().sum())]
    loss = sliced_loss(problem.hidden, problem.weight, first, slice_rows=4)
    gradient, _ = problem.gradients(loss)
    assert (gradient[4:] == 0).all() and (gradient[:4] != 0).all()


def test_second_backward_is_refused():
    """Catches gradients multiplied twice: they are scaled in place and freed."""
    loss = Problem().sliced()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="freed by the first backward"):
        loss.backward()


def test_logits_of_all_positions_never_exist():
    """Catches memory that grows with all positions times the vocabulary: no larger tensor than the head is made."""
    sizes = []
    hidden, weight = torch.randn(64, HIDDEN).requires_grad_(), torch.randn(1000, HIDDEN).requires_grad_()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            found = [value for value in (out if isinstance(out, tuple) else (out,)) if isinstance(value, torch.Tensor)]
            sizes.extend(value.numel() for value in found)
            return out

    with Watch():
        segments = [Segment(slice(0, 64), lambda z, rows: z.log_softmax(-1).square().sum())]
        sliced_loss(hidden, weight, segments, slice_rows=4).backward()
    assert max(sizes) == weight.numel(), "the head itself is larger than four positions' logits"


def test_true_token_log_probs_of_a_frozen_network(monkeypatch):
    """Catches slices put together in another order, and a graph through a teacher."""
    monkeypatch.setitem(slices.SLICE_BYTES, "cpu", 4 * VOCAB * 3)
    problem = Problem()
    ours = sliced_log_probs(problem.hidden, lambda hidden: hidden @ problem.weight.T, problem.targets, VOCAB)
    assert_close(ours, losses.true_token_log_probs(problem.hidden @ problem.weight.T, problem.targets).detach())
    assert not ours.requires_grad
    assert len(sliced_log_probs(problem.hidden[:0], lambda hidden: hidden, problem.targets[:0], VOCAB)) == 0
