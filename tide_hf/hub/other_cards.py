"""Cards that no trainer writes: of a row of an embedded comparison, and of a prepared dataset."""

import yaml

from ..config import TIDEConfig
from ..data import PreparationReport
from ..objective import resolve_objective
from .card import BEGIN, END, adopt_edits, values_table, write_card
from .record import AFTER, Measurement, RunRecord
from .sources import IN_MEMORY, DataSource, Source, is_hub_name

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
        report (`dict`): see [`~tide_hf.demo.report.build_report`].
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
            "objective": "block",
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


def dataset_card(
    repo_id: str,
    reports: dict[str, PreparationReport],
    sources: list[str],
    student_tokenizer: str,
    teacher_tokenizer: str | None,
    settings: dict,
    license: str | None = None,
    languages: list[str] | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    existing: str = "",
) -> str:
    """The card of a dataset prepared by [`~tide_hf.data.prepare_dataset`].

    Args:
        repo_id (`str`): where it is pushed.
        reports (`dict[str, PreparationReport]`): split -> what became of its rows.
        sources (`list[str]`): Hub names of the conversations; local ones stay unnamed.
        student_tokenizer, teacher_tokenizer (`str`): whose ids its columns hold; None without a teacher.
        settings (`dict`): plain values it was prepared with.
        license (`str`, *optional*), languages (`list[str]`, *optional*): of the conversations.
        license_name, license_link (`str`, *optional*): with the license `other`.
        existing (`str`): the card it replaces: metadata and text that are not written here are kept.
    """
    published = [name for name in sources if is_hub_name(name)]
    metadata = {
        "license": license,
        "license_name": license_name,
        "license_link": license_link,
        "language": languages or None,
        "source_datasets": published,  # an empty one too: that of an earlier push must not outlive it
        "tags": ["tide", "diffusion-lm", "tokenized"],
    }
    metadata = {name: value for name, value in metadata.items() if value is not None}
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    lines = [f"- {name}: {report}" for name, report in reports.items()]
    names = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in published)
    teacher = f" and of the teacher's, `{teacher_tokenizer}`" if teacher_tokenizer else ""
    card = f"""---
{head}
---

{BEGIN}

# {repo_id.split("/")[-1]}

Conversations{f" of {names}" if names else ""}, rendered, tokenized and aligned by `tide_hf` for distilling a diffusion
language model. Its ids are those of the student's tokenizer, `{student_tokenizer}`{teacher}: it serves no others.

```python
from datasets import load_dataset

rows = load_dataset("{repo_id}", split="{next(iter(reports), "train")}")
```

`TIDETrainer` takes it as `train_dataset` as it stands. Columns: `row_key`, a hash of the row, keys the noise;
`input_ids` and `labels` (−100 = not trained on); `teacher_input_ids`; `chunk_ids` and `teacher_chunk_ids`, the number
of the span of equal bytes that a token belongs to, −1 for none.

## What became of the rows

{chr(10).join(lines)}

## Settings

{values_table(settings)}

{END}
"""
    return adopt_edits(card, existing)
