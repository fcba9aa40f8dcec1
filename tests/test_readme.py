"""What the README and the recipes' README say is run, and their numbers are those of the committed reports."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from embedded.comparison import comparison_table
from embedded.few_step import few_step_table
from embedded.smollm2 import smollm2_table
from embedded.table import COMPARISONS
from embedded.teacher_cache import cache_table
from test_published_students import CELLS, COLUMNS
from tiny import SHAPE, tiny_model
from transformers import Qwen3Config, Qwen3ForCausalLM

import tide_hf.losses
from tide_hf.demo.sorting import build_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "recipes" / "README.md").read_text()
# what the README calls the rows of the sorting report
SORTING_ROWS = {
    "teacher": "teacher",
    "ce": "CE alone, no teacher",
    "ce_equal_time": "CE alone, equal training time",
    "tide_raw": "TIDE as published",
    "tide": "TIDE with normalised strength",
    "kl": "KL",
    "kl_weight_3": "KL at a tuned weight (3)",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def report_of(name: str) -> dict:
    return json.loads((ROOT / "recipes" / "reports" / f"{name}.json").read_text())


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_python_blocks_run(tmp_path):
    """Catches an example that no longer runs: the Python blocks of each document, in order, in one process per
    document, after stand-ins for the main job's checkpoints and for the autoregressive model that is named."""
    for name, seed in (("teacher-seed0", 1), ("ce-seed0", 0)):
        folder = tmp_path / "outputs" / "dense_teacher" / "runs" / name
        tiny_model(seed, dtype=torch.float32).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(tmp_path / "Qwen" / "Qwen3-0.6B")
    build_tokenizer().save_pretrained(tmp_path / "Qwen" / "Qwen3-0.6B")
    first, then = (run(tmp_path, "-c", "\n".join(blocks(text, "python"))) for text in (README, RECIPES))
    assert re.search(r"^<user>739152<assistant>", first, flags=re.MULTILINE)
    assert re.search(r"^<user>739152<assistant>12..79$", then, flags=re.MULTILINE)
    assert re.search(r"^\[.*license", then, flags=re.MULTILINE), "nobody gave one"
    for name in ("mine", "merged", "start"):
        assert (tmp_path / "outputs" / name / "model.safetensors").exists()


def test_readme_is_read_in_two_minutes():
    """Catches a README that grows until nobody reads it: its length, where code starts, an interface that takes more
    lines than promised."""
    assert len(README.split()) <= 1500
    assert README.split("```python")[0].count("\n") < 60
    assert len([line for line in blocks(README, "python")[0].splitlines() if line.strip()]) <= 10


