"""Every loss against its naive derivation (value and gradient, float64), and what each promises at its limits."""

import itertools
import math
from decimal import Decimal, getcontext
from functools import partial

import numpy as np
import pytest
import references
import torch
import weighted_losses

from tide_hf import losses
from tide_hf.models.masked_diffusion import masked_probability

N, V, U, SHARED = 6, 9, 11, 8
CHUNKS = 4
STUDENT_CHUNKS = torch.tensor([0, 0, 1, -1, 3, 3, 3, -1, 1])
TEACHER_CHUNKS = torch.tensor([0, 1, 1, 1, -1, 3, 0])  # chunk 2 has no token on either side


def draw(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def same(ours, reference, *inputs):
    """Value and the gradient with respect to every input agree."""
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad(reference, inputs)
    for gradient, wanted in zip(torch.autograd.grad(ours, inputs), expected, strict=True):
        assert wanted.abs().max() > 1e-4, "the comparison would say nothing"
        torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-11)


# ---- denoising ----


@pytest.mark.parametrize("normalization", ["token", "sequence", "batch"])
def test_denoising_loss_matches_its_equation(normalization):
    """Catches a divisor that counts masked tokens, and weights applied to the wrong row."""
    logits = draw(3, 5, V).requires_grad_()
    input_ids = torch.randint(0, V, (3, 5), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]) > 0, input_ids, -100)
    masked = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]) > 0
    weights = torch.tensor([1.7, 4.0, 9.0], dtype=torch.float64)
    row = masked.nonzero()[:, 0]
    trained = (labels != -100).sum(1)
    num_items = {"token": trained.sum(), "sequence": 3 * trained[row], "batch": 3.0}[normalization]
    ours = losses.denoising_loss(logits[masked], input_ids[masked], weights[row], num_items=num_items)
    same(ours, references.denoising(logits, input_ids, labels, masked, weights, normalization), logits)


# ---- divergences over tokens ----

TOKEN_LOSSES = {
    "forward_kl": weighted_losses.forward_kl_loss,
    "reverse_kl": weighted_losses.reverse_kl_loss,
    "jsd": partial(weighted_losses.jsd_loss, beta=0.3),
}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", TOKEN_LOSSES)
def test_token_divergence_matches_its_equation(kind, temperature):
    """Catches swapped arguments, a lost T², a cut after the softmax, and a divisor taken from the selection."""
    student, teacher, weights = draw(N, V).requires_grad_(), draw(N, U, seed=1), draw(N, seed=2).abs()
    ours = TOKEN_LOSSES[kind](
        student, teacher, num_items=17, temperature=temperature, weights_N=weights, shared_vocab_size=SHARED
    )
    expected = references.token_divergence(kind, student, teacher, weights, 17, temperature, SHARED, beta=0.3)
    (gradient,) = torch.autograd.grad(ours, student, retain_graph=True)
    assert gradient[:, SHARED:].abs().max() == 0, "ids that mean something else to the teacher"
    same(ours, expected, student)


@pytest.mark.parametrize("kind", TOKEN_LOSSES)
def test_token_divergence_is_zero_only_at_the_teacher(kind):
    """Catches a sign or a missing entropy: a divergence is 0 at equality, with zero slope, and positive elsewhere."""
    teacher = draw(N, V)
    student = (teacher + 3.0).requires_grad_()  # a constant changes no softmax
    loss = TOKEN_LOSSES[kind](student, teacher, num_items=N)
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss) < 1e-12 and gradient.abs().max() < 1e-12
    assert TOKEN_LOSSES[kind](draw(N, V, seed=4), teacher, num_items=N) > 0.1


def test_forward_kl_survives_a_teacher_that_excludes_tokens():
    """Catches 0 · (−inf): a teacher that forbids a token (its own [MASK]) must not make loss or gradient NaN."""
    teacher, student = draw(N, V, seed=1), draw(N, V).requires_grad_()
    teacher[:, -1] = -torch.inf
    loss = weighted_losses.forward_kl_loss(student, teacher, num_items=N)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    shorter = weighted_losses.forward_kl_loss(student[:, :-1], teacher[:, :-1], num_items=N)
    assert loss > shorter, "the student's mass on the forbidden token costs something"


