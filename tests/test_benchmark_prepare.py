"""The preparation benchmark: its check of the rows it times, and its JSON."""

import importlib
import json
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("benchmark_prepare")


@pytest.fixture
def preparation(benchmark):
    text = benchmark.sources()[:100_000]
    return benchmark.build_preparation(
        benchmark.load_tokenizer(None, benchmark.TEMPLATES[0], text, 600),
        benchmark.load_tokenizer(None, benchmark.TEMPLATES[1], text, 400),
    )


def test_wrong_rows_are_not_timed(benchmark, preparation, monkeypatch):
    """Catches a fast preparation that is wrong: other tokens, chunks of different text, or no chunks at all."""
    conversations = [benchmark.conversation(benchmark.sources()[:500])]
    benchmark.require_correct(preparation, conversations)
    prepare = type(preparation).prepare

    def broken(change):
        def prepared(self, row):
            columns, truncated = prepare(self, row)
            change(columns)
            return columns, truncated

        return prepared

    def another_token(columns):
        columns["teacher_input_ids"][5] += 1

    def shifted_chunks(columns):
        columns["chunk_ids"].insert(0, columns["chunk_ids"].pop())

    def no_chunks(columns):
        for name in ("chunk_ids", "teacher_chunk_ids"):
            columns[name] = [-1] * len(columns[name])

    for change, message in (
        (another_token, "teacher_input_ids"),
        (shifted_chunks, "equal characters"),
        (no_chunks, "got 0 and 0"),
    ):
        monkeypatch.setattr(type(preparation), "prepare", broken(change))
        with pytest.raises(SystemExit, match=message):
            benchmark.require_correct(preparation, conversations)


@pytest.mark.slow
def test_the_report_holds_what_the_recipe_says(benchmark, preparation, tmp_path, monkeypatch):
    """Catches a run that fails behind its measurements, and JSON without the figures that are quoted."""
    tokenizers = iter([preparation.tokenizer, preparation.teacher_tokenizer])
    monkeypatch.setattr(benchmark, "load_tokenizer", lambda *_: next(tokenizers))
    monkeypatch.setattr(benchmark, "WAYS", ("map",))  # each way starts two processes
    path = tmp_path / "deep" / "report.json"
    flags = ["--repeats", "1", "--characters", "300", "1200", "--per_round", "2400", "--memory_rows", "5"]
    benchmark.main([*flags, "--output", str(path)])
    report = json.loads(path.read_text())
    assert set(report) == {"arguments", "rows", "growth", "memory"}
    figures = {"tokens_per_row", "alignment", "tokenisations", "preparation", "cost"}
    assert [set(row) for row in report["rows"]] == [figures, figures]
    assert set(report["growth"]) == {"length", "alignment", "preparation"} and report["growth"]["length"] > 2
    (found,) = report["memory"]
    assert set(found) == {"way", "rows", "peak_bytes", "rows_4x_peak_bytes"} and found["rows"] == 5
    assert 0 <= found["peak_bytes"] < 1 << 30
    for who, tokenizer in (("one", preparation.tokenizer), ("two", preparation.teacher_tokenizer)):
        tokenizer.save_pretrained(tmp_path / who)
    prepared = []
    monkeypatch.setattr(type(preparation), "__call__", lambda self, row: prepared.append(row) or {})
    with pytest.raises(KeyError):  # the rows reach the preparation; what it was made to return here does not
        benchmark.peak_memory(str(tmp_path), "streaming", ["x = 1\n"], 2)
    assert prepared
