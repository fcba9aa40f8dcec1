"""The noise of `forward(labels=…)`: what belongs to a row in evaluation, what is fresh in training, and its law."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from transformers import Trainer, TrainingArguments
from uniform_run import tiny_uniform

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.models import masked_diffusion, row_noise, uniform_divergence

MASK, PAD = build_tokenizer().mask_token_id, build_tokenizer().pad_token_id
KINDS = ("block", "full", "uniform")


def student(kind: str, **changes):
    model = tiny_uniform() if kind == "uniform" else tiny_model(diffusion_type=kind, **changes)
    return model.double().eval()


def rows_of(num_rows: int, seed: int = 0, length: tuple[int, int] = (5, 11)) -> list[dict]:
    """Rows of unequal lengths, with prompts of unequal lengths that are not trained on."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        ids = draw.integers(0, 10, draw.integers(*length)).tolist()
        prompt = int(draw.integers(1, 4))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def stack(rows: list[dict], side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch, `extra` columns wider than its longest row."""
    width = max(len(row["input_ids"]) for row in rows) + extra
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        missing = width - len(row["input_ids"])
        values = {**row, "attention_mask": [1] * len(row["input_ids"])}
        for name, fill in (("input_ids", PAD), ("labels", -100), ("attention_mask", 0)):
            padding = [fill] * missing
            batch[name].append(padding + values[name] if side == "left" else values[name] + padding)
    return {name: torch.tensor(values) for name, values in batch.items()}


def evaluated(model, rows, tmp_path, batch_size: int, collate=stack) -> float:
    """What a plain Trainer's evaluation gives."""
    args = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=batch_size, report_to="none", disable_tqdm=True, use_cpu=True
    )
    return Trainer(model, args, data_collator=collate).evaluate(rows)["eval_loss"]


# ---- the numbers ----


def chi_square(uniform: torch.Tensor, num_cells: int = 64) -> float:
    """Pearson's statistic against uniformity, in standard deviations from its mean."""
    counts = torch.histc(uniform.flatten().double(), num_cells, 0, 1)
    expected = uniform.numel() / num_cells
    return float(((counts - expected) ** 2 / expected).sum() - (num_cells - 1)) / (2 * (num_cells - 1)) ** 0.5


def test_the_numbers_are_uniform_and_independent():
    """Catches a hash with a pattern: masks that are too many, too few, or the same for similar rows and positions."""
    rows, length = 3000, 48
    ids = torch.zeros(rows, length, dtype=torch.long)
    ids[:, 0] = torch.arange(rows)  # rows that differ in one token
    valid = torch.ones_like(ids, dtype=torch.bool)
    keys, positions = row_noise.row_keys(ids, ids, valid), row_noise.row_positions(valid)
    assert keys.unique().numel() == rows
    draws = [row_noise.uniforms(keys, draw, positions) for draw in range(3)]
    times = torch.cat([row_noise.stratified_times(keys, 0, 0, 1)] * 1)
    for uniform in (*draws, times, row_noise.uniforms(torch.arange(rows), 0, positions)):
        assert uniform.min() >= 0 and uniform.max() < 1 and abs(chi_square(uniform)) < 4
    columns = torch.cat([*draws, times], 1).T  # positions, and draws, and the time
    off = torch.corrcoef(columns) - torch.eye(len(columns))
    assert off.abs().max() < 5 / rows**0.5
    neighbours = torch.corrcoef(draws[0][:300]) - torch.eye(300)
    assert neighbours.square().mean().sqrt() < 1.1 / length**0.5
    cells = (draws[0][:, :-1] * 8).long() * 8 + (draws[0][:, 1:] * 8).long()
    assert abs(chi_square(cells / 64 + 1 / 128)) < 4
    tokens = row_noise.random_tokens(keys, 0, positions, 24)
    assert tokens.min() == 0 and tokens.max() == 23 and abs(chi_square(tokens / 24 + 1 / 48, 24)) < 4


def test_a_key_is_that_of_the_row():
    """Catches a key that sees padding, the batch or the integer type, or that does not see a token or a label."""
    rows = rows_of(20)

    def keys(batch):
        return row_noise.row_keys(batch["input_ids"], batch["labels"], batch["attention_mask"].bool()).tolist()

    expected = keys(stack(rows))
    assert len(set(expected)) == 20
    assert keys(stack(rows[::-1], "left", extra=3)) == expected[::-1]
    assert [keys(stack([row]))[0] for row in rows] == expected
    narrow = {name: tensor.int() for name, tensor in stack(rows).items()}
    assert keys(narrow) == expected
    for name, value in (("input_ids", 9), ("labels", -100)):
        changed = [{**row, name: [*row[name][:-1], value if row[name][-1] != value else 8]} for row in rows]
        assert not set(keys(stack(changed))) & set(expected)
    moved = [{name: values[::-1] for name, values in row.items()} for row in rows]
    assert len(set(keys(stack(moved))) & set(expected)) <= 1, "the order of the tokens is part of the row"