# ---- TIDAL ----


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tidal_loss_matches_its_equation(temperature):
    """Catches a target that keeps its graph, a mixture of probabilities, and λ applied to the wrong side."""
    student, teacher = draw(N, V).requires_grad_(), draw(N, U, seed=1)
    strength, weights = torch.rand(N, generator=torch.Generator().manual_seed(3)).double(), draw(N, seed=2).abs()
    ours = weighted_losses.tidal_loss(
        student,
        teacher,
        strength,
        num_items=13,
        temperature=temperature,
        weights_N=weights,
        shared_vocab_size=SHARED,
    )
    expected = references.tidal_logit(student, teacher, strength, weights, 13, temperature, SHARED)
    same(ours, expected, student)


def test_tidal_loss_limits():
    """Catches interpolation from the wrong end: λ = 0 must teach nothing, λ = 1 must be the forward KL."""
    student, teacher = draw(N, V).requires_grad_(), draw(N, V, seed=1)
    zero, one = torch.zeros(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    nothing = weighted_losses.tidal_loss(student, teacher, zero, num_items=N, temperature=2.0)
    (gradient,) = torch.autograd.grad(nothing, student)
    assert abs(nothing) < 1e-14 and gradient.abs().max() < 1e-14
    full = weighted_losses.tidal_loss(student, teacher, one, num_items=N, temperature=2.0)
    same(full, weighted_losses.forward_kl_loss(student, teacher, num_items=N, temperature=2.0), student)


@pytest.mark.parametrize("growth", ["cosine", "linear"])
def test_lambda_schedule(growth):
    """Catches a λ that decays, restarts or overshoots: it grows from init to max and stays there."""
    schedule = partial(losses.lambda_schedule, max_steps=200, lambda_init=0.2, lambda_max=0.7, growth=growth)
    values = [schedule(step) for step in range(201)]
    expected = [references.lambda_progress(step, 200, 0.2, 0.7, growth) for step in range(201)]
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert values[0] == pytest.approx(0.2) and values[-1] == pytest.approx(0.7)
    assert all(later > earlier for earlier, later in itertools.pairwise(values))
    assert schedule(-5) == values[0] and schedule(260) == values[-1], "progress is clamped to [0, 1]"


def test_lambda_schedule_defaults():
    """Catches defaults other than the paper's: 0.1 to 0.9, cosine."""
    assert losses.lambda_schedule(0, 10) == pytest.approx(0.1)
    assert losses.lambda_schedule(10, 10) == pytest.approx(0.9)
    assert losses.lambda_schedule(1, 4) == pytest.approx(0.1 + 0.8 * 0.5 * (1 - math.sqrt(0.5)))


@pytest.mark.parametrize("axes", ["both", "progress", "time"])
def test_tidal_lambda(axes):
    """Catches swapped axes: at t → 0 the teacher has its full share, at t → 1 none unless time is left out."""
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    ours = losses.tidal_lambda(0.4, 0.9, t, axes)
    expected = [references.tidal_lambda(0.4, 0.9, value, axes) for value in t.tolist()]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-15)
    assert ours[0].item() == pytest.approx(0.9 if axes == "time" else 0.4)
    assert ours[-1].item() == pytest.approx(0.4 if axes == "progress" else 0.0)


@pytest.mark.parametrize("kind", ["uniform", "midrange"])
def test_timestep_weight(kind):
    """Catches a variance used as a standard deviation: at t = 0.5 ± 0.15 the mid-range weight is e^(−½)."""
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    expected = [references.timestep_weight(value, kind) for value in t.tolist()]
    np.testing.assert_allclose(losses.timestep_weight(t, kind).numpy(), expected, rtol=1e-12)
    assert losses.timestep_weight(torch.tensor(0.65), "midrange").item() == pytest.approx(math.exp(-0.5), rel=1e-5)