def families_table() -> str:
    """What works with each published family; a cell links the file of the test that shows it."""
    names = [*[*COLUMNS][:6], "named sampler", *[*COLUMNS][6:]]
    lines = [f"| family | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for family, cells in CELLS.items():
        linked = (f"[yes](../tests/{cells[name].partition('::')[0]})" if name in cells else "" for name in names)
        lines.append(f"| {family} | {' | '.join(linked)} |")
    return "\n".join(lines)


def test_families_table_is_that_of_the_tests():
    """Catches a promise in the table that no test of its file keeps."""
    assert families_table() in RECIPES


def test_every_recipe_and_report_is_described():
    """Catches a recipe or a measurement that nobody can find."""
    for path in [*(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes" / "reports").glob("*.json")]:
        assert path.name in RECIPES, path.name


@pytest.mark.parametrize("path", ["README.md", "recipes/README.md"])
def test_links_and_commands_name_files_that_exist(path):
    """Catches a link or a command that outlives its file, and a table whose rows do not match its head."""
    text = (ROOT / path).read_text()
    linked = {target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target}
    missing = [target for target in linked if not (ROOT / path).parent.joinpath(target).exists()]
    missing += [name for name in re.findall(r"recipes/[\w/.]+\.\w+", text) if not (ROOT / name).exists()]
    assert not missing
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_method_table_names_files_that_exist():
    """Catches a method table that outlives a file, a test or a golden case."""
    entries = re.findall(r"^  (\S.*); (test_.*)$", tide_hf.losses.__doc__, flags=re.MULTILINE)
    assert len(entries) >= 13
    for files, tests in entries:
        for name in files.split(", "):
            assert (ROOT / "tide_hf" / name).exists(), name
        tests, _, golden = tests.partition("golden ")
        for name in re.findall(r"test_[\w*]+\.py", tests):
            assert list((ROOT / "tests").glob(name)), name
        for name in filter(None, golden.split(", ")):
            assert (ROOT / "tests" / "golden" / f"{name}.json").exists(), name


@pytest.mark.slow
def test_the_picture_is_made_by_its_recipe(tmp_path):
    """Catches a picture that no command makes: the recipe on a random student prints the same lines but for the
    tokens that are revealed."""
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "outputs" / "dense_teacher")
    build_tokenizer().save_pretrained(tmp_path / "outputs" / "dense_teacher")
    made = run(tmp_path, str(ROOT / "recipes" / "show_denoising.py")).split("threshold 0.9")[0].splitlines()
    picture = blocks(README, "text")[0].split("threshold 0.9")[0].splitlines()
    assert made[:2] == picture[:2] and len(made) == len(picture) == 10
    masked = [[line.count("▒") for line in lines] for lines in (made, picture)]
    assert masked[0] == masked[1] == [0, 0, 7, 6, 5, 4, 3, 2, 1, 0]


def test_small_table_is_that_of_the_report():
    """Catches a number in the README that no run measured."""
    rows = {row["name"]: row["exact_match"] for row in report_of("sorting")["rows"]}
    assert rows.keys() == SORTING_ROWS.keys()
    lines = {name: f"{100 * row['mean']:.1f} % ± {100 * row['sd']:.1f}" for name, row in rows.items()}
    expected = "\n".join(f"| {title} | {lines[name]} |" for name, title in SORTING_ROWS.items())
    assert expected in README, f"The README's table should read\n{expected}"


# the committed reports of comparisons of objectives; of the standard library only the first is shown as a table
REPORTED = sorted(
    name for named in COMPARISONS.values() for name in named if (ROOT / f"recipes/reports/{name}.json").exists()
)


@pytest.mark.parametrize("name", REPORTED)
def test_tables_are_those_of_the_reports(name):
    """Catches a number in the recipes' README that no run measured."""
    assert f"```\n{comparison_table(report_of(name))}\n```" in RECIPES


def test_tables_of_other_comparisons_are_those_of_the_reports():
    """Catches the same of kept predictions and of real weights."""
    for name, table in (("teacher_cache", cache_table), ("smollm2", smollm2_table)):
        if (ROOT / f"recipes/reports/{name}.json").exists():
            assert f"```\n{table(report_of(name))}\n```" in RECIPES, name
    assert {"sorting", "sorting_across_tokenizers", "sorting_on_policy", "python_stdlib"} <= {*REPORTED}


def test_few_step_table_is_that_of_the_report():
    """Catches a number in the recipes' README that no run measured."""
    right_answers = few_step_table(report_of("few_step")["tasks"][0]).split("right answers, %")[1]
    assert "```\nright answers, %" + right_answers.split("\n\n")[0].rstrip() + "\n```" in RECIPES


def test_findings_are_those_of_the_reports():
    """Catches a sentence about the embedded comparisons that a later run contradicts."""
    match = {row["name"]: row["exact_match"]["mean"] for row in report_of("sorting")["rows"]}
    assert match["kl_weight_3"] > max(match["tide"], match["kl"]) and abs(match["tide"] - match["kl"]) < 0.02
    assert match["tide"] > match["tide_raw"] > match["ce"] > match["ce_equal_time"]
    nll = {row["name"]: list(row["nll"]["mean"].values()) for row in report_of("python_stdlib")["rows"]}
    for kl, tide, ce in zip(nll["kl"], nll["tide"], nll["ce"], strict=True):
        assert kl < tide < ce, "KL is ahead of TIDE, CE behind, at every noise level"
    assert nll["ce_equal_time"][-1] > nll["ce"][-1], "it overfits at high noise levels"
    nll = {row["name"]: list(row["nll"]["mean"].values()) for row in report_of("python_stdlib_1000_rows")["rows"]}
    for name in ("kl", "kl_weight_3", "tide"):
        ahead = [mine < theirs for mine, theirs in zip(nll["ce_equal_time"], nll[name], strict=True)]
        assert ahead[:4] == [True] * 4, f"{name}, up to t = 0.7"
    rows = {row["name"]: row for row in report_of("sorting_across_tokenizers")["rows"]}
    match = {name: row["exact_match"]["mean"] for name, row in rows.items() if name not in ("teacher", "start")}
    equal_time, ce = match.pop("ce_equal_time"), match.pop("ce")
    assert min(match.values()) > ce and max(match, key=match.get) == "calm" and abs(equal_time - match["calm"]) < 0.02
    nll = {name: row["nll"]["mean"]["0.5"] for name, row in rows.items() if name != "teacher"}
    assert min(nll, key=nll.get) == "bernoulli_reverse_kl" and nll["tide_cross"] < nll["calm"] < nll["ce_equal_time"]
    chunks = report_of("sorting_across_tokenizers")["preparation"]["num_chunks"]
    assert f"{chunks:,} chunks" in " ".join(RECIPES.split())
    match = {row["name"]: row["exact_match"]["mean"] for row in report_of("sorting_objectives")["rows"]}
    answers = [match[name] for name in match if name.startswith("ce_on_")]
    best = max(match["on_policy"], match["kl_weight_3"])
    assert len(answers) == 3 and min(answers) > best - 0.03 and match["on_policy"] > best - 0.01
    token_targets = [match[f"ar_{name}"] for name in ("all", "exact", "annealed", "exact_no_suffix")]
    assert max(token_targets) < match["ar_on_policy_half"] < min(answers)
    copying = {row["name"]: row for row in report_of("copying_answers")["rows"] if row["name"].startswith("ce")}
    for name, row in copying.items():
        greedy = name in ("ce_on_ar_answers", "ce_on_diffusion_answers")
        assert (row["differ"]["mean"] < 0.02) if greedy else (0.25 < row["differ"]["mean"] < 0.35)
        assert (row["by_steps"]["1"]["mean"] > 0.97) if greedy else (row["by_steps"]["1"]["mean"] < 0.7)
    cached = {row["name"]: row["kl_kept"]["mean"] for row in report_of("teacher_cache")["rows"]}
    assert cached["cache, top 16"] == pytest.approx(0.91, abs=0.005)
    assert cached["cache, top 1"] == pytest.approx(0.54, abs=0.005)


def test_few_step_findings_are_those_of_the_report():
    """Catches a sentence about few-step students that a later run contradicts."""
    copying, sorting = (
        {row["name"]: row["steps"] for row in task["networks"]} for task in report_of("few_step")["tasks"]
    )
    idlm = copying["IDLM"]["1"]["accuracy"]["mean"]
    greedy = copying["taught on its greedy answers"]["1"]["accuracy"]["values"]
    teacher = copying["teacher"]["full"]
    told = " ".join(RECIPES.split())
    found = f"({100 * idlm:.0f} %; 83.5 % or more on every seed), where its teacher needs 33"
    assert f"{found} ({100 * teacher['accuracy']['mean']:.0f} %)" in told
    assert min(copying["IDLM"]["1"]["accuracy"]["values"]) > 0.83 and idlm > teacher["accuracy"]["mean"] - 0.03
    assert sorted(value > 0.98 for value in greedy) == [False, True, True], "does as well on two of three seeds"
    assert f"differ in {100 * teacher['differ']['mean']:.1f} % of cases" in told
    one = sorting["teacher"]["1"]["accuracy"]
    assert f"one step per block ({100 * one['mean']:.1f} % ± {100 * one['sd']:.1f})" in told


def test_step_costs_are_those_of_the_report():
    """Catches a ratio that the benchmark did not measure."""
    shared, cross = report_of("benchmark_step")["rows"]
    told = f"takes {shared['plain_time_ratio']:.1f} × as long ({cross['plain_time_ratio']:.1f} × with two tokenizers)"
    assert told in " ".join(README.split())
    for row in (shared, cross):
        ratios = f"| {row['plain_time_ratio']:.1f} × | {row['library_bytes'] / 2**20:.0f} MiB |"
        assert f"| {row['library_s']:.2f} s {ratios} {row['plain_memory_ratio']:.1f} × |" in RECIPES
    selected = [f"{row[f'selected_{kind}_ratio']:.1f} ×" for kind in ("time", "memory") for row in (shared, cross)]
    told = "it is {} and {} better in time, {} and {} in memory".format(*selected)
    assert told in " ".join(RECIPES.split())
    for row in report_of("benchmark_step_sweep")["rows"]:
        time, memory = f"{row['library_s']:.1f} s", f"{row['library_bytes'] / 2**20:.0f} MiB"
        ratios = [f"{row[name]:.1f} ×" for name in ("plain_time_ratio", "plain_memory_ratio")]
        assert f"| {time} | {ratios[0]} | {memory} | {ratios[1]} |" in RECIPES


def test_generation_ratios_are_those_of_the_report():
    """Catches a ratio that the benchmark did not measure."""
    rows = report_of("benchmark_generate")["rows"]
    for one, four, _ in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        ratios = [f"{value:.1f} ×" for value in (one["ratio"], four["ratio"], four["ratio_to_one_per_step"])]
        line = [str(one["prompt"]), str(one["batch"]), f"{one['library_seconds']:.1f} s", *ratios]
        assert f"| {' | '.join(line)} |" in RECIPES


def test_memory_and_preparation_are_those_of_the_reports():
    """Catches a number of the text that the benchmarks did not measure."""
    told = " ".join(RECIPES.split())
    memory = report_of("benchmark_generate")["memory"]
    peaks = {name: memory[name]["peak_bytes"] / 2**20 for name in ("library", "plain")}
    growth = memory["library"]["growth_per_step_bytes"] / 1024
    assert (
        f"{peaks['library']:.0f} MiB above the weights instead of {peaks['plain']:.0f}, and {growth:.0f} KiB" in told
    )
    rows = report_of("benchmark_prepare")["rows"]
    costs = [row["cost"] for row in rows]
    assert (
        f"takes {costs[0]:.2f} times as long" in told and f"{costs[1]:.1f} times for 1,500 and {costs[2]:.1f}" in told
    )
    assert f"{rows[0]['alignment'] / 1e6:.1f} to {rows[2]['alignment'] / 1e6:.1f} million tokens" in told


def test_ci_calls_the_test_command():
    """Catches a CI that tests something else than the README tells people to run, and a command of several lines."""
    commands = [command for command in blocks(README, "bash") if "venv" in command]
    assert len(commands) == 2 and all(command.count("\n") == 1 for command in commands)
    command = next(block for block in commands if "pytest" in block).strip()
    script = (ROOT / ".ci" / "run").read_text()
    assert command.removeprefix("python ").strip() in script
