"""The embedded few-step comparison: its task, its measures, its recipe."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from embedded.command import run_and_show_few_step, show_few_step
from embedded.few_step import FULL, METRICS, NETWORKS, few_step_table, find_teacher, measure
from embedded.table import FEW_STEP
from embedded.tasks import copying_task, sorting_few_step_task
from tiny import tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tide_hf import IDLMConfig
from tide_hf.commands.distill import parse_arguments, run_inverse_distillation
from tide_hf.demo.copying import HELD_OUT_SEED, VALIDATION_SEED, both_cases, build_case_tokenizer, copying_rows
from tide_hf.demo.sorting import build_tokenizer, sorting_rows

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "recipes" / "reports" / "few_step.json"


# -- the task ---------------------------------------------------------------------------------------------------------


def test_rows_are_one_of_two_right_answers():
    """Catches a coin that is not fair, an answer that mixes cases, and held-out prompts among the training rows."""
    rows = [[turn["content"] for turn in row] for row in copying_rows(2000, seed=1)["messages"]]
    assert all(answer in both_cases(word) and len(word) == 32 for word, answer in rows)
    assert sum(answer.isupper() for _, answer in rows) / 2000 == pytest.approx(0.5, abs=0.04)
    held_out, validation = (copying_rows(50, seed)["messages"] for seed in (HELD_OUT_SEED, VALIDATION_SEED))
    words = [{row[0]["content"] for row in part} for part in (held_out, validation)]
    assert not words[0] & words[1] and not (words[0] | words[1]) & {word for word, _ in rows}


def test_case_tokenizer_round_trips():
    """Catches a tokenizer for which small letters and capitals are the same, or letters are joined."""
    tokenizer = build_case_tokenizer()
    ids = tokenizer("aBcJ", add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == 4 and tokenizer.decode(ids) == "aBcJ"


# -- what is measured -------------------------------------------------------------------------------------------------


class Answers:
    """A network whose letters are right and whose case is drawn anew at every network call."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, []

    def generate(self, input_ids, attention_mask, max_new_tokens, steps_per_block, generator, **settings):
        self.calls.append((steps_per_block, settings))
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        cells = torch.randint(2, (len(texts), steps_per_block), generator=generator)
        answers = [
            "".join(
                letter.upper() if cells[row, index * steps_per_block // len(text)] else letter
                for index, letter in enumerate(text)
            )
            for row, text in enumerate(texts)
        ]
        new = torch.tensor(self.tokenizer(answers, add_special_tokens=False)["input_ids"])
        eos = torch.full((len(new), 1), self.tokenizer.eos_token_id)
        output = torch.cat([input_ids, new, eos], 1)
        return type("Output", (), {"sequences": output, "tokens_per_forward": 33 / 2, "forward_passes": 2})()


@pytest.mark.slow
def test_measures_of_a_known_network():
    """Catches an accuracy that takes mixtures for right, one answer for two, or other settings than random order at
    temperature 1: with n independent choices of case 2^(1−n) answers are right, and half of the right pairs differ."""
    task = copying_task()
    network = Answers(build_case_tokenizer())
    metrics = measure(task, network, network.tokenizer, copying_rows(400, HELD_OUT_SEED), seed=0)
    for steps, expected in (("1", 1.0), ("2", 0.5), ("4", 0.125), ("16", 0.0)):
        assert metrics[steps]["accuracy"] == pytest.approx(expected, abs=0.04), steps
    assert metrics["1"]["differ"] == pytest.approx(0.5, abs=0.07) and math.isnan(metrics["16"]["differ"])
    assert set(metrics) == {"1", "2", "4", "8", "16", "32", FULL}
    assert [call[0] for call in network.calls] == [n for n in task.steps for _ in range(2)]
    for _, settings in network.calls:
        assert settings["remasking"] == "random" and settings["temperature"] == 1.0


def save_dense_run(folder: Path, task: str) -> Path:
    """What the dense recipe leaves of its teacher, in a folder beside the output of the few-step one."""
    teacher = folder / "dense_teacher" / "runs" / "teacher-seed0"
    tiny_model(0, dtype=torch.float32).save_pretrained(teacher)
    build_tokenizer().save_pretrained(teacher)
    (folder / "dense_teacher" / "report.json").write_text(json.dumps({"task": task}))
    return teacher


def test_only_the_same_tasks_teacher_is_taken(tmp_path):
    """Catches a teacher trained once more although the dense recipe left one, and a teacher of another task, seed or
    network taken for this one."""
    sorting, copying = sorting_few_step_task(), copying_task()
    teacher = save_dense_run(tmp_path, "sorting")
    assert find_teacher(sorting, 0, tmp_path / "few_step") == teacher
    assert find_teacher(sorting, 1, tmp_path / "few_step") is None
    assert find_teacher(copying, 0, tmp_path / "few_step") is None
    save_dense_run(tmp_path, "python_stdlib")
    assert find_teacher(sorting, 0, tmp_path / "few_step") is None


# -- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_comparison_from_end_to_end(tmp_path, capsys):
    """Catches a comparison that leaves out a network, a seed or a number of steps, or hands over another student."""
    tasks = [copying_task(teacher_steps=4, student_steps=2, num_held_out=4), sorting_few_step_task(2, 4)]
    save_dense_run(tmp_path, "sorting")
    out = tmp_path / "out"
    report = run_and_show_few_step(tasks, [0], str(out))
    assert not (out / "sorting" / "runs" / "teacher-seed0").exists(), "the dense recipe's was taken"
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "few_step.png").stat().st_size > 5000
    for task, columns in zip(report["tasks"], (7, 3), strict=True):
        assert [network["name"] for network in task["networks"]] == list(NETWORKS)
        for network in task["networks"]:
            assert len(network["steps"]) == columns
            assert all(set(cell) == set(METRICS) for cell in network["steps"].values())
    printed = capsys.readouterr().out
    assert few_step_table(report["tasks"][0]) in printed and few_step_table(report["tasks"][1]) in printed
    card = (out / "README.md").read_text()
    assert "![Right answers against denoising steps](few_step.png)" in card and "2602.19066" in card
    assert few_step_table(report["tasks"][0]) in card
    student, saved = (AutoModel.from_pretrained(path) for path in (out, out / "copying" / "runs" / "IDLM-seed0"))
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in student.state_dict().items())
    assert student.generation_config.steps_per_block == tasks[0].idlm["num_steps"]


