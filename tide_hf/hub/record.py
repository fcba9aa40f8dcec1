"""What a run leaves behind for its card: plain values, collected from a trainer or from a report."""

from dataclasses import dataclass, field
from datetime import datetime, timezone

from .provenance import changed_arguments, command_line, hardware, source_commit, versions
from .sources import Source, find_source

BEFORE, AFTER = "student before", "student after"
PROMPTS = ("What is 17 + 25?", "739152")
METRIC_NAMES = {
    "loss": "objective, nats",
    "ce": "denoising loss, nats per token",
    "ce_answer": "denoising loss, nats per answer token (end-of-text fill left out)",
    "distill": "distillation term, nats",
    "fake_loss": "fake's denoising loss on the student's samples, nats per row",
}


@dataclass(frozen=True)
class Measurement:
    """One measured number.

    Args:
        network (`str`): column of the table: teacher, student before, student after, or a name.
        metric (`str`): what was measured, with its unit.
        value (`float`): the number.
        dataset (`str`): on what; a Hub name or a short one.
        harness, settings (`str`): with what, and how.
        num_samples (`int`): rows or prompts.
        date (`str`): ISO.
        task (`str`): of the model index.
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
    """One line of the decoding table; scores and speeds as measured together.

    Args:
        settings (`str`): steps or threshold.
        block_size (`int`): tokens.
        metric (`str`), score (`float`): quality under these settings.
        tokens_per_forward, tokens_per_second (`float`): speed.
        hardware (`str`): on what.
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
        model_name (`str`): title.
        location (`str`): what `from_pretrained` is given: repository, or folder relative to the reader's.
        revision (`str`, *optional*): branch that has to be named to load it.
        start ([`Source`]): the weights the student started from.
        teachers, datasets (`list[Source]`): where it learned.
        network (`dict`): `architecture`, `parameters`, `block_size`, `diffusion_type` ("block", "full" or
            "uniform").
        objective (`dict`): every field of [`~tide_hf.Objective`], decided.
        arguments (`dict`): training arguments that differ from the defaults, and the teacher's context.
        preparation (`dict[str, dict]`): dataset -> fields of its [`~tide_hf.data.PreparationReport`].
        step, max_steps (`int`): how far training is.
        seeds (`list[int]`): of the run.
        log_history (`list[dict]`): as logged.
        results (`list[Measurement]`), decoding (`list[Decoding]`): what was measured.
        environment (`dict`), hardware, command, commit (`str`): where it was run.
        is_adapter (`bool`): PEFT weights rather than a whole model.
        example_prompt (`str`): for the code, understood by the tokenizer.
        has_chat_template (`bool`): whether prompts are conversations.
        license (`dict[str, str]`), languages, tags (`list[str]`): given by the user; win over what is derived.
        intro (`str`): a sentence for the top.
        method (`str`): `"tide"` or `"idlm"`.
    """

    model_name: str
    location: str
    start: Source
    network: dict
    revision: str | None = None
    teachers: list[Source] = field(default_factory=list)
    datasets: list[Source] = field(default_factory=list)
    objective: dict = field(default_factory=dict)
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


def record_run(trainer, datasets: list[str] = ()) -> RunRecord:
    """The record of a trainer as it stands before the first step; [`update_record`] keeps it current.

    Args:
        trainer ([`~tide_hf.TIDETrainer`]): of the run.
        datasets (`list[str]`): Hub names or paths of what it trains on.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    is_adapter = hasattr(model, "get_base_model")
    base = model.get_base_model() if is_adapter else model
    teacher = getattr(trainer, "teacher", None)
    tokenizer = trainer.processing_class
    objective, arguments = _settings(trainer)
    return RunRecord(
        model_name="",
        location=".",
        start=_model_source(base, args),
        teachers=[] if teacher is None else [_model_source(getattr(teacher, "model", teacher), args)],
        datasets=[find_source(name, is_dataset=True, token=args.hub_token) for name in datasets],
        network={
            "architecture": type(base).__name__,
            "parameters": base.num_parameters(),
            "block_size": getattr(base.config, "block_size", None),
            "diffusion_type": base.config.diffusion_type,
        },
        objective=objective,
        arguments=arguments,
        seeds=[args.seed],
        environment=versions(),
        hardware=hardware(args.world_size),
        command=command_line(),
        commit=source_commit(),
        is_adapter=is_adapter,
        example_prompt=_understood_prompt(tokenizer),
        has_chat_template=getattr(tokenizer, "chat_template", None) is not None,
        method=objective.get("method", "tide"),
    )


def _settings(trainer) -> tuple[dict, dict]:
    """The objective, and the training arguments that differ from their defaults, as they are now."""
    objective, args = trainer.objective.to_dict(), trainer.args
    arguments = {name: value for name, value in changed_arguments(args).items() if name not in objective}
    if hasattr(args, "teacher_context") and getattr(trainer, "teacher", None) is not None:
        arguments["teacher_context"] = args.teacher_context
    return objective, arguments


def update_record(record: RunRecord, trainer) -> None:
    """Brings settings, progress, logs, preparation and the evaluations a trainer has made up to date."""
    given = {name: value for name, value in record.arguments.items() if name == "dataset_args"}
    record.objective, arguments = _settings(trainer)
    record.arguments = {**arguments, **given}
    record.step, record.max_steps = trainer.state.global_step, trainer.state.max_steps
    record.log_history = list(trainer.state.log_history)
    record.preparation = {
        name: vars(report) for name, report in trainer.preparation_reports.items() if report.num_rows
    }
    given = [result for result in record.results if not result.harness.endswith(_HARNESS)]
    record.results = given + _evaluations(trainer)


_HARNESS = "Trainer.evaluate"


def _evaluations(trainer) -> list[Measurement]:
    """The first evaluation if it came before training, and the last one."""
    entries = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    try:
        num_rows = len(trainer.eval_dataset)
    except TypeError:  # streamed, or none
        report = trainer.preparation_reports.get("eval")
        num_rows = 0 if report is None else report.num_kept
    if not num_rows:
        return []
    columns = {AFTER: entries[-1]} if entries and entries[-1]["step"] > 0 else {}
    columns |= {BEFORE: entries[0]} if entries and entries[0]["step"] == 0 else {}
    dataset = trainer.run_record.datasets[0].name if trainer.run_record.datasets else "held-out rows"
    found = []
    for network, entry in sorted(columns.items(), reverse=True):
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            if not key.startswith("eval_") or not (name in METRIC_NAMES or name.startswith("nll_")):
                continue
            metric = METRIC_NAMES.get(name, f"nats per masked token at t = {name.removeprefix('nll_')}")
            settings = f"noise keyed by (seed {trainer.args.seed}, row), after step {entry['step']}"
            harness = f"{type(trainer).__name__}.evaluate"
            found.append(Measurement(network, metric, value, dataset, harness, settings, num_rows, today()))
    return found


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def _model_source(model, args) -> Source:
    commit = getattr(model.config, "_commit_hash", None)
    return find_source(model.name_or_path, revision=commit, token=args.hub_token)


def _understood_prompt(tokenizer) -> str:
    """The first example prompt that the vocabulary can say."""
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids).replace(" ", "") == prompt.replace(" ", ""):
            return prompt
    return PROMPTS[0]
