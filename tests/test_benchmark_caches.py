"""The benchmark of the approximate caches: its counts and its JSON."""

import importlib
import json
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
ROW = {"student", "seed", "new_tokens", "block_size", "setting", "cache", "exact_match", "agreement", "same_answers"}
ROW |= {"forward_passes", "columns", "saved"}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("benchmark_caches")


def test_shares_and_columns_are_counted(benchmark):
    """Catches shares over the wrong axis, a reference with a cache, and columns of another run."""
    model = benchmark.build_student(**TINY, initializer_range=0.3, diffusion_type="full").double()
    ids = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 8, "block_size": 4}
    exact = model.generate(ids, **settings)[:, 6:]
    dual = model.generate(ids, approximate_cache="dual", **settings)[:, 6:]
    assert not torch.equal(exact, dual)
    none, _, found = benchmark.compare(
        {"student": "x", "seed": 0}, model, ids, None, 8, (4,), benchmark.ONE_TOKEN, right=exact
    )
    assert set(none) == ROW and none["exact_match"] == none["agreement"] == none["same_answers"] == none["saved"] == 1
    pairs = [list(zip(*rows, strict=True)) for rows in zip(exact.tolist(), dual.tolist(), strict=True)]
    assert found["agreement"] == pytest.approx(sum(a == b for row in pairs for a, b in row) / 24)
    assert found["same_answers"] == pytest.approx(sum(all(a == b for a, b in row) for row in pairs) / 3)
    assert found["exact_match"] == found["same_answers"]
    assert (none["columns"], found["columns"]) == (8 * 14, 2 * (14 + 3 * 4)) and found["saved"] == 112 / 52


@pytest.mark.slow
def test_the_report_holds_what_the_recipe_says(benchmark, tmp_path, capsys, monkeypatch):
    """Catches a run that fails behind its measurements, and JSON without the figures that are quoted."""
    monkeypatch.setattr(benchmark, "QUICK", TINY)
    path = tmp_path / "report.json"
    flags = ["--quick", "--prompts", "8", "--prompt_lengths", "8", "--new_tokens", "32", "--rounds", "1"]
    benchmark.main([*flags, "--output", str(path)])
    report = json.loads(path.read_text())
    assert set(report) == {"arguments", "threads", "torch", "rows", "times"}
    assert len(report["rows"]) == 2 * 3 * 2 * 3 and all(set(row) == ROW for row in report["rows"])
    assert {row["student"] for row in report["rows"]} == {"2 steps", "random"}
    assert [row["cache"] for row in report["times"]] == [None, "prefix", "dual"]
    assert report["times"][0]["ratio"] == 1
    assert "as fast as none" in capsys.readouterr().out
