"""Every term's gradient in every precision against float64, at a vocabulary of 32,000; and what stays outside the
student's autocast."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import weighted_losses
from tiny import tiny_model, tiny_trainer
from torch.testing import assert_close

from tide_hf import losses
from tide_hf.diffusion import LayoutSpec
from tide_hf.losses import Segment, sliced_loss
from tide_hf.losses.products import gradient_product
from tide_hf.teachers import Teacher

VOCAB, HIDDEN, NUM_POSITIONS, NUM_PAIRED, CHUNK = 32_000, 16, 24, 16, 4
SCALE = 65536.0  # what a GradScaler starts with
TOKEN_KINDS = ("forward_kl", "reverse_kl", "jsd", "tidal")
CHUNK_KINDS = ("calm", "reverse_calm", "bernoulli_reverse_kl", "tidal_chunk")
INVERSE_KINDS = ("soft", "inverse")
KINDS = (None, *TOKEN_KINDS, *CHUNK_KINDS, *INVERSE_KINDS)
# name -> type of the tensors, autocast's type, what the gradients' relative error (2-norm) may be: a few roundings of
# the format, of the logits among them, which an exponential turns into relative errors of probabilities
PRECISIONS = {
    "float64": (torch.float64, None, 1e-12),
    "float32": (torch.float32, None, 1e-5),
    "bfloat16 weights": (torch.bfloat16, None, 4 * 2.0**-8),
    "bfloat16 autocast": (torch.float32, torch.bfloat16, 4 * 2.0**-8),
    "float16 autocast": (torch.float32, torch.float16, 4 * 2.0**-11),
}


class Problem:
    """A student of small or large logits, and what it is compared with; all numbers such as both types hold."""

    def __init__(self, flat: bool, dtype: torch.dtype, generator_seed: int = 0):
        generator = torch.Generator().manual_seed(generator_seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        sharpness = 1e-3 if flat else 0.3
        # rounded to the coarsest precision, so that every precision is asked for the same gradient
        self.hidden = (draw(NUM_POSITIONS, HIDDEN) * sharpness).bfloat16().to(dtype).requires_grad_()
        self.weight = draw(VOCAB, HIDDEN).bfloat16().to(dtype).requires_grad_()
        self.teacher, self.fake = draw(NUM_PAIRED, VOCAB), draw(NUM_PAIRED, VOCAB)
        self.targets = torch.randint(VOCAB, (NUM_POSITIONS,), generator=generator)
        # 1/t over the tokens of a batch of a thousand
        self.weights = (torch.rand(NUM_POSITIONS, generator=generator, dtype=torch.float64) * 20 + 1) / 1000
        self.strength = torch.rand(NUM_PAIRED, generator=generator, dtype=torch.float64)
        self.chunk_ids = torch.arange(NUM_PAIRED) // CHUNK
        # chunks as likely as the student's: elsewhere a clamp takes the gradient
        log_probs = losses.true_token_log_probs(
            self.hidden.detach().double() @ self.weight.detach().double().T, self.targets
        )
        student = losses.chunk_log_likelihood(log_probs[:NUM_PAIRED], self.chunk_ids, NUM_PAIRED // CHUNK)
        self.temperature = 8.0
        self.teacher_likelihood = student + draw(NUM_PAIRED // CHUNK)

    def positions(self, kind):
        """What of the positions a kind has a loss of, and where they may be cut."""
        number = NUM_POSITIONS if kind is None else NUM_PAIRED
        return slice(0, number), list(range(CHUNK, number + 1, CHUNK)) if kind in CHUNK_KINDS else None

    def loss(self, kind, logits, at):
        """One kind's weighted sum over some positions."""
        if kind is None:
            return losses.denoising_loss(logits, self.targets[at], self.weights[at], num_items=1)
        if kind == "soft":
            return losses.soft_denoising_loss(
                logits, self.teacher[at].softmax(-1), self.weights[at], num_items=1.0, mask_token_id=5
            )
        if kind == "inverse":
            return losses.inverse_distillation_loss(
                logits, self.teacher[at], self.fake[at], self.weights[at], num_items=1.0, mask_token_id=5
            )
        loss = getattr(weighted_losses, f"{kind}_loss")
        if kind in TOKEN_KINDS:
            own = {"tidal": {"lambda_N": self.strength[at]}, "jsd": {"beta": 0.3}}.get(kind, {})
            return loss(logits, self.teacher[at], num_items=1, temperature=2.0, weights_N=self.weights[at], **own)
        chunks = slice(at.start // CHUNK, at.stop // CHUNK)
        own = {"lambda_C": self.strength[chunks]} if kind == "tidal_chunk" else {}
        log_probs = losses.true_token_log_probs(logits, self.targets[at])
        student = losses.chunk_log_likelihood(log_probs, self.chunk_ids[at] - chunks.start, chunks.stop - chunks.start)
        return loss(
            student,
            self.teacher_likelihood[chunks],
            num_items=1,
            temperature=self.temperature,
            weights_C=self.weights[chunks],
            **own,
        )

    def sliced(self, kind):
        rows, ends = self.positions(kind)
        segments = [Segment(rows, partial(self.loss, kind), ends=ends)]
        return sliced_loss(self.hidden, self.weight, segments, slice_rows=8)

    def plain(self, kind):
        rows, _ = self.positions(kind)
        return self.loss(kind, self.hidden[rows] @ self.weight.T, rows)

    def gradients(self, loss, scale):
        """In float64, of the loss as it was before the scaler."""
        found = torch.autograd.grad(loss * scale, [self.hidden, self.weight])
        return [gradient.double() / scale for gradient in found]


def errors(ours, exact) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "peaked"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_a_large_vocabulary(kind, flat):
    """Catches gradients that half precision rounds to zero before a scaler sees them: every term in every precision
    against float64 on the same numbers, and no worse than the plain losses in that precision."""
    reference = Problem(flat, torch.float64)
    exact = reference.gradients(reference.plain(kind), 1.0)
    assert all(gradient.abs().max() > 0 for gradient in exact)
    for name, (dtype, autocast, tolerance) in PRECISIONS.items():
        problem, scale = Problem(flat, dtype), SCALE if autocast == torch.float16 else 1.0
        with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
            sliced, plain = problem.sliced(kind), problem.plain(kind)
        assert sliced.dtype == torch.promote_types(dtype, torch.float32)
        ours, theirs = (errors(problem.gradients(loss, scale), exact) for loss in (sliced, plain))
        assert max(ours) <= tolerance, (name, ours, theirs)
        for own, other in zip(ours, theirs, strict=True):
            assert own <= 2 * other + tolerance / 10, (name, ours, theirs)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-9, 1.0, 1e9, 1e25])
