"""What a comparison shows: a table, report.json and curves.png."""

import json
import platform
import statistics
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from .comparison import RowResult, Task

METRICS = ("exact_match", "nll")


def build_report(task: Task, results: list[RowResult], seeds: list[int]) -> dict:
    """The record of a comparison.

    Returns:
        `{"task", "settings", "environment", "preparation", "rows": [{"name", "exact_match" and "nll": {"mean", "sd",
        "values"}, "parameters", "tokens_per_second", "train_seconds", "steps"}]}`. `exact_match` is a fraction; the
        `mean`, `sd` and each value of `nll` map a diffusion time to nats per masked token. `sd` is the sample standard
        deviation over seeds, None for one seed. `preparation` is that of the student's rows of the first seed.
    """
    settings = asdict(task)
    settings.pop("load")
    packages = ("torch", "transformers", "accelerate", "datasets")
    environment = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    rows = []
    for name in dict.fromkeys(result.name for result in results):
        group = [result for result in results if result.name == name]
        rows.append(
            {
                "name": name,
                **{
                    metric: _summary([result.metrics[metric] for result in group])
                    for metric in METRICS
                    if metric in group[0].metrics
                },
                "parameters": group[0].parameters,
                "tokens_per_second": statistics.mean(result.tokens_per_second for result in group),
                "train_seconds": statistics.mean(result.train_seconds for result in group),
                "steps": statistics.mean(result.steps for result in group),
            }
        )
    return {
        "task": task.name,
        "settings": {**settings, "seeds": seeds},
        "environment": environment,
        "preparation": next((result.preparation for result in results if result.name == task.distilled), {}),
        "rows": rows,
    }


def format_table(report: dict) -> str:
    """The report as text, one line per network."""
    first = report["rows"][0]
    levels = list(first["nll"]["mean"]) if "nll" in first else []
    heads = ["exact match"] * ("exact_match" in first) + [f"nll t={t}" for t in levels]
    table = [["", *heads, "parameters", "steps", "train CPU s", "tokens/s"]]
    for row in report["rows"]:
        cells = []
        if "exact_match" in first:
            mean, sd = row["exact_match"]["mean"], row["exact_match"]["sd"]
            cells.append(f"{100 * mean:.1f} %" + (f" ± {100 * sd:.1f}" if sd is not None else ""))
        for t in levels:
            sd = row["nll"]["sd"]
            cells.append(f"{row['nll']['mean'][t]:.3f}" + (f" ± {sd[t]:.3f}" if sd else ""))
        numbers = [f"{row['parameters']:,}", f"{row['steps']:,.0f}", f"{row['train_seconds']:.1f}"]
        table.append([row["name"], *cells, *numbers, f"{row['tokens_per_second']:,.0f}"])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join(lines)


def write_report(report: dict, results: list[RowResult], output_dir: str | Path) -> None:
    """Writes report.json and curves.png into a folder."""
    output_dir = Path(output_dir)
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _plot(report, results, output_dir / "curves.png")


def _summary(values: list) -> dict:
    """Mean, sample standard deviation and values; by key for mappings."""
    if isinstance(values[0], dict):
        parts = {key: _summary([value[key] for value in values]) for key in values[0]}
        sd = {key: part["sd"] for key, part in parts.items()} if len(values) > 1 else None
        return {"mean": {key: part["mean"] for key, part in parts.items()}, "sd": sd, "values": values}
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "sd": sd, "values": values}


def _plot(report: dict, results: list[RowResult], path: Path) -> None:
    """Losses, λ and the measured metric against steps, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [("ce", "denoising loss (nats per token)"), ("distill", "distillation term"), ("lambda", "λ(s)")]
    if any("exact_match" in point for result in results for point in result.curve):
        panels.append(("exact_match", "exact match"))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        for index, row in enumerate(report["rows"]):
            group = [result for result in results if result.name == row["name"]]
            curve = _mean_curve(group, key)
            if curve:
                axis.plot(*zip(*curve, strict=True), color=f"C{index}", label=row["name"])
        axis.set(xlabel="optimizer step", title=title)
        if key == "ce":
            axis.set_yscale("log")
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{report['task']}, {len(report['settings']['seeds'])} seed(s)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _mean_curve(group: list[RowResult], key: str) -> list[tuple[int, float]]:
    """(step, mean over seeds) of one logged quantity, where every seed has it."""
    by_step: dict[int, list[float]] = {}
    for result in group:
        for point in result.curve:
            if key in point:
                by_step.setdefault(point["step"], []).append(point[key])
    return [(step, statistics.mean(values)) for step, values in sorted(by_step.items()) if len(values) == len(group)]