def test_expected_strength_at_the_defaults():
    """Catches a changed default or integrand: the paper's setting teaches at 0.0856 of KL's strength."""
    assert losses.expected_tidal_strength(masked_probability) == pytest.approx(0.0856, abs=1e-4)


@pytest.mark.parametrize(
    ("schedule", "growth", "axes", "weight"),
    [
        ("linear", "cosine", "both", "midrange"),
        ("cosine", "linear", "both", "uniform"),
        ("cosine", "cosine", "progress", "midrange"),
        ("linear", "linear", "time", "midrange"),
    ],
)
def test_expected_strength_matches_its_integral(schedule, growth, axes, weight):
    """Catches an average over rows in place of masked positions, and a schedule other than the run's."""
    ours = losses.expected_tidal_strength(
        partial(masked_probability, schedule=schedule),
        lambda_init=0.2,
        lambda_max=0.7,
        growth=growth,
        axes=axes,
        weight=weight,
        time_epsilon=0.01,
    )
    expected = references.expected_strength(schedule, 0.2, 0.7, growth, axes, weight, 0.01)
    assert ours == pytest.approx(expected, rel=1e-4)


def test_tidal_gradient_is_lambda_times_that_of_kl():
    """Catches an integral of something else than the strength: to first order λ scales KL's slope."""
    student = draw(N, V).requires_grad_()
    teacher = student.detach() + 1e-3 * draw(N, V, seed=1)
    strength = torch.full((N,), 1e-3, dtype=torch.float64)
    (tidal,) = torch.autograd.grad(weighted_losses.tidal_loss(student, teacher, strength, num_items=N), student)
    (full,) = torch.autograd.grad(weighted_losses.forward_kl_loss(student, teacher, num_items=N), student)
    assert (tidal - 1e-3 * full).abs().max() < 1e-3 * 1e-2 * full.abs().max()


# ---- chunks ----


def chunk_likelihoods(seed=0, scale=2.0):
    """Student logits with a graph, ℓ of both sides by the package, and by the reference."""
    student, teacher = draw(9, V, seed=seed, scale=scale).requires_grad_(), draw(7, U, seed=seed + 1, scale=scale)
    ids = torch.arange(9) % V, torch.arange(7) % U
    both = ((student, ids[0], STUDENT_CHUNKS), (teacher, ids[1], TEACHER_CHUNKS))
    ours = [
        losses.chunk_log_likelihood(losses.true_token_log_probs(logits, targets), chunks, CHUNKS)
        for logits, targets, chunks in both
    ]
    naive = [references.chunk_log_likelihoods(logits, targets, chunks, CHUNKS) for logits, targets, chunks in both]
    return student, ours, naive


def test_chunk_log_likelihood_matches_its_equation():
    """Catches tokens summed into a neighbour's chunk, and a chunk without tokens that is not certain (ℓ = 0)."""
    student, (ours, _), (naive, _) = chunk_likelihoods()
    weights = torch.arange(1, CHUNKS + 1, dtype=torch.float64)
    same((ours * weights).sum(), sum(w * value for w, value in zip(weights, naive, strict=True)), student)
    assert ours[2] == 0


CHUNK_LOSSES = {
    "calm": weighted_losses.calm_loss,
    "reverse_calm": weighted_losses.reverse_calm_loss,
    "bernoulli_reverse_kl": weighted_losses.bernoulli_reverse_kl_loss,
}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", CHUNK_LOSSES)
def test_chunk_loss_matches_its_equation(kind, temperature):
    """Catches swapped sides, a T² that does not belong here, and a different clamp."""
    student, ours, naive = chunk_likelihoods()
    weights = torch.tensor([1.0, 0.5, 0.25, 3.0], dtype=torch.float64)
    loss = CHUNK_LOSSES[kind](*ours, num_items=7, temperature=temperature, weights_C=weights)
    same(loss, references.chunk_objective(kind, *naive, weights, 7, temperature), student)


