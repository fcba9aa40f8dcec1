"""The embedded comparisons beyond TIDE, at toy sizes: every row of every table is trained and measured."""

import json
import math
from dataclasses import replace

import pytest
from datasets import Dataset
from embedded import decoding
from embedded.command import run_and_show
from embedded.decoding import num_right
from embedded.objective_tasks import (
    copying_answers_task,
    copying_objectives_task,
    python_stdlib_objectives_task,
    sorting_across_objectives_task,
    sorting_objectives_task,
)
from embedded.tasks import python_stdlib_task
from embedded.teacher_cache import IN_MEMORY, run_and_show_cache

from tide_hf.demo.copying import both_cases, copying_rows


def test_right_answers_are_counted():
    """Catches an answer in the other case that counts as wrong, and a mixture that counts as right."""
    rows = copying_rows(3, seed=1, length=4)
    words = [messages[0]["content"] for messages in rows["messages"]]
    answers = [words[0].upper(), words[1], words[2][:2] + words[2][2:].upper()]
    assert num_right(both_cases, rows, answers) == 2


def test_two_draws_are_two(monkeypatch):
    """Catches a pair with a wrong answer that counts as a choice kept, and a share of nothing that is 0."""
    drawn = iter([["ab", "CD", "ef"], ["AB", "CD", "eF"], ["x"] * 3, ["ab", "cd", "ef"]])
    settings = []

    def complete(model, tokenizer, rows, **given):
        settings.append((given["temperature"], given["generator"].initial_seed()))
        return next(drawn), 1.0

    monkeypatch.setattr(decoding, "complete", complete)
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": word}]} for word in ("ab", "cd", "ef")])
    assert decoding.two_draws(both_cases, None, None, rows, seed=7) == {"valid": 5 / 6, "differ": 1 / 2}
    found = decoding.two_draws(both_cases, None, None, rows, seed=7)
    assert found["valid"] == 1 / 2 and math.isnan(found["differ"])
    assert set(settings) == {(1.0, 7)}


SMALL = {"steps": 100, "num_held_out": 8}
TASKS = {
    "sorting": lambda: sorting_objectives_task(num_student_rows=32, **SMALL),
    "across": lambda: sorting_across_objectives_task(num_student_rows=32, **SMALL),
    "copying answers": lambda: copying_answers_task(**SMALL),
    "copying": lambda: copying_objectives_task(**SMALL),
    "stdlib": lambda: python_stdlib_objectives_task(num_student_rows=32),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sorting", "copying answers"])
def test_every_row_is_trained_and_measured(name, tmp_path):
    """Catches a row whose fields are refused, a metric that a network lacks, and a report that is not JSON."""
    task = TASKS[name]()
    task = replace(
        task,
        teacher=replace(task.teacher, hidden=32, experts=0),
        autoregressive=replace(task.autoregressive, hidden=32),
        student=replace(task.student, steps=2, hidden=16),
        curve_every=1,
    )
    report = run_and_show(task, [0], str(tmp_path))
    names = [row["name"] for row in report["rows"]]
    assert names[:2] == ["teacher", "autoregressive_teacher"] and set(task.objectives) <= set(names)
    for row in report["rows"]:
        assert 0 <= row["exact_match"]["mean"] <= 1 and row["steps"] > 0
        if task.right_answers is not None and not row["name"].endswith("teacher"):
            assert 0 <= row["valid"]["mean"] <= 1
    json.dumps(report)


def test_tables_name_what_they_compare():
    """Catches a task whose rows lack their teacher, or train on another one than they say."""
    for make in TASKS.values():
        task = make()
        assert task.autoregressive is not None and task.distilled in task.objectives
        for fields in task.objectives.values():
            answers = fields.get("answers")
            assert answers is None or answers[0] in ("teacher", "autoregressive_teacher")


@pytest.mark.slow
def test_the_cache_is_compared_with_its_teacher(tmp_path):
    """Catches a row of the cache's table that trains on other predictions than it says."""
    task = python_stdlib_task(num_student_rows=16)
    task = replace(
        task,
        teacher=replace(task.teacher, steps=2, hidden=32, layers=1),
        student=replace(task.student, steps=2, hidden=32, layers=1),
        noise_levels=(0.5,),
    )
    report = run_and_show_cache(task, [0], str(tmp_path))
    rows = {row["name"]: row for row in report["rows"]}
    sizes = [rows[f"cache, top {k}"]["cache_bytes"]["mean"] for k in (1, 4, 16)]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert rows[IN_MEMORY]["cache_bytes"]["mean"] is None
    assert rows["cache, top 16"]["nll"]["0.5"]["mean"] == pytest.approx(rows[IN_MEMORY]["nll"]["0.5"]["mean"], abs=0.2)
