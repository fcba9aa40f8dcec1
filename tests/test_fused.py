"""The fused step against the plain functions that define its terms: values, gradients, memory, precision."""

import dataclasses
from functools import partial

import pytest
import references
import torch
from torch.testing import assert_close

from tide_hf import losses
from tide_hf.losses import ChunkTerm, TokenTerm, fused_loss, fused_true_token_log_probs
from tide_hf.losses import fused as fused_module

HIDDEN, TEACHER_HIDDEN, VOCAB, TEACHER_VOCAB, SHARED = 6, 5, 11, 13, 9
TEMPERATURE = 2.0
TOKEN_KINDS = ("forward_kl", "reverse_kl", "jsd", "tidal")
CHUNK_KINDS = ("calm", "reverse_calm", "bernoulli_reverse_kl", "tidal_chunk", "reverse_tidal_chunk")


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    """The elementwise passes run over two rows at a time, so that a slice has several such parts."""
    monkeypatch.setattr(fused_module, "CACHED_LOGITS", 2 * VOCAB)


class Problem:
    """Random hidden states, heads, targets and weights: N positions, M of them paired, chunks of 1, 3, 2, … tokens."""

    def __init__(self, num_positions=13, num_paired=10, dtype=torch.float64, sizes=(1, 3, 2, 1, 3)):
        generator = torch.Generator().manual_seed(num_positions)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.sizes = [size for size, end in zip(sizes, self._ends(sizes), strict=True) if end <= num_paired]
        if sum(self.sizes) < num_paired:
            self.sizes.append(num_paired - sum(self.sizes))
        self.hidden = draw(num_positions, HIDDEN).to(dtype).requires_grad_()
        self.weight = draw(VOCAB, HIDDEN).to(dtype).requires_grad_()
        self.teacher_hidden = draw(num_paired, TEACHER_HIDDEN).to(dtype)
        self.teacher_weight = draw(TEACHER_VOCAB, TEACHER_HIDDEN).to(dtype)
        self.targets = torch.randint(VOCAB, (num_positions,), generator=generator)
        self.weights = draw(num_positions).abs()
        self.pair_weights = draw(num_paired).abs()
        self.strength = torch.rand(num_paired, generator=generator, dtype=torch.float64)
        self.chunk_ids = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes).long())
        self.teacher_likelihood = -draw(len(self.sizes)).abs()

    @staticmethod
    def _ends(sizes) -> list[int]:
        return torch.tensor(sizes).cumsum(0).tolist()

    def teacher_head(self, hidden):
        with torch.autocast("cpu", enabled=False):  # as a teacher's is
            return hidden @ self.teacher_weight.T

    def token_term(self, kind: str) -> TokenTerm:
        return TokenTerm(
            kind=kind,
            teacher_hidden_MK=self.teacher_hidden,
            teacher_head=self.teacher_head,
            weights=self.pair_weights,
            temperature=TEMPERATURE,
            lambda_M=self.strength if kind == "tidal" else None,
            beta=0.3,
            shared_vocab_size=SHARED,
        )

    def chunk_loss(self, kind: str, num_items=None):
        """A loss of `losses.calm`, of student and teacher likelihoods and λ."""
        if kind.endswith("tidal_chunk"):
            return partial(losses.tidal_chunk_loss, reverse=kind.startswith("reverse"))
        loss = getattr(losses, f"{kind}_loss")
        return lambda student, teacher, strength, **kwargs: loss(student, teacher, **kwargs)

    def chunk_term(self, kind: str) -> ChunkTerm:
        loss, size = self.chunk_loss(kind), len(self.sizes)

        def values(student_C, chunks):
            strength, teacher = self.strength[:size][chunks], self.teacher_likelihood[chunks]
            return loss(student_C, teacher, strength, num_items=None, temperature=TEMPERATURE)

        return ChunkTerm(values, self.chunk_ids, self._ends(self.sizes), self.pair_weights[:size])

    def term(self, kind: str | None):
        if kind is None:
            return None
        return self.token_term(kind) if kind in TOKEN_KINDS else self.chunk_term(kind)

    def plain(self, kind: str | None) -> torch.Tensor:
        """The same loss from the plain functions, logits of all positions at once."""
        logits = self.hidden @ self.weight.T
        loss = losses.denoising_loss(logits, self.targets, self.weights, num_items=1)
        num_paired = len(self.teacher_hidden)
        if kind in TOKEN_KINDS:
            function = {"jsd": partial(losses.jsd_loss, beta=0.3), "forward_kl": losses.forward_kl_loss}.get(kind)
            if kind == "tidal":
                function = partial(losses.tidal_loss, lambda_N=self.strength)
            function = function or losses.reverse_kl_loss
            loss = loss + function(
                logits[:num_paired],
                self.teacher_head(self.teacher_hidden),
                num_items=1,
                temperature=TEMPERATURE,
                weights_N=self.pair_weights,
                shared_vocab_size=SHARED,
            )
        elif kind is not None:
            log_probs = losses.true_token_log_probs(logits[:num_paired], self.targets[:num_paired])
            student = losses.chunk_log_likelihood(log_probs, self.chunk_ids, len(self.sizes))
            size = len(self.sizes)
            loss = loss + self.chunk_loss(kind)(
                student,
                self.teacher_likelihood,
                self.strength[:size],
                num_items=1,
                temperature=TEMPERATURE,
                weights_C=self.pair_weights[:size],
            )
        return loss

    def fused(self, kind: str | None, **kwargs):
        return fused_loss(self.hidden, self.weight, self.targets, self.weights, self.term(kind), **kwargs)

    def gradients(self, loss: torch.Tensor, scale: float = 1.0):
        return torch.autograd.grad(loss * scale, [self.hidden, self.weight])


