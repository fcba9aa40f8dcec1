"""What a card says of a run, as plain values: collected from what a trainer states, or filled in from a report."""

from dataclasses import dataclass, field
from datetime import datetime, timezone

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..data import PreparationReport
from .provenance import changed_arguments, command_line, hardware, leaks, source_commit, versions
from .sources import Source, find_source

BEFORE, AFTER = "student before", "student after"
PROMPTS = ("What is 17 + 25?", "739152")
METRIC_NAMES = {
    "loss": "objective, nats",
    "ce": "denoising loss, nats per token",
    "ce_answer": "denoising loss, nats per answer token (end-of-text fill excluded)",
    "distill": "distillation term, nats",
    "fake_loss": "denoising loss of the fake on the student's samples, nats per row",
}


@dataclass(frozen=True)
class RunFacts:
    """What a trainer states about its run each time that the card is written.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the student, without the wrappers of accelerate.
        teachers (`list[tuple[str, str | None]]`): name, or folder, and commit of what it learns from; empty without a
            teacher.
        tokenizer (`PreTrainedTokenizerBase`): the student's.
        args (`TrainingArguments`): of the run.
        objective (`dict`): what the run optimises, every field decided.
        preparation (`dict[str, PreparationReport]`): dataset -> what became of its rows.
        step, max_steps (`int`): optimizer steps taken so far, and in total.
        log_history (`list[dict]`): of the `TrainerState`.
        num_evaluated_rows (`int`): rows of the evaluation dataset; 0 without one.
        evaluation (`str`): name of the trainer's own evaluation: the harness of the numbers in `log_history`.
        plan (`dict`): what the run feeds its networks, as plain values and dicts of them: alignment, layouts, block
            size, shared vocabulary, preparation.
    """

    model: PreTrainedModel | PeftModel
    teachers: list[tuple[str, str | None]]
    tokenizer: PreTrainedTokenizerBase
    args: TrainingArguments
    objective: dict
    preparation: dict[str, PreparationReport]
    step: int
    max_steps: int
    log_history: list[dict]
    num_evaluated_rows: int
    evaluation: str
    plan: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One measured number.

    Args:
        network (`str`): whose number it is, a column of the table: teacher, student before, student after, or a name.
        metric (`str`): what was measured, with its unit.
        value (`float`): the number.
        dataset (`str`): what it was measured on: a Hub name or a short description.
        harness, settings (`str`): what measured it, and how.
        num_samples (`int`): number of rows or prompts.
        date (`str`): ISO 8601, UTC.
        task (`str`): the task in the Hub's vocabulary, for the model index.
        spread (`float`, *optional*): sample standard deviation over seeds.
    """

    network: str
    metric: str
    value: float
    dataset: str
    harness: str
    settings: str
    num_samples: int
    date: str
    task: str = "text-generation"
    spread: float | None = None


@dataclass(frozen=True)
class Decoding:
    """One line of the decoding table: quality and speed, measured together.

    Args:
        settings (`str`): steps or threshold.
        block_size (`int`): tokens per block.
        metric (`str`), score (`float`): quality with these settings.
        tokens_per_forward (`float`): answer tokens per network call.
        tokens_per_second (`float`): answer tokens per second.
        hardware (`str`): the machine.
    """

    settings: str
    block_size: int
    metric: str
    score: float
    tokens_per_forward: float
    tokens_per_second: float
    hardware: str


@dataclass
class RunRecord:
    """Everything a card says. What is None or empty is left out of it.

    Args:
        model_name (`str`): the title.
        location (`str`): the argument of `from_pretrained`: a repository, or a folder relative to the reader's.
        start ([`Source`]): the model that the student was initialised from.
        network (`dict`): `architecture`, `parameters`, `block_size` and `diffusion_type` ("block", "full" or
            "uniform") of the student.
        revision (`str`, *optional*): the branch to load, if it is not the default one.
        teachers, datasets (`list[Source]`): what it learned from.
        objective (`dict`): every field of [`~tide_hf.Objective`], decided.
        plan (`dict`): name -> plain value; what the run fed its networks.
        arguments (`dict`): training arguments that differ from the defaults, and the teacher's context.
        preparation (`dict[str, dict]`): dataset -> fields of its [`~tide_hf.data.PreparationReport`].
        step, max_steps (`int`): optimizer steps taken so far, and in total.
        seeds (`list[int]`): of the run.
        log_history (`list[dict]`): as logged.
        results (`list[Measurement]`), decoding (`list[Decoding]`): what was measured.
        environment (`dict`): package -> version.
        hardware, command, commit (`str`, *optional*): the machine, the command line, and the commit of this library.
        is_adapter (`bool`): whether the weights are a PEFT adapter rather than a whole model.
        example_prompt (`str`): for the programs; one that the tokenizer can encode.
        has_chat_template (`bool`): whether prompts are conversations.
        license (`dict[str, str]`), languages, tags (`list[str]`): given by the user; the first two win over what the
            sources say.
        intro (`str`): a sentence for the top.
        method (`str`): `"tide"` or `"idlm"`.
        sampler (`str`, *optional*): the published sampler that the student's generation config names (`decoding`).
    """

    model_name: str
    location: str
    start: Source
    network: dict
    revision: str | None = None
    teachers: list[Source] = field(default_factory=list)
    datasets: list[Source] = field(default_factory=list)
    objective: dict = field(default_factory=dict)
    plan: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    preparation: dict[str, dict] = field(default_factory=dict)
    step: int = 0
    max_steps: int = 0
    seeds: list[int] = field(default_factory=list)
    log_history: list[dict] = field(default_factory=list)
    results: list[Measurement] = field(default_factory=list)
    decoding: list[Decoding] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    hardware: str | None = None
    command: str | None = None
    commit: str | None = None
    is_adapter: bool = False
    example_prompt: str = PROMPTS[0]
    has_chat_template: bool = False
    license: dict[str, str] = field(default_factory=dict)
    languages: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    intro: str = ""
    method: str = "tide"
    sampler: str | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """Metadata keys that the user set for this run, whatever an earlier card says."""
        return (*(("license",) if self.license else ()), *(("language",) if self.languages else ()))


def record_run(facts: RunFacts) -> RunRecord:
    """The record of a run before its first step; [`update_record`] keeps it current.

    Args:
        facts ([`RunFacts`]): from its trainer.
    """
    args = facts.args
    is_adapter = isinstance(facts.model, PeftModel)
    base = facts.model.get_base_model() if is_adapter else facts.model
    record = RunRecord(
        model_name="",
        location=".",
        start=_source(*named_model(base), args),
        teachers=[_source(*teacher, args) for teacher in facts.teachers],
        network={
            "architecture": type(base).__name__,
            "parameters": base.num_parameters(),
            "block_size": getattr(base.config, "block_size", None),
            "diffusion_type": base.config.diffusion_type,
        },
        seeds=[args.seed],
        environment=versions(),
        hardware=hardware(args.world_size),
        command=command_line(),
        commit=source_commit(),
        is_adapter=is_adapter,
        example_prompt=_understood_prompt(facts.tokenizer),
        has_chat_template=getattr(facts.tokenizer, "chat_template", None) is not None,
        method=facts.objective.get("method", "tide"),
    )
    update_record(record, facts)
    return record


def update_record(record: RunRecord, facts: RunFacts) -> None:
    """Brings a record up to date; what people added to it, their measurements for example, stays.

    Args:
        record ([`RunRecord`]): changed in place.
        facts ([`RunFacts`]): of the same run, as it stands now.
    """
    args, objective = facts.args, facts.objective
    arguments = {name: value for name, value in changed_arguments(args).items() if name not in objective}
    if facts.teachers and hasattr(args, "teacher_context"):
        arguments["teacher_context"] = args.teacher_context
    if "dataset_args" in record.arguments:  # given to create_model_card
        arguments["dataset_args"] = record.arguments["dataset_args"]
    record.objective, record.arguments = objective, arguments
    record.plan = {name: value for name, value in _flat(facts.plan).items() if not leaks(value)}
    base = facts.model.get_base_model() if isinstance(facts.model, PeftModel) else facts.model
    record.sampler = getattr(base.generation_config, "decoding", None)
    record.step, record.max_steps, record.log_history = facts.step, facts.max_steps, list(facts.log_history)
    record.preparation = {name: vars(report) for name, report in facts.preparation.items() if report.num_rows}
    given = [result for result in record.results if result.harness != facts.evaluation]
    record.results = given + _evaluations(facts, record.datasets[0].name if record.datasets else "held-out rows")


def _flat(values: dict, prefix: str = "") -> dict:
    """Nested dicts as one, their names joined by dots."""
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _evaluations(facts: RunFacts, dataset: str) -> list[Measurement]:
    """The first evaluation, if it came before training, and the last one."""
    entries = [entry for entry in facts.log_history if any(name.startswith("eval_") for name in entry)]
    if not facts.num_evaluated_rows:
        return []
    columns = {AFTER: entries[-1]} if entries and entries[-1]["step"] > 0 else {}
    columns |= {BEFORE: entries[0]} if entries and entries[0]["step"] == 0 else {}
    found = []
    for network, entry in sorted(columns.items(), reverse=True):
        how = {
            "dataset": dataset,
            "harness": facts.evaluation,
            "settings": f"noise keyed by (seed {facts.args.seed}, row), after step {entry['step']}",
            "num_samples": facts.num_evaluated_rows,
            "date": today(),
        }
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            if not key.startswith("eval_") or not (name in METRIC_NAMES or name.startswith("nll_")):
                continue
            metric = METRIC_NAMES.get(name, f"nats per masked token at t = {name.removeprefix('nll_')}")
            found.append(Measurement(network, metric, value, **how))
    return found


def today() -> str:
    """The date in UTC, ISO 8601."""
    return datetime.now(timezone.utc).date().isoformat()


def named_model(model: PreTrainedModel) -> tuple[str, str | None]:
    """Name, or folder, and commit of a loaded `model`."""
    return model.name_or_path, getattr(model.config, "_commit_hash", None)


def _source(name: str, commit: str | None, args) -> Source:
    return find_source(name, revision=commit, token=args.hub_token)


def _understood_prompt(tokenizer) -> str:
    """The first example prompt that survives encoding and decoding."""
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids).replace(" ", "") == prompt.replace(" ", ""):
            return prompt
    return PROMPTS[0]
