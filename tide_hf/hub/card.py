"""A model card from the record of a run: its metadata in the Hub's vocabulary, and its text."""

from huggingface_hub import EvalResult, ModelCardData

from .card_edits import adopt_edits, assemble_card, held_metadata
from .card_text import render_text
from .record import AFTER, Measurement, RunRecord
from .sources import resolve_license

TAGS = ("diffusion-lm", "distillation", "tide")


def write_card(record: RunRecord, existing: str = "", remote_code: bool = False, has_curves: bool = False) -> str:
    """The whole card as text.

    Args:
        record ([`RunRecord`]): what the card says.
        existing (`str`): the card it replaces; [`~tide_hf.hub.card_edits`] says what is kept of it.
        remote_code (`bool`): whether the checkpoint carries its modeling files and loads with `trust_remote_code`.
        has_curves (`bool`): whether `training_curves.png` lies beside the card.
    """
    metadata = {name: value for name, value in card_metadata(record).items() if value}
    shown = {**metadata, **held_metadata(existing, record.given)}
    card = assemble_card(metadata, render_text(record, shown, remote_code, has_curves))
    return adopt_edits(card, existing, record.given)


def card_metadata(record: RunRecord) -> dict:
    """The YAML head of the card of a run, `record`."""
    sources = [record.start, *record.teachers, *record.datasets]
    base_model = record.start.name if record.start.on_hub else record.start.base_model
    relation = "adapter" if record.is_adapter else "finetune"
    return ModelCardData(
        language=record.languages or list(dict.fromkeys(code for source in sources for code in source.languages)),
        **(record.license or resolve_license(sources)),
        library_name="peft" if record.is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=[source.name for source in record.datasets if source.on_hub],
        tags=_tags(record, base_model),
        distillation={
            "student_start": record.start.name,
            "teachers": [source.name for source in record.teachers],
            "alignment": record.objective.get("alignment"),
            "schedule": record.objective.get("schedule"),
            "objective": record.objective,
        },
        eval_results=[_eval_result(result) for result in record.results if result.network == AFTER] or None,
        model_name=record.model_name,
    ).to_dict()


def _tags(record: RunRecord, base_model: str | None) -> list[str]:
    """The library's tags and the user's; those that PEFT sets where the weights are an adapter."""
    tags = [*TAGS, "block-diffusion"] if record.network["diffusion_type"] == "block" else [*TAGS]
    if not record.teachers:
        tags.remove("distillation")
    if record.method == "idlm":
        tags[tags.index("tide")] = "few-step"
    if record.is_adapter:
        tags += [f"base_model:adapter:{base_model}", "lora"] if base_model else ["lora"]
    return list(dict.fromkeys([*tags, *record.tags]))


def _eval_result(result: Measurement) -> EvalResult:
    """One entry of the model index; its arguments name the network that was measured."""
    return EvalResult(
        task_type=result.task,
        dataset_type=result.dataset,
        dataset_name=result.dataset,
        metric_type=result.metric,
        metric_name=f"{result.metric} ({result.network})",
        metric_value=result.value,
        metric_args={
            "network": result.network,
            "harness": result.harness,
            "settings": result.settings,
            "num_samples": result.num_samples,
            "date": result.date,
        },
    )
