"""What the few-step comparison shows: tables, report.json, few_step.png, and the card of the student."""

import json
import platform
import shutil
import statistics
import time
from importlib.metadata import version
from pathlib import Path

from tide_hf.hub.provenance import hardware
from tide_hf.hub.record import today

from .command import loading_lines, refuse_other_flags
from .few_step import (
    IDLM,
    NETWORKS,
    TEACHER,
    FewStepResult,
    FewStepTask,
    copying_task,
    run_few_step,
    sorting_few_step_task,
)

METRICS = {
    "accuracy": ("right answers, %", 100, "{:.1f}"),
    "differ": ("two right answers to a prompt differ, %", 100, "{:.1f}"),
    "entropy": ("unigram entropy of an answer, nats", 1, "{:.2f}"),
    "speed": ("tokens per CPU second", 1, "{:,.0f}"),
}
PLOT_FILE = "few_step.png"


def show_few_step(arguments) -> None:
    """Runs the embedded comparison of a recipe's arguments, prints it, and writes it into the output folder."""
    refuse_other_flags(arguments, {"output_dir", "seeds"})
    output_dir = Path(arguments.training.output_dir)
    tasks = [copying_task(), sorting_few_step_task(dense_runs=str(output_dir.parent / "dense_teacher" / "runs"))]
    run_and_show_few_step(tasks, list(range(arguments.script.seeds or 3)), output_dir)


def run_and_show_few_step(tasks: list[FewStepTask], seeds: list[int], output_dir: Path) -> dict:
    """Runs tasks, prints their tables, and writes report, plot, and the first task's IDLM student with its card.

    Returns:
        the report, see [`build_few_step_report`].
    """
    started = time.time()
    results = run_few_step(tasks, seeds, output_dir)
    report = build_few_step_report(tasks, results, seeds)
    for task in report["tasks"]:
        print(f"\n{format_few_step_table(task)}")
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_few_step(report, output_dir / PLOT_FILE)
    student = next(row for row in results if (row.task, row.name, row.seed) == (tasks[0].name, IDLM, seeds[0]))
    for file in Path(student.path).iterdir():
        if file.is_file() and file.name != "training_args.bin":
            shutil.copy(file, output_dir)
    write_few_step_card(report, output_dir)
    print(f"\n{time.time() - started:.0f} s in all. Report, plot, card and student are in {output_dir}. To load it:\n")
    print(loading_lines(str(output_dir), tasks[0].held_out()[0]["messages"][0]["content"]))
    return report


def build_few_step_report(tasks: list[FewStepTask], results: list[FewStepResult], seeds: list[int]) -> dict:
    """The record of a comparison.

    Returns:
        `{"environment", "seeds", "tasks": [{"name", "settings", "networks": [{"name", "train_seconds", "steps":
        {number: {metric: {"mean", "sd", "values"}}}}]}]}`; metrics as in [`FewStepResult`], `sd` the sample standard
        deviation over seeds, None for one seed.
    """
    packages = ("torch", "transformers", "accelerate", "datasets")
    report = {
        "environment": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "hardware": hardware(1),
        "seeds": seeds,
        "tasks": [],
    }
    for task in tasks:
        settings = {
            "student": vars(task.student),
            "idlm": task.idlm,
            "num_taught": task.num_taught,
            "num_held_out": len(task.held_out()),
            "max_length": task.max_length,
        }
        networks = []
        for name in NETWORKS:
            group = [row for row in results if (row.task, row.name) == (task.name, name)]
            steps = {
                number: {metric: _summary([row.metrics[number][metric] for row in group]) for metric in METRICS}
                for number in group[0].metrics
            }
            seconds = statistics.mean(row.train_seconds for row in group)
            networks.append({"name": name, "train_seconds": seconds, "steps": steps})
        report["tasks"].append({"name": task.name, "settings": settings, "networks": networks})
    return report


def format_few_step_table(task: dict) -> str:
    """One task of a report as text: a block per metric, a line per network, a column per number of steps."""
    columns, blocks = list(task["networks"][0]["steps"]), []
    for metric, (title, factor, form) in METRICS.items():
        lines = [[title, *columns]]
        for network in task["networks"]:
            cells = [_cell(network["steps"][column][metric], factor, form) for column in columns]
            lines.append([network["name"], *cells])
        widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
        blocks.append("\n".join("  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                 zip(line[1:], widths[1:], strict=True))]) for line in lines))  # fmt: skip
    seconds = ", ".join(f"{network['name']} {network['train_seconds']:.0f}" for network in task["networks"])
    head = f"{task['name']}: columns are network calls per block, or per answer"
    return "\n\n".join([head, *blocks, f"CPU seconds of training (teaching: with making the rows): {seconds}"])


def plot_few_step(report: dict, path: Path) -> None:
    """Right answers against steps, teacher and students, mean and spread over seeds; one panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(report["tasks"]), figsize=(5.0 * len(report["tasks"]), 3.6), squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis, task in zip(axes[0], report["tasks"], strict=True):
        for network in task["networks"]:
            values = [100 * cell["accuracy"]["mean"] for cell in network["steps"].values()]
            spread = [100 * (cell["accuracy"]["sd"] or 0.0) for cell in network["steps"].values()]
            label = f"{network['name']} (before)" if network["name"] == TEACHER else network["name"]
            axis.errorbar(range(len(values)), values, spread, label=label, marker="o", capsize=3)
        axis.set_xticks(range(len(network["steps"])), list(network["steps"]))
        axis.set(xlabel="denoising steps", ylabel="right answers, %", title=task["name"], ylim=(-3, 103))
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def write_few_step_card(report: dict, output_dir: Path) -> None:
    """Puts what was measured by number of steps, and the plot, below what the student's run wrote into its card."""
    card, task = output_dir / "README.md", report["tasks"][0]
    text = card.read_text(encoding="utf-8").rstrip()
    lines = [
        "## Quality against denoising steps",
        f"![Right answers against denoising steps]({PLOT_FILE})",
        f"Task `{task['name']}`: {task['settings']['num_held_out']} held-out prompts, each answered twice; mean ± "
        f"sample standard deviation over {len(report['seeds'])} seed(s); on {report['hardware']}; {today()}. The "
        "teacher is the student before.",
        f"```\n{format_few_step_table(task)}\n```",
    ]
    card.write_text("\n\n".join([text, *lines]) + "\n", encoding="utf-8")


def _summary(values: list[float]) -> dict:
    """Mean and sample standard deviation over the seeds that have the number, and all values; None for none."""
    found = [value for value in values if value == value]
    return {
        "mean": statistics.mean(found) if found else None,
        "sd": statistics.stdev(found) if len(found) > 1 else None,
        "values": [value if value == value else None for value in values],
    }


def _cell(summary: dict, factor: float, form: str) -> str:
    if summary["mean"] is None:
        return "–"
    spread = "" if summary["sd"] is None else f" ± {form.format(factor * summary['sd'])}"
    return form.format(factor * summary["mean"]) + spread
