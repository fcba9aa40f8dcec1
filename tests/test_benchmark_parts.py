"""recipes/benchmark_parts.py on tiny networks: what is counted for which part, and what is written."""

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch

RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = {
    "vocab": 64,
    "hidden": 16,
    "layers": 1,
    "heads": 2,
    "teacher_hidden": 16,
    "teacher_layers": 1,
    "block_size": 4,
}
TINY = [f"--{name}={size}" for name, size in SIZES.items()] + ["--batch=1", "--rounds=1", "--answers", "4", "8"]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("benchmark_parts")


@pytest.fixture
def clock(recipe, monkeypatch):
    """A clock whose seconds are told."""
    now = [0.0]
    monkeypatch.setattr(recipe.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    return recipe.Clock(), spend


def test_a_moment_counts_for_one_part(clock):
    """Catches a teacher's head that is counted again as the student's, a part that goes on after an error, and the
    time between two steps that is counted for the last part of the first."""
    clock, spend = clock
    teacher = clock.timed("teacher", lambda: spend(2))

    def forward():
        spend(1)
        teacher()
        spend(4)
        raise KeyError

    student = clock.timed("student", forward)
    for _ in range(2):
        spend(100)
        with pytest.raises(KeyError):
            student()
    assert clock.seconds == {"rollout": 0, "teacher": 4, "student": 10, "rest": 0}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of one run on tiny networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        recipe, output = importlib.import_module("benchmark_parts"), tmp_path_factory.mktemp("parts") / "report.json"
        recipe.main([*TINY, "--output", str(output)])
    return json.loads(output.read_text())


@pytest.mark.slow
def test_each_kind_has_its_parts(recipe, report):
    """Catches a cache beside which the teacher is run all the same, a rollout that is written off-policy, and a part
    whose function is no longer the one that a step calls."""
    assert [(row["kind"], row["answer"]) for row in report["rows"]] == [(k, n) for n in (4, 8) for k in recipe.KINDS]
    for row in report["rows"]:
        kind, seconds = recipe.KINDS[row["kind"]], row["seconds"]
        assert (seconds["rollout"] > 0) == kind.writes == ("rollout_tokens" in row)
        assert (seconds["teacher"] == 0) == kind.from_cache
        assert seconds["student"] > 0 and seconds["rest"] > 0


@pytest.mark.slow
def test_ratios_are_of_what_was_measured(report):
    """Catches shares that are not of the step, and a ratio or a growth with another row's time."""
    steps = {(row["kind"], row["answer"]): row["step_s"] for row in report["rows"]}
    for row in report["rows"]:
        # one round: the medians are its values
        assert row["step_s"] == pytest.approx(sum(row["seconds"].values()))
        assert row["share"] == pytest.approx({part: s / row["step_s"] for part, s in row["seconds"].items()})
        assert row["ratio"] == pytest.approx(row["step_s"] / steps["kl", row["answer"]])
        assert row["growth"] == pytest.approx(row["step_s"] / steps[row["kind"], 4])
    assert report["environment"]["torch"] == torch.__version__ and report["arguments"]["answers"] == [4, 8]


@pytest.mark.parametrize(
    ("kind", "steps", "num_written"), [("kl", 4, 0), ("on-policy", 1, 3), ("on-policy, reuse 4", 4, 3)]
)
def test_answers_are_written_as_often_as_said(recipe, tmp_path, kind, steps, num_written):
    """Catches answers that are written for every step where they are used four times, or never again."""
    arguments = SimpleNamespace(**SIZES, batch=1, answers=[4])
    recipe.build_folder(tmp_path, arguments)
    bench, written = recipe.Bench(recipe.KINDS[kind], 4, tmp_path, arguments), []
    write = bench.trainer._write
    bench.trainer._write = lambda prompts: written.append(write(prompts)) or written[-1]
    for _ in range(3):
        bench.round()
    assert (bench.steps, len(written)) == (steps, num_written) and all(batch for batch in written)
    assert any(value.grad.abs().sum() > 0 for value in bench.trainer.model.parameters())


def test_the_whole_step_is_timed(recipe, tmp_path):
    """Catches a step of which a good part is counted nowhere."""
    arguments = SimpleNamespace(**SIZES, batch=8, answers=[64])
    recipe.build_folder(tmp_path, arguments)
    bench = recipe.Bench(recipe.KINDS["kl"], 64, tmp_path, arguments)
    bench.round()
    started = time.perf_counter()
    counted = sum(bench.round().values()) * bench.steps
    assert 0.8 < counted / (time.perf_counter() - started) <= 1
