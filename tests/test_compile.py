"""`torch.compile` of a student whose own forward makes the loss: shapes that change, and the same numbers."""

import pytest
import torch
from tiny import tiny_model
from uniform_run import tiny_uniform

from tide_hf.models import row_noise

SHAPES = ((2, 9), (2, 12), (3, 7))


def batches():
    draw = torch.Generator().manual_seed(0)
    for rows, length in SHAPES:
        ids = torch.randint(0, 10, (rows, length), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        yield {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "training"),
    [("block", True), ("block", False), ("full", True), ("uniform", True), ("uniform", False)],
)
def test_lengths_and_batch_sizes_may_change(kind, training):
    """Catches a graph that takes its first batch's length for a constant, or that fails at the second."""
    torch._dynamo.reset()
    model = tiny_uniform() if kind == "uniform" else tiny_model(diffusion_type=kind)
    model.train(training).eval_num_times = 2
    compiled = torch.compile(model, backend="eager")
    for batch in batches():
        losses, gradients = [], []
        for each in (model, compiled):
            torch.manual_seed(1)
            model.zero_grad()
            losses.append(each(**batch).loss)
            losses[-1].backward()
            gradients.append(model.lm_head.weight.grad.clone())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-8)
        assert losses[0] > 0
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_noise_survives_a_compiler():
    """Catches integer arithmetic that a compiler would be free to change: other noise than without it."""
    torch._dynamo.reset()

    def noise(input_ids, labels, attention_mask):
        valid = attention_mask.bool()
        keys, positions = row_noise.row_keys(input_ids, labels, valid), row_noise.row_positions(valid)
        return row_noise.uniforms(keys, 1, positions), row_noise.random_tokens(keys, 2, positions, 24)

    compiled = torch.compile(noise, backend="inductor", dynamic=True)
    for batch in batches():
        assert all(torch.equal(*pair) for pair in zip(compiled(**batch), noise(**batch), strict=True))
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_foreign_loss_is_refused_when_compiled():
    """Catches the check on un-noised input lost in a compiled forward."""
    torch._dynamo.reset()
    compiled = torch.compile(tiny_model().train(), backend="eager")
    with pytest.raises(ValueError, match=r"input without a \[MASK\]"):
        compiled(torch.tensor([[1, 2, 3]])).logits.logsumexp(-1).sum().backward()
    torch._dynamo.reset()
