"""What every embedded comparison shows: statistics over seeds, tables, report.json, plots, how to load the student."""

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pandas

from .harness import Result

PACKAGES = ("torch", "transformers", "accelerate", "datasets")


def measurements(results: list[Result]) -> pandas.DataFrame:
    """The metrics of results: one line per network and seed, one column per number.

    Args:
        results (`list[Result]`): of one task.

    Returns:
        `pandas.DataFrame` indexed by `network` and `seed`; a nested metric has a column like `nll/0.5`.
    """
    frame = pandas.json_normalize([result.metrics for result in results], sep="/")
    frame.index = pandas.MultiIndex.from_tuples(
        [(result.network, result.seed) for result in results], names=["network", "seed"]
    )
    return frame


def summarize(results: list[Result]) -> list[dict]:
    """Mean, sample standard deviation and values of every metric of every network.

    Args:
        results (`list[Result]`): of one task.

    Returns:
        `list[dict]`, one for each network, in the order of the results: its `name`, and its metrics as in
        [`Result.metrics`], each number replaced by `{"mean", "sd", "values"}`. `values` has one entry per seed, None
        where it is NaN; mean and standard deviation are those of the others, and None where there are too few.
    """
    frame, entries = measurements(results), []
    statistics = frame.groupby("network", sort=False).agg(["mean", "std", "count"])
    for network, values in frame.groupby("network", sort=False):
        entry = {"name": network}
        for metric in frame.columns:
            *outer, last = metric.split("/")
            place = entry
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = _summary(statistics.loc[network, metric], values[metric])
        entries.append(entry)
    return entries


def _summary(statistics: pandas.Series, values: pandas.Series) -> dict:
    count = statistics["count"]
    return {
        "mean": float(statistics["mean"]) if count else None,
        "sd": float(statistics["std"]) if count > 1 else None,
        "values": [None if pandas.isna(value) else value for value in values.tolist()],
    }


def mean_curve(results: list[Result], key: str) -> pandas.Series:
    """Mean over seeds of a quantity in [`Result.curve`], by step; only steps at which every result has it.

    Args:
        results (`list[Result]`): of one network.
        key (`str`): name of the quantity.
    """
    points = [point for result in results for point in result.curve if key in point]
    if not points:
        return pandas.Series(dtype=float)
    by_step = pandas.DataFrame(points, columns=["step", key]).groupby("step")[key].agg(["mean", "count"])
    return by_step.loc[by_step["count"] == len(results), "mean"]


def cell(summary: dict, form: str, factor: float = 1.0, unit: str = "") -> str:
    """A summary as text: the mean, and the standard deviation if there is one; a dash without a mean.

    Args:
        summary (`dict`): see [`summarize`].
        form (`str`): format of both numbers, such as `"{:.1f}"`.
        factor (`float`): both are multiplied by it.
        unit (`str`): after the mean.
    """
    if summary["mean"] is None:
        return "–"
    spread = "" if summary["sd"] is None else f" ± {form.format(factor * summary['sd'])}"
    return form.format(factor * summary["mean"]) + unit + spread


def format_table(
    entries: list[dict], columns: Mapping[str, Callable[[dict], str]], corner: str = "", names_left: bool = False
) -> str:
    """A table as text, one line per network.

    Args:
        entries (`list[dict]`): networks; `name` starts the line.
        columns (`Mapping`): title -> function of an entry that gives the cell.
        corner (`str`): title of the names.
        names_left (`bool`): align the names to the left instead of the right.
    """
    lines = [[corner, *columns]]
    lines += [[entry["name"], *(show(entry) for show in columns.values())] for entry in entries]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    alignments = ["<" if names_left else ">", *">" * len(columns)]
    return "\n".join(
        "  ".join(f"{text:{side}{width}}" for text, side, width in zip(line, alignments, widths, strict=True))
        for line in lines
    )


def environment() -> dict[str, str]:
    """Versions that a report names."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def write_report(report: dict, output_dir: Path) -> None:
    """Writes report.json into a folder."""
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def copy_student(path: str | Path, output_dir: Path) -> None:
    """Puts the files of a checkpoint into the output folder itself, where people look for the student."""
    for file in Path(path).iterdir():
        if file.is_file() and file.name != "training_args.bin":
            shutil.copy(file, output_dir)


def loading_lines(output_dir: str | Path, prompt: str) -> str:
    """Python that loads and uses the saved student.

    Args:
        output_dir (`str` or `Path`): where it is.
        prompt (`str`): what the user says.
    """
    return f"""    import tide_hf
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained("{output_dir}")
    tokenizer = AutoTokenizer.from_pretrained("{output_dir}")
    prompt = tokenizer.apply_chat_template(
        [{{"role": "user", "content": {prompt!r}}}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))"""


@contextmanager
def plot(path: Path, num_panels: int, width: float = 4.5, height: float = 3.5) -> Iterator[tuple]:
    """A figure with its panels in one row, saved at the end.

    Args:
        path (`Path`): file to write.
        num_panels (`int`): how many.
        width, height (`float`): of a panel, in inches.

    Yields:
        the figure and the list of its axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (width * num_panels, height)
    figure, axes = plt.subplots(1, num_panels, figsize=size, squeeze=False, layout="constrained")
    yield figure, list(axes[0])
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
