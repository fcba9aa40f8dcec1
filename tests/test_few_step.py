"""IDLMTrainer: both losses of a step against straightforward ones, accounting, resume, average, adapters, refusals."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import references
import torch
from accelerate.utils import DistributedType
from datasets import concatenate_datasets
from few_step_run import tiny_few_step
from peft import AutoPeftModelForCausalLM, LoraConfig
from tiny import tiny_model
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tide_hf import IDLMConfig, IDLMTrainer
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.few_step import InverseNoising, stratified_times
from tide_hf.few_step.networks import WeightAverage, three_networks
from tide_hf.few_step.noising import Draws
from tide_hf.hub import check_card
from tide_hf.models import TIDEGenerationConfig

LORA = {"r": 2, "task_type": "CAUSAL_LM"}


def weights_of(network) -> dict:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def logs_of(trainer, name="loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def noised_step(trainer, rows=8, micro_batches=1):
    """The fake's and the student's batches of a first step, on the host."""
    chosen = [trainer.train_dataset[index] for index in range(rows)]
    size = rows // micro_batches
    batches = [trainer.data_collator(chosen[start : start + size]) for start in range(0, rows, size)]
    student_batches, _ = trainer.get_batch_samples(iter(batches), micro_batches, torch.device("cpu"))
    return chosen, trainer._fake_batches, student_batches


# -- the step ---------------------------------------------------------------------------------------------------------


def naive_logits(model, noised, clean) -> torch.Tensor:
    """Logits of every position of x_t in the textbook layout, full length, full vocabulary."""
    length, config = len(clean), model.config
    if config.diffusion_type == "full":
        out = model.model(input_ids=noised[None], attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool))
        return model.lm_head(out.last_hidden_state)[0]
    visible = torch.from_numpy(references.block_visibility_mask(length, config.block_size))
    out = model.model(
        input_ids=torch.cat([noised, clean])[None],
        attention_mask=visible[None, None],
        position_ids=torch.arange(length).repeat(2)[None],
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state)[0, :length]


def naive_losses(trainer, student, teacher, fake, rows, update):
    """Both losses of one update, row by row and position by position; every choice made a second time."""
    mask_id, fake_total, student_total = student.config.mask_token_id, 0.0, 0.0
    all_ids = [row["row_key"] for row in rows]
    times = {}
    for name, stream in (("student", 2 * update), ("t", 2 * update + 1)):
        draws = [float(references.keyed_uniforms(trainer.args.seed, 0, i, 1, stream)[0]) for i in all_ids]
        order = sorted(range(len(rows)), key=lambda i: draws[i])
        offset = sum(sorted(draws)) % 1
        for rank, i in enumerate(order):
            times[name, all_ids[i]] = 1e-3 + (1 - 1e-3) * (rank + offset) / len(rows)
    for row in rows:
        clean, labels, row_id = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), row["row_key"]
        length = len(clean)
        shown_draws = references.keyed_uniforms(trainer.args.seed, 0, row_id, 2 * length + 1, 2 * update)
        draws = references.keyed_uniforms(trainer.args.seed, 0, row_id, 2 * length + 1, 2 * update + 1)
        t_student, t = times["student", row_id], times["t", row_id]
        shown, noised, hidden, masked = clean.clone(), clean.clone(), [], []
        for i in range(length):
            if labels[i] != -100 and shown_draws[1 + 2 * i] < t_student:
                shown[i] = mask_id
                hidden.append(i)
            if labels[i] != -100 and draws[1 + 2 * i] < t:
                masked.append(i)
        z = naive_logits(student, shown, clean)
        q = {i: references.clean_distribution(z[i], mask_id) for i in hidden}
        for i in range(length):
            if i in masked:
                noised[i] = mask_id
            elif i in hidden:
                threshold, total = float(shown_draws[2 + 2 * i]), 0.0
                for v, p in enumerate(q[i].tolist()):
                    total += p
                    if threshold < total:
                        noised[i] = v
                        break
        f, f_star = naive_logits(fake, noised, clean), naive_logits(teacher, noised, clean)
        for i in masked:
            log_f = torch.log(references.clean_distribution(f[i], mask_id) + 1e-300)
            log_f_star = torch.log(references.clean_distribution(f_star[i], mask_id) + 1e-300).detach()
            if i in hidden:
                fake_total = fake_total - (q[i].detach() * log_f).sum() / t
                student_total = student_total + (q[i] * (log_f.detach() - log_f_star)).sum() / t
            else:
                fake_total = fake_total - log_f[clean[i]] / t
                student_total = student_total + (log_f[clean[i]].detach() - log_f_star[clean[i]]) / t
    return fake_total / len(rows), student_total / len(rows)


@pytest.mark.parametrize("diffusion_type", ["block", "full"])
def test_step_equals_a_straightforward_one(tmp_path, diffusion_type):
    """Catches any error of packing, sampling, pairing, weighting, or a gradient that reaches the wrong network: both
    losses and gradients of a step against whole layouts, full logits and loops over rows and positions."""
    model = tiny_model(0, diffusion_type=diffusion_type)
    trainer = tiny_few_step(tmp_path, model=model, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    student, fake, teacher = trainer.model, trainer.fake, trainer.teacher
    for seed, network in ((5, fake), (6, teacher)):
        network.load_state_dict(tiny_model(seed, diffusion_type=diffusion_type).state_dict())
    rows, (fake_batches,), student_batches = noised_step(trainer, 8, 2)
    trainer.fake_training.wrapped = fake
    inverse = trainer.inverse
    got_fake = sum(inverse.fake_loss(student, fake, batch) for batch in fake_batches)
    got_fake.backward()
    assert all(value.grad is None for value in student.parameters())
    expected_fake, _ = naive_losses(trainer, student, teacher, fake, rows, 0)
    expected = torch.autograd.grad(expected_fake, list(fake.parameters()))
    assert_close(got_fake.detach(), expected_fake.detach(), rtol=1e-5, atol=0)
    for (name, value), gradient in zip(fake.named_parameters(), expected, strict=True):
        assert_close(value.grad, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)

    fake.zero_grad()
    got = sum(trainer.compute_loss(student, batch) for batch in student_batches)
    got.backward()
    assert all(value.grad is None for network in (fake, teacher) for value in network.parameters())
    _, expected_student = naive_losses(trainer, student, teacher, fake, rows, 1)
    expected = torch.autograd.grad(expected_student, list(student.parameters()))
    assert_close(got.detach(), expected_student.detach(), rtol=1e-5, atol=1e-7)
    for (name, value), gradient in zip(student.named_parameters(), expected, strict=True):
        assert_close(value.grad, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_evaluation_is_the_definition_over_the_rows_that_train(tmp_path):
    """Catches an evaluated loss without the positions that the student saw, and rows counted that weigh nothing."""
    trainer = tiny_few_step(tmp_path, eval_dataset=sorting_rows(5, seed=9), per_device_eval_batch_size=2)
    for seed, network in ((5, trainer.fake), (6, trainer.teacher)):
        network.load_state_dict(tiny_model(seed).state_dict())
    metrics, rows = trainer.evaluate(), trainer.eval_dataset
    batch = trainer._noise(trainer.data_collator([rows[index] for index in range(5)]), None, 0)
    assert len(batch.seen.column) > 0
    networks = (trainer.model, trainer.teacher, trainer.fake)
    with torch.no_grad():
        whole = trainer.inverse.student_loss(*networks, batch)
        alone = trainer.inverse.student_loss(*networks, replace(batch, seen=batch.seen.of_row(-1)))
    assert metrics["eval_loss"] == pytest.approx(whole.item(), rel=1e-5) != alone.item()
    empty = rows.select([0]).map(lambda row: {"labels": [-100] * len(row["labels"])}).cast(rows.features)
    filled = trainer.evaluate(concatenate_datasets([rows, empty]))
    for name in ("eval_loss", "eval_fake_loss"):
        assert filled[name] == pytest.approx(metrics[name], rel=1e-6)


def test_student_stands_still_where_fake_equals_teacher(tmp_path):
    """Catches a student that moves although it makes just what the teacher expects: at the start fake = teacher."""
    trainer = tiny_few_step(tmp_path)
    _, _, (batch,) = noised_step(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss == 0 and all((value.grad == 0).all() for value in trainer.model.parameters())


@pytest.mark.parametrize("diffusion_type", ["block", "full"])
def test_prompts_never_change(tmp_path, diffusion_type):
    """Catches prompt or prefix tokens that are masked, drawn anew, or scored."""
    trainer = tiny_few_step(tmp_path, model=tiny_model(diffusion_type=diffusion_type), fake_steps_per_student_step=3)
    trainer.noising = replace(trainer.noising, pack=False)  # a row a line, in its own order
    rows, fake_batches, student_batches = noised_step(trainer)
    clean = trainer.data_collator(rows)
    prompt = (clean["labels"] == -100) & clean["attention_mask"].bool()
    assert prompt.any()
    for batch in [*(batch for batches in fake_batches for batch in batches), *student_batches]:
        for inputs in (batch.shown, batch.noised):
            column = torch.arange(inputs.input_ids.shape[1])
            rows_of = torch.arange(len(clean["labels"]))[:, None].expand(-1, len(column))
            position = inputs.position_ids
            real = inputs.stream >= 0
            at_prompt = prompt[rows_of, position] & real
            ids, own = inputs.input_ids, clean["input_ids"][rows_of, position]
            assert torch.equal(ids[at_prompt], own[at_prompt])
            # the clean copy is the row's own text to the last token
            copies = inputs.stream == 0
            assert torch.equal(ids[copies], own[copies])
        at_prompt = at_prompt.flatten()
        for columns in (batch.drawn.column, batch.soft.column, batch.seen.column):
            assert not at_prompt[columns].any()
            assert (batch.noised.stream.flatten()[columns] == 1).all(), "the noised copy alone"


def test_packing_changes_nothing(tmp_path):
    """Catches a packed layout that drops a block somebody sees, and a drawn token put into a wrong column."""
    trainer = tiny_few_step(tmp_path)
    trainer.fake.load_state_dict(tiny_model(5).state_dict())
    losses = []
    for pack in (True, False):
        trainer.noising = InverseNoising(trainer.noising.spec, pack=pack)
        _, ((fake_batch,),), (batch,) = noised_step(trainer)
        losses.append((trainer.inverse.fake_loss(trainer.model, trainer.fake, fake_batch),
                       trainer.compute_loss(trainer.model, batch)))  # fmt: skip
    assert batch.noised.input_ids.shape[1] == 2 * 16
    assert_close(losses[0], losses[1])


@pytest.mark.slow
def test_slices_of_the_head_change_nothing(tmp_path):
    """Catches positions lost between slices, or draws that depend on the slice."""
    losses = []
    for size in (None, 3):
        trainer = tiny_few_step(tmp_path, head_slice_size=size)
        trainer.train()
        losses.append(logs_of(trainer) + logs_of(trainer, "fake_loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_logits_exist_at_a_few_positions_at_a_time(tmp_path):
    """Catches a step that holds a network's logits at all masked positions: memory grows with the vocabulary."""
    trainer = tiny_few_step(tmp_path, head_slice_size=2)
    vocabulary, hidden = trainer.model.lm_head.weight.shape
    _, ((fake_batch,),), (batch,) = noised_step(trainer)
    assert min(len(fake_batch.soft.column), len(batch.soft.column), len(batch.drawn.source)) > 4
    found = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple) else (out,):
                if isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] == vocabulary:
                    found.add(tuple(value.shape))
            return out

    with Watch():
        trainer.inverse.fake_loss(trainer.model, trainer.fake, fake_batch).backward()
        trainer.compute_loss(trainer.model, batch).backward()
    assert {(1, vocabulary), (2, vocabulary)} & found
    assert all(shape[0] in (0, 1, 2, hidden) for shape in found), "positions at a time, or the head transposed"


