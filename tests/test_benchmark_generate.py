"""The generation benchmark: its plain sampler, its refusal of different answers, its measure of memory, its JSON."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from naive_sampler import naive_generate

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "block_size": 4}
ROW = {"prompt", "batch", "setting", "forward_passes", "plain_seconds", "library_seconds", "ratio"}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("benchmark_generate")


@pytest.mark.parametrize("setting", [{}, {"steps_per_block": 2}, {"confidence_threshold": 0.1}], ids=str)
@pytest.mark.parametrize("cached", [True, False])
def test_the_plain_sampler_is_the_definition(benchmark, setting, cached):
    """Catches a baseline that does other work: every ratio of the benchmark would compare different samplers."""
    model = benchmark.build_student(**TINY, initializer_range=0.3).double()
    ids = torch.randint(0, 20, (3, 8), generator=torch.Generator().manual_seed(0))
    out = benchmark.plain_sampler(model, ids, 12, cached=cached, **setting)
    assert len(set(out[:, 8:].flatten().tolist())) > 3
    for given, row in zip(ids.tolist(), out.tolist(), strict=True):
        assert row == given + naive_generate(model, given, 12, **setting)[0]


def test_different_answers_are_not_timed(benchmark, monkeypatch):
    """Catches a comparison that goes on although the library decodes something else."""
    model = benchmark.build_student(**TINY)
    ids, generate = torch.randint(0, 20, (2, 8)), model.generate

    def wrong(*args, **kwargs):
        out = generate(*args, **kwargs)
        if kwargs.get("return_dict_in_generate"):
            out.sequences[1, 9] += 1
        return out

    assert len(benchmark.compare(model, ids, 8, rounds=1, no_cache=False)) == 3
    monkeypatch.setattr(model, "generate", wrong)
    with pytest.raises(SystemExit, match="differ from the plain sampler's, first in row 1 at column 9"):
        benchmark.compare(model, ids, 8, rounds=1, no_cache=False)


def test_memory_that_grows_is_seen(benchmark):
    """Catches a measure that calls any sampler constant, and a library that keeps something of every step."""
    model, kept = benchmark.build_student(**TINY), []
    ids, settings = torch.randint(0, 20, (2, 32)), {"max_new_tokens": 4 * TINY["block_size"]}
    constant = benchmark.memory(model, lambda: model.generate(ids, **settings))
    handle = model.model.register_forward_hook(lambda *_: kept.append(torch.empty(1 << 20, dtype=torch.uint8)))
    leaking = benchmark.memory(model, lambda: model.generate(ids, **settings))
    handle.remove()
    # what is left: a row of the visibility mask per column more, held in a block's first step
    assert constant["growth_per_step_bytes"] < 256 and constant["peak_bytes"] < 1 << 20
    assert leaking["growth_per_step_bytes"] == pytest.approx(1 << 20, rel=0.01)
    assert leaking["peak_bytes"] > len(kept) << 20


@pytest.mark.slow
def test_the_report_holds_what_the_recipe_says(benchmark, tmp_path, capsys, monkeypatch):
    """Catches a run that fails behind its measurements, and JSON without the figures that are quoted."""
    monkeypatch.setattr(benchmark, "QUICK", {key: value for key, value in TINY.items() if key != "block_size"})
    path = tmp_path / "deep" / "report.json"
    flags = ["--quick", "--prompts", "32", "--batches", "1", "2", "--new_tokens", "32", "--rounds", "1"]
    for extra in ([], ["--no_cache"]):
        benchmark.main([*flags, *extra, "--output", str(path)])
        report = json.loads(path.read_text())
        assert {"student", "arguments", "threads", "torch", "rows", "memory"} == set(report)
        assert [(row["batch"], row["setting"]) for row in report["rows"]] == [
            (batch, name) for batch in (1, 2) for name in (benchmark.ONE, benchmark.FOUR, benchmark.THRESHOLD)
        ]
        for row in report["rows"]:
            assert set(row) == ROW | {"ratio_to_one_per_step"} | ({"ratio_to_no_cache"} if extra else set())
        assert [row["forward_passes"] for row in report["rows"]][:2] == [32, 8]
        assert list(report["memory"]) == ["library", "plain"]
        assert all(set(found) == {"peak_bytes", "growth_per_step_bytes"} for found in report["memory"].values())
        assert capsys.readouterr().out.count("token per step") == 2
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", "--prompts", "33"])
    assert "multiples of the block size" in capsys.readouterr().err
