"""Steps and weights that are not finite: caught before the optimizer steps, named, written down, never saved."""

import copy
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from few_step_run import tiny_few_step
from peft import LoraConfig
from tiny import tiny_model, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from uniform_run import tiny_trainer as tiny_uniform

from tide_hf import IDLMConfig, NonFiniteError, TIDEConfig
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.diffusion import Record
from tide_hf.training.nonfinite import StepGuard, guard, replay

LORA = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])


@dataclass
class Nothing(Record):
    """A batch for a guard that is asked by hand."""


def poison_teacher(trainer, step: int, value: float = math.nan, healthy_calls: int = 0) -> None:
    """One NaN in the teacher's hidden states of one optimizer step, after so many healthy micro-batches of it."""
    hidden, calls = trainer.signal.hidden, []

    def poisoned(batch):
        found = hidden(batch)
        calls.append(trainer.state.global_step)
        if trainer.state.global_step == step - 1 and calls.count(step - 1) > healthy_calls:
            found[0, 0] = value
        return found

    trainer.signal.hidden = poisoned


def poison_gradient(trainer, network, name: str, step: int) -> None:
    """A finite loss with a NaN in one gradient."""
    value = dict(network.named_parameters())[name]
    value.register_hook(lambda gradient: gradient * (math.nan if trainer.state.global_step == step - 1 else 1.0))


def state_of(trainer) -> list[torch.Tensor]:
    """Weights and optimizer state."""
    found = [value.detach().clone() for value in trainer.model.parameters()]
    for moments in trainer.optimizer.state.values():
        found += [value.clone() for value in moments.values() if torch.is_tensor(value)]
    return found


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Keep(TrainerCallback):
    """Weights and optimizer state after each step."""

    def __init__(self):
        self.states, self.trainer = [], None

    def on_step_end(self, args, state, control, **kwargs):
        self.states.append(state_of(self.trainer))


def watched(trainer) -> Keep:
    keep = Keep()
    keep.trainer = trainer
    trainer.add_callback(keep)
    return keep


def distilling(folder, **overrides):
    kwargs = overrides.pop("trainer_kwargs", None)
    values = {"tidal": False, "comp_demo": False, "divergence": "forward_kl", **overrides}
    return tiny_trainer(folder, teacher=tiny_model(seed=1), trainer_kwargs=kwargs, **values)


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def files(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


@pytest.fixture
def late(monkeypatch):
    """As on a GPU: the optimizer's kernel leaves the step out, the host is told afterwards."""
    monkeypatch.setattr(StepGuard, "reads_late", True)


# -- stop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"value": math.inf},
        {"max_grad_norm": 0.0},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"optim": "adafactor"},
        {"tidal": True, "comp_demo": True},
        {"divergence": "calm"},
        {"adapter": True},
        {"bf16": True},
    ],
    ids=str,
)
def test_stops_before_the_step(tmp_path, options):
    """Catches a run that steps on a loss that is no number, goes on, saves and looks converged: weights and moments
    stay those of the step before, term, row and step are named, and no model and no card is written."""
    options = dict(options)
    value = options.pop("value", math.nan)
    kwargs = {"peft_config": LORA} if options.pop("adapter", False) else {}
    trainer = distilling(tmp_path, trainer_kwargs=kwargs, **options)
    last = options.get("gradient_accumulation_steps", 1) - 1
    poison_teacher(trainer, step=3, value=value, healthy_calls=last)
    keep = watched(trainer)
    with pytest.raises(NonFiniteError) as raised:
        trainer.train()
    assert len(keep.states) == 2 and equal(state_of(trainer), keep.states[1])
    message = str(raised.value)
    assert message.startswith("Step 3: distill is nan in row ")
    assert f"(micro-batch {last} of process 0)" in message and "--nonfinite skip" in message
    assert "ce is" not in message, "the denoising loss is finite"
    row, text = message.split("distill is nan in row ")[1].split(" (micro-batch")[0].split(" ", 1)
    assert row.isdigit() and len(text) > 5, "the row's text"
    assert files(tmp_path) == ["nonfinite-step3-rank0.pt"]
    assert str(tmp_path / "nonfinite-step3-rank0.pt") in message
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))


