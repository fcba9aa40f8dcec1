"""The embedded comparison, end to end and in its parts."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
from embedded.command import run_and_show
from embedded.comparison import build_report, comparison_table
from embedded.decoding import complete
from embedded.harness import Result
from embedded.networks import Network, build_network
from embedded.report import cell, format_table, mean_curve, summarize
from embedded.table import COMPARISONS, dense_task, embedded_task, find_comparison
from embedded.tasks import rows_task, sorting_across_tokenizers_task, sorting_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from tide_hf.demo.sorting import build_tokenizer, held_out_rows, sorting_rows

RECIPE = Path(__file__).parents[1] / "recipes" / "dense_teacher.py"
REPORTS = RECIPE.parent / "reports"
ROWS = ["teacher", "ce", "kl", "kl_weight_3", "tide_raw", "tide", "ce_equal_time"]


def test_held_out_prompts_are_never_trained_on():
    """Catches an exact match that was learned by heart."""
    held_out = {messages[0]["content"] for messages in held_out_rows(400)["messages"]}
    trained = {messages[0]["content"] for messages in sorting_rows(5000, seed=0)["messages"]}
    assert len(held_out) == 400 and not held_out & trained


def test_wrong_digits_have_the_stated_rate():
    """Catches a dirty set that is cleaner than the README says."""
    rows = sorting_rows(3000, seed=1, wrong=0.2)["messages"]
    wrong = sum(a != b for row in rows for a, b in zip(row[1]["content"], sorted(row[0]["content"]), strict=True))
    assert wrong / (6 * len(rows)) == pytest.approx(0.2, abs=0.01)
    assert all(row[1]["content"] == "".join(sorted(row[0]["content"])) for row in sorting_rows(50, 2)["messages"])


def test_sorting_tokenizer_round_trips():
    """Catches a tokenizer that joins digits, loses offsets or marks the wrong tokens as the answer."""
    tokenizer = build_tokenizer()
    messages = held_out_rows(1)[0]["messages"]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert len(encoded["input_ids"]) == 15
    answer = [token for token, flag in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if flag]
    assert tokenizer.decode(answer) == messages[1]["content"] + "<eos>"


def test_completions_are_cut_at_eos_and_counted():
    """Catches answers that carry the prompt or special tokens, and a token count of another length."""
    tokenizer = build_tokenizer()
    model = build_network(Network(hidden=16, layers=1, heads=2, steps=1), tokenizer, 4, seed=0)
    answers, tokens_per_second = complete(model, tokenizer, held_out_rows(5))
    assert len(answers) == 5 and all(set(answer) <= set("0123456789") for answer in answers)
    assert tokens_per_second > 0


def test_report_of_nll_keeps_noise_levels():
    """Catches a summary that averages over diffusion times, and spreads claimed from one seed."""
    nll = {"0.1": 1.0, "0.5": 2.0}
    size = {"parameters": 10, "steps": 5, "train_seconds": 1.0, "tokens_per_second": 100.0}
    one = Result("sorting", "teacher", 0, {"exact_match": 0.5, "nll": nll, **size})
    report = build_report(sorting_task(), [one], [0])
    assert report["rows"][0]["nll"] == {"mean": nll, "sd": None, "values": [nll]}
    two = replace(one, seed=1, metrics={"exact_match": 1.0, "nll": {"0.1": 3.0, "0.5": 4.0}, **size})
    row = build_report(sorting_task(), [one, two], [0, 1])["rows"][0]
    assert row["nll"]["mean"] == {"0.1": 2.0, "0.5": 3.0} and row["nll"]["sd"]["0.1"] == pytest.approx(2**0.5)
    assert row["exact_match"]["mean"] == 0.75
    assert (row["parameters"], row["steps"]) == (10, 5) and type(row["steps"]) is int
    head, line = comparison_table(report).splitlines()
    assert head.split("  ")[-6:-4] == ["nll t=0.1", "nll t=0.5"]
    assert line.split()[:5] == ["teacher", "50.0", "%", "1.000", "2.000"]
    json.dumps(report)


def committed(name: str) -> list[tuple[list[Result], list[dict]]]:
    """Of each task of a committed report: results with the numbers of every seed, and the networks as reported."""
    report = json.loads((REPORTS / f"{name}.json").read_text())
    tasks = [(task["name"], task["networks"]) for task in report.get("tasks", [])]
    if not tasks:
        # nll has its noise levels inside "mean", "sd" and "values": bring them outside, as in every other metric
        for row in report["rows"]:
            if "nll" in row:
                mean, sd, values = (row["nll"][key] for key in ("mean", "sd", "values"))
                row["nll"] = {
                    t: {"mean": mean[t], "sd": sd and sd[t], "values": [value[t] for value in values]} for t in mean
                }
        tasks = [(report["task"], report["rows"])]
    seeds = range(len(report["seeds"] if "seeds" in report else report["settings"]["seeds"]))
    return [
        ([Result(task, row["name"], seed, of_seed(row, seed)) for row in rows for seed in seeds], rows)
        for task, rows in tasks
    ]


def of_seed(entry: dict, seed: int) -> dict:
    """A network of a report with one seed's value instead of every summary."""
    found = {}
    for key, value in entry.items():
        if isinstance(value, dict) and "values" in value:
            number = value["values"][seed]
            found[key] = float("nan") if number is None else number
        elif isinstance(value, dict):
            found[key] = of_seed(value, seed)
    return found


