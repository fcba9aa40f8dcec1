"""Students of a teacher that is in memory, and of its predictions that were kept: quality, time and bytes.

The teacher is autoregressive, so that what it predicts holds for every pass, seed and student. The task is text: on
digits a teacher is nearly sure everywhere, and how many of its likeliest tokens are kept would tell nothing.
"""

import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path

from datasets import DatasetDict, load_from_disk

from tide_hf.commands.prepare import parse_prepare_arguments, run_preparation
from tide_hf.data import PreparationRecord
from tide_hf.data.teacher_cache import num_bytes
from tide_hf.training.trainer import TIDETrainer

from .autoregressive import train_autoregressive
from .command import refuse_other_flags
from .comparison import Task, TaskData
from .harness import Clock, Job, Result, workers
from .networks import Network, build_network, train, training_arguments
from .report import cell, environment, format_table, loading_lines, summarize, write_report
from .tasks import python_stdlib_task

IN_MEMORY = "teacher in memory"


@dataclass(frozen=True)
class Student:
    """One row of the table.

    Args:
        name (`str`): of the row.
        fields (`dict`): TIDEConfig fields of its run.
        top_k (`int`, *optional*): likeliest tokens kept of each prediction it is trained on; None with the teacher in
            memory, or without one.
        network ([`Network`], *optional*): of another size than the task's.
        seed (`int`): added to that of the comparison.
    """

    name: str
    fields: dict
    top_k: int | None = None
    network: Network | None = None
    seed: int = 0


AR_KL = {"preset": "ar-kl"}