def test_the_row_is_the_right_one(tmp_path):
    """Catches a row named by another row's text: that of the first pair, whose teacher state was poisoned."""
    trainer = distilling(tmp_path)
    poison_teacher(trainer, step=1)
    with pytest.raises(NonFiniteError) as raised:
        trainer.train()
    (batch,) = torch.load(tmp_path / "nonfinite-step1-rank0.pt")["batches"]
    row = int(batch["row"][0])
    assert f"distill is nan in row {row} " in str(raised.value)
    key, quoted = str(raised.value).split(f"row {row} (row_key ")[1].split(" (micro-batch")[0].split(") ", 1)
    (own,) = [row["input_ids"] for row in trainer.train_dataset if row["row_key"] == int(key)]
    assert quoted[1:].startswith(trainer.processing_class.decode(own[:8]))
    assert set(batch["student"]["targets"][batch["row"] == row].tolist()) <= set(own)


@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_gradient_alone_is_named(tmp_path, clipping):
    """Catches a finite loss with a gradient that is not, and a name taken after clipping made all of them NaN."""
    trainer = distilling(tmp_path, max_grad_norm=clipping)
    poison_gradient(trainer, trainer.model, "model.layers.1.mlp.up_proj.weight", step=2)
    before = watched(trainer)
    with pytest.raises(NonFiniteError, match="Step 2: 1 of 25 gradients are not finite") as raised:
        trainer.train()
    assert "(model.layers.1.mlp.up_proj.weight)" in str(raised.value)
    assert equal(state_of(trainer), before.states[-1])
    losses, norms = replay_at(trainer, tmp_path / "nonfinite-step2-rank0.pt", step=1)
    assert math.isfinite(losses[0])
    assert [name for name, norm in norms.items() if not math.isfinite(norm)] == ["model.layers.1.mlp.up_proj.weight"]


def replay_at(trainer, path, step):
    assert trainer.state.global_step == step
    found = replay(trainer, path)
    assert trainer.state.global_step == step
    assert all(value.grad is None for value in trainer.model.parameters())
    return found


def test_student_without_a_teacher(tmp_path):
    """Catches a denoising loss that only a teacher's run looks at, and weights that were broken before any step."""
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    trainer = tiny_trainer(tmp_path, model=model, nonfinite="skip")
    with pytest.raises(NonFiniteError, match="Step 1: the weights of the student themselves are not finite") as raised:
        trainer.train()
    assert "(model.norm.weight)" in str(raised.value) and "ce is nan in row " in str(raised.value)