def summaries(entry: dict, path: str = "") -> dict[str, dict]:
    """Every summary of a network, by the path to it."""
    found = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            here = f"{path}/{key}"
            found |= {here: value} if "values" in value else summaries(value, here)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "sorting",
        "sorting_across_tokenizers",
        "sorting_on_policy",
        "python_stdlib",
        "python_stdlib_1000_rows",
        "few_step",
    ],
)
def test_statistics_are_those_of_the_committed_reports(name):
    """Catches another mean or standard deviation (of the population, or over missing seeds) than the reports', which
    were written with the standard library's `statistics`."""
    for results, rows in committed(name):
        entries = summarize(results)
        assert [entry["name"] for entry in entries] == [row["name"] for row in rows]
        for entry, row in zip(entries, rows, strict=True):
            found, expected = summaries(entry), summaries(row)
            assert list(found) == list(expected) and expected
            for path, summary in expected.items():
                assert found[path]["values"] == summary["values"]
                for statistic in ("mean", "sd"):
                    ours, reported = found[path][statistic], summary[statistic]
                    # deviations are differences of numbers as large as the mean, and as precise as those
                    rounding = 1e-15 * abs(summary["mean"] or 0.0)
                    same = ours == reported or math.isclose(ours, reported, rel_tol=1e-12, abs_tol=rounding)
                    assert same, (path, statistic, ours, reported)


def test_missing_numbers_are_left_out_and_shown_as_a_dash():
    """Catches a seed without the number counted as zero, and a spread of one value."""
    results = [
        Result("t", name, seed, {"a": {"b": value}})
        for name, values in (("x", (1.0, float("nan"), 3.0)), ("y", (float("nan"),) * 3), ("z", (2.0,)))
        for seed, value in enumerate(values)
    ]
    x, y, z = summarize(results)
    assert x["a"]["b"] == {"mean": 2.0, "sd": pytest.approx(2**0.5), "values": [1.0, None, 3.0]}
    assert y["a"]["b"] == {"mean": None, "sd": None, "values": [None] * 3}
    assert z["a"]["b"] == {"mean": 2.0, "sd": None, "values": [2.0]}
    table = format_table([x, y, z], {"b": lambda entry: cell(entry["a"]["b"], "{:.1f}", 10, " %")}, corner="of a")
    assert table.splitlines() == [
        "of a              b",
        "   x  20.0 % ± 14.1",
        "   y              –",
        "   z         20.0 %",
    ]