def test_nothing_masked_trains(tmp_path):
    """Catches a crash, NaN or a missing gradient where no position is masked, or the student was shown everything."""
    trainer = tiny_few_step(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    nothing, half = torch.ones(1, 16), torch.full((1, 16), 0.4)
    for student_mask, mask in ((nothing, nothing), (nothing, half), (half, nothing)):
        noised = trainer.noising(batch, Draws(torch.tensor([0.5]), torch.tensor([0.5]), student_mask, mask, half))
        for network in (trainer.model, trainer.fake):
            network.zero_grad()
        student_loss = trainer.inverse.student_loss(trainer.model, trainer.teacher, trainer.fake, noised)
        fake_loss = trainer.inverse.fake_loss(trainer.model, trainer.fake, noised)
        (student_loss + fake_loss).backward()
        assert student_loss == 0 and torch.isfinite(fake_loss)
        assert all(
            value.grad is not None for network in (trainer.model, trainer.fake) for value in network.parameters()
        )


# -- times ------------------------------------------------------------------------------------------------------------


def test_times_fill_the_interval_and_belong_to_the_rows():
    """Catches times that leave a part of [0, 1) out, and times that follow a row's place in the batch."""
    draws = torch.rand(64, generator=torch.Generator().manual_seed(0))
    times = stratified_times(draws)
    assert sorted((times * 64).floor().long().tolist()) == list(range(64))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(stratified_times(draws[order]), times[order])
    single = torch.stack(
        [stratified_times(torch.rand(4, generator=torch.Generator().manual_seed(s)))[0] for s in range(2000)]
    )
    counts = torch.histc(single, 10, 0, 1)
    assert ((counts - 200).abs() < 60).all(), "each time alone is uniform"


def test_grid_times_are_those_of_decoding(tmp_path):
    """Catches a student that never learns at the all-masked start, or at times it does not decode at."""
    trainer = tiny_few_step(tmp_path, student_times="grid", num_steps=1)
    _, _, (batch,) = noised_step(trainer)
    counts = (torch.tensor(trainer.train_dataset[:8]["labels"]) != -100).sum()
    assert len(batch.student_asked) == counts, "one step: everything is hidden from the student"


# -- accounting -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accumulation_changes_nothing(tmp_path):
    """Catches per-micro-batch means and times: 8x1, 4x2 and 1x8 rows give the same losses, norms and weights."""
    runs = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        trainer = tiny_few_step(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            fake_steps_per_student_step=2,
            max_grad_norm=0.5,
            fake_max_grad_norm=0.7,
        )
        trainer.train()
        runs.append(trainer)
    for run in runs[1:]:
        for name in ("loss", "fake_loss", "grad_norm", "fake_grad_norm"):
            assert logs_of(run, name) == pytest.approx(logs_of(runs[0], name), rel=1e-5, abs=1e-6), name
        assert_close(weights_of(run.model), weights_of(runs[0].model), rtol=1e-6, atol=1e-7)
        assert_close(weights_of(run.fake), weights_of(runs[0].fake), rtol=1e-6, atol=1e-7)
        assert_close(run.ema.average, runs[0].ema.average, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "fsdp"])
