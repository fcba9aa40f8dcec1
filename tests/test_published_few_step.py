"""Published families under inverse distillation: both losses of a step against plain forwards, and a run of each."""

import pytest
import test_few_step
import torch
from few_step_run import tiny_few_step
from published import write_checkpoint
from published_students import BLOCKS, STUDENTS, families, plain_logits
from test_few_step import naive_losses, noised_step
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from tide_hf.demo.sorting import build_tokenizer


def published_model(path, family: str):
    """A published folder in float64, its special tokens those of the sorting tokenizer; experts in a loop, which
    float64 needs."""
    tokenizer = build_tokenizer()
    special = {field: getattr(tokenizer, field) for field in ("mask_token_id", "pad_token_id", "eos_token_id")}
    write_checkpoint(path, family, **special, **BLOCKS)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")


# each kind of layout, dense and with experts
@pytest.mark.parametrize("family", ["llada-8b", "llada2", "dream", "sdar-moe", "wedlm-7b"])
def test_inverse_losses_are_the_definition(family, tmp_path, monkeypatch):
    """Catches three networks fed in another layout than the family's, asked at a wrong position, or tokens that are
    drawn for one position and stand at another: both losses and their gradients."""
    trainer = tiny_few_step(tmp_path, model=published_model(tmp_path / "model", family))
    student, fake, teacher = trainer.model, trainer.fake, trainer.teacher
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for network in (fake, teacher):
            for value in network.parameters():
                value += 0.1 * torch.randn(value.shape, generator=draw, dtype=value.dtype)
    rows, ((fake_batch,),), (batch,) = noised_step(trainer, 3)
    monkeypatch.setattr(test_few_step, "naive_logits", plain_logits(*STUDENTS[family]))
    networks = trainer, student, teacher, fake, rows
    for found, expected, network in (
        (trainer.inverse.fake_loss(student, fake, fake_batch), naive_losses(*networks, 0)[0], fake),
        (trainer.compute_loss(student, batch), naive_losses(*networks, 1)[1], student),
    ):
        assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
        assert abs(found) > 1e-2
        values = [network.lm_head.weight, network.model.embed_tokens.weight]
        for value, gradient in zip(
            torch.autograd.grad(found, values), torch.autograd.grad(expected, values), strict=True
        ):
            assert_close(value, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@families
def test_a_few_step_run(family, tmp_path):
    """Catches a family whose fake does not train, whose average is not saved, or which no few-step decoding takes."""
    trainer = tiny_few_step(tmp_path, model=published_model(tmp_path / "model", family).float(), max_steps=2)
    before = {name: value.clone() for name, value in trainer.fake.state_dict().items()}
    trainer.train()
    trainer.save_model()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.fake.state_dict().items())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(saved) is type(trainer.model) and saved.generation_config.steps_per_block == 2
    out = saved.generate(torch.tensor([[11, 3, 1, 12]]), max_new_tokens=8)
    assert trainer.model.config.mask_token_id not in out