def rows_of_table(task: Task) -> list[Student]:
    """Alone, with the teacher, and from caches of different sizes; then three more students from the largest cache."""
    smaller = replace(task.student, hidden=task.student.hidden // 2)
    return [
        Student("ce", {"preset": "ce"}),
        Student(IN_MEMORY, AR_KL),
        *(Student(f"cache, top {k}", AR_KL, k) for k in (1, 4, 16)),
        Student("top 16, half as wide", AR_KL, 16, smaller),
        Student("top 16, likelihoods (ar-calm)", {"preset": "ar-calm"}, 16),
        Student("top 16, another seed", AR_KL, 16, seed=1000),
    ]


def run_teacher_cache(task: Task, seeds: list[int], output_dir: str | Path) -> list[Result]:
    """The teacher, its caches, and every student.

    Args:
        task ([`Task`]): of text; its teacher's size and training are those of the autoregressive one.
        seeds (`list[int]`): one teacher, its caches and one set of students each.
        output_dir (`str` or `Path`): checkpoints and caches go to `<output_dir>/runs`.

    Returns:
        `list[Result]`; metrics are `nll` (nats per masked held-out token by diffusion time), `train_seconds` (CPU
        seconds), `parameters`, and of a cache `cache_seconds` (CPU seconds), `cache_bytes` (per trained-on token) and
        `kl_kept`, see [`measure_kept`].
    """
    runs, students = Path(output_dir) / "runs", rows_of_table(task)
    kept = sorted({student.top_k for student in students if student.top_k is not None})
    with workers() as run:
        jobs = [Job(partial(make_teacher, task, seed, runs), task.teacher.steps) for seed in seeds]
        teachers = run(f"teacher x {len(seeds)}", jobs)
        caches = {}
        for result in run(
            "caches", [Job(partial(make_cache, task, seed, runs, k), 1) for seed in seeds for k in kept]
        ):
            caches[result.seed, result.metrics["top_k"]] = result.metrics
        found = run(
            f"students x {len(seeds)}",
            [
                Job(partial(make_student, task, student, seed, runs), task.student.steps)
                for student in students
                for seed in seeds
            ],
        )
        jobs = [Job(partial(measure_kept, task, seed, runs, kept), 1) for seed in seeds]
        shares = {result.seed: result.metrics for result in run("divergences", jobs)}
    top_k = {student.name: student.top_k for student in students}
    for result in found:
        is_plain = result.network == f"cache, top {top_k[result.network]}"
        result.metrics["kl_kept"] = shares[result.seed][top_k[result.network]] if is_plain else float("nan")
        costs = caches.get((result.seed, top_k[result.network]), {})
        result.metrics |= {name: costs.get(name, float("nan")) for name in ("cache_seconds", "cache_bytes")}
    return teachers + found


def make_teacher(task: Task, seed: int, runs: Path) -> list[Result]:
    """Trains the autoregressive teacher on all training rows, and saves it, the student's start and the rows.

    Args:
        task ([`Task`]), seed (`int`), runs (`Path`): as in [`run_teacher_cache`].
    """
    data, folder, started = task.load(seed), runs / f"teacher-seed{seed}", time.process_time()
    rows, length = data.teacher_rows, task.max_length
    teacher = train_autoregressive(task.teacher, folder, rows, data.tokenizer, seed, length, **task.training).model
    build_network(task.student, data.tokenizer, task.block_size, seed).save_pretrained(runs / f"start-seed{seed}")
    data.tokenizer.save_pretrained(runs / f"start-seed{seed}")
    DatasetDict({"train": data.student_rows, "test": data.held_out_rows}).save_to_disk(runs / f"rows-seed{seed}")
    seconds = time.process_time() - started
    return [
        Result(
            task.name, "teacher", seed, {"train_seconds": seconds, "parameters": teacher.num_parameters()}, str(folder)
        )
    ]


def make_cache(task: Task, seed: int, runs: Path, top_k: int) -> list[Result]:
    """Prepares the student's rows and keeps the teacher's predictions, as recipes/prepare_data.py does.

    Args:
        task ([`Task`]), seed (`int`), runs (`Path`): as in [`run_teacher_cache`].
        top_k (`int`): likeliest tokens to keep.
    """
    started, folder = time.process_time(), runs / f"top{top_k}-seed{seed}"
    words = ["--model_name_or_path", runs / f"start-seed{seed}"]
    words += [
        "--teacher_model_name_or_path",
        runs / f"teacher-seed{seed}",
        "--dataset_name",
        runs / f"rows-seed{seed}",
    ]
    words += ["--max_length", task.max_length, "--block_size", task.block_size, "--preset", "ar-kl"]
    words += ["--teacher_cache", "--cache_top_k", top_k, "--output_dir", folder]
    with redirect_stdout(StringIO()):
        rows = run_preparation(parse_prepare_arguments([str(word) for word in words]))["train"]
    seconds = time.process_time() - started
    num_tokens = PreparationRecord.read(rows).reports["train"].num_trained_tokens
    costs = {"top_k": top_k, "cache_seconds": seconds, "cache_bytes": num_bytes(rows) / num_tokens}
    return [Result(task.name, "cache", seed, costs, str(folder))]


def make_student(task: Task, student: Student, seed: int, runs: Path) -> list[Result]:
    """Trains one student and measures it.

    Args:
        task ([`Task`]), seed (`int`), runs (`Path`): as in [`run_teacher_cache`].
        student ([`Student`]): which.
    """
    data, network = task.load(seed), student.network or task.student
    path = runs / f"{student.name.replace(' ', '_')}-seed{seed}"
    clock, teacher, rows = Clock(network.steps, network.steps), None, {"train": data.student_rows}
    if student.top_k is not None:
        rows = load_from_disk(runs / f"top{student.top_k}-seed{seed}")
    elif student.fields["preset"] != "ce":
        teacher = str(runs / f"teacher-seed{seed}")
    fields = {"max_length": task.max_length, "block_size": task.block_size, **task.training, **student.fields}
    trainer = train(
        TIDETrainer,
        build_network(network, data.tokenizer, task.block_size, seed + student.seed),
        training_arguments(network, path, seed + student.seed, **fields),
        rows["train"],
        data.tokenizer,
        callbacks=(clock,),
        teacher=teacher,
    )
    nll = _likelihood(task, data, trainer.model, path)
    metrics = {"nll": nll, "parameters": trainer.model.num_parameters(), "train_seconds": clock.seconds}
    return [Result(task.name, student.name, seed, metrics, str(path))]


def measure_kept(task: Task, seed: int, runs: Path, top_k: list[int]) -> list[Result]:
    """The divergence of one student to its teacher on held-out rows, over the kept tokens, as a share of the whole.

    Args:
        task ([`Task`]), seed (`int`), runs (`Path`): as in [`run_teacher_cache`].
        top_k (`list[int]`): likeliest tokens of each cache.
    """
    data, path = task.load(seed), runs / f"{IN_MEMORY.replace(' ', '_')}-seed{seed}"
    settings = {"max_length": task.max_length, "block_size": task.block_size, "per_device_eval_batch_size": 64}

    def divergence(rows, teacher=None) -> float:
        args = training_arguments(task.student, path / "measured", seed, **AR_KL, **settings)
        trainer = TIDETrainer(
            str(path),
            teacher=teacher,
            args=args,
            train_dataset=rows["train"],
            eval_dataset=rows["test"],
            processing_class=data.tokenizer,
        )
        return trainer.evaluate()["eval_distill"]

    whole = divergence({"train": None, "test": data.held_out_rows}, str(runs / f"teacher-seed{seed}"))
    shares = {k: divergence(load_from_disk(runs / f"top{k}-seed{seed}")) / whole for k in top_k}
    return [Result(task.name, "kept", seed, shares)]


def _likelihood(task: Task, data: TaskData, model, path: Path) -> dict[str, float]:
    """Nats per masked token of held-out rows, by diffusion time."""
    args = training_arguments(
        task.student,
        path,
        0,
        preset="ce",
        max_length=task.max_length,
        eval_noise_levels=list(task.noise_levels),
        per_device_eval_batch_size=64,
    )
    trainer = TIDETrainer(model, args=args, processing_class=data.tokenizer, eval_dataset=data.held_out_rows)
    measured = trainer.evaluate()
    return {f"{t:g}": measured[f"eval_nll_{t:g}"] for t in task.noise_levels}


# -- showing ----------------------------------------------------------------------------------------------------------


def build_cache_report(task: Task, results: list[Result], seeds: list[int]) -> dict:
    """The record of a comparison: settings, environment, and each row's metrics as in [`summarize`].

    Args:
        task ([`Task`]), results (`list[Result]`), seeds (`list[int]`): what was run, and what came of it.
    """
    settings = {name: value for name, value in asdict(task).items() if name not in ("load", "card", "objectives")}
    students = {student.name: asdict(student) for student in rows_of_table(task)}
    return {
        "task": "teacher_cache",
        "settings": {**settings, "students": students, "seeds": seeds},
        "environment": environment(),
        "rows": summarize(results),
    }


def cache_table(report: dict) -> str:
    """A report as text, one line per network.

    Args:
        report (`dict`): see [`build_cache_report`].
    """

    def show(*keys: str, form: str) -> Callable[[dict], str]:
        def of(row: dict) -> str:
            for key in keys:
                row = row.get(key, {})
            return cell(row, form) if row else "–"

        return of

    levels = [f"{t:g}" for t in report["settings"]["noise_levels"]]
    columns = {f"nll t={t}": show("nll", t, form="{:.3f}") for t in levels}
    columns |= {
        "KL kept": show("kl_kept", form="{:.3f}"),
        "parameters": lambda row: f"{row['parameters']['values'][0]:,.0f}",
    }
    columns |= {
        "train CPU s": show("train_seconds", form="{:.0f}"),
        "cache CPU s": show("cache_seconds", form="{:.1f}"),
    }
    return format_table(report["rows"], {**columns, "bytes/token": show("cache_bytes", form="{:.0f}")})


def show_teacher_cache(arguments) -> None:
    """Runs the comparison, prints its table, and writes the report.

    Args:
        arguments ([`~tide_hf.commands.distill.Arguments`]): of the recipe.
    """
    refuse_other_flags(arguments, {"output_dir", "seeds"})
    run_and_show_cache(python_stdlib_task(), list(range(arguments.script.seeds or 1)), arguments.training.output_dir)


def run_and_show_cache(task: Task, seeds: list[int], output_dir: str) -> dict:
    """Does the same for a task.

    Args:
        task ([`Task`]), seeds (`list[int]`): what to run.
        output_dir (`str`): where checkpoints and report go.
    """
    started = time.time()
    results = run_teacher_cache(task, seeds, output_dir)
    report = build_cache_report(task, results, seeds)
    print(f"\n{cache_table(report)}\n")
    write_report(report, Path(output_dir))
    student = next(result for result in results if result.network == "cache, top 16")
    print(f"{time.time() - started:.0f} s in all. The report is in {output_dir}. To load a student:\n")
    print(loading_lines(student.path, task.card.example_prompt))
    return report