def test_float16_products_of_any_magnitude(magnitude):
    """Catches a product that over- or underflows in float16: rows of very different sizes, many of one sign, against
    float64; and NaN and infinity that become numbers."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.rand(5, 3000, generator=generator) * magnitude
    gradient *= torch.tensor([1.0, 1e-6, 1e6, 1.0, 0.0])[:, None]
    right = (torch.randn(3000, 4, generator=generator) * 50 + 40).half()
    product = gradient_product(gradient, right)
    exact = gradient.double() @ right.double()
    assert product.dtype == torch.float32
    assert_close(product.double(), exact, rtol=2e-3, atol=0)
    for value in (torch.nan, torch.inf, -torch.inf):
        gradient[3, 7] = value
        assert not gradient_product(gradient, right)[3].isfinite().any()


def test_float16_hidden_states_get_their_gradient():
    """Catches gradients made float16 before the scaler's factor: hidden states and head in float16 themselves."""
    problem, exact_problem = Problem(True, torch.float16), Problem(True, torch.float64)
    exact = exact_problem.gradients(exact_problem.plain("forward_kl"), 1.0)
    ours = problem.gradients(problem.sliced("forward_kl"), SCALE)
    assert errors(ours, exact)[0] < 1e-3


# -- the teacher's side -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_head_ignores_autocast(autocast, dtype):
    """Catches a teacher's head inside the student's autocast: its logits are those of its own precision."""
    teacher = Teacher(tiny_model(1, dtype=dtype), LayoutSpec(1, 4, True))
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = teacher.logits(hidden)
    with torch.autocast("cpu", dtype=autocast):
        logits = teacher.logits(hidden)
    assert logits.dtype == expected.dtype == dtype
    assert torch.equal(logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"divergence": "forward_kl"}, {"divergence": "calm"}], ids=str)
def test_whole_teacher_ignores_the_runs_autocast(tmp_path, fields):
    """Catches a float32 teacher that a bf16 run asks in bfloat16, body or head: the numbers that meet the student's
    are those of a run without autocast, while the student's do round."""
    seen = {}
    for bf16 in (False, True):
        trainer = tiny_trainer(
            tmp_path / str(bf16),
            model=tiny_model(dtype=torch.float32),
            teacher=tiny_model(1, dtype=torch.float32),
            bf16=bf16,
            max_steps=1,
            tidal=False,
            comp_demo=False,
            **fields,
        )
        found = seen[bf16] = []
        head = trainer.signal.logits

        def recording(hidden, head=head, found=found):
            found.append(head(hidden))
            return found[-1]

        trainer.signal.logits = recording
        trainer.train()
        found.append([entry["ce"] for entry in trainer.state.log_history if "ce" in entry])
    (*plain, ce), (*mixed, mixed_ce) = seen[False], seen[True]
    assert len(plain) == len(mixed) > 0
    for ours, theirs in zip(mixed, plain, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    assert ce != mixed_ce, "the student ran in bfloat16"