def test_mean_curve_has_only_steps_of_every_seed():
    """Catches a curve that jumps where one seed stopped earlier."""
    curves = [[{"step": 1, "ce": 2.0}, {"step": 2, "ce": 1.0}, {"step": 2, "lambda": 9.0}], [{"step": 1, "ce": 4.0}]]
    results = [Result("t", "x", seed, {}, curve=curve) for seed, curve in enumerate(curves)]
    assert mean_curve(results, "ce").to_dict() == {1: 3.0} and mean_curve(results, "distill").empty


@pytest.mark.parametrize("name", [*chain(*COMPARISONS.values()), "mine.jsonl"])
def test_the_command_of_a_report_runs_its_task(name):
    """Catches a card that names the command of another comparison."""
    task, recipe, command = find_comparison(name)
    launched, _, named = command.partition(" --dataset_name ")
    choose = dense_task if recipe == "dense_teacher" else partial(embedded_task, recipe)
    assert launched == f"accelerate launch recipes/{recipe}.py" and task.name == name
    assert choose(named or None).name == name


@pytest.mark.slow
def test_embedded_default_shows_that_it_worked(tmp_path):
    """Catches any break of the main job: one seed through the recipe, with the widest margins that mean something."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPE), "--seeds", "1"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"task", "settings", "environment", "preparation", "rows"} and report["task"] == "sorting"
    assert [row["name"] for row in report["rows"]] == ROWS
    match = {row["name"]: row["exact_match"]["mean"] for row in report["rows"]}
    assert match["teacher"] >= 0.95
    assert match["tide"] >= match["ce"] + 0.20
    for row in report["rows"]:
        assert {"parameters", "tokens_per_second", "train_seconds"} <= set(row)
        assert f"{100 * row['exact_match']['mean']:.1f} %" in done.stdout
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert not (tmp_path / "training_args.bin").exists()

    # the lines that the run ends with, in a process of their own
    lines = done.stdout[done.stdout.index("    import tide_hf") :]
    code = "\n".join(line[4:] for line in lines.splitlines())
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert shown.stdout.startswith("<user>") and "<assistant>" in shown.stdout


@pytest.mark.slow
def test_comparison_across_tokenizers(tmp_path):
    """Catches a mixture-of-experts teacher or a second tokenizer that one of the objectives cannot be run with."""
    task = sorting_across_tokenizers_task(num_student_rows=200, num_held_out=64)
    task = replace(task, teacher=replace(task.teacher, steps=60), student=replace(task.student, steps=40))
    report = run_and_show(task, [0], str(tmp_path))
    names = ["teacher", "start", "ce", "calm", "tide_cross", "bernoulli_reverse_kl", "tide_shared_raw", "tide_shared"]
    assert [row["name"] for row in report["rows"]] == [*names, "ce_equal_time"]
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["start"]["steps"] == 0 and rows["start"]["parameters"] == rows["tide_cross"]["parameters"]
    before = rows["start"]["nll"]["mean"]["0.5"]
    assert all(rows[name]["nll"]["mean"]["0.5"] < before - 0.3 for name in names[2:])
    counts = report["preparation"]
    assert counts["num_aligned_bytes"] == counts["num_answer_bytes"] > 200 * 6
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "teacher-seed0")
    assert teacher.config.model_type == "llada2_moe" and teacher.config.n_routed_experts == 8
    assert len(AutoTokenizer.from_pretrained(tmp_path)("123456")["input_ids"]) == 3


@pytest.mark.slow
def test_own_rows_run_through_the_same_comparison(tmp_path):
    """Catches a comparison that works on the embedded data alone."""
    rows = tmp_path / "rows.jsonl"
    pairs = [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(20) for b in range(10)]
    rows.write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
            for q, a in pairs
        )
    )
    task = rows_task(str(rows))
    task = replace(
        task, teacher=replace(task.teacher, steps=6, hidden=32, layers=1), student=replace(task.student, steps=3)
    )
    report = run_and_show(task, [0], str(tmp_path / "out"))
    assert [row["name"] for row in report["rows"]] == [name for name in ROWS if name != "tide_raw"]
    assert set(report["rows"][0]["nll"]["mean"]) == {"0.1", "0.3", "0.5", "0.7", "0.9"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == "<mask>"
