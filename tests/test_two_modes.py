"""Inverse distillation by enumeration: exact samplers, the loss and its gradient, and what training reaches."""

import math

import pytest
import references
import torch
from embedded import two_modes as toy

from tide_hf.losses import soft_denoising_loss

STEPS = (1, 2, 3, 4)
DATA = toy.two_modes()
NAMES = ["".join("AB_"[token] for token in state) for state in toy.STATES_SL.tolist()]
WORDS = [NAMES[row] for row in toy.CLEAN_ROWS]
SHARE = 0.05


def random_logits(num_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_steps, len(NAMES), 3, 2, generator=generator, dtype=torch.float64)


def distance(table):
    return toy.total_variation(toy.output_distribution(table), DATA).item()


def teacher_table(num_steps):
    return toy.exact_denoiser(DATA).expand(num_steps, -1, -1, -1)


def times_of(num_steps):
    return torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps


def loss_at_the_optimal_fake(logits, share=SHARE):
    times = times_of(len(logits))
    fake = toy.exact_denoiser(toy.student_distribution(logits.detach().softmax(-1), times))
    return toy.idlm_loss(logits, toy.exact_denoiser(toy.two_modes(share)), fake, times)


def reference(logits, share=SHARE, **kwargs):
    """The naive loss on the same table."""
    table = logits.softmax(-1)
    words = dict(zip(WORDS, toy.two_modes(share).tolist(), strict=True))
    return references.two_mode_inverse_loss(
        lambda step, state, i: table[step, NAMES.index(state), i],
        times_of(len(logits)).tolist(),
        words,
        kwargs.pop("epsilon", 1e-3),
        **kwargs,
    )


# ---- exact samplers ----


@pytest.mark.parametrize("num_steps", STEPS)
def test_output_distribution_equals_the_state_by_state_one(num_steps):
    """Catches revealed tokens that change again, a wrong reveal probability, and masks that survive the last step."""
    table = random_logits(num_steps).softmax(-1)
    expected = references.word_sampler(lambda step, state, i: table[step, NAMES.index(state), i].tolist(), num_steps)
    ours = toy.output_distribution(table)
    assert ours.sum().item() == pytest.approx(1) and sorted(expected) == sorted(WORDS)
    assert ours.tolist() == pytest.approx([expected[word] for word in WORDS], abs=1e-14)


def test_exact_denoiser_is_the_posterior():
    """Catches words counted that a state rules out."""
    clean = random_logits(1).flatten()[:8].softmax(0)
    words, denoiser = dict(zip(WORDS, clean.tolist(), strict=True)), toy.exact_denoiser(clean)
    for state, name in enumerate(NAMES):
        for i in range(3):
            expected = references.word_posterior(words, name, i)
            assert denoiser[state, i].tolist() == pytest.approx(expected, abs=1e-14)


def test_the_exact_teacher_needs_steps():
    """Catches a sampler other than the one whose exact distances are known: 3/4, 3/8, 1/4, 3/16."""
    assert [distance(teacher_table(k)) for k in STEPS] == pytest.approx([0.75, 0.375, 0.25, 0.1875], abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("knows_time", [False, True])
def test_no_other_table_is_better_than_the_best(knows_time):
    """Catches a bound that is not one: unequal positions and arbitrary answers in every state do not get below it."""
    generator = torch.Generator().manual_seed(0)
    for num_steps in STEPS:
        best = distance(toy.best_table(num_steps, knows_time))
        assert best < distance(teacher_table(num_steps)) - 0.005
        tables = num_steps if knows_time else 1
        # the all-masked state alone, unequal positions: many random tables
        a = torch.rand(200_000, tables, 3, generator=generator, dtype=torch.float64).expand(-1, num_steps, -1)
        reveal = 1 / torch.arange(num_steps, 0, -1, dtype=torch.float64)
        untouched = torch.cat([torch.ones(1), (1 - reveal[:-1]).cumprod(0)]).double() ** 3
        modes = [
            (untouched * ((1 - reveal[:, None] + reveal[:, None] * p).prod(-1) - (1 - reveal) ** 3)).sum(1)
            for p in (a, 1 - a)
        ]
        assert best < (1 - modes[0].clamp(max=0.5) - modes[1].clamp(max=0.5)).min() + 1e-9
    # everything free, by descent from random starts, at 2 steps
    for seed in range(2):
        logits = random_logits(2 if knows_time else 1, seed).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.2)
        for update in range(250):
            optimizer.param_groups[0]["lr"] = 0.2 * (1 - update / 250)
            table = logits.softmax(-1).expand(2, -1, -1, -1)
            descended = toy.total_variation(toy.output_distribution(table), DATA)
            optimizer.zero_grad()
            descended.backward()
            optimizer.step()
        best = distance(toy.best_table(2, knows_time))
        assert best < descended.item() < best + 0.005


