"""recipes/benchmark_step.py on tiny networks: what it compares, and what it writes."""

import importlib
import json
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = ["--vocab=97", "--length=64", "--hidden=64", "--layers=1", "--teacher_hidden=64", "--teacher_layers=1"]
TINY += ["--rounds=1"]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("benchmark_step")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_pipelines_are_compared_and_written(recipe, tmp_path, capsys, dtype):
    """Catches a straightforward step that computes something else than the library's, and numbers nobody measured."""
    output = tmp_path / "report.json"
    recipe.main([*TINY, "--no_memory", "--teacher_dtype", dtype, "--output", str(output)])
    report = json.loads(output.read_text())
    assert [row["pipeline"] for row in report["rows"]] == ["shared", "cross"]
    assert report["versions"]["torch"] == torch.__version__
    for row in report["rows"]:
        assert row["largest_difference"] < (1e-5 if dtype == "float32" else 5e-2)
        assert row["vocab"] == 97 and row["teacher_dtype"] == dtype and row["library_time_ratio"] == 1
        for side in recipe.SIDES:
            assert row[f"{side}_time_ratio"] == pytest.approx(row[f"{side}_s"] / row["library_s"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " 64 " in line]
    assert len(lines) == 2


def test_the_exact_step_is_the_same_step(recipe):
    """Catches a comparison in float64 that leaves the networks there, or is of other losses."""
    bench = recipe.Bench(recipe.Case("cross", vocab=97, length=64, hidden=64, layers=1, teacher_hidden=64))
    before = [value.clone() for value in bench.student.parameters()]
    assert 0 < recipe.largest_difference(bench, exact=True) < 1e-5
    assert all(torch.equal(old, new) for old, new in zip(before, bench.student.parameters(), strict=True))


def test_another_gradient_stops_it(recipe, monkeypatch):
    """Catches a benchmark of a step that is fast and wrong."""
    step = recipe.Bench.step

    def wrong(self, side, index):
        loss = step(self, side, index)
        if side == "library":
            next(self.student.parameters()).grad[0, 0] += 1
        return loss

    monkeypatch.setattr(recipe.Bench, "step", wrong)
    with pytest.raises(SystemExit, match=r"shared, 97 ids.*differs from the plain one"):
        recipe.main([*TINY, "--no_memory"])


@pytest.mark.slow
def test_peaks_are_measured_in_processes_of_their_own(recipe):
    """Catches a peak that counts the weights, or forgets the logits."""
    case = recipe.Case("shared", vocab=20_000, length=64, hidden=64, layers=1, teacher_hidden=64, teacher_layers=1)
    plain, library = (recipe.subprocess_peak(case, side) for side in ("plain", "library"))
    assert plain > library > 4 * case.vocab * case.hidden, "the head's gradient alone"
    assert plain > 4 * case.batch * 2 * case.length * case.vocab, "logits of both halves"
