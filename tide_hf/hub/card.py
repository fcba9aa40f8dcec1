"""A model card from the record of a run: metadata, text, and what a person wrote beside it.

Between the two marks the run writes, and rewrites at every save. Text outside of them is the reader's own and is kept,
and so are metadata keys that the run does not write; of those it writes, `language` and the `license` keys keep what
the card already says.
"""

import functools
import re
from importlib.resources import files

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from .curves import CURVES_FILE
from .record import AFTER, Measurement, RunRecord
from .sources import IN_MEMORY, resolve_license

BEGIN = "<!-- tide_hf writes from here; edits between the marks are overwritten -->"
END = "<!-- tide_hf writes up to here; text below and above is kept -->"
# keys that a run writes: a value of an earlier state does not outlive it
DERIVED = (
    "library_name",
    "pipeline_tag",
    "base_model",
    "base_model_relation",
    "datasets",
    "distillation",
    "model-index",
)
HELD = ("language", "license", "license_name", "license_link")
# whole cards that libraries write on their own, with nothing a person said
STOCK_CARDS = (
    "Provide a quick summary of what the model is/does",
    "generated automatically according to the information",
)
TAGS = ("diffusion-lm", "distillation", "tide")
PAPERS = {
    "tide": ("TIDE", "2604.26951"),
    "block": ("BD3LM (block diffusion)", "2503.09573"),
    "full": ("MDLM (masked diffusion)", "2406.07524"),
    "uniform": ("Duo (uniform-state diffusion)", "2506.10892"),
    "chunk": ("ALM (likelihoods of chunks across tokenizers)", "2503.20083"),
    "idlm": ("IDLM (inverse distillation to few steps)", "2602.19066"),
}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NUM_EXAMPLE_TOKENS = 64


def write_card(record: RunRecord, existing: str = "", remote_code: bool = False, has_curves: bool = False) -> str:
    """The whole card as text.

    Args:
        record ([`RunRecord`]): what is said.
        existing (`str`): the card it replaces; see the head of this file for what is kept of it.
        remote_code (`bool`): the checkpoint carries its modeling files, and loads with `trust_remote_code`.
        has_curves (`bool`): `training_curves.png` lies beside the card.
    """
    metadata = {name: value for name, value in card_metadata(record).items() if value}
    text = render_text(record, {**metadata, **_held(existing, _given(record))}, remote_code, has_curves)
    return adopt_edits(_join(metadata, "", f"{BEGIN}\n\n{text}\n\n{END}", ""), existing, _given(record))


def adopt_edits(card: str, other: str, given: tuple[str, ...] = ()) -> str:
    """A card with what people wrote into another version of it, where it has no text of its own.

    Args:
        card, other (`str`): the card, and the version that people may have edited.
        given (`tuple[str, ...]`): metadata keys that keep the card's value whatever the other says.
    """
    above, below, metadata = split_card(card)
    other_above, other_below, kept = split_card(other)
    if not other.strip():
        return card
    tags = list(dict.fromkeys([*(metadata.get("tags") or []), *(kept.pop("tags", None) or [])]))
    held = _held(other, given)
    if "license" in held:
        metadata = {name: value for name, value in metadata.items() if not name.startswith("license")}
    run = card[card.index(BEGIN) : card.index(END) + len(END)]
    derived = [name for name in kept if name in DERIVED]
    kept = {name: value for name, value in kept.items() if name not in derived and not name.startswith("license")}
    return _join({**kept, **metadata, **held, "tags": tags}, above or other_above, run, below or other_below)


def _given(record: RunRecord) -> tuple[str, ...]:
    """Held metadata keys that the user set for this run."""
    return (*(("license",) if record.license else ()), *(("language",) if record.languages else ()))


def _held(other: str, given: tuple[str, ...]) -> dict:
    """Language and licence as another version of the card says them."""
    metadata = split_card(other)[2]
    return {name: metadata[name] for name in HELD if metadata.get(name) and name.split("_")[0] not in given}


def _join(metadata: dict, above: str, run: str, below: str) -> str:
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    return "\n\n".join(part for part in (f"---\n{head}\n---", above, run, below) if part) + "\n"


def split_card(text: str) -> tuple[str, str, dict]:
    """What a person wrote above and below the run's part, and the metadata; nothing of a library's stock card."""
    if not text.strip() or (BEGIN not in text and any(mark in text for mark in STOCK_CARDS)):
        return "", "", {}
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(?:\r?\n|$)", text, re.DOTALL)
    metadata = (yaml.safe_load(match[1]) or {}) if match else {}
    body = text[match.end() :] if match else text
    if BEGIN not in body or END not in body:
        return body.strip(), "", metadata
    above, rest = body.split(BEGIN, 1)
    return above.strip(), rest.split(END, 1)[1].strip(), metadata