def test_file_reproduces(tmp_path):
    """Catches a file that lacks what the loss depends on: every micro-batch, its counts, and the step that λ follows;
    run again by a trainer made anew, and by the interrupted one with a healthy teacher."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "tidal": True, "comp_demo": True}
    trainer = distilling(tmp_path, **options)
    poison_teacher(trainer, step=3, healthy_calls=1)
    with pytest.raises(NonFiniteError):
        trainer.train()
    path = tmp_path / "nonfinite-step3-rank0.pt"
    saved = torch.load(path)  # without unpickling code
    assert (saved["step"], saved["seed"], saved["rank"], saved["max_steps"]) == (3, trainer.args.seed, 0, 4)
    assert len(saved["batches"]) == 2 and math.isfinite(saved["losses"][0]) and math.isnan(saved["losses"][1])
    del trainer.signal.hidden  # the healthy one
    losses, norms = replay(trainer, path)
    assert losses[0] == pytest.approx(saved["losses"][0], rel=1e-12)
    assert math.isfinite(losses[1]) and all(map(math.isfinite, norms.values()))
    fresh = distilling(tmp_path / "fresh", **options)
    fresh.model.load_state_dict(trainer.model.state_dict())
    assert replay(fresh, path)[0] == pytest.approx(losses, rel=1e-12)
    with torch.no_grad():
        fresh.teacher.lm_head.weight[5, 0] = math.nan
    assert all(map(math.isnan, replay(fresh, path)[0]))


# -- skip -------------------------------------------------------------------------------------------------------------


def skipping(folder, bad_steps, **overrides):
    """A run of which some steps end in a micro-batch that is not finite."""
    trainer = distilling(folder, nonfinite="skip", max_steps=6, logging_steps=6, **overrides)
    hidden, calls = trainer.signal.hidden, []

    def poisoned(batch):
        found, step = hidden(batch), trainer.state.global_step + 1
        calls.append(step)
        if step in bad_steps and calls.count(step) % trainer.args.gradient_accumulation_steps == 0:
            found[0, 0] = math.nan
        return found

    trainer.signal.hidden = poisoned
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("when", ["now", "late"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_skip_leaves_the_step_out(tmp_path, monkeypatch, when, accumulation, clipping):
    """Catches a skipped step that moves weights or decays moments, is counted in the logged means, or is not counted
    at all; the host reading the flag at once, or as on a GPU after the optimizer's kernel."""
    if when == "late":
        monkeypatch.setattr(StepGuard, "reads_late", True)
    options = {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8 // accumulation,
        "max_grad_norm": clipping,
    }
    trainer = skipping(tmp_path / "run", (2, 3, 5), **options)
    keep = watched(trainer)
    trainer.train()
    for step in (2, 3, 5):
        assert equal(keep.states[step - 1], keep.states[step - 2]), step
    for step in (4, 6):
        assert not equal(keep.states[step - 1], keep.states[step - 2]), step
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["nonfinite_steps"] == 3
    steps = skipping(tmp_path / "steps", (2, 3, 5), **options)
    steps.args.logging_steps = 1
    steps.train()
    for name in ("loss", "ce", "distill"):
        taken = [value for value in logged(steps, name) if math.isfinite(value)]
        assert len(taken) == 3, "a step that is left out has no loss"
        assert entry[name] == pytest.approx(sum(taken) / 3, rel=1e-6)
    assert [math.isnan(value) for value in logged(steps, "grad_norm")] == [False, True, True, False, True, False]
    assert [name for name in files(tmp_path / "run") if name.endswith(".pt")] == [
        f"nonfinite-step{step}-rank0.pt" for step in (2, 3, 5)
    ]
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


@pytest.mark.slow
def test_late_stop_takes_neither_step(tmp_path, late):
    """Catches a GPU's run whose next step is taken before the host has read of the bad one, or whose last step is
    never read of."""
    healthy = distilling(tmp_path / "healthy", max_steps=2)
    healthy.train()
    for max_steps in (4, 3):
        trainer = distilling(tmp_path / str(max_steps), max_steps=max_steps, logging_steps=100)
        poison_teacher(trainer, step=3)
        with pytest.raises(NonFiniteError, match="Step 3: distill is nan"):
            trainer.train()
        assert equal(state_of(trainer), state_of(healthy))
        assert files(tmp_path / str(max_steps)) == ["nonfinite-step3-rank0.pt"]


def test_late_path_reads_nothing(tmp_path, late, monkeypatch):
    """Catches a host that waits for the device in a healthy step: no number is fetched between the last backward pass
    and the optimizer."""
    fetched, inside = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                fetched.append(function)
            return function(*args, **(kwargs or {}))

    saw = StepGuard.saw

    def watched_saw(self, *args, **kwargs):
        inside.append(1)
        with Watch():
            return saw(self, *args, **kwargs)

    monkeypatch.setattr(guard._Flag, "__bool__", lambda self: False)
    monkeypatch.setattr(StepGuard, "saw", watched_saw)
    trainer = distilling(tmp_path, logging_steps=100, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer.train()
    assert len(inside) == 8 and fetched == []
    assert trainer.args.logging_nan_inf_filter is False, "transformers' own look waits twice per micro-batch"


def test_endless_skipping_stops(tmp_path):
    """Catches a run that skips every step to its end and saves its start as its result."""
    trainer = skipping(tmp_path, range(2, 100))
    trainer.args.max_steps = 50
    with pytest.raises(NonFiniteError, match=r"Step 11: .* number 10 in a row"):
        trainer.train()
    assert len([name for name in files(tmp_path) if name.endswith(".pt")]) == 10


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, adapter):
    """Catches a model, checkpoint or card of NaN weights, and half a checkpoint."""
    trainer = tiny_trainer(tmp_path, trainer_kwargs={"peft_config": LORA} if adapter else None, max_steps=1)
    trainer.train()
    name, value = [item for item in trainer.model.named_parameters() if item[1].requires_grad][-1]
    with torch.no_grad():
        value.view(-1)[0] = math.inf
    for write in (
        trainer.save_model,
        lambda: trainer._save_checkpoint(trainer.model, None),
        trainer.create_model_card,
    ):
        with pytest.raises(NonFiniteError, match="is not written: ") as raised:
            write()
        assert name.removesuffix(".weight").split(".")[-1] in str(raised.value)
    assert files(tmp_path) == [] and not list(tmp_path.glob("checkpoint*"))
    with torch.no_grad():
        value.zero_()
    trainer.save_model()
    assert "README.md" in files(tmp_path)


