"""The card of one network of an embedded comparison, for which no trainer writes one.

`model_cards/` holds two of them, which `PYTHONPATH=recipes python tests/test_model_cards.py` writes anew. Any other
network of a report gets its card by

    cd recipes && python -m embedded.cards reports/sorting.json kl > card.md
"""

import argparse
import json
from pathlib import Path

from tide_hf.hub import Measurement, RunRecord, Source, write_card
from tide_hf.hub.record import AFTER, today
from tide_hf.hub.sources import IN_MEMORY, DataSource
from tide_hf.training.config import TIDEConfig
from tide_hf.training.presets import resolve_objective

from .comparison import TEACHER, Task
from .table import find_comparison

INTRO = (
    "A run of an embedded comparison of `tide_hf`: a very small network, trained on a CPU to compare objectives. It "
    "is not a general-purpose language model, and its numbers say nothing about the paper's models."
)


def card_of(report: dict, row: str, date: str) -> str:
    """The card of a network whose checkpoint lies where its recipe puts it.

    Args:
        report (`dict`): see [`~embedded.comparison.build_report`].
        row (`str`): name of the network in it.
        date (`str`): day of the run (ISO).
    """
    task, recipe, command = find_comparison(report["task"])
    seed = report["settings"]["seeds"][0]
    return report_card(
        task,
        report,
        row,
        command=command,
        location=f"outputs/{recipe}/runs/{row}-seed{seed}",
        num_held_out=len(task.load(seed).held_out_rows),
        date=date,
    )


def report_card(
    task: Task,
    report: dict,
    row: str,
    command: str,
    location: str,
    num_held_out: int,
    date: str,
    license: str = "apache-2.0",
) -> str:
    """The card of one network of an embedded comparison, every number from the report of the run.

    Args:
        task ([`Task`]): the comparison; says what the card needs beside the report.
        report (`dict`): see [`~embedded.comparison.build_report`].
        row (`str`): name of the network in it.
        command (`str`): what ran it.
        location (`str`): folder of the checkpoint after that command, relative to the checkout.
        num_held_out (`int`), date (`str`): prompts or rows it was measured on, and when (ISO).
        license (`str`): of the checkpoint; teacher and data are made by the run.

    Raises:
        ValueError: if the report has no such row.
    """
    settings, rows = report["settings"], {entry["name"]: entry for entry in report["rows"]}
    if row not in rows:
        raise ValueError(f"The report has no row {row!r}; it has {', '.join(rows)}.")
    fields = settings["objectives"].get(row, {"preset": "ce"})
    config = TIDEConfig(output_dir="outputs", use_cpu=True, report_to=[], **fields)
    objective = resolve_objective(config, task.card.alignment)
    size = settings["teacher" if row == TEACHER else "student"]
    teacher = Source("the teacher that the same command trains", license=license)
    record = RunRecord(
        model_name=f"Embedded comparison {report['task']}: {row}",
        intro=INTRO,
        location=location,
        start=Source(IN_MEMORY),
        teachers=[teacher] if objective.distills else [],
        datasets=[DataSource(f"{report['task']}, made by the command", license=license)],
        network=_network(size, rows[row]["parameters"], settings["block_size"]),
        objective=objective.to_dict(),
        preparation={"train": report["preparation"]} if row != TEACHER and report.get("preparation") else {},
        arguments={**size, **settings["training"], "max_length": settings["max_length"]},
        step=round(rows[row]["steps"]),
        max_steps=round(rows[row]["steps"]),
        seeds=settings["seeds"],
        results=_report_results(report, row, num_held_out, date),
        environment=report["environment"],
        command=command,
        example_prompt=task.card.example_prompt,
        has_chat_template=True,
        license={"license": license},
        languages=[task.card.language],
        tags=["embedded-run"],
    )
    return write_card(record)


def _network(size: dict, num_parameters: int, block_size: int) -> dict:
    architecture = "LLaDA2MoeModelLM" if size.get("experts") else "TIDEQwen3ForBlockDiffusion"
    return {
        "architecture": architecture,
        "parameters": num_parameters,
        "block_size": block_size,
        "diffusion_type": "block",
    }


def _report_results(report: dict, row: str, num_held_out: int, date: str) -> list[Measurement]:
    """Quality and speed of every network of the report; the card's own is called student after."""
    seeds = report["settings"]["seeds"]
    found = []
    for entry in report["rows"]:
        network = AFTER if entry["name"] == row else entry["name"]
        how = {
            "dataset": report["task"],
            "harness": "tide_hf embedded comparison",
            "settings": f"held-out prompts, mean over {len(seeds)} seed(s)",
            "num_samples": num_held_out,
            "date": date,
        }
        measured = {}
        if "exact_match" in entry:
            measured["exact match (fraction)"] = (entry["exact_match"]["mean"], entry["exact_match"]["sd"])
        if "nll" in entry:
            mean, sd = entry["nll"]["mean"], entry["nll"]["sd"] or {}
            measured |= {f"nats per masked token at t = {t}": (value, sd.get(t)) for t, value in mean.items()}
        measured["tokens decoded per CPU second"] = (entry["tokens_per_second"], None)
        found += [Measurement(network, name, value, spread=sd, **how) for name, (value, sd) in measured.items()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the card of one network of a report.")
    parser.add_argument("report", type=Path, help="report.json of a comparison.")
    parser.add_argument("row", help="Name of the network in its table.")
    parser.add_argument("--date", default=today(), help="Day of the run (ISO). Today.")
    arguments = parser.parse_args()
    print(card_of(json.loads(arguments.report.read_text()), arguments.row, arguments.date), end="")


if __name__ == "__main__":
    main()
