"""Published families as students: their denoising loss, what they learn, adapters, and what is saved."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published import FAMILIES
from published_students import MASK, PAD, STUDENTS, families, fresh_student, naive_masked_logits, published_student

from tide_hf.models import row_noise
from tide_hf.models.masked_diffusion import TIME_EPSILON

HERE = Path(__file__).parent
# rotary tables are float32
RTOL = 1e-4


def rows_with_prompts() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of unequal lengths and their labels; prompts of unequal lengths, one of none, are not trained on."""
    draw, rows = torch.Generator().manual_seed(3), []
    for length, prompt in ((11, 3), (6, 0), (9, 5)):
        ids = torch.randint(0, 20, (length,), generator=draw)
        rows.append((ids, torch.where(torch.arange(length) < prompt, -100, ids)))
    return rows


def stacked(rows, side: str) -> dict[str, torch.Tensor]:
    """A batch padded on a side, two columns wider than its longest row."""
    width = max(len(ids) for ids, _ in rows) + 2
    batch = {
        name: torch.full((len(rows), width), fill)
        for name, fill in (("input_ids", PAD), ("labels", -100), ("attention_mask", 0))
    }
    for number, (ids, labels) in enumerate(rows):
        columns = slice(width - len(ids), None) if side == "left" else slice(0, len(ids))
        for name, values in (("input_ids", ids), ("labels", labels), ("attention_mask", 1)):
            batch[name][number, columns] = values
    return batch


def naive_nats(family, config, weights, row, key, number: int, num_times: int) -> torch.Tensor:
    """Σ −log p(x0) / t over the masked positions of one row, at its time `number` of `num_times`."""
    ids, labels = row
    position = torch.arange(len(ids)) + 1
    t = float(TIME_EPSILON + (1 - TIME_EPSILON) * row_noise.stratified_times(key, number, number, num_times))
    masked = (row_noise.uniforms(key, number, position[None])[0] < t) & (labels != -100)
    logits = naive_masked_logits(family, config, weights, ids, masked, MASK)
    return sum(-(values.log_softmax(-1)[ids[place]]) / t for place, values in logits.items())


def key_of(row) -> torch.Tensor:
    ids, labels = row
    return row_noise.row_keys(ids[None], labels[None], torch.ones(1, len(ids), dtype=torch.bool))


# ---- the loss ----


@families
def test_evaluation_loss_is_the_definition(family, tmp_path):
    """Catches a shift, a block grid, an order or a mask that the loss of a padded batch has other than the published
    network, and a row whose loss depends on its neighbours."""
    config, weights, model = published_student(tmp_path, family)
    rows = rows_with_prompts()
    expected = []
    for row in rows:
        nats = sum(naive_nats(family, config, weights, row, key_of(row), number, 8) for number in range(8)) / 8
        expected.append(float(nats / (row[1] != -100).sum()))
    assert min(expected) > 1
    model.eval()
    with torch.no_grad():
        for side in ("left", "right"):
            assert model(**stacked(rows, side)).loss.item() == pytest.approx(sum(expected) / 3, rel=RTOL)
            for row, own in zip(rows, expected, strict=True):
                assert model(**stacked([row], side)).loss.item() == pytest.approx(own, rel=RTOL)


@families
def test_training_loss_and_gradients_are_the_definition(family, tmp_path):
    """Catches a loss of the wrong tokens with the right value on average: means over tokens, gradients of the
    published tensors that stand at both ends of the network."""
    config, weights, model = published_student(tmp_path, family)
    rows, names = rows_with_prompts(), FAMILIES[family][3]
    ends = {name: weights[f"{names[name]}.weight"].double().requires_grad_() for name in ("embed", "head")}
    weights = {**weights, **{f"{names[name]}.weight": value for name, value in ends.items()}}
    torch.manual_seed(5)
    keys = row_noise.fresh_keys(torch.cat([key_of(row) for row in rows]))
    nats = sum(
        naive_nats(family, config, weights, row, keys[number : number + 1], 0, 1) for number, row in enumerate(rows)
    )
    num_tokens = sum(int((labels != -100).sum()) for _, labels in rows)
    (nats / num_tokens).backward()
    for side, divisor in (("left", None), ("right", 2 * num_tokens)):
        model.train().zero_grad()
        torch.manual_seed(5)
        loss = model(**stacked(rows, side), num_items_in_batch=divisor).loss
        assert loss.item() == pytest.approx(nats.item() / (divisor or num_tokens), rel=RTOL)
        loss.backward()
        share = num_tokens / (divisor or num_tokens)
        for value, module in ((ends["embed"], model.model.embed_tokens), (ends["head"], model.lm_head)):
            torch.testing.assert_close(module.weight.grad.double(), share * value.grad, rtol=1e-3, atol=1e-4)


@families
def test_half_precision_loss(family, tmp_path):
    """Catches a family whose layout or router runs in float32 alone, and a loss summed in bfloat16."""
    _, _, model = published_student(tmp_path, family, torch.bfloat16)
    loss = model.train()(**stacked(rows_with_prompts(), "left")).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(value.grad.isfinite().all() for value in model.parameters())


