"""The recipes' common run: what is checked first, and a tiny distillation from folders to a saved student."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from embedded.command import run_embedded
from embedded.table import dense_task, embedded_task
from peft import AutoPeftModelForCausalLM
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tide_hf.commands.distill import parse_arguments, run_distillation
from tide_hf.demo.sorting import build_tokenizer, sorting_rows

ROOT = Path(__file__).parent.parent


def recipe(*flags: str, cache: Path, name: str = "dense_teacher") -> tuple[subprocess.CompletedProcess, float]:
    """Runs a recipe offline with an empty cache; its outcome and seconds."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    for variable in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(variable, None)
    started = time.monotonic()
    command = [sys.executable, f"recipes/{name}.py", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return done, time.monotonic() - started


# -- before anything is loaded ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), [("dense_teacher", "wedlm_to_qwen3"), ("moe_teacher", "llada2_to_qwen3")])
def test_the_papers_run_says_offline_what_it_misses(name, config, tmp_path):
    """Catches the full run, started without network, failing late, item by item, or for this machine's precision."""
    config = f"recipes/configs/{config}.yaml"
    done, seconds = recipe("--config", config, cache=tmp_path, name=name)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("HF_HUB_OFFLINE is set and the model ") and message.endswith("give local paths.")
    assert "Traceback" not in done.stderr
    settings = yaml.safe_load((ROOT / config).read_text())
    models = {f"the model {settings[name]}" for name in ("model_name_or_path", "teacher_model_name_or_path")}
    datasets = {f"the dataset {part['path']}" for part in settings["datasets"]}
    assert len(models) == 2 and len(datasets) == 4
    assert all(message.count(name) == 1 for name in models | datasets)
    assert seconds < 60, "mostly imports; retries would take half a minute per item"
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--learning_rate", "1e-3"], "--learning_rate"),
        (["--preset=ce", "--max_steps", "3"], "--max_steps, --preset"),
        (["--teacher_model_name_or_path", "x"], "--teacher_model_name_or_path"),
    ],
)
def test_embedded_run_refuses_flags_it_would_ignore(flags, named, monkeypatch):
    """Catches a setting of the user that an embedded comparison silently does not use."""
    monkeypatch.setattr("embedded.command.run_and_show", lambda *args: pytest.fail("the comparison was started"))
    with pytest.raises(SystemExit) as stopped:
        run_embedded(parse_arguments("outputs", flags), dense_task)
    verb = "are" if "," in named else "is"
    assert str(stopped.value).startswith(f"{named} {verb} not used by the embedded comparison, which")


def test_embedded_run_refuses_a_file_of_settings(tmp_path, monkeypatch):
    """Catches a YAML file whose settings an embedded comparison silently does not use."""
    monkeypatch.setattr("embedded.command.run_and_show", lambda *args: pytest.fail("the comparison was started"))
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\nuse_cpu: true\n")
    with pytest.raises(SystemExit, match="--config is not used"):
        run_embedded(parse_arguments("outputs", ["--config", str(path)]), dense_task)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--seeds", "2", "--output_dir", "x"], ("sorting", [0, 1], "x")),
        (["--seeds=2", "--output-dir", "x"], ("sorting", [0, 1], "x")),
        ([], ("sorting", [0, 1, 2], "outputs")),
        (["--dataset_name", "python_stdlib"], ("python_stdlib", [0], "outputs")),
        (["--dataset_name", "mine.jsonl"], ("mine.jsonl", [0], "outputs")),
    ],
)
def test_embedded_run_takes_its_own_flags(flags, expected, monkeypatch):
    """Catches another task, other seeds or another folder than the user asked for, in either spelling of a flag."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    started = []
    monkeypatch.setattr(
        "embedded.command.run_and_show", lambda task, seeds, folder: started.append((task.name, seeds, folder))
    )
    run_embedded(parse_arguments("outputs", flags), dense_task)
    assert started == [expected]


def test_the_other_recipe_embeds_one_comparison(monkeypatch):
    """Catches a comparison of another recipe run in place of the one that was named."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    started = []
    monkeypatch.setattr("embedded.command.run_and_show", lambda task, seeds, folder: started.append(task.name))
    choose = partial(embedded_task, "moe_teacher")
    run_embedded(parse_arguments("outputs", []), choose)
    with pytest.raises(SystemExit, match="--dataset_name python_stdlib names another"):
        run_embedded(parse_arguments("outputs", ["--dataset_name", "python_stdlib"]), choose)
    assert started == ["sorting_across_tokenizers"]