@pytest.mark.parametrize("kind", [None, *TOKEN_KINDS, *CHUNK_KINDS])
@pytest.mark.parametrize("slice_rows", [1, 4, 100])
@pytest.mark.parametrize(
    ("num_positions", "num_paired"),
    [(13, 10), (10, 10), (7, 0), (1, 1), (1, 0), (0, 0)],
    ids=["some paired", "all paired", "none paired", "one", "one unpaired", "no position"],
)
def test_equals_the_plain_functions(kind, slice_rows, num_positions, num_paired):
    """Catches a gradient derived wrongly, a slice that cuts a chunk, and buffers that leak from slice to slice."""
    problem = Problem(num_positions, num_paired)
    loss, nll_N, values = problem.fused(kind, slice_rows=slice_rows)
    expected = problem.plain(kind)
    assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    # the outer gradient counts: accumulation, mixed precision and DDP scale the loss
    for ours, plain in zip(problem.gradients(loss, 3.0), problem.gradients(expected, 3.0), strict=True):
        assert_close(ours, plain, rtol=1e-10, atol=1e-10 * float(plain.abs().max()) if plain.numel() else 0)
    term, total = problem.term(kind), (problem.weights * nll_N).sum()
    if term is not None:
        assert len(values) == len(term.weights)
        total = total + (term.weights * values).sum()
    assert_close(total, loss.detach(), rtol=1e-12, atol=1e-14)
    assert not nll_N.requires_grad and (values is None or not values.requires_grad)