@families
def test_checkpointing_changes_neither_loss_nor_gradients(family, tmp_path):
    """Catches other noise, another order or a lost mask in the recomputation: wrong gradients at the right loss."""
    _, _, model = published_student(tmp_path, family)
    outcomes = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        runs = []
        hook = model.model.layers[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        within = model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(3)
        model.train().zero_grad()
        loss = model(**stacked(rows_with_prompts(), "left")).loss
        loss.backward()
        hook.remove()
        within.remove()
        outcomes.append((len(runs), loss, {name: value.grad.clone() for name, value in model.named_parameters()}))
    (num_plain, plain, expected), (num_again, checkpointed, gradients) = outcomes
    assert num_again > num_plain and torch.equal(plain, checkpointed)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@families
def test_padding_changes_no_logit(family, tmp_path):
    """Catches padding that a plain forward attends to, or that moves positions."""
    _, _, model = published_student(tmp_path, family)
    batch = stacked(rows_with_prompts(), "left")
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for number, (ids, _) in enumerate(rows_with_prompts()):
            torch.testing.assert_close(logits[number, -len(ids) :], model(ids[None]).logits[0], rtol=0, atol=RTOL)


# ---- what is learned ----


def digits(num_rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 10, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def random_rows(num_rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Uniformly random digits, all trained on."""
    ids = digits(num_rows, 12, seed)
    return {"input_ids": ids, "labels": ids}


def repeating_rows(num_rows: int, seed: int) -> dict[str, torch.Tensor]:
    """A digit that is given, and its repetition, which is trained on."""
    ids = digits(num_rows, 1, seed).repeat(1, 12)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) == 0, -100)}


def loss_after(model, rows, num_steps: int) -> float:
    """Trains on other rows in every step; the loss of rows that were in none."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for step in range(num_steps):
        optimizer.zero_grad()
        model(**rows(32, step)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval()(**rows(256, 10**6)).loss.item()


@pytest.mark.slow
@families
def test_random_tokens_stay_at_their_entropy(family, tmp_path):
    """Catches a loss that shows the network what it asks for, as an unshifted or an un-noised one does: it would fall
    below log 10."""
    loss = loss_after(fresh_student(tmp_path, family), random_rows, 40)
    # that of uniform predictions at the same masks is within 2 % of log 10
    assert loss == pytest.approx(math.log(10), rel=0.05)


@pytest.mark.slow
@families
def test_what_can_be_known_is_learned(family, tmp_path):
    """Catches a context that is not shown, and gradients that do not reach the weights."""
    assert loss_after(fresh_student(tmp_path, family), repeating_rows, 50) < 0.1


# ---- what each family can do ----

COLUMNS = {
    "loads": "test_published_layouts.py::test_published_folder_loads_as_its_native_class[{}-AutoModelForCausalLM]",
    "keys": "test_published_layouts.py::test_saving_gives_the_published_layout_back[{}]",
    "forward parity": "test_published_layouts.py::test_logits_are_those_of_the_formulas[{}]",
    "SFT": "test_published_students.py::test_training_loss_and_gradients_are_the_definition[{}]",
    "LoRA": "test_published_adapters.py::test_an_adapter_is_trained_saved_loaded_and_merged[{}]",
    "generate": "test_published_generation.py::test_generate_is_the_plain_sampler[{}]",
    "distils as teacher": "test_teacher_families.py::"
    "test_teacher_logits_are_those_of_plain_forwards[{}-native-left-True]",
    "as student": "test_published_distilling.py::test_a_step_of_a_published_student_under_another_family[{}-token]",
}
NAMED_SAMPLERS = {
    "llada-8b": "test_published_samplers.py::test_llada[1-0]",
    "llada-moe": "test_published_samplers.py::test_llada[1-0]",
    "llada2": "test_published_samplers.py::test_llada2[2-0]",
    "sdar": "test_published_samplers.py::test_sdar[1-0]",
    "sdar-moe": "test_published_samplers.py::test_sdar[1-0]",
    "dream": "test_published_samplers.py::test_dream[entropy-3-0]",
    "wedlm-8b": "test_published_generation.py::test_wedlm_decodes_as_published[wedlm-8b-0.4]",
    "wedlm-7b": "test_published_generation.py::test_wedlm_decodes_as_published[wedlm-7b-0.4]",
}
# family -> column -> the test that shows it
CELLS = {family: {column: test.format(family) for column, test in COLUMNS.items()} for family in STUDENTS}
for family, test in NAMED_SAMPLERS.items():
    CELLS[family]["named sampler"] = test


def test_every_cell_names_a_test():
    """Catches a promise about a family whose test was renamed or removed."""
    for test in {test for cells in CELLS.values() for test in cells.values()}:
        file, _, name = test.partition("::")
        assert f"\ndef {name.partition('[')[0]}(" in (HERE / file).read_text(), test


@pytest.mark.slow
def test_every_cell_is_run():
    """Catches a test that no longer runs for the family that points at it."""
    named = {test for cells in CELLS.values() for test in cells.values()}
    files = sorted({test.partition("::")[0] for test in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "-p", "no:warnings", *files]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    collected = {line.removeprefix("tests/") for line in done.stdout.splitlines()}
    assert done.returncode == 0 and not named - collected, done.stdout[-3000:]