@pytest.mark.parametrize("flags", [["--learning_rate", "1e-3"], ["--num_steps=2"], ["--dataset_name", "x"]])
def test_embedded_run_refuses_flags_it_would_ignore(flags, monkeypatch):
    """Catches a setting of the user that the embedded comparison silently does not use."""
    monkeypatch.setattr(
        "embedded.command.run_and_show_few_step", lambda *args: pytest.fail("the comparison was started")
    )
    with pytest.raises(SystemExit, match="is not used by the embedded comparison"):
        show_few_step(parse_arguments("outputs", flags, IDLMConfig))


@pytest.fixture
def folders(tmp_path, monkeypatch) -> dict[str, Path]:
    """A saved model and a JSONL of sorting rows."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_model(0, dtype=torch.float32).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sorting_rows(8, seed=1)))
    return {"model": tmp_path / "model", "rows": tmp_path / "rows.jsonl", "out": tmp_path / "out"}


def flags_of(folders) -> list[str]:
    flags = ["--model_name_or_path", folders["model"], "--dataset_name", folders["rows"], "--output_dir"]
    flags += [folders["out"], "--max_steps", 2, "--max_length", 16, "--num_steps", 2, "--learning_rate", "1e-2"]
    flags += ["--fake_learning_rate", "2e-2", "--warmup_steps", 0, "--report_to", "none", "--use_cpu"]
    return [str(flag) for flag in flags]


@pytest.mark.parametrize("adapter", [False, True])
def test_run_from_folders_to_a_loadable_student(folders, adapter):
    """Catches flags that do not reach the run, and a saved student that is not the trained one."""
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    flags = [*flags_of(folders), *(lora if adapter else [])]
    trainer = run_inverse_distillation(parse_arguments("outputs", flags, IDLMConfig))
    assert trainer.args.fake_learning_rate == 2e-2 and trainer.objective.num_steps == 2
    assert (folders["out"] / "adapter_config.json").is_file() == adapter
    assert (folders["out"] / "model.safetensors").is_file() == (not adapter)
    loaded = AutoModelForCausalLM.from_pretrained(folders["out"])
    start = AutoModelForCausalLM.from_pretrained(folders["model"])
    ids = torch.tensor([AutoTokenizer.from_pretrained(folders["out"])("310254<assistant>")["input_ids"]])
    assert not torch.equal(loaded(ids).logits, start(ids).logits)
    assert loaded.generate(ids, max_new_tokens=4, steps_per_block=1).shape[1] > ids.shape[1]


def test_a_second_model_as_teacher_is_refused(folders):
    """Catches a teacher that is named and silently not used."""
    flags = [*flags_of(folders), "--teacher_model_name_or_path", str(folders["model"])]
    with pytest.raises(SystemExit, match="takes no --teacher_model_name_or_path"):
        run_inverse_distillation(parse_arguments("outputs", flags, IDLMConfig))


@pytest.mark.slow
def test_recipe_shows_its_flags():
    """Catches a recipe that does not start, or fields that are no flags."""
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "few_step.py"), "--help"], capture_output=True, text=True, check=True,
        env=environment, cwd=ROOT,
    )  # fmt: skip
    for name in ("num_steps", "fake_steps_per_student_step", "ema_decay", "student_times", "use_peft", "seeds"):
        assert f"--{name}" in done.stdout, name


# -- the committed report ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_committed_report_is_a_whole_run():
    """Catches a report of another task, fewer seeds or other settings than the recipe's."""
    report = json.loads(REPORT.read_text())
    assert report["seeds"] == [0, 1, 2]
    copying, sorting = report["tasks"]
    for found, task in zip((copying, sorting), (make() for make in FEW_STEP.values()), strict=True):
        assert found["name"] == task.name and found["settings"]["idlm"] == task.idlm
        assert found["settings"]["student"] == vars(task.student)
        assert found["settings"]["num_held_out"] == len(task.load(0).held_out_rows)
        assert [network["name"] for network in found["networks"]] == list(NETWORKS)
        assert all(len(cell["accuracy"]["values"]) == 3 for n in found["networks"] for cell in n["steps"].values())