@pytest.mark.parametrize("kind", ["tidal", "tidal_reverse"])
def test_tidal_chunk_loss_matches_its_equation(kind):
    """Catches a mixed label with a graph, and a mixture of log-likelihoods in place of probabilities."""
    student, ours, naive = chunk_likelihoods()
    strength = torch.tensor([0.1, 0.9, 0.4, 0.6], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 0.25, 3.0], dtype=torch.float64)
    loss = weighted_losses.tidal_chunk_loss(
        *ours, strength, num_items=5, temperature=2.0, weights_C=weights, reverse=kind == "tidal_reverse"
    )
    same(loss, references.chunk_objective(kind, *naive, weights, 5, 2.0, strength), student)


def test_tidal_chunk_loss_limits():
    """Catches interpolation from the wrong end: λ = 0 has no slope, λ = 1 is CALM."""
    student = torch.tensor([-0.3, -4.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-2.0, -0.1], dtype=torch.float64)
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(weighted_losses.tidal_chunk_loss(student, teacher, zero, num_items=2), student)
    assert gradient.abs().max() < 1e-14
    full = weighted_losses.tidal_chunk_loss(student, teacher, one, num_items=2)
    same(full, weighted_losses.calm_loss(student, teacher, num_items=2), student)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_poison_outside_chunks_does_not_spread(poison):
    """Catches sums by a 0/1 matrix product: 0 · NaN in a padded token would make every chunk NaN."""
    clean = draw(9, V).float()
    teacher = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    gradients = []
    for logits in (clean.clone(), clean.clone()):
        if gradients:
            logits[STUDENT_CHUNKS < 0] = poison
        logits.requires_grad_()
        log_probs = losses.true_token_log_probs(logits, torch.arange(9))
        likelihood = losses.chunk_log_likelihood(log_probs, STUDENT_CHUNKS, CHUNKS)
        loss = weighted_losses.calm_loss(likelihood, teacher, num_items=CHUNKS)
        assert torch.isfinite(loss)
        gradients.append(torch.autograd.grad(loss, logits)[0][STUDENT_CHUNKS >= 0])
    assert torch.equal(*gradients)


def test_log1mexp_is_accurate_at_both_ends():
    """Catches log(1 − exp(x)) in float32, which loses every digit of a chunk the model is sure of."""
    getcontext().prec = 50
    log_p = -torch.logspace(math.log10(1.2e-7), math.log10(16), 400, dtype=torch.float64).float()
    log_p = torch.cat([log_p, torch.tensor([-math.log(2)]), torch.tensor([-0.6931, -0.6932])])
    exact = [float((1 - Decimal(value).exp()).ln()) for value in log_p.tolist()]
    np.testing.assert_allclose(losses.log1mexp(log_p).double().numpy(), exact, rtol=1e-6)


