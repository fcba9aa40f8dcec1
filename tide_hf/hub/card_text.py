"""The text of a model card: the template beside this file, its tables and its programs."""

import functools
import re
from importlib.resources import files

import jinja2

from ..data.answers import describe_answers
from .curves import CURVES_FILE
from .record import RunRecord
from .sources import IN_MEMORY

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


def render_text(record: RunRecord, metadata: dict, remote_code: bool, has_curves: bool) -> str:
    """The Markdown that a run writes, between the marks of its card.

    Args:
        record ([`RunRecord`]): what the card says.
        metadata (`dict`): as the card will have it; the licence is stated from there.
        remote_code (`bool`): whether the checkpoint carries its modeling files and loads with `trust_remote_code`.
        has_curves (`bool`): whether `training_curves.png` lies beside the card.
    """
    notes = [source.note for source in [record.start, *record.teachers, *record.datasets] if source.note]
    return render_template(
        "card_template.md",
        record=record,
        diffusion=_diffusion(record.network),
        code=example_code(record, remote_code),
        made_for=_decoding_arguments(record) if record.method == "idlm" else "",
        tables={
            "results": _results_table(record),
            "decoding": _decoding_table(record),
            "objective": values_table(record.objective),
            "plan": values_table(record.plan),
            "arguments": values_table(record.arguments),
            "licenses": _license_table(record),
        },
        result_notes=_result_notes(record),
        answers=_answers(record),
        method_notes=_method_notes(record),
        teacher_kind=_teacher_kind(record),
        has_curves=has_curves,
        curves_file=CURVES_FILE,
        license_line=_license_line(metadata),
        license_notes=list(dict.fromkeys(notes)),
        citations=_citations(record),
    )


def render_template(name: str, **values: object) -> str:
    """A template beside this file, filled with `values`; more than one empty line in a row becomes one.

    Args:
        name (`str`): its file.
        values: by the names that the template uses, every one of which must be given.
    """
    return re.sub(r"\n{3,}", "\n\n", _template(name).render(**values)).strip()


def _answers(record: RunRecord) -> dict[str, str]:
    """Who wrote the answers of each dataset, where a teacher did."""
    written = {name: report.get("answers") for name, report in record.preparation.items()}
    return {name: describe_answers(answers) for name, answers in written.items() if answers}


def _teacher_kind(record: RunRecord) -> str:
    """What goes before the name of the teacher, where it is known."""
    autoregressive = record.plan.get("teacher_layout.autoregressive")
    kinds = {None: "", True: "the autoregressive model ", False: "the diffusion model "}
    return kinds[autoregressive] if len(record.teachers) == 1 else ""


def _method_notes(record: RunRecord) -> list[str]:
    """Where the student learned at its own states, and what a teacher that was run once had predicted."""
    notes, share = [], record.objective.get("on_policy_fraction")
    if share:
        order = record.arguments.get("rollout_order", "confidence").replace("_", " ")
        states = "states that it visited"
        if record.arguments.get("rollout_states") == "random_mask":
            states = "random masks of it"
        notes.append(
            f"To {share:.0%} of the rows the student wrote the answer itself (in the order {order}), and was compared "
            f"with the teacher at {states}; the answers of the data were not read there."
        )
    if "teacher_cache" in record.plan:
        notes.append(f"The teacher was not in memory: the rows carried {record.plan['teacher_cache']}.")
    return notes


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
    )
    return environment.from_string(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _diffusion(network: dict) -> str:
    if network["diffusion_type"] == "block":
        return f"block diffusion with {network['block_size']} tokens per block"
    kind = {"full": "diffusion", "uniform": "uniform-state diffusion"}[network["diffusion_type"]]
    return f"{kind} over the full sequence"


# -- programs ---------------------------------------------------------------------------------------------------------


def example_code(record: RunRecord, remote_code: bool) -> dict[str, str]:
    """Complete programs of a card, by their names in the template.

    Args:
        record ([`RunRecord`]): of the run.
        remote_code (`bool`): whether the checkpoint carries its code; if not, `without_library` is empty.
    """
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
    auto_class, imports = "AutoModel", ["from transformers import AutoModel, AutoTokenizer"]
    if record.is_adapter:
        auto_class = "AutoPeftModelForCausalLM"
        imports = [f"from peft import {auto_class}", "from transformers import AutoTokenizer"]
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
    arguments = ["**inputs", f"max_new_tokens={NUM_EXAMPLE_TOKENS}"]
    if record.method == "idlm" and record.is_adapter:  # the settings of its base know nothing of few steps
        arguments.append(_decoding_arguments(record))
    lines = [
        *imports,
        "",
        f"model = {auto_class}.from_pretrained({where})",
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
        *prompt,
        f"output = model.generate({', '.join(arguments)})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def _decoding_arguments(record: RunRecord) -> str:
    """What a few-step student is decoded with."""
    if record.network["diffusion_type"] == "uniform":
        return f"num_steps={record.objective['num_steps']}"
    return f'steps_per_block={record.objective["num_steps"]}, remasking="random", temperature=1.0'


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


# -- tables -----------------------------------------------------------------------------------------------------------


def _table(rows: list[list[str]]) -> str:
    """A Markdown table whose head is the first row."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def values_table(values: dict) -> str:
    """A Markdown table of names and values.

    Args:
        values (`dict`): name -> plain value.
    """
    return _table([["field", "value"], *([f"`{name}`", _shown(value)] for name, value in values.items())])


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _results_table(record: RunRecord) -> str:
    """A row for each metric and dataset, a column for each network."""
    networks = list(dict.fromkeys(result.network for result in record.results))
    lines: dict[tuple, dict] = {}
    for result in record.results:
        spread = "" if result.spread is None else f" ± {result.spread:.4g}"
        lines.setdefault((result.dataset, result.metric), {})[result.network] = f"{result.value:.4g}{spread}"
    body = [[*key, *(cells.get(network, "") for network in networks)] for key, cells in lines.items()]
    return _table([["data", "metric", *networks], *body])


def _result_notes(record: RunRecord) -> list[str]:
    """How the numbers were measured: tool, settings, number of samples and date; one line for all that agree."""
    lines = {}
    for result in record.results:
        key = (result.harness, result.settings, result.num_samples, result.date)
        lines.setdefault(key, []).append(result.network)
    return [
        f"{', '.join(dict.fromkeys(networks))}: {harness}; {settings}; {num_samples:,} samples; {date}."
        for (harness, settings, num_samples, date), networks in lines.items()
    ]


def _decoding_table(record: RunRecord) -> str:
    """A row for each decoding setting, with its quality and speed."""
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
    """The licence of the card, and what introduces the table of those it follows from."""
    license, name, link = (metadata.get(key) for key in ("license", "license_name", "license_link"))
    if not license:
        return "No licence is stated, because the sources of this model do not determine one:"
    stated = f"`{name if license == 'other' else license}`"
    if license == "other" and link:
        stated = f"[{name}]({link})"
    return f"{stated}. This model is derived from:"


def _license_table(record: RunRecord) -> str:
    """The licence of each source."""
    kinds = [("start", [record.start]), ("teacher", record.teachers), ("data", record.datasets)]
    rows = []
    for kind, sources in kinds:
        for source in sources:
            said = source.license_name or source.license
            if said is None:
                said = "same as this model" if source.name == IN_MEMORY else "not stated"
            rows.append([kind, source.link, f"[{said}]({source.license_link})" if source.license_link else said])
    return _table([["", "source", "licence"], *rows])


def _citations(record: RunRecord) -> list[tuple[str, str]]:
    """Name and arXiv id of the methods that the run used, then of the models that it started and learned from."""
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
