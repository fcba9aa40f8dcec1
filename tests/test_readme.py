"""What the README says is run, and its numbers are those of the committed reports."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import SHAPE, tiny_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from tide_hf.demo.few_step_report import format_few_step_table
from tide_hf.demo.report import format_table
from tide_hf.demo.sorting import build_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run(tmp_path):
    """Catches an example that no longer runs: all Python blocks, in order, in one process, after stand-ins for the
    main job's checkpoints and for the autoregressive model it names."""
    for name, seed in (("teacher-seed0", 1), ("ce-seed0", 0)):
        folder = tmp_path / "outputs" / "dense_teacher" / "runs" / name
        tiny_model(seed, dtype=torch.float32).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(tmp_path / "Qwen" / "Qwen3-0.6B")
    build_tokenizer().save_pretrained(tmp_path / "Qwen" / "Qwen3-0.6B")
    code = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if "<assistant>" in line or line.startswith("[")]
    loaded, *_, infilled, lacks = told
    assert loaded.startswith("<user>739152<assistant>")
    assert re.fullmatch(r"<user>739152<assistant>12..79", infilled)
    assert "license" in lacks, "nobody gave one"
    for name in ("mine", "merged", "start"):
        assert (tmp_path / "outputs" / name / "model.safetensors").exists()


def test_library_example_has_ten_lines():
    """Catches an interface that takes more than the README promises."""
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("name", ["sorting", "sorting_across_tokenizers", "python_stdlib"])
def test_tables_are_those_of_the_reports(name):
    """Catches a number in the README that no run measured."""
    report = json.loads((ROOT / "recipes" / "reports" / f"{name}.json").read_text())
    assert format_table(report) in README


def test_few_step_table_is_that_of_the_report():
    """Catches a number in the README that no run measured."""
    report = json.loads((ROOT / "recipes" / "reports" / "few_step.json").read_text())
    right_answers = format_few_step_table(report["tasks"][0]).split("right answers, %")[1].split("\n\n")[0]
    assert "right answers, %" + right_answers.rstrip() + "\n" in README


def test_step_costs_are_those_of_the_report():
    """Catches a ratio that the benchmark did not measure."""
    for row in json.loads((ROOT / "recipes" / "reports" / "benchmark_step.json").read_text())["rows"]:
        ratios = f"| {row['plain_time_ratio']:.1f} × | {row['library_bytes'] / 2**20:.0f} MiB |"
        assert f"| {row['library_s']:.2f} s {ratios} {row['plain_memory_ratio']:.1f} × |" in README
    for row in json.loads((ROOT / "recipes" / "reports" / "benchmark_step_sweep.json").read_text())["rows"]:
        time, memory = f"{row['library_s']:.1f} s", f"{row['library_bytes'] / 2**20:.0f} MiB"
        ratios = [f"{row[name]:.1f} ×" for name in ("plain_time_ratio", "plain_memory_ratio")]
        assert f"| {time} | {ratios[0]} | {memory} | {ratios[1]} |" in README


def test_generation_ratios_are_those_of_the_report():
    """Catches a ratio that the benchmark did not measure."""
    rows = json.loads((ROOT / "recipes" / "reports" / "benchmark_generate.json").read_text())["rows"]
    for one, four, _ in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        ratios = [f"{value:.1f} ×" for value in (one["ratio"], four["ratio"], four["ratio_to_one_per_step"])]
        line = [str(one["prompt"]), str(one["batch"]), f"{one['library_seconds']:.1f} s", *ratios]
        assert f"| {' | '.join(line)} |" in README


def test_ci_calls_the_test_command():
    """Catches a CI that tests something else than the README tells people to run."""
    command = next(block for block in blocks("bash") if "pytest" in block).strip()
    script = (ROOT / ".ci" / "run").read_text()
    assert command.removeprefix("python ").strip() in script