# ---- the loss ----


@pytest.mark.parametrize("num_steps", [1, 3])
def test_loss_and_gradient_equal_the_naive_sums(num_steps):
    """Catches wrong weights, positions left out, a gradient through x_t or through the fake, and a lost sign."""
    logits = random_logits(num_steps).requires_grad_()
    ours, (expected, _) = loss_at_the_optimal_fake(logits), reference(logits)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-10)
    (gradient,), (wanted,) = torch.autograd.grad(ours, logits), torch.autograd.grad(expected, logits)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 5.0])
def test_loss_at_the_optimal_fake_is_not_negative(scale):
    """Catches positions with a seen token left out of the value, and the two networks exchanged."""
    for seed in range(5):
        assert loss_at_the_optimal_fake(scale * random_logits(2, seed)) > 1e-3


def test_loss_and_gradient_vanish_where_the_fake_is_the_teacher():
    """Catches a student that is pushed away from a distribution that is right."""
    logits, times = random_logits(2).requires_grad_(), times_of(2)
    teacher = toy.exact_denoiser(toy.two_modes(SHARE))
    loss = toy.idlm_loss(logits, teacher, teacher, times)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and (gradient == 0).all()


def test_the_optimal_fake_is_the_minimum_of_the_fakes_loss():
    """Catches a fake trained on something else than what the student makes: the library's loss has no slope there."""
    logits, times = random_logits(2), times_of(2)
    table = toy.with_seen_tokens(logits.softmax(-1))
    fake = toy.exact_denoiser(toy.student_distribution(table, times)).log().requires_grad_()
    law = toy.noised_data(times)[..., None] / 2 * toy._state_law(table, 0.4)
    step, before, after, i = ((law > 0)[..., None] & ~toy.SEEN_SL).nonzero().T
    loss = soft_denoising_loss(fake[after, i], table[step, before, i], law[step, before, after], num_items=1.0)
    (slope,) = torch.autograd.grad(loss, fake)
    assert slope.abs().max() < 1e-15 < 1e-3 < loss


def test_value_is_the_reverse_divergence_and_gradient_is_not_its_derivative(monkeypatch):
    """Catches a reading of the method as descent on KL(student ‖ teacher): the value is, the gradient omits x_t's."""
    monkeypatch.setattr(toy, "TIMES_J", (toy.NODES + 1) / 2)  # ε = 0: any-order likelihoods are exact then
    logits = random_logits(2).requires_grad_()
    ours, (total, generated) = loss_at_the_optimal_fake(logits), reference(logits, epsilon=0, through_sample=True)
    divergence = sum(
        p * (p.log() - math.log(q)) for p, q in zip(generated.values(), toy.two_modes(SHARE).tolist(), strict=True)
    )
    assert ours.item() == pytest.approx(divergence.item(), rel=1e-10)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, total, divergence)]
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-9, atol=1e-12)
    ours, exact = gradients[0].flatten(), gradients[2].flatten()
    assert torch.nn.functional.cosine_similarity(ours, exact, 0) > 0.9, "still a direction of descent"
    assert (ours - exact).norm() > 0.1 * exact.norm()


# ---- what training reaches ----


@pytest.mark.slow
def test_a_student_that_knows_the_time_lies_between_the_teacher_and_the_best():
    """Catches losses that train to something no better than the teacher, or to more than is possible."""
    for num_steps in STEPS:
        trained = distance(toy.train_student(num_steps, 0.12, seed=0, knows_time=True))
        best, teacher = distance(toy.best_table(num_steps, True)), distance(teacher_table(num_steps))
        assert best + 0.01 < trained < teacher - 0.01


@pytest.mark.slow
def test_a_sharp_teacher_makes_one_table_collapse_to_one_mode():
    """Catches a claim that inverse distillation always helps: with one table and a sharp teacher one mode is lost."""
    for num_steps in (1, 2, 4):
        times, best = times_of(num_steps), toy.best_table(num_steps)
        table = toy.train_student(num_steps, 0.01, seed=0)
        output = toy.output_distribution(table)
        assert output[[0, -1]].max() > 0.9 and output[[0, -1]].min() < 0.05
        # it is what the loss asks for: the best table has a higher one
        teacher = toy.exact_denoiser(toy.two_modes(0.01))
        losses = [
            toy.idlm_loss(t.log(), teacher, toy.exact_denoiser(toy.student_distribution(t, times)), times)
            for t in (table, best.clamp(1e-12, 1))
        ]
        assert losses[0] < losses[1]
        if num_steps > 1:
            assert distance(table) > distance(teacher_table(num_steps)) + 0.05
