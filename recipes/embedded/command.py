"""Runs an embedded comparison from a recipe's arguments and shows the outcome."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForCausalLM

from tide_hf.data import PreparationReport

from .comparison import TEACHER, Task, TaskData, build_report, comparison_table, plot_curves, run_comparison
from .decoding import complete, show_denoising
from .few_step import (
    IDLM,
    PLOT_FILE,
    FewStepTask,
    build_few_step_report,
    extend_card,
    few_step_table,
    plot_few_step,
    run_few_step,
)
from .harness import Result
from .report import copy_student, loading_lines, write_report
from .table import FEW_STEP

FLAGS = {"dataset_name", "output_dir", "seeds"}  # that an embedded comparison uses
NUM_COMPLETIONS = 3


def refuse_other_flags(arguments, flags: set[str]) -> None:
    """Stops an embedded comparison that was given flags it would ignore, or more than one process.

    Args:
        arguments ([`~tide_hf.commands.distill.Arguments`]): of the recipe.
        flags (`set[str]`): the ones it uses.
    """
    unused = sorted(arguments.given - flags)
    if unused:
        sys.exit(
            f"--{', --'.join(unused)} {'is' if len(unused) == 1 else 'are'} not used by the embedded comparison, "
            "which brings its own models and settings. To train your own model, give --model_name_or_path and "
            "--dataset_name, and whatever else the recipe's --help lists."
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("An embedded comparison runs in one process: start it with accelerate launch --num_processes 1.")


def run_embedded(arguments, choose_task: Callable[[str | None], Task]) -> None:
    """Runs the comparison that `--dataset_name` asks for.

    Args:
        arguments ([`~tide_hf.commands.distill.Arguments`]): of the recipe.
        choose_task (`Callable`): name, or None for the default -> task; see `table`.
    """
    refuse_other_flags(arguments, FLAGS)
    try:
        task = choose_task(arguments.script.dataset_name)
    except ValueError as error:
        sys.exit(str(error))
    num_seeds = 3 if task.decodes else 1
    run_and_show(task, list(range(arguments.script.seeds or num_seeds)), arguments.training.output_dir)


def run_and_show(task: Task, seeds: list[int], output_dir: str) -> dict:
    """Runs a comparison, prints its table, and writes report, plot and the distilled student into a folder.

    Args:
        task ([`Task`]), seeds (`list[int]`): what to run.
        output_dir (`str`): the folder.

    Returns:
        the report, see [`build_report`].
    """
    started, folder = time.time(), Path(output_dir)
    results = run_comparison(task, seeds, output_dir)
    report = build_report(task, results, seeds)
    prepared = f"The student's rows: {PreparationReport(**report['preparation'])}"
    _hand_over(report, [comparison_table(report), prepared], _first(results, task.name, task.distilled), folder)
    plot_curves(report, results, folder / "curves.png")
    data = task.load(seeds[0])
    _show_student(data, results, task, output_dir)
    _say_how_to_load(output_dir, data, "Report, curves and the student", started)
    return report


def show_few_step(arguments) -> None:
    """Runs the few-step comparison on all of its tasks.

    Args:
        arguments ([`~tide_hf.commands.distill.Arguments`]): of the recipe.
    """
    refuse_other_flags(arguments, {"output_dir", "seeds"})
    tasks = [make() for make in FEW_STEP.values()]
    run_and_show_few_step(tasks, list(range(arguments.script.seeds or 3)), arguments.training.output_dir)


def run_and_show_few_step(tasks: list[FewStepTask], seeds: list[int], output_dir: str) -> dict:
    """Runs tasks, prints their tables, and writes report, plot, and the first task's IDLM student with its card.

    Args:
        tasks (`list[FewStepTask]`), seeds (`list[int]`): what to run.
        output_dir (`str`): the folder.

    Returns:
        the report, see [`build_few_step_report`].
    """
    started, folder = time.time(), Path(output_dir)
    results = run_few_step(tasks, seeds, output_dir)
    report = build_few_step_report(tasks, results, seeds)
    tables = [few_step_table(task) for task in report["tasks"]]
    _hand_over(report, tables, _first(results, tasks[0].name, IDLM), folder)
    plot_few_step(report, folder / PLOT_FILE)
    extend_card(report, folder)
    _say_how_to_load(output_dir, tasks[0].load(seeds[0]), "Report, plot, card and student", started)
    return report


def _first(results: list[Result], task: str, network: str) -> Result:
    """A network of the first seed."""
    return next(result for result in results if (result.task, result.network) == (task, network))


def _hand_over(report: dict, texts: list[str], student: Result, output_dir: Path) -> None:
    """Prints the tables, writes the report and puts the student into the output folder."""
    for text in texts:
        print(f"\n{text}")
    print()
    write_report(report, output_dir)
    copy_student(student.path, output_dir)


def _show_student(data: TaskData, results: list[Result], task: Task, output_dir: str) -> None:
    """One answer being denoised, or a few completions by teacher and student."""
    student = AutoModelForCausalLM.from_pretrained(output_dir)
    if task.decodes:
        print("One held-out prompt being denoised by the distilled student:")
        show_denoising(student, data.tokenizer, data.held_out_rows[0]["messages"])
        return
    rows = data.held_out_rows.select(range(NUM_COMPLETIONS))
    teacher = AutoModelForCausalLM.from_pretrained(_first(results, task.name, TEACHER).path)
    answers = {
        TEACHER: complete(teacher, data.teacher_tokenizer or data.tokenizer, rows, task.num_completion_tokens)[0],
        f"student ({task.distilled})": complete(student, data.tokenizer, rows, task.num_completion_tokens)[0],
    }
    for index, messages in enumerate(rows["messages"]):
        print(f"--- prompt\n{messages[0]['content']}\n--- reference\n{messages[-1]['content']}")
        for name, texts in answers.items():
            print(f"--- {name}\n{texts[index]}")


def _say_how_to_load(output_dir: str, data: TaskData, what: str, started: float) -> None:
    print(f"\n{time.time() - started:.0f} s in all. {what} are in {output_dir}. To load the student:\n")
    print(loading_lines(output_dir, data.held_out_rows[0]["messages"][0]["content"]))
