"""The card of one network of an embedded comparison, which no trainer writes."""

from tide_hf.hub import Measurement, RunRecord, Source, write_card
from tide_hf.hub.record import AFTER
from tide_hf.hub.sources import IN_MEMORY, DataSource
from tide_hf.training.config import TIDEConfig
from tide_hf.training.presets import resolve_objective

NO_LANGUAGE = "zxx"  # ISO 639-2: no linguistic content


def report_card(
    report: dict,
    row: str,
    command: str,
    location: str,
    num_held_out: int,
    date: str,
    alignment: str = "token",
    license: str = "apache-2.0",
    commit: str | None = None,
    example_prompt: str | None = None,
) -> str:
    """The card of one network of an embedded comparison, every number from the report of the run.

    Args:
        report (`dict`): see [`~embedded.report.build_report`].
        row (`str`): name of the network in it.
        command (`str`): what ran it.
        location (`str`): folder of the checkpoint after that command, relative to the checkout.
        num_held_out (`int`), date (`str`): prompts or rows it was measured on, and when (ISO).
        alignment (`str`): pipeline of the comparison.
        license (`str`): of the checkpoint; teacher and data are made by the run.
        commit (`str`, *optional*): of this library when it ran.
        example_prompt (`str`, *optional*): for the code; suits the task by default.

    Raises:
        ValueError: if the report has no such row.
    """
    settings, rows = report["settings"], {entry["name"]: entry for entry in report["rows"]}
    if row not in rows:
        raise ValueError(f"The report has no row {row!r}; it has {', '.join(rows)}.")
    fields = settings["objectives"].get(row, {"preset": "ce"})
    config = TIDEConfig(output_dir="outputs", use_cpu=True, report_to=[], **fields)
    objective = resolve_objective(config, alignment)
    sorting = report["task"].startswith("sorting")
    size = settings["teacher" if row == "teacher" else "student"]
    teacher = Source("the teacher that the same command trains", license=license)
    record = RunRecord(
        model_name=f"Embedded comparison {report['task']}: {row}",
        intro=(
            "A run of the embedded comparison of `tide_hf`: a very small network, trained on a CPU to compare "
            "objectives. It is no general language model, and its numbers say nothing about the paper's models."
        ),
        location=location,
        start=Source(IN_MEMORY),
        teachers=[teacher] if objective.distills else [],
        datasets=[DataSource(f"{report['task']}, made by the command", license=license)],
        network={
            "architecture": "LLaDA2MoeModelLM" if size.get("experts") else "TIDEQwen3ForBlockDiffusion",
            "parameters": rows[row]["parameters"],
            "block_size": settings["block_size"],
            "diffusion_type": "block",
        },
        objective=objective.to_dict(),
        preparation={"train": report["preparation"]} if row != "teacher" and report.get("preparation") else {},
        arguments={**size, **settings["training"], "max_length": settings["max_length"]},
        step=round(rows[row]["steps"]),
        max_steps=round(rows[row]["steps"]),
        seeds=settings["seeds"],
        results=_report_results(report, row, num_held_out, date),
        environment=report["environment"],
        command=command,
        commit=commit,
        example_prompt=example_prompt or ("739152" if sorting else "def double(x):"),
        has_chat_template=True,
        license={"license": license},
        languages=[NO_LANGUAGE if sorting else "en"],
        tags=["embedded-run"],
    )
    return write_card(record)


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
