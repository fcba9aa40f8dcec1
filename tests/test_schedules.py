"""Noise schedules: what each one is, and that one more is one more entry of the table."""

import math

import numpy as np
import pytest
import references
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import MASK, SHAPE, VOCAB

from tide_hf.diffusion import chunk_loss_weight, mask_positions
from tide_hf.models import (
    SCHEDULES,
    NoiseSchedule,
    TIDEQwen3Config,
    TIDEQwen3ForBlockDiffusion,
    loss_weight,
    masked_probability,
    row_noise,
)

TIMES = (1e-3, 0.01, 0.2, 0.5, 0.77, 0.999)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_matches_alpha(schedule):
    """Catches a weight that belongs to another schedule, or a sign lost in α′: the loss would bound nothing."""
    t = torch.tensor(TIMES, dtype=torch.float64)
    probability = [references.masked_probability(value, schedule) for value in TIMES]
    weight = [references.loss_weight(value, schedule) for value in TIMES]
    np.testing.assert_allclose(masked_probability(t, schedule).numpy(), probability, rtol=1e-9)
    np.testing.assert_allclose(loss_weight(t, schedule).numpy(), weight, rtol=1e-9)
    slope = (masked_probability(t + 1e-7, schedule) - masked_probability(t - 1e-7, schedule)) / 2e-7
    np.testing.assert_allclose(slope / masked_probability(t, schedule), weight, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_keeps_its_digits_in_float32(schedule):
    """Catches 1 − (1 − t) in float32, which is off by 3e-5 at t = 1e-3."""
    t = torch.tensor([1e-3, 1.3e-3, 7e-3])
    exact = [references.loss_weight(value, schedule) for value in t.double().tolist()]
    np.testing.assert_allclose(loss_weight(t, schedule).numpy(), exact, rtol=1e-6)
    exact = [references.masked_probability(value, schedule) for value in t.double().tolist()]
    np.testing.assert_allclose(masked_probability(t, schedule).numpy(), exact, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("num_tokens", [1, 2, 8])
def test_chunk_loss_weight(schedule, num_tokens):
    """Catches completed chunks that count several times: with w(t) a chunk of 8 tokens weighs 2.7 times too much."""
    t = torch.tensor(TIMES, dtype=torch.float64)
    ours = chunk_loss_weight(t, torch.full_like(t, num_tokens), schedule)
    expected = [references.chunk_loss_weight(value, num_tokens, schedule) for value in TIMES]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-8)
    if num_tokens == 1:
        torch.testing.assert_close(ours, loss_weight(t, schedule))


@pytest.fixture
def quadratic(monkeypatch) -> str:
    """A third schedule, α = (1 − t)²."""
    record = NoiseSchedule(masked_probability=lambda t: t * (2 - t), loss_weight=lambda t: 2 * (1 - t) / (t * (2 - t)))
    monkeypatch.setitem(SCHEDULES, "quadratic", record)
    return "quadratic"


def naive_quadratic(t: float) -> tuple[float, float]:
    """1 − α(t), and −α′(t) by central differences."""
    return 1 - (1 - t) ** 2, ((1 - t + 1e-6) ** 2 - (1 - t - 1e-6) ** 2) / 2e-6


def test_a_new_schedule_is_used_wherever_its_name_is(quadratic):
    """Catches a place that knows two schedules by name and takes the second for any other."""
    assert TIDEQwen3Config(**SHAPE, noise_schedule=quadratic).noise_schedule == quadratic
    for t in TIMES:
        time, (masked, slope) = torch.tensor([t], dtype=torch.float64), naive_quadratic(t)
        assert masked_probability(time, quadratic).item() == pytest.approx(masked)
        assert loss_weight(time, quadratic).item() == pytest.approx(slope / masked, rel=1e-6)
        weight = chunk_loss_weight(time, torch.tensor([3]), quadratic).item()
        assert weight == pytest.approx(slope / (1 - (1 - masked) ** 3), rel=1e-6)
        uniform = torch.linspace(0, 1, 1001)[None]
        num_masked = mask_positions(uniform, time.float(), torch.zeros(1, 1001, dtype=torch.long), quadratic).sum()
        assert num_masked == pytest.approx(1000 * masked, abs=1)


@pytest.mark.parametrize("diffusion_type", ["block", "full"])
def test_the_loss_of_forward_uses_a_new_schedule(quadratic, diffusion_type):
    """Catches a student whose own loss is weighted or masked by another schedule than its config's."""
    config = TIDEQwen3Config(**SHAPE, mask_token_id=MASK, noise_schedule=quadratic, diffusion_type=diffusion_type)
    model = TIDEQwen3ForBlockDiffusion(config).eval()
    model.lm_head.weight.data.zero_()  # every masked token costs log V nats, whatever the network sees
    ids = torch.randint(VOCAB - 3, (2, 12), generator=torch.Generator().manual_seed(0))
    everything, total = torch.ones_like(ids, dtype=torch.bool), 0.0
    keys, positions = row_noise.row_keys(ids, ids, everything), row_noise.row_positions(everything)
    for number in range(model.eval_num_times):
        times = 1e-3 + (1 - 1e-3) * row_noise.stratified_times(keys, number, number, model.eval_num_times)
        uniforms = row_noise.uniforms(keys, number, positions)
        for t, row in zip(times.flatten().tolist(), uniforms.tolist(), strict=True):
            masked, slope = naive_quadratic(t)
            total += sum(u < masked for u in row) * slope / masked
    expected = math.log(VOCAB) * total / (ids.numel() * model.eval_num_times)
    assert model(ids, labels=ids).loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_unknown_schedule_is_refused_by_name():
    """Catches a misspelt schedule that would train as another one."""
    for function in (masked_probability, loss_weight):
        with pytest.raises(ValueError, match="schedule must be one of linear, cosine, got 'quadratic'"):
            function(torch.tensor([0.5]), "quadratic")
    with pytest.raises((ValueError, StrictDataclassError), match="noise_schedule must be one of linear, cosine, got"):
        TIDEQwen3Config(**SHAPE, noise_schedule="quadratic")