@pytest.mark.parametrize("part", ["student", "average", "fake"])
def test_few_step_state_that_is_not_finite_is_not_saved(tmp_path, part):
    """Catches a checkpoint that goes on with a broken average or fake."""
    trainer = tiny_few_step(tmp_path, max_steps=1)
    trainer.train()
    parts = {"student": dict(trainer.model.named_parameters()), "average": trainer.ema.average}
    parts["fake"] = dict(trainer.fake.named_parameters())
    with torch.no_grad():
        parts[part]["model.norm.weight"][0] = math.nan
    with pytest.raises(NonFiniteError, match=rf"{part}\.model\.norm\.weight contains NaN"):
        trainer._save_checkpoint(trainer.model, None)
    assert files(tmp_path) == []


@pytest.mark.parametrize(("metric", "greater"), [(math.nan, False), (math.inf, True), (-math.inf, False)])
def test_metric_that_is_not_finite_is_never_best(tmp_path, metric, greater, caplog):
    """Catches load_best_model_at_end that takes infinity, and NaN passed over without a word."""
    trainer = tiny_trainer(tmp_path, greater_is_better=greater, metric_for_best_model="loss")
    trainer.state.best_metric = 1.0
    assert not trainer._determine_best_metric({"eval_loss": metric, "eval_ce": 1.0}, None)
    assert trainer.state.best_metric == 1.0
    assert f"eval_loss = {metric}" in caplog.text
    assert trainer._determine_best_metric({"eval_loss": 2.0 if greater else 0.5}, None)


# -- inverse distillation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_few_step, tiny_uniform])
def test_teacher_of_an_inverse_distillation(tmp_path, make):
    """Catches the IndexError one step after the weights became NaN, with a last checkpoint of NaN."""
    trainer = make(tmp_path)
    with torch.no_grad():
        next(trainer.teacher.parameters())[:] = math.nan
    keep = watched(trainer)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(NonFiniteError, match=r"Step 1: loss is nan in row \d "):
        trainer.train()
    assert keep.states == []
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(value.isfinite().all() for value in trainer.ema.average.values())
    path = tmp_path / "nonfinite-step1-rank0.pt"
    assert math.isnan(replay(trainer, path)[0][0])
    fresh = make(tmp_path / "fresh")
    assert math.isfinite(replay(fresh, path)[0][0])