def test_log1mexp_gradient_is_finite_at_both_ends():
    """Catches NaN from the branch that torch.where does not take."""
    log_p = torch.tensor([-1.2e-7, -1e-3, -math.log(2), -1.0, -16.0, -60.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.log1mexp(log_p).sum(), log_p)
    exact = [-1 / math.expm1(-value) for value in log_p.tolist()]
    np.testing.assert_allclose(gradient.numpy(), exact, rtol=1e-5)


def test_chunk_probability_clamp():
    """Catches a ceiling of 1 in float32 (log(1−p) = −inf) and a gradient that leaks through the clamp."""
    likelihood = torch.tensor([0.0, -1e-9, -1.0, -1000.0], requires_grad=True)
    clamped = losses.chunk_log_probability(likelihood)
    assert clamped.exp().max() < 1 and torch.isfinite(losses.log1mexp(clamped)).all()
    np.testing.assert_allclose(clamped.detach()[[0, 3]], [math.log1p(-(2.0**-23)), math.log(1e-7)], rtol=1e-6)
    (gradient,) = torch.autograd.grad(clamped.sum(), likelihood)
    assert gradient.tolist() == [0, 0, 1, 0]


def reverse_calm_slope(log_p_student, log_p_teacher):
    """d loss / d p_S of reverse CALM for one chunk at T = 1: the slope in ℓ over p_S."""
    student = torch.tensor([log_p_student], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([log_p_teacher], dtype=torch.float64)
    (slope,) = torch.autograd.grad(weighted_losses.reverse_calm_loss(student, teacher, num_items=1), student)
    return slope.item() / math.exp(log_p_student)


def test_reverse_calm_coefficient_is_bounded_and_fixed_by_the_teacher():
    """Catches forward CALM in its place: its slope grows as 1/p_S, reverse CALM's depends on the teacher alone."""
    for log_p_teacher in (-1000.0, -20.0, -5.0, -1.0, -0.1, -1e-3, -1e-9, 0.0):
        slopes = [reverse_calm_slope(log_p, log_p_teacher) for log_p in (-15.0, -1.0, -1e-3)]
        p_t = min(max(math.exp(log_p_teacher), references.FLOOR), references.CEILING)
        np.testing.assert_allclose(slopes, -math.log(p_t / (1 - p_t)), rtol=1e-6)
        assert max(map(abs, slopes)) < 16.2
    assert abs(reverse_calm_slope(-1.0, 0.0)) > 15.9, "the bound is reached"
    assert abs(reverse_calm_slope(-1.0, -math.log(2))) < 1e-12, "no opinion at p_T = 1/2"


def test_reverse_calm_filters_both_ends():
    """Catches lost dual-end filtering: in the logits the slope vanishes as the student's p_S goes to 0 or 1."""
    slopes = []
    for gap in (-12.0, 0.0, 12.0):
        logits = torch.tensor([[gap, 0.0]], dtype=torch.float64, requires_grad=True)
        likelihood = losses.true_token_log_probs(logits, torch.tensor([0]))
        loss = weighted_losses.reverse_calm_loss(likelihood, torch.tensor([-0.1], dtype=torch.float64), num_items=1)
        slopes.append(torch.autograd.grad(loss, logits)[0].abs().max().item())
    assert slopes[0] < 1e-4 < slopes[1] > 1e-4 > slopes[2]
    assert slopes[1] > 0.5


def test_bernoulli_reverse_kl_is_a_divergence():
    """Catches a missing entropy term: with it the optimum is p_S = p_T, without it p_S runs to 0 or 1."""
    log_p = torch.log(torch.linspace(0.02, 0.98, 25, dtype=torch.float64))
    for teacher in log_p:
        student = log_p.clone().requires_grad_()
        per_chunk = [
            weighted_losses.bernoulli_reverse_kl_loss(value[None], teacher[None], num_items=1).item()
            for value in student
        ]
        assert min(per_chunk) > -1e-14
        assert int(np.argmin(per_chunk)) == (log_p == teacher).nonzero().item()
    loss = weighted_losses.bernoulli_reverse_kl_loss(student, log_p, num_items=1)
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss) < 1e-13 and gradient.abs().max() < 1e-13


# ---- what all of them promise ----


def all_losses(student, teacher, weights=1.0, num_items=1.0):
    """Every loss on `(N, V)` logits of both sides; chunk losses see one token per chunk."""
    rows = torch.arange(len(student))
    likelihoods = [
        losses.chunk_log_likelihood(losses.true_token_log_probs(logits, rows % 5), rows, len(rows))
        for logits in (student, teacher)
    ]
    strength = torch.full((len(rows),), 0.3)
    token = {"num_items": num_items, "weights_N": weights, "temperature": 2.0}
    chunk = {"num_items": num_items, "weights_C": weights, "temperature": 2.0}
    return {
        "denoising": losses.denoising_loss(student, rows % 5, weights, num_items=num_items),
        "tidal": weighted_losses.tidal_loss(student, teacher, strength, **token),
        "tidal_chunk": weighted_losses.tidal_chunk_loss(*likelihoods, strength, **chunk),
        "tidal_chunk_reverse": weighted_losses.tidal_chunk_loss(*likelihoods, strength, reverse=True, **chunk),
        **{name: function(student, teacher, **token) for name, function in TOKEN_LOSSES.items()},
        **{name: function(*likelihoods, **chunk) for name, function in CHUNK_LOSSES.items()},
    }


ALL_LOSSES = tuple(all_losses(draw(2, V), draw(2, V, seed=1)))


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("num_items", [0, torch.tensor(0.0)])
def test_no_position_is_zero_with_a_graph(name, num_items):
    """Catches a constant 0 or 0/0 when nothing is masked: backward() raises on one rank while the others wait."""
    student = draw(0, V).float().requires_grad_()
    loss = all_losses(student, draw(0, V).float(), num_items=num_items)[name]
    assert loss.item() == 0
    loss.backward()
    assert student.grad.shape == student.shape


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_teacher_gets_no_gradient(name):
    """Catches a teacher in the graph: its activations would be kept, and its weights moved if they require grad."""
    student, teacher = draw(N, V).requires_grad_(), draw(N, V, seed=1).requires_grad_()
    loss = all_losses(student, teacher)[name]
    student_gradient, teacher_gradient = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
    assert student_gradient.abs().max() > 0
    assert teacher_gradient is None or teacher_gradient.abs().max() == 0


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_bf16_logits_are_raised_before_the_softmax(name):
    """Catches sums in bf16, which are off by several percent over a vocabulary."""
    student, teacher = draw(N, 300).bfloat16(), draw(N, 300, seed=1).bfloat16()
    half, full = all_losses(student, teacher)[name], all_losses(student.float(), teacher.float())[name]
    assert half.dtype == torch.float32
    assert torch.equal(half, full)


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_sums_are_divided_by_the_count_passed_in(name, as_tensor):
    """Catches a local mean: micro-batches over one global count must add up to the whole batch."""
    student, teacher, weights = draw(10, V), draw(10, V, seed=1), draw(10, seed=2).abs()
    num_items = torch.tensor(7.0) if as_tensor else 7
    whole = all_losses(student, teacher, weights, num_items)[name]
    # halves of five rows: the targets of all_losses repeat with that period
    first = all_losses(student[:5], teacher[:5], weights[:5], num_items)[name]
    second = all_losses(student[5:], teacher[5:], weights[5:], num_items)[name]
    torch.testing.assert_close(first + second, whole)
    torch.testing.assert_close(4 * all_losses(student, teacher, weights, 4 * num_items)[name], whole)


# ---- errors ----


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.lambda_schedule(3, 0), "max_steps > 0"),
        (lambda: losses.lambda_schedule(3, -1), "max_steps > 0"),
        (lambda: losses.lambda_schedule(3, 10, growth="step"), "'cosine' or 'linear'"),
        (lambda: losses.tidal_lambda(0.5, 0.9, torch.zeros(2), "timestep_only"), "axes must be"),
        (lambda: losses.timestep_weight(torch.zeros(2), "middle"), "'uniform' or 'midrange'"),
        (
            lambda: weighted_losses.jsd_loss(draw(2, 3), draw(2, 3), num_items=2, beta=0.0),
            r"jsd: beta=.* must lie in",
        ),
        (
            lambda: weighted_losses.jsd_loss(draw(2, 3), draw(2, 3), num_items=2, beta=1.0),
            r"jsd: beta=.* must lie in",
        ),
        (lambda: weighted_losses.forward_kl_loss(draw(2, V), draw(2, U), num_items=2), "shared_vocab_size"),
        (lambda: weighted_losses.reverse_kl_loss(draw(2, V), draw(2, U), num_items=2), "shared_vocab_size"),
        (lambda: weighted_losses.jsd_loss(draw(2, V), draw(2, U), num_items=2), "shared_vocab_size"),
        (lambda: weighted_losses.tidal_loss(draw(2, V), draw(2, U), torch.ones(2), num_items=2), "shared_vocab_size"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    """Catches a run that silently trains on another objective than the one asked for."""
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["tidal", *TOKEN_LOSSES])
def test_shared_vocabulary_larger_than_either_side_is_refused(name):
    """Catches a slice beyond both ends, which cuts nothing and compares ids of unequal meaning."""
    functions = {"tidal": partial(weighted_losses.tidal_loss, lambda_N=torch.ones(2)), **TOKEN_LOSSES}
    with pytest.raises((ValueError, RuntimeError)):
        functions[name](draw(2, V), draw(2, U), num_items=2, shared_vocab_size=U)