def test_embedded_run_refuses_several_processes(monkeypatch):
    """Catches the same comparison run once per GPU, all writing into one folder."""
    monkeypatch.setattr("embedded.command.run_and_show", lambda *args: pytest.fail("the comparison was started"))
    arguments = parse_arguments("outputs", [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="--num_processes 1"):
        run_embedded(arguments, dense_task)


# -- a tiny run from folders ------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, monkeypatch) -> dict[str, Path]:
    """A saved teacher, a saved student, and a JSONL of sorting rows."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    paths = {name: tmp_path / name for name in ("teacher", "student", "rows.jsonl", "out")}
    for seed, name in enumerate(("teacher", "student")):
        tiny_model(seed=seed, hidden=32 if name == "teacher" else 16, dtype=torch.float32).save_pretrained(paths[name])
        build_tokenizer().save_pretrained(paths[name])
    paths["rows.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in sorting_rows(8, seed=1)))
    return paths


def flags_of(folders, **overrides) -> list[str]:
    values = {
        "model_name_or_path": folders["student"],
        "teacher_model_name_or_path": folders["teacher"],
        "dataset_name": folders["rows.jsonl"],
        "output_dir": folders["out"],
        "max_steps": 2,
        "max_length": 16,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        **overrides,
    }
    return [*(word for name, value in values.items() for word in (f"--{name}", str(value))), "--use_cpu"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.slow
def test_run_from_folders_to_a_loadable_student(folders):
    """Catches a saved checkpoint that is not the trained student, and a teacher that trained along."""
    teacher_before, student_before = contents(folders["teacher"]), contents(folders["student"])
    trainer = run_distillation(parse_arguments("outputs", flags_of(folders)))
    assert trainer.objective.preset == "tide-shared" and trainer.objective.distills
    terms = [entry for entry in trainer.state.log_history if "distill" in entry]
    assert len(terms) == 2 and all(entry["distill"] > 0 and entry["grad_norm"] > 0 for entry in terms)

    assert contents(folders["teacher"]) == teacher_before and contents(folders["student"]) == student_before
    saved_teacher = AutoModelForCausalLM.from_pretrained(folders["teacher"]).state_dict()
    teacher = trainer.teacher
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not {id(p) for p in teacher.parameters()} & {
        id(p) for group in trainer.optimizer.param_groups for p in group["params"]
    }
    assert all(torch.equal(value, saved_teacher[name]) for name, value in teacher.state_dict().items())

    loaded = AutoModelForCausalLM.from_pretrained(folders["out"])
    start = AutoModelForCausalLM.from_pretrained(folders["student"])
    trained = trainer.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in loaded.state_dict().items())
    moved = [name for name, value in loaded.named_parameters() if not torch.equal(value, start.state_dict()[name])]
    assert len(moved) > 10
    tokenizer = AutoTokenizer.from_pretrained(folders["out"])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "310254"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    sequences = loaded.generate(**prompt, max_new_tokens=4)
    assert sequences.shape[1] > prompt["input_ids"].shape[1]
    assert tokenizer.mask_token_id not in sequences[0, prompt["input_ids"].shape[1] :]


@pytest.mark.slow
def test_run_with_an_adapter(folders):
    """Catches --use_peft that trains or saves the whole student, or adapts the teacher."""
    flags = [*flags_of(folders), "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "2"]
    student_before = contents(folders["student"])
    trainer = run_distillation(parse_arguments("outputs", flags))
    assert contents(folders["student"]) == student_before
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trainable)
    assert not any("lora_" in name for name, _ in trainer.teacher.named_parameters())
    assert (folders["out"] / "adapter_config.json").is_file()
    assert not (folders["out"] / "model.safetensors").exists()

    loaded = AutoPeftModelForCausalLM.from_pretrained(folders["out"])
    name = next(name for name in trainable if "lora_B" in name)
    saved = dict(loaded.named_parameters())[name]
    assert saved.abs().sum() > 0, "lora_B starts at zero: it has not trained"
    assert torch.equal(saved, dict(trainer.model.named_parameters())[name])


@pytest.mark.slow
def test_run_without_teacher(folders):
    """Catches a baseline that still asks for a teacher."""
    flags = flags_of(folders, preset="ce")
    at = flags.index("--teacher_model_name_or_path")
    trainer = run_distillation(parse_arguments("outputs", flags[:at] + flags[at + 2 :]))
    assert trainer.teacher is None and (folders["out"] / "model.safetensors").is_file()


@pytest.mark.slow
def test_run_on_a_mixture_with_evaluation(folders, tmp_path):
    """Catches a mixture in a YAML file that is not what trains, and held-out rows that are not evaluated."""
    parts = [{"path": str(folders["rows.jsonl"])}, {"path": str(folders["rows.jsonl"]), "split": "train[:4]"}]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"datasets": parts, "test_split_size": 0.25, "eval_strategy": "steps"}))
    flags = flags_of(folders, eval_steps=2)
    at = flags.index("--dataset_name")
    trainer = run_distillation(parse_arguments("outputs", ["--config", str(path), *flags[:at], *flags[at + 2 :]]))
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (9, 3)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


def test_missing_evaluation_split_is_said_before_loading(folders, monkeypatch):
    """Catches an evaluation that was asked for and silently left out."""
    monkeypatch.setattr(
        "tide_hf.commands.distill.TIDETrainer", lambda *args, **kwargs: pytest.fail("the trainer was made")
    )
    with pytest.raises(SystemExit, match="--eval_strategy steps needs a 'test' split, and the dataset has train"):
        run_distillation(parse_arguments("outputs", [*flags_of(folders), "--eval_strategy", "steps"]))


def test_no_data_is_said(folders):
    """Catches a run without data failing inside the data loader."""
    flags = flags_of(folders)
    at = flags.index("--dataset_name")
    with pytest.raises(SystemExit, match="Nothing to train on: give --dataset_name"):
        run_distillation(parse_arguments("outputs", flags[:at] + flags[at + 2 :]))


def test_the_checkpoints_dtype_is_the_one_asked_for(folders):
    """Catches --dtype and --teacher_dtype applied to the other model, or to none."""
    flags = [*flags_of(folders, max_steps=1), "--teacher_dtype", "bfloat16", "--dtype", "float32"]
    trainer = run_distillation(parse_arguments("outputs", flags))
    assert trainer.teacher.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