# ---- evaluation ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_depends_on_nothing_but_the_rows(kind, tmp_path):
    """Catches a plain Trainer whose evaluation loss follows the batch size, the order of the rows or the padding."""
    model, rows = student(kind), rows_of(37)
    expected = evaluated(model, rows, tmp_path, 1)
    assert len({sum(label != -100 for label in row["labels"]) for row in rows}) > 3
    order = np.random.default_rng(1).permutation(len(rows))
    for batch_size in (3, 8, 64):
        assert evaluated(model, rows, tmp_path, batch_size) == pytest.approx(expected, rel=1e-6)
    assert evaluated(model, [rows[row] for row in order], tmp_path, 8) == pytest.approx(expected, rel=1e-6)
    padded = lambda batch: stack(batch, "left", extra=3)  # noqa: E731
    # rotary tables are float32, so that a shift of all positions leaves rounding errors
    assert evaluated(model, rows, tmp_path, 8, padded) == pytest.approx(expected, rel=1e-5)
    alone = [model(**stack([row])).loss.item() for row in rows]
    assert np.mean(alone) == pytest.approx(expected, rel=1e-6) and np.std(alone) > 0.1
    state = torch.get_rng_state()
    model(**stack(rows))
    assert torch.equal(torch.get_rng_state(), state), "evaluation moved the training's draws"


def true_nats(model, batch) -> torch.Tensor:
    """E_t[w(t) Σ_M −log p(x0)] / n of each row, summed over every set M of masked positions and integrated over t."""
    ids, trained = batch["input_ids"], batch["labels"] != -100
    num_trained = int(trained[0].sum())
    columns = trained[0].nonzero()[:, 0]
    nodes, node_weights = np.polynomial.legendre.leggauss(200)
    t = torch.tensor((nodes + 1) / 2 * (1 - 1e-3) + 1e-3)
    rate = masked_diffusion.masked_probability(t, model.config.noise_schedule)
    weight = masked_diffusion.loss_weight(t, model.config.noise_schedule) * torch.tensor(node_weights) / 2
    total = torch.zeros(len(ids), dtype=torch.float64)
    for choice in itertools.product((False, True), repeat=num_trained):
        number = sum(choice)
        if number:
            masked = columns[torch.tensor(choice)]
            noised = ids.clone()
            noised[:, masked] = MASK
            log_p = model(noised).logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0][:, masked].sum(-1)
            total -= log_p * (weight * rate**number * (1 - rate) ** (num_trained - number)).sum()
    return total / num_trained


def losses_of_rows(model, batch, monkeypatch) -> torch.Tensor:
    """What each row of a batch contributes to its evaluation loss."""
    found = []

    def recorded(nats_B, num_trained_B, *rest):
        found.append(nats_B / num_trained_B)
        return row_noise.mean_nats(nats_B, num_trained_B, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[type(model)._denoise.__module__], "mean_nats", recorded)
        loss = model(**batch).loss
    assert loss == pytest.approx(found[0].mean().item(), rel=1e-6)
    return found[0].double()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@torch.no_grad()
def test_evaluation_is_unbiased(schedule, monkeypatch):
    """Catches times that leave out a part of [0, 1], and masks that come too often: a loss beside the likelihood."""
    model = student("full", noise_schedule=schedule)
    batch = stack([{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in DIGITS.tolist()])
    truth = true_nats(model, batch)
    error = losses_of_rows(model, batch, monkeypatch) - truth
    assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5 < 0.1 * truth.mean()
    model.eval_num_times = 1
    single = losses_of_rows(model, batch, monkeypatch) - truth
    assert abs(single.mean()) < 4 * single.std() / len(single) ** 0.5 and single.var() > 3 * error.var()


DIGITS = torch.randint(0, 10, (2000, 5), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_evaluation_of_the_uniform_state_model_is_unbiased(monkeypatch):
    """Catches the same of the uniform-state NELBO, against fresh noise of torch's generator."""
    model, ids = student("uniform"), DIGITS[:500]
    labels = torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], 1)
    draw, num_tokens = torch.Generator().manual_seed(7), model.config.vocab_size
    fresh = []
    for _ in range(40):
        level = 1e-3 + (1 - 2e-3) * torch.rand(500, 1, generator=draw, dtype=torch.float64)
        random = torch.randint(num_tokens, ids.shape, generator=draw)
        replaced = (torch.rand(ids.shape, generator=draw) < level) & (labels != -100)
        noised = torch.where(replaced, random, ids)
        predicted = model(noised, noise_level=level * (labels != -100)).logits[:, 1:].softmax(-1)
        clean = torch.nn.functional.one_hot(ids[:, 1:], num_tokens).double()
        alpha = (1 - level).expand(-1, 4).flatten()
        values = uniform_divergence(clean.flatten(0, 1), predicted.flatten(0, 1), noised[:, 1:].flatten(), alpha, 1.0)
        fresh.append(values.view(500, 4).mean(1))
    fresh = torch.stack(fresh).mean(0)
    error = losses_of_rows(model, {"input_ids": ids, "labels": labels}, monkeypatch) - fresh
    assert abs(error.mean()) < 4 * error.std() / 500**0.5 < 0.2 * fresh.mean()


