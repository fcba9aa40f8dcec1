"""Inverse distillation: the losses against naive float64 derivations, sampling, and chunked heads."""

import pytest
import references
import torch
from torch.testing import assert_close

from tide_hf.losses import (
    Segment,
    clean_token_probabilities,
    denoising_loss,
    inverse_distillation_loss,
    sample_tokens,
    sliced_loss,
    soft_denoising_loss,
)

N, V, H, MASK = 6, 7, 5, 3


def draw(*shape, seed=0, scale=2.0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * scale


def value_and_gradient(function, tensor):
    tensor = tensor.clone().requires_grad_()
    value = function(tensor)
    return value.detach(), torch.autograd.grad(value, tensor)[0]


WEIGHTS = 1 / torch.linspace(0.1, 1.0, N, dtype=torch.float64)


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_fakes_loss_equals_the_naive_one(mask):
    """Catches a wrong sign, weight, divisor or normaliser of the fake's loss, and [MASK] left in it."""
    logits, q = draw(N, V), clean_token_probabilities(draw(N, V, seed=1), mask)
    got = value_and_gradient(lambda z: soft_denoising_loss(z, q, WEIGHTS, num_items=4.0, mask_token_id=mask), logits)
    expected = value_and_gradient(lambda z: references.soft_denoising(z, q, WEIGHTS, 4, mask), logits)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_students_loss_equals_the_naive_one(mask):
    """Catches a student pushed the wrong way, through one of the two frozen networks, or toward [MASK]."""
    student, teacher, fake = (draw(N, V, seed=seed) for seed in range(3))
    teacher.requires_grad_(), fake.requires_grad_()
    got = value_and_gradient(
        lambda z: inverse_distillation_loss(z, teacher, fake, WEIGHTS, num_items=4.0, mask_token_id=mask), student
    )
    expected = value_and_gradient(lambda z: references.inverse_student(z, teacher, fake, WEIGHTS, 4, mask), student)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    loss = inverse_distillation_loss(student.requires_grad_(), teacher, fake, num_items=1.0, mask_token_id=mask)
    assert torch.autograd.grad(loss, (teacher, fake), allow_unused=True) == (None, None)
    if mask is not None:
        assert (got[1][:, mask] == 0).all()


def test_student_moves_to_what_the_teacher_likes_more_than_the_fake():
    """Catches the difference of the two terms taken the wrong way round, in value and derivation alike."""
    teacher, fake = torch.zeros(1, V, dtype=torch.float64), torch.zeros(1, V, dtype=torch.float64)
    teacher[0, 2], fake[0, 5] = 1.0, 1.0
    student = torch.zeros(1, V, dtype=torch.float64, requires_grad=True)
    inverse_distillation_loss(student, teacher, fake, num_items=1.0).backward()
    assert student.grad[0].argmin() == 2 and student.grad[0].argmax() == 5


def test_student_gradient_is_zero_where_fake_equals_teacher():
    """Catches a term that keeps pushing a student whose distribution is the teacher's already."""
    student, both = draw(N, V), draw(N, V, seed=1)
    loss, gradient = value_and_gradient(
        lambda z: inverse_distillation_loss(z, both, both.clone(), WEIGHTS, num_items=1.0, mask_token_id=MASK), student
    )
    assert loss == 0 and (gradient == 0).all()


def test_a_one_hot_prediction_is_the_denoising_loss():
    """Catches positions seen by the student, whose q is one-hot, weighed differently from the others."""
    logits, targets = draw(N, V), torch.arange(N)
    one_hot = torch.nn.functional.one_hot(targets, V).double()
    assert_close(
        soft_denoising_loss(logits, one_hot, WEIGHTS, num_items=3.0),
        denoising_loss(logits, targets, WEIGHTS, num_items=3.0),
    )


def test_masks_logit_means_nothing_even_in_half_precision():
    """Catches NaN from 0 · (−∞), and a huge [MASK] logit that leaks into any of the networks."""
    student, teacher, fake = (draw(N, V, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    options = {"num_items": 1.0, "mask_token_id": MASK}
    before = inverse_distillation_loss(student, teacher, fake, **options)
    for logits in (student, teacher, fake):
        logits[:, MASK] = 300.0
    after = inverse_distillation_loss(student, teacher, fake, **options)
    assert after.dtype == torch.float32 and torch.isfinite(after) and torch.equal(before, after)
    assert (clean_token_probabilities(student, MASK)[:, MASK] == 0).all()


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_follow_the_distribution():
    """Catches samples of a neighbouring token or of a distorted distribution: frequencies of even draws."""
    probabilities = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    uniform = (torch.arange(1000) + 0.5) / 1000
    tokens = sample_tokens(probabilities.expand(1000, -1), uniform)
    assert torch.bincount(tokens, minlength=4).tolist() == [200, 0, 500, 300]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_tokens_are_never_drawn(dtype):
    """Catches [MASK], or an id behind the vocabulary, drawn at the very ends of the interval."""
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]], dtype=dtype).expand(3, -1) * (1 - 1e-7)
    ends = torch.tensor([0.0, 1 - 2.0**-24, 1.0])
    assert sample_tokens(probabilities, ends).tolist() == [1, 3, 3]


def test_no_gradient_passes_through_a_sample():
    """Catches a student trained through its sampled noise, which the masked case does not do."""
    logits = draw(N, V).requires_grad_()
    tokens = sample_tokens(clean_token_probabilities(logits, MASK), torch.rand(N))
    assert not tokens.requires_grad and tokens.dtype == torch.long


# -- slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slice_rows", [1, 4, 100])
def test_slices_change_nothing(slice_rows):
    """Catches frozen logits that are paired with others' positions: value and both gradients."""
    hidden, weight = draw(N, H, scale=1.0).requires_grad_(), draw(V, H, seed=1, scale=1.0).requires_grad_()
    teacher, fake = draw(N, V, seed=2), draw(N, V, seed=3)

    def loss_fn(logits, positions, teacher_logits, fake_logits):
        return inverse_distillation_loss(
            logits, teacher_logits, fake_logits, WEIGHTS[positions], num_items=3.0, mask_token_id=MASK
        )

    whole = loss_fn(hidden @ weight.T, slice(None), teacher, fake) * 2.5
    expected = torch.autograd.grad(whole, (hidden, weight))
    segment = Segment(slice(0, N), loss_fn, [lambda rows: teacher[rows], lambda rows: fake[rows]])
    sliced = sliced_loss(hidden, weight, [segment], slice_rows=slice_rows) * 2.5
    assert_close(sliced, whole, rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(sliced, (hidden, weight)), expected, rtol=1e-12, atol=1e-14)