@pytest.mark.parametrize("kind", TOKEN_KINDS)
def test_token_terms_equal_a_naive_derivation(kind):
    """Catches an error that the plain functions share: value and gradient against loops in float64."""
    problem = Problem()
    loss, *_ = problem.fused(kind, slice_rows=4)
    logits = problem.hidden @ problem.weight.T
    paired, teacher = logits[: len(problem.teacher_hidden)], problem.teacher_head(problem.teacher_hidden)
    arguments = {"num_items": 1, "temperature": TEMPERATURE, "size": SHARED}
    if kind == "tidal":
        expected = references.tidal_logit(paired, teacher, problem.strength, problem.pair_weights, **arguments)
    else:
        expected = references.token_divergence(kind, paired, teacher, problem.pair_weights, beta=0.3, **arguments)
    for logit, target, weight in zip(logits, problem.targets.tolist(), problem.weights, strict=True):
        expected = expected - weight * torch.log_softmax(logit, -1)[target]
    assert_close(loss, expected, rtol=1e-10, atol=0)
    for ours, plain in zip(problem.gradients(loss), problem.gradients(expected), strict=True):
        assert_close(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [None, *TOKEN_KINDS, *CHUNK_KINDS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_precision_of_gradients(kind, dtype, tolerance):
    """Catches sums in half precision: gradients within 1e-5 of their scale in float32, bfloat16 as good as its
    inputs' rounding, against float64 on the same rounded numbers."""
    problem, exact = Problem(dtype=dtype), Problem(dtype=dtype)
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        setattr(exact, name, getattr(exact, name).detach().double().requires_grad_("teacher" not in name))
    loss, nll_N, _ = problem.fused(kind, slice_rows=4)
    expected = exact.plain(kind)
    assert loss.dtype == nll_N.dtype == torch.float32
    assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    for ours, plain in zip(problem.gradients(loss), exact.gradients(expected), strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), plain, rtol=0, atol=tolerance * float(plain.abs().max()))


def test_autocast_multiplies_as_the_plain_head_does():
    """Catches full-precision products under mixed precision, and gradients of another type than their tensors."""
    problem = Problem(dtype=torch.float32)
    problem.weights, problem.pair_weights = problem.weights.float(), problem.pair_weights.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, *_ = problem.fused("forward_kl", slice_rows=4)
        expected = problem.plain("forward_kl")
    assert_close(loss, expected, rtol=1e-5, atol=0)
    assert abs(loss - problem.fused("forward_kl")[0]) > 1e-4 * loss, "the products were rounded"
    for ours, plain in zip(problem.gradients(loss), problem.gradients(expected), strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, plain, rtol=0, atol=2e-2 * float(plain.abs().max()))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen):
    """Catches a (V, H) gradient formed for a head that an adapter run does not train, and one that is missing."""
    problem = Problem()
    getattr(problem, frozen).requires_grad_(False)
    loss, *_ = problem.fused("tidal")
    other = {"hidden": problem.weight, "weight": problem.hidden}[frozen]
    (gradient,) = torch.autograd.grad(loss, [other])
    (expected,) = torch.autograd.grad(problem.plain("tidal"), [other])
    assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert not problem.fused("tidal")[0].requires_grad


def test_second_backward_is_refused():
    """Catches gradients multiplied twice: they are scaled in place and freed."""
    problem = Problem()
    loss, *_ = problem.fused(None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="freed by the first backward"):
        loss.backward()


def test_logits_of_all_positions_never_exist(monkeypatch):
    """Catches a buffer that grows with the positions: no tensor of the step has more rows of the vocabulary than a
    slice, but for the two gradients that are asked for."""
    seen = []
    original = torch.empty

    def recording(*shape, **kwargs):
        seen.append(shape)
        return original(*shape, **kwargs)

    monkeypatch.setattr(fused_module.torch, "empty", recording)
    Problem(60, 50, sizes=(2,) * 25).fused("forward_kl", slice_rows=8)
    vocabulary = [shape for shape in seen if len(shape) == 2 and shape[1] in (VOCAB, TEACHER_VOCAB, SHARED)]
    assert vocabulary and max(rows for rows, _ in vocabulary) == 8


def test_chunk_longer_than_a_slice_stays_whole():
    """Catches a long chunk cut in two, whose likelihood would be those of its halves."""
    problem = Problem(9, 9, sizes=(1, 7, 1))
    loss, _, values = problem.fused("calm", slice_rows=2)
    assert len(values) == 3
    assert_close(loss, problem.plain("calm"), rtol=1e-12, atol=0)


def test_different_vocabularies_need_a_shared_size():
    """Catches ids compared that mean different things."""
    problem = Problem()
    term = dataclasses.replace(problem.token_term("forward_kl"), shared_vocab_size=None)
    with pytest.raises(ValueError, match="11 logits and the teacher 13"):
        fused_loss(problem.hidden, problem.weight, problem.targets, problem.weights, term)


def test_true_token_log_probs_of_a_frozen_network(monkeypatch):
    """Catches slices put together in another order, and a graph through a teacher."""
    monkeypatch.setitem(fused_module.SLICE_BYTES, "cpu", 4 * VOCAB * 3)
    problem = Problem()
    ours = fused_true_token_log_probs(problem.hidden, lambda hidden: hidden @ problem.weight.T, problem.targets, VOCAB)
    assert_close(ours, losses.true_token_log_probs(problem.hidden @ problem.weight.T, problem.targets).detach())
    assert not ours.requires_grad
    assert (
        len(fused_true_token_log_probs(problem.teacher_hidden[:0], problem.teacher_head, problem.targets[:0], VOCAB))
        == 0
    )