def test_number_of_processes_changes_nothing(tmp_path, kind):
    """Catches local counts, times or masks that depend on the rank, a fake whose gradients are not shared, shards that
    are saved as if they were whole, and a step that runs on the average's weights because an evaluation left them
    gathered: one and two processes give the same run, interrupted or not."""
    results = []
    for world_size, accumulation, resumes in [(1, 1, 0), (2, 2, 0), (2, 1, 1)]:
        output = tmp_path / f"{world_size}x{accumulation}x{resumes}"
        output.mkdir()
        script = [str(Path(__file__).parent / "few_step_run.py"), str(output)]
        arguments = [str(world_size), str(accumulation), str(resumes), kind]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world_size)]
        launcher += ["--master_port", str(29700 + world_size * 10 + accumulation + 5 * resumes)]
        launcher = launcher if world_size > 1 else [sys.executable]
        subprocess.run([*launcher, *script, *arguments], check=True, timeout=300)
        results.append(torch.load(output / "result.pt", weights_only=False))
    for result in results[1:]:
        for name in ("student", "fake", "ema", "saved"):
            assert_close(result[name], results[0][name], rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(result["losses"][::-1], results[0]["losses"][::-1], strict=False):
            for name in ("loss", "fake_loss", "grad_norm", "fake_grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        for name in ("eval_loss", "eval_fake_loss"):
            assert result["metrics"][name] == pytest.approx(results[0]["metrics"][name], rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_resume_goes_on_exactly(tmp_path, adapters):
    """Catches a student restarted from its average, a fake or an optimizer restarted, noise from a global generator:
    a resumed run equals one that was never interrupted, in both networks, the average, and every logged number."""
    options = {
        "max_steps": 6,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "fake_lr_scheduler_type": "cosine",
        "fake_learning_rate": 3e-3,
        "fake_steps_per_student_step": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "ema_decay": 0.5,
    }
    lora = LoraConfig(**LORA) if adapters else None
    whole = tiny_few_step(tmp_path / "whole", peft_config=lora, **options)
    whole.train()
    teacher = tiny_model(0).state_dict()
    start = tiny_model(0) if adapters else tiny_model(7)  # an adapter goes on over its own base
    resumed = tiny_few_step(tmp_path / "resumed", model=start, peft_config=lora, **options)
    resumed.teacher.load_state_dict(teacher)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for ours, theirs in ((resumed.model, whole.model), (resumed.fake, whole.fake)):
        assert_close(weights_of(ours), weights_of(theirs), rtol=0, atol=0)
    assert_close(resumed.ema.average, whole.ema.average, rtol=0, atol=0)
    names = ("loss", "fake_loss", "grad_norm", "fake_grad_norm", "learning_rate", "fake_learning_rate")
    for ours, theirs in zip(resumed.state.log_history[3:6], whole.state.log_history[3:6], strict=True):
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    rates = logs_of(whole, "fake_learning_rate")
    assert len(set(rates)) > 4 and rates != logs_of(whole, "learning_rate"), "the test must see both schedules"


@pytest.mark.slow
def test_resume_from_another_trainers_checkpoint_is_refused(tmp_path):
    """Catches a fake and an average that silently begin anew."""
    trainer = tiny_few_step(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-2" / "few_step_state.pt").unlink()
    with pytest.raises(ValueError, match=r"holds no few_step_state\.pt"):
        tiny_few_step(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_resume_from_another_start_is_refused(tmp_path, adapters):
    """Catches a run that goes on towards a teacher it did not begin with; an adapter alone does not tell."""
    lora = LoraConfig(**LORA) if adapters else None
    tiny_few_step(tmp_path, peft_config=lora, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = tiny_few_step(tmp_path, model=tiny_model(7), peft_config=lora)
    with pytest.raises(ValueError, match="distilled from another teacher"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.slow
def test_fake_and_student_each_have_their_settings(tmp_path, monkeypatch):
    """Catches one learning rate, clipping or ratio used for both, and updates out of turn."""
    trainer = tiny_few_step(
        tmp_path, max_steps=2, fake_steps_per_student_step=3, learning_rate=0.0, fake_learning_rate=1e-2
    )
    start, turns = weights_of(trainer.model), []
    for name in ("fake_loss", "student_loss"):
        original = getattr(trainer.inverse, name)
        monkeypatch.setattr(trainer.inverse, name, lambda *a, n=name, o=original, **k: turns.append(n) or o(*a, **k))
    trainer.train()
    assert turns == (["fake_loss"] * 3 + ["student_loss"]) * 2
    assert_close(weights_of(trainer.model), start, rtol=0, atol=0)
    assert any(not torch.equal(value, start[name]) for name, value in trainer.fake.state_dict().items())
    clipped = tiny_few_step(tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, fake_max_grad_norm=1e-3)
    before = weights_of(clipped.fake)
    clipped.train()
    moved = sum((value - before[name]).square().sum() for name, value in clipped.fake.state_dict().items()).sqrt()
    assert moved == pytest.approx(1e-3, rel=1e-3) and logs_of(clipped, "fake_grad_norm")[0] > 1e-2


def test_noise_of_the_updates_of_a_step_differs(tmp_path):
    """Catches a student scored on the very noise that the fake was just fitted to, and the same noise each epoch."""
    trainer = tiny_few_step(tmp_path, fake_steps_per_student_step=2)
    _, fake_batches, (batch,) = noised_step(trainer)
    masks = [tuple(b.student_asked.tolist()) for b in (fake_batches[0][0], fake_batches[1][0], batch)]
    assert len(set(masks)) == 3
    trainer._pass = 1
    rows = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    (later,), _ = trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
    assert tuple(later.student_asked.tolist()) not in masks


# -- the moving average -----------------------------------------------------------------------------------------------


def test_average_equals_a_naive_loop(tmp_path):
    """Catches an average that misses a step, starts at zero, or follows the fake: a loop over every step's weights."""
    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        history = []  # noqa: RUF012

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.history.append(weights_of(model))

    start = weights_of(tiny_model(0))
    trainer = tiny_few_step(tmp_path, ema_decay=0.7, callbacks=[Keep()])
    trainer.train()
    assert len(Keep.history) == 4
    average = {name: value.clone() for name, value in start.items()}
    for weights in Keep.history:
        for name in average:
            average[name] = 0.7 * average[name] + 0.3 * weights[name]
    for name, value in trainer.ema.average.items():
        assert_close(value, average[name], rtol=1e-10, atol=1e-12)
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(saved.state_dict(), average, rtol=1e-10, atol=1e-12)
    assert_close(weights_of(trainer.model), Keep.history[-1], rtol=0, atol=0)


def test_average_is_kept_in_full_precision():
    """Catches a bfloat16 average, which a decay of 0.9999 never moves."""
    layer = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    average = WeightAverage(layer, 0.9999)
    start = layer.weight.detach().float().clone()
    with torch.no_grad():
        layer.weight += 1
    for _ in range(100):
        average.update()
    moved = (average.average["weight"] - start) / (layer.weight.float() - start)
    assert_close(moved, torch.full_like(moved, 1 - 0.9999**100), rtol=1e-2, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("save_weights", ["ema", "student"])
def test_checkpoints_hold_the_weights_that_were_asked_for(tmp_path, save_weights):
    """Catches the other weights in a checkpoint or in the final model, or evaluated."""
    trainer = tiny_few_step(
        tmp_path, save_weights=save_weights, save_strategy="steps", save_steps=4, eval_dataset=sorting_rows(5, seed=9)
    )
    trainer.train()
    expected = {**weights_of(trainer.model), **(trainer.ema.average if save_weights == "ema" else {})}
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert_close(loaded.state_dict(), expected, rtol=0, atol=0)
    measured = trainer.evaluate()["eval_fake_loss"]
    trainer.model.load_state_dict(expected)
    trainer.ema = None
    assert trainer.evaluate()["eval_fake_loss"] == pytest.approx(measured, rel=1e-9)


# -- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diffusion_type", ["block", "full"])
def test_saved_student_decodes_as_it_was_made(tmp_path, diffusion_type):
    """Catches a generation config that forgets the number of steps, the random order or the sampling."""
    start = tiny_model(diffusion_type=diffusion_type, dtype=torch.float32)
    start.generation_config.decoding = "llada2.1"  # whatever the start is decoded like
    trainer = tiny_few_step(tmp_path, model=start, num_steps=2)
    trainer.train()
    trainer.save_model()
    model, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    settings = model.generation_config
    assert (settings.steps_per_block, settings.remasking, settings.temperature) == (2, "random", 1.0)
    assert settings.decoding is None
    chat = [{"role": "user", "content": "739152"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    outputs = [
        model.generate(
            **prompt, max_new_tokens=8, eos_token_id=-1, return_dict_in_generate=True,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in range(4)
    ]  # fmt: skip
    num_blocks = 1 if diffusion_type == "full" else 2
    assert {output.forward_passes for output in outputs} == {2 * num_blocks}
    assert len({tuple(output.sequences[0].tolist()) for output in outputs}) > 1, "it samples"
    assert all(tokenizer.mask_token_id not in output.sequences[0] for output in outputs)
    assert model.generate(**prompt, max_new_tokens=8, steps_per_block=4).shape[1] > prompt["input_ids"].shape[1]


def test_the_card_tells_what_was_run(tmp_path):
    """Catches a card of another method, or one that does not say how many steps the student is made for."""
    tiny_model(0, dtype=torch.float32).save_pretrained(tmp_path / "start")
    build_tokenizer().save_pretrained(tmp_path / "start")
    trainer = tiny_few_step(tmp_path / "out", model=str(tmp_path / "start"), eval_dataset=sorting_rows(5, seed=9))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2602.19066" in card and "| `num_steps` | 2 |" in card and "IDLMTrainer.evaluate" in card
    assert "aligned with the teacher" not in card and "- tide\n" not in card and "- few-step\n" in card
    assert "decoded in 2 network calls per block" in card
    lacks = [line.split(",")[0] for line in check_card(tmp_path / "out" / "README.md") if "licen" not in line.lower()]
    assert lacks == ["The metadata has no language.", "The metadata has no base_model"], "both unknown here"


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_share_one_frozen_base(tmp_path):
    """Catches a base copied three times, a base that moves, and a fake that trains the student's adapter."""
    base = tiny_model(0, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = tiny_few_step(tmp_path / "out", model=model, peft_config=LoraConfig(**LORA), ema_decay=0.5)
    networks = (trainer.model.get_base_model(), trainer.fake.get_base_model(), trainer.teacher)
    pointers = [{value.data_ptr() for value in network.parameters()} for network in networks]
    assert pointers[2] < pointers[0] and pointers[2] < pointers[1]
    assert pointers[0] & pointers[1] == pointers[2]
    before = {name: weights_of(network) for name, network in (("student", trainer.model), ("fake", trainer.fake))}
    trainer.train()
    assert_close(trainer.teacher.state_dict(), base.state_dict(), rtol=0, atol=0)
    for name, network in (("student", trainer.model), ("fake", trainer.fake)):
        for key, value in network.state_dict().items():
            if "lora_B" in key:
                assert not torch.equal(value, before[name][key]), (name, key)
            elif "lora_" not in key:
                assert_close(value, before[name][key], rtol=0, atol=0)

    trainer.save_model()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([build_tokenizer().encode("<user>739152<assistant>")])
    trainer.model.eval()
    with trainer.ema.applied():
        assert_close(loaded(ids).logits, trainer.model(ids).logits)
    settings = TIDEGenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.steps_per_block, settings.remasking, settings.temperature) == (2, "random", 1.0)


def test_adapters_equal_whole_networks_with_their_weights(tmp_path):
    """Catches an adapter that is bypassed by one of the nested forwards: both losses equal those of merged ones."""
    student, fake, teacher = three_networks(tiny_model(0), LoraConfig(**LORA), None, 0)
    for seed, network in enumerate((student, fake)):
        generator = torch.Generator().manual_seed(seed)
        for name, value in network.named_parameters():
            if "lora_B" in name:
                value.data = torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.3
    trainer = tiny_few_step(tmp_path)
    _, ((fake_batch,),), (batch,) = noised_step(trainer)
    losses = []
    for _ in range(2):
        losses.append((trainer.inverse.fake_loss(student, fake, fake_batch).detach(),
                       trainer.inverse.student_loss(student, teacher, fake, batch).detach()))  # fmt: skip
        if len(losses) == 1:
            teacher = tiny_model(0)
            # copies first: merging writes into the base, which all three share
            student, fake = (copy.deepcopy(network).merge_and_unload() for network in (student, fake))
    assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-12)
    assert losses[0][1].abs() > 1e-3


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps=0 is out of range"),
        ({"fake_steps_per_student_step": 0}, "fake_steps_per_student_step=0 is out of range"),
        ({"ema_decay": 1.5}, "ema_decay=1.5 is out of range"),
        ({"save_weights": "fake"}, "save_weights='fake' is not known; choose one of ema, student"),
        ({"student_times": "log"}, "student_times='log' is not known"),
        ({"max_length": 18}, "block_size=4 does not fit max_length=18"),
        ({"fp16": True}, "fp16=True would use one loss scaler for two optimizers"),
        ({"schedule": "sine"}, "schedule='sine' is not known"),
        ({"remove_unused_columns": True}, "leave it False"),
    ],
)
def test_settings_that_cannot_train_are_refused(tmp_path, options, message):
    """Catches a run that starts although it cannot train."""
    with pytest.raises(ValueError, match=message):
        tiny_few_step(tmp_path, **options)


def test_models_that_cannot_be_three_networks_are_refused(tmp_path):
    """Catches a teacher that would move with the student: an adapter on an adapter, and whole modules trained."""
    lora = LoraConfig(**LORA, modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match="which the teacher shares"):
        tiny_few_step(tmp_path, peft_config=lora)
    student, _, _ = three_networks(tiny_model(0), LoraConfig(**LORA), None, 0)
    with pytest.raises(ValueError, match="merge it first"):
        tiny_few_step(tmp_path, model=student)


@pytest.mark.parametrize(
    ("kind", "version", "adapters", "message"),
    [
        ("DEEPSPEED", None, False, "one optimizer per engine"),
        ("FSDP", 1, False, "set fsdp_version: 2"),
        ("FSDP", 2, False, None),
        ("FSDP", 2, True, "train adapters with plain data parallelism"),
    ],
)
def test_engines_that_run_one_network_are_refused(kind, version, adapters, message):
    """Catches a run whose fake is silently left out of the engine, deep in the first step."""
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
    fake = three_networks(tiny_model(0), LoraConfig(**LORA) if adapters else None, None, 0)[1]
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], state=state)
    trainer = SimpleNamespace(accelerator=accelerator, fake=fake)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        IDLMTrainer._refuse_engines(trainer)


def test_published_defaults(tmp_path):
    """Catches a default that is not the published one."""
    args = IDLMConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (1e-6, 0.0, 0.0)
    assert (args.ema_decay, args.fake_steps_per_student_step) == (0.9999, 1)
    assert args.lr_scheduler_type == "constant_with_warmup" and args.warmup_steps > 0
    assert args.optim == "adamw_torch" or args.optim.startswith("adamw_torch")
    assert not args.bf16 and not args.fp16 and args.schedule is None and args.time_epsilon == 1e-3
    for name in ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"):
        assert args.for_fake(name) == getattr(args, name)