def test_broken_start_of_an_inverse_distillation(tmp_path):
    """Catches an IndexError in place of a word about a student whose weights are NaN."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    trainer = tiny_few_step(tmp_path, model=model)
    with pytest.raises(NonFiniteError, match="update of the fake: the weights of the fake themselves are not finite"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["now", "late"])
def test_update_of_the_fake_is_left_out(tmp_path, monkeypatch, when):
    """Catches a fake that steps on NaN, and means that count the update it did not take."""
    if when == "late":
        monkeypatch.setattr(StepGuard, "reads_late", True)
    trainer = tiny_few_step(tmp_path / "run", nonfinite="skip")
    poison_gradient(trainer, trainer.fake, "model.norm.weight", step=2)
    fakes = []

    class Fakes(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            fakes.append([value.detach().clone() for value in trainer.fake.parameters()])

    trainer.add_callback(Fakes())
    keep = watched(trainer)
    trainer.train()
    assert equal(fakes[1], fakes[0]) and not equal(fakes[2], fakes[1])
    assert not equal(keep.states[1], keep.states[0]), "the student's step is healthy"
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("fake_nonfinite_steps") for entry in entries] == [None, 1, 1, 1]
    assert [math.isnan(entry["fake_loss"]) for entry in entries] == [False, True, False, False]
    assert all(math.isfinite(entry["loss"]) and "nonfinite_steps" not in entry for entry in entries)
    path = tmp_path / "run" / "nonfinite-step2-fake-rank0.pt"
    assert torch.load(path)["network"] == "fake"
    stopped = tiny_few_step(tmp_path / "stop")
    poison_gradient(stopped, stopped.fake, "model.norm.weight", step=2)
    with pytest.raises(NonFiniteError, match=r"Step 2, update of the fake: 1 of 25 gradients .*\(model.norm.weight\)"):
        stopped.train()
    stopped.state.global_step = 1
    losses, norms = replay(stopped, path)
    assert math.isfinite(losses[0]) and math.isnan(norms["model.norm.weight"])


def test_average_of_a_step_left_out(tmp_path):
    """Catches a moving average that takes the weights in once more where there was no step."""
    trainer = tiny_few_step(tmp_path, nonfinite="skip", ema_decay=0.5)
    poison_gradient(trainer, trainer.model, "model.norm.weight", step=2)
    averages = []

    class Averages(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            averages.append([value.clone() for value in trainer.ema.average.values()])

    trainer.add_callback(Averages())
    trainer.train()
    assert equal(averages[1], averages[0]) and not equal(averages[2], averages[1])
    assert [entry.get("nonfinite_steps") for entry in trainer.state.log_history if "loss" in entry] == [None, 1, 1, 1]


# -- engines ----------------------------------------------------------------------------------------------------------


def scaled(loss_value=1.0, scale=65536.0, gradient=1.0, late=True):
    """A guard, optimizer and scaler of one parameter after one backward pass, as accelerate has them under fp16."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator = SimpleNamespace(
        scaler=scaler, num_processes=1, process_index=0, device=torch.device("cpu"), distributed_type=None
    )
    args = TIDEConfig(output_dir="unused", use_cpu=True, report_to=[])
    state = SimpleNamespace(global_step=0, max_steps=5)
    trainer = SimpleNamespace(args=args, accelerator=accelerator, state=state, model_wrapped=None)
    step_guard = StepGuard(trainer, "student", {"weight": weight}, optimizer, lambda batch: {})
    loss = (weight * gradient).sum() * 0 + (weight * gradient).sum()
    scaler.scale(loss).backward()
    return step_guard, optimizer, scaler, weight, torch.tensor(loss_value)


def test_scaler_tries_scales(late):
    """Catches overflow that a GradScaler looks for taken as an error: the scaler skips the step and lowers the scale,
    the run goes on."""
    step_guard, optimizer, scaler, weight, loss = scaled(gradient=1e38)
    step_guard.saw(Nothing(), loss, is_last=True)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert step_guard.settle() == 0
    assert torch.equal(weight, torch.ones(3)) and scaler.get_scale() == 32768


@pytest.mark.parametrize(("loss", "scale", "gradient"), [(math.nan, 65536.0, 1.0), (1.0, 1.0, math.inf)])
def test_scaler_does_not_hide_what_no_scale_heals(late, tmp_path, loss, scale, gradient):
    """Catches a loss that is NaN itself, or a gradient that overflows at a scale of 1, lost in the scaler's skipping;
    and a step on them."""
    step_guard, optimizer, scaler, weight, value = scaled(loss, scale, gradient)
    step_guard.args.output_dir = str(tmp_path)
    step_guard.saw(Nothing(), value, is_last=True)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert torch.equal(weight, torch.ones(3))
    with pytest.raises(NonFiniteError, match="Step 1: "):
        step_guard.settle()


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_early_are_refused(tmp_path, optim):
    """Catches an optimizer that has stepped before anybody can look."""
    step_guard, *_ = scaled()
    step_guard.args.optim = optim
    with pytest.raises(ValueError, match=f"optim='{optim}' steps inside the backward pass"):
        StepGuard(step_guard.trainer, "student", {}, step_guard.optimizer, None)