def card_metadata(record: RunRecord) -> dict:
    """The card's YAML head, in the Hub's vocabulary."""
    sources = [record.start, *record.teachers, *record.datasets]
    license_keys = record.license or resolve_license(sources)
    base_model = record.start.name if record.start.on_hub else record.start.base_model
    datasets = [source.name for source in record.datasets if source.on_hub]
    languages = record.languages or list(dict.fromkeys(code for source in sources for code in source.languages))
    relation = "adapter" if record.is_adapter else "finetune"
    data = ModelCardData(
        language=languages,
        **license_keys,
        library_name="peft" if record.is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=datasets,
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
    return data


def _tags(record: RunRecord, base_model: str | None) -> list[str]:
    """The library's, and the user's; PEFT's own where the weights are an adapter."""
    tags = [*TAGS, "block-diffusion"] if record.network["diffusion_type"] == "block" else [*TAGS]
    if not record.teachers:
        tags.remove("distillation")
    if record.method == "idlm":
        tags[tags.index("tide")] = "few-step"
    if record.is_adapter:
        tags += [f"base_model:adapter:{base_model}", "lora"] if base_model else ["lora"]
    return list(dict.fromkeys([*tags, *record.tags]))


def _eval_result(result: Measurement) -> EvalResult:
    """One entry of the model index; which network it is about stands in its settings."""
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


# -- text -------------------------------------------------------------------------------------------------------------


def render_text(record: RunRecord, metadata: dict, remote_code: bool, has_curves: bool) -> str:
    """The run's part of the card, from the template beside this file."""
    notes = [source.note for source in [record.start, *record.teachers, *record.datasets] if source.note]
    text = _template().render(
        record=record,
        diffusion=_diffusion(record.network),
        code=example_code(record, remote_code),
        tables={
            "results": _results_table(record),
            "decoding": _decoding_table(record),
            "objective": values_table(record.objective),
            "arguments": values_table(record.arguments),
            "licenses": _license_table(record),
        },
        result_notes=_result_notes(record),
        has_curves=has_curves,
        curves_file=CURVES_FILE,
        license_line=_license_line(metadata),
        license_notes=list(dict.fromkeys(notes)),
        citations=_citations(record),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    return environment.from_string(files(__package__).joinpath("card_template.md").read_text(encoding="utf-8"))


def example_code(record: RunRecord, remote_code: bool) -> dict[str, str]:
    """Programs of the card, complete as they stand; `without_library` is empty where the checkpoint has no code."""
    return {
        "with_library": _generation_code(record, remote_code=False),
        "without_library": _generation_code(record, remote_code=True) if remote_code else "",
        "adapter": _adapter_code(record),
    }


def _where(record: RunRecord, remote_code: bool) -> str:
    """Arguments of `from_pretrained`."""
    words = [f'"{record.location}"']
    words += [f'revision="{record.revision}"'] if record.revision else []
    return ", ".join([*words, "trust_remote_code=True"] if remote_code else words)


def _generation_code(record: RunRecord, remote_code: bool) -> str:
    where = _where(record, remote_code)
    auto_class, package = "AutoModel", "transformers"
    if record.is_adapter:
        auto_class, package = "AutoPeftModelForCausalLM", "peft"
    imports = ["from transformers import AutoModel, AutoTokenizer"]
    if record.is_adapter:
        imports = [f"from {package} import {auto_class}", "from transformers import AutoTokenizer"]
    if not remote_code:
        imports = ["import tide_hf  # registers the model with transformers", *imports]
    if record.has_chat_template:
        prompt = [
            f'chat = [{{"role": "user", "content": "{record.example_prompt}"}}]',
            'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", '
            "return_dict=True)",
        ]
    else:
        prompt = [f'inputs = tokenizer("{record.example_prompt}", return_tensors="pt")']
    lines = [
        *imports,
        "",
        f"model = {auto_class}.from_pretrained({where})",
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
        *prompt,
        f"output = model.generate(**inputs, max_new_tokens={NUM_EXAMPLE_TOKENS}{_decoding_arguments(record)})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def _decoding_arguments(record: RunRecord) -> str:
    """What an adapter of a few-step student decodes with: its base's own settings know nothing of it."""
    if record.method != "idlm" or not record.is_adapter:
        return ""
    if record.network["diffusion_type"] == "uniform":
        return f", num_steps={record.objective['num_steps']}"
    return f', steps_per_block={record.objective["num_steps"]}, remasking="random", temperature=1.0'


def _adapter_code(record: RunRecord) -> str:
    targets = ", ".join(f'"{name}"' for name in LORA_TARGETS)
    return f"""import tide_hf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({_where(record, remote_code=False)})
adapter = LoraConfig(
    task_type="CAUSAL_LM",
    r=16,
    target_modules=[{targets}],
)
model = get_peft_model(model, adapter)
model.print_trainable_parameters()"""


def _diffusion(network: dict) -> str:
    if network["diffusion_type"] == "block":
        return f"block diffusion with {network['block_size']} tokens per block"
    return {"full": "diffusion", "uniform": "uniform-state diffusion"}[
        network["diffusion_type"]
    ] + " over the full sequence"


def _table(rows: list[list[str]]) -> str:
    """Markdown, the first row as head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def values_table(values: dict) -> str:
    """Names and values as a Markdown table."""
    return _table([["field", "value"], *([f"`{name}`", _shown(value)] for name, value in values.items())])


def _shown(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _results_table(record: RunRecord) -> str:
    """A line per metric and dataset, a column per network."""
    networks = list(dict.fromkeys(result.network for result in record.results))
    lines: dict[tuple, dict] = {}
    for result in record.results:
        spread = "" if result.spread is None else f" ± {result.spread:.4g}"
        lines.setdefault((result.dataset, result.metric), {})[result.network] = f"{result.value:.4g}{spread}"
    body = [[*key, *(cells.get(network, "") for network in networks)] for key, cells in lines.items()]
    return _table([["data", "metric", *networks], *body])


def _result_notes(record: RunRecord) -> list[str]:
    """With what, how, on how many samples and when the numbers were measured, each once."""
    lines = {}
    for result in record.results:
        key = (result.harness, result.settings, result.num_samples, result.date)
        lines.setdefault(key, []).append(result.network)
    return [
        f"{', '.join(dict.fromkeys(networks))}: {harness}; {settings}; {num_samples:,} samples; {date}."
        for (harness, settings, num_samples, date), networks in lines.items()
    ]


def _decoding_table(record: RunRecord) -> str:
    metrics = list(dict.fromkeys(row.metric for row in record.decoding))
    head = ["decoding", "block", " / ".join(metrics) or "score", "tokens per forward", "tokens per second", "hardware"]
    body = [
        [
            row.settings,
            str(row.block_size),
            f"{row.score:.4g}",
            f"{row.tokens_per_forward:.3g}",
            f"{row.tokens_per_second:,.0f}",
            row.hardware,
        ]
        for row in record.decoding
    ]
    return _table([head, *body])


def _license_line(metadata: dict) -> str:
    name, link = metadata.get("license_name"), metadata.get("license_link")
    if not metadata.get("license"):
        return "The licence of what this model derives from is not stated by its sources:"
    if metadata["license"] != "other":
        return f"`{metadata['license']}`. What this model derives from:"
    return f"{f'[{name}]({link})' if link else f'`{name}`'}. What this model derives from:"


def _license_table(record: RunRecord) -> str:
    kinds = [("start", [record.start]), ("teacher", record.teachers), ("data", record.datasets)]
    rows = []
    for kind, sources in kinds:
        for source in sources:
            said = source.license_name or source.license
            if said is None:
                said = "as this model" if source.name == IN_MEMORY else "not stated"
            rows.append([kind, source.link, f"[{said}]({source.license_link})" if source.license_link else said])
    return _table([["", "source", "licence"], *rows])


def _citations(record: RunRecord) -> list[tuple[str, str]]:
    """Papers of what the run used, then those that its models' cards name."""
    objective = record.objective
    keys = [record.network["diffusion_type"]]
    if objective.get("tidal") or objective.get("comp_demo") or objective.get("divergence") == "reverse_calm":
        keys.insert(0, "tide")
    if record.teachers and objective.get("alignment") == "chunk":
        keys.append("chunk")
    if record.method == "idlm":
        keys.append("idlm")
    found = [PAPERS[key] for key in keys]
    for source in [*record.teachers, record.start]:
        found += [(source.name, identifier) for identifier in source.arxiv_ids[:1]]
    return list({identifier: (name, identifier) for name, identifier in reversed(found)}.values())[::-1]