@torch.no_grad()
def test_logits_of_an_evaluation_are_those_of_the_middle_time():
    """Catches logits of another noise than the documented one, and a number of times that is not obeyed."""
    model, batch = student("full"), stack(rows_of(3))
    calls = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True)
    out = model(**batch)
    assert len(calls) == model.eval_num_times == 8
    shares = [(call == MASK).sum() for call in calls]
    real = batch["attention_mask"].bool()
    again = model(calls[4], batch["attention_mask"]).logits[real]
    assert shares[0] < shares[7]
    torch.testing.assert_close(out.logits[real], again, rtol=0, atol=1e-10)
    calls.clear()
    model.eval_num_times = 2
    model(**batch)
    assert len(calls) == 2


@torch.no_grad()
def test_a_row_without_trained_tokens_counts_nothing():
    """Catches NaN, or a mean over fewer rows, which the evaluation loop would weigh as if it were over all."""
    model, rows = student("block"), rows_of(3)
    empty = {"input_ids": [1, 2, 3], "labels": [-100] * 3}
    assert model(**stack([*rows, empty])).loss == pytest.approx(model(**stack(rows)).loss.item() * 3 / 4, rel=1e-6)
    assert model(**stack([empty])).loss == 0


# ---- training ----


def times_of(model, ids, seed=None) -> torch.Tensor:
    """Shares of masked tokens of each row in one training forward."""
    if seed is not None:
        torch.manual_seed(seed)
    seen = []
    hook = model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(ids, labels=ids)
    hook.remove()
    return (seen[0]["input_ids"][:, : ids.shape[1]] == MASK).double().mean(1)


@pytest.mark.slow
def test_processes_of_one_seed_draw_other_times():
    """Catches ranks that all train at the same noise levels, because Trainer gives every one the same seed."""
    model = student("full").train()
    ids = torch.randint(0, 10, (32, 400), generator=torch.Generator().manual_seed(2))
    here, there = times_of(model, ids[:16], seed=0), times_of(model, ids[16:], seed=0)
    assert abs(torch.corrcoef(torch.stack([here, there]))[0, 1]) < 0.7 and (here - there).abs().mean() > 0.1
    assert torch.equal(times_of(model, ids[:16], seed=0), here), "a seed repeats its noise"
    assert (times_of(model, ids[:16]) - here).abs().mean() > 0.1, "each step draws anew"
    same = times_of(model, ids[:1].repeat(16, 1), seed=0)
    assert same.unique().numel() == 16, "equal rows of a batch have noise of their own"
    many = torch.cat([times_of(model, ids[:, :200]) for _ in range(30)])
    assert abs(chi_square(many.clamp(max=0.999), 8)) < 4, "times are uniform"


SCRIPT = """
import json, sys, torch
sys.path.insert(0, sys.argv[2])
from test_row_noise import evaluated, rows_of, student
rows = rows_of(24)
found = {kind: evaluated(student(kind), rows, sys.argv[1], 3) for kind in ("block", "uniform")}
if int(__import__("os").environ["RANK"]) == 0:
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_evaluate_to_the_number_of_one(tmp_path):
    """Catches a loss that Trainer multiplies by the number of processes, or a mean over tokens of unequal batches."""
    (tmp_path / "run.py").write_text(SCRIPT)
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "run.py"), str(tmp_path / "out"), str(here)]
    environment = {**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for kind, loss in found.items():
        assert loss == pytest.approx(evaluated(student(kind), rows_of(24), tmp_path, 6), rel=1e-6)