def test_deepspeed_looks_before_its_backward(tmp_path):
    """Catches DeepSpeed's engine, which steps in the backward pass, let into it with a loss that is NaN; and skip,
    which it cannot do, accepted."""
    step_guard, *_ = scaled()
    step_guard.args.output_dir, step_guard.scaler, step_guard.is_deepspeed = str(tmp_path), None, True
    step_guard.before_backward(Nothing(), torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match="the loss of micro-batch 0 of process 0 was nan"):
        step_guard.before_backward(Nothing(), torch.tensor(math.nan))
    step_guard.args.nonfinite = "skip"
    step_guard.accelerator.distributed_type = "DEEPSPEED"
    with pytest.raises(ValueError, match="cannot skip a step under DeepSpeed"):
        StepGuard(step_guard.trainer, "student", {}, step_guard.optimizer, None)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["tide", "idlm"])
@pytest.mark.parametrize("choice", ["stop", "skip", "skip late"])
def test_processes_decide_alike(tmp_path, engine, kind, choice):
    """Catches a process that stops or skips alone, while the others wait for it: the second one's row is broken."""
    script = [str(Path(__file__).parent / "nonfinite_run.py"), str(tmp_path), engine, kind, choice]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29760"]
    subprocess.run([*launcher, *script], check=True, timeout=300)
    results = [torch.load(tmp_path / f"result{rank}.pt") for rank in range(2)]
    term = "distill" if kind == "tide" else "loss"
    if choice == "stop":
        assert results[0]["message"] == results[1]["message"]
        assert results[0]["message"].startswith(f"Step 2: {term} is nan in row ")
        assert "(micro-batch 0 of process 1)" in results[0]["message"]
    for result in results:
        assert result["unchanged"] and result["finite"]
    assert [name for name in files(tmp_path) if name.startswith("nonfinite")] == [
        f"nonfinite-step2-rank{rank}.pt" for rank in range(2)
    ]


@pytest.mark.parametrize("config_class", [TIDEConfig, IDLMConfig])
def test_choices(tmp_path, config_class):
    """Catches a choice that is accepted and means stop, or a default that goes on."""
    assert config_class(output_dir=str(tmp_path), use_cpu=True).nonfinite == "stop"
    with pytest.raises(ValueError, match="nonfinite='ignore' is not known; choose one of stop, skip"):
        config_class(output_dir=str(tmp_path), use_cpu=True, nonfinite="ignore")


def test_recipes_end_in_a_sentence(tmp_path, monkeypatch):
    """Catches a traceback, or a status of 0, where a run stopped."""
    from tide_hf.commands import distill

    def train(self, *args, **kwargs):
        raise NonFiniteError("Step 3: distill is nan.")

    monkeypatch.setattr("tide_hf.training.trainer.TIDETrainer.train", train)
    trainer = tiny_trainer(tmp_path)
    arguments = SimpleNamespace(
        script=SimpleNamespace(
            dataset_name="rows",
            dataset_test_split="test",
            dataset_train_split="train",
            teacher_model_name_or_path=None,
        ),
        training=trainer.args,
        model=None,
        mixture=SimpleNamespace(datasets=[]),
    )
    monkeypatch.setattr(distill, "load_named", lambda script: {"train": sorting_rows(16, seed=3)})
    monkeypatch.setattr(distill, "get_quantization_config", lambda model: None)
    monkeypatch.setattr(distill, "get_peft_config", lambda model: None)
    monkeypatch.setattr(distill, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *a, **k: build_tokenizer()))
    arguments.model = SimpleNamespace(
        model_revision=None, attn_implementation=None, dtype=None, model_name_or_path="student"
    )
    with pytest.raises(SystemExit) as stopped:
        distill._run(arguments, lambda **kwargs: trainer)
    assert stopped.value.code == "Step 3: distill is nan.", "a string: printed, status 1"
