"""Preparing a dataset once, from names to a saved or pushed one.

Reads two tokenizers and configs; weights only of a teacher that writes the answers or whose predictions are kept.
"""

import json
import sys
from dataclasses import dataclass, field, fields, make_dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, AutoTokenizer
from trl import ModelConfig

from ..data import PreparationRecord, write_prepared
from ..data.answers import AnswerRecord, describe_answers
from ..data.loading import MixtureConfig, load_mixture
from ..data.teacher_cache import num_bytes
from ..hub import dataset_card, find_source, require_available
from ..hub.sources import PERMISSIVE, Source, resolve_license
from ..teachers.answers import DIFFUSION, kind_of
from ..training.config import RANGES, TIDEConfig, check_ranges, check_types, declared_types
from ..training.plan import RunPlan, resolve_plan
from ..training.presets import resolve_objective
from .answer_arguments import AnswerArguments, TeacherModel, launched
from .answers import write_answers
from .cache import CacheArguments, add_predictions, describe_predictions, plan_of
from .distill import DistillArguments, check_available, load_named
from .parsing import RecipeParser
from .part_folder import PartFolder, wait_until
from .refusals import refusing

# all settings of a run: its rows depend on some of them, and what is kept of a teacher's predictions on others
DECLARED = declared_types(TIDEConfig)


def _check_settings(settings) -> None:
    check_types(settings, DECLARED)
    check_ranges(settings, RANGES)


# the same fields, defaults and help texts, without the checks of a training run on this machine
RunSettings = make_dataclass(
    "RunSettings",
    [
        (knob.name, DECLARED[knob.name], field(default=knob.default, metadata=knob.metadata))
        for knob in fields(TIDEConfig)
        if knob.name in DECLARED
    ]
    + [
        (name, kind, field(default=default, metadata={"help": f"Of the run: {text}; read by teacher_cache."}))
        for name, kind, default, text in (
            ("seed", int, 42, "the seed of its noise"),
            ("num_train_epochs", float, 3.0, "passes over the rows"),
        )
    ],
    namespace={"__post_init__": _check_settings},
)


@dataclass
class WriteArguments:
    """Where the prepared dataset goes. Its fields are flags of [`parse_prepare_arguments`]."""

    output_dir: str = field(
        default="prepared",
        metadata={
            "help": "Folder for the prepared dataset; output_dir in a config file, where a run saves, is not read."
        },
    )
    rows_per_part: int = field(
        default=10_000, metadata={"help": "Raw rows written at a time, the most that an interruption loses."}
    )
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Dataset on the Hub to push to as well."})
    hub_private: bool = field(default=False, metadata={"help": "Make the pushed dataset private if it is new."})


@dataclass
class PrepareArguments:
    """Everything the preparation was given.

    Args:
        script ([`DistillArguments`]): teacher and dataset.
        run (`RunSettings`): the library's own settings of a [`TIDEConfig`], its seed and number of passes.
        write ([`WriteArguments`]): where the rows go.
        model (`ModelConfig`): the student.
        mixture ([`MixtureConfig`]): datasets of a YAML file.
        answers ([`AnswerArguments`]): whether and how the teacher writes the answers.
        cache ([`CacheArguments`]): whether and how its predictions are kept.
    """

    script: DistillArguments
    run: RunSettings
    write: WriteArguments
    model: ModelConfig
    mixture: MixtureConfig
    answers: AnswerArguments = field(default_factory=AnswerArguments)
    cache: CacheArguments = field(default_factory=CacheArguments)


def parse_prepare_arguments(command_line: list[str] | None = None) -> PrepareArguments:
    """Reads flags and `--config` file; settings in the file that concern only the training are ignored.

    Exits with one line for an unknown flag or choice, and if something is missing or out of reach.

    Args:
        command_line (`list[str]`, *optional*): `sys.argv[1:]` by default.
    """
    command_line = sys.argv[1:] if command_line is None else command_line
    kinds = (
        DistillArguments,
        RunSettings,
        WriteArguments,
        ModelConfig,
        MixtureConfig,
        AnswerArguments,
        CacheArguments,
    )
    parser = RecipeParser(kinds)
    *parsed, remaining = parser.parse_args_and_config(command_line, return_remaining_strings=True)
    arguments = PrepareArguments(*parsed)
    flags = [word[2:].split("=")[0].replace("-", "_") for word in remaining if word.startswith("--")]
    unknown = sorted(set(flags) - {knob.name for knob in fields(TIDEConfig)})
    if unknown:
        parser.error(f"unknown: {', '.join('--' + name for name in unknown)}")
    if not any(word.split("=")[0].replace("-", "_") == "__output_dir" for word in command_line):
        arguments.write.output_dir = WriteArguments.output_dir
    named = arguments.mixture.datasets or arguments.script.dataset_name
    if arguments.answers.teacher_answers is not None:
        _check_answers(arguments, named)
    elif arguments.model.model_name_or_path is None or not named:
        sys.exit(
            "Nothing to prepare: give --model_name_or_path (the student, for its tokenizer), "
            "--teacher_model_name_or_path and --dataset_name (a Hub name, a .jsonl or .parquet file), or --config "
            "with them."
        )
    if arguments.cache.teacher_cache:
        _check_cache(arguments)
    check_available(arguments.script, arguments.model, arguments.mixture)
    return arguments


def _check_cache(arguments: PrepareArguments) -> None:
    """Exits with one line for what the teacher's predictions miss."""
    script, model = arguments.script, arguments.model
    if script.teacher_model_name_or_path is None or model.model_name_or_path is None:
        sys.exit(
            "--teacher_cache keeps what a student needs of a teacher's predictions: give --model_name_or_path (the "
            "student) and --teacher_model_name_or_path."
        )
    if arguments.answers.teacher_answers is not None and launched()[1] > 1:
        sys.exit(
            "--teacher_answers and --teacher_cache in one call go with one process: write the answers first, then "
            "give their folder as --dataset_name with --teacher_cache."
        )


def _check_answers(arguments: PrepareArguments, named) -> None:
    """Exits with one line for what the teacher's answers miss; without a student only they are written."""
    script, model, write = arguments.script, arguments.model, arguments.write
    if script.teacher_model_name_or_path is None or not named:
        sys.exit(
            "Nothing to answer: --teacher_answers needs --teacher_model_name_or_path and --dataset_name (a Hub name, "
            "a .jsonl or .parquet file), or --config with them."
        )
    if model.model_name_or_path is None and write.hub_dataset_id is not None:
        sys.exit(
            "--hub_dataset_id pushes a prepared dataset, and without --model_name_or_path (the student) there is "
            "none: give it, or push the answers yourself with load_from_disk(…).push_to_hub(…)."
        )
    with refusing():
        datasets = [part.path for part in arguments.mixture.datasets] or [script.dataset_name]
        require_available([script.teacher_model_name_or_path], list(dict.fromkeys(datasets)))


def run_preparation(arguments: PrepareArguments) -> DatasetDict | None:
    """Loads tokenizers, configs and rows; prepares, saves, and pushes where asked to. Prints the reports.

    With `teacher_answers` the teacher first writes the answers; without a student, only that is done.

    Exits with one line for what the user has to mend.

    Args:
        arguments ([`PrepareArguments`]): as [`parse_prepare_arguments`] reads them.

    Returns:
        `DatasetDict`: the prepared splits, or the answers; None in the further processes of a launch.
    """
    with refusing():
        dataset = _prepared(arguments)
        if dataset is None or arguments.model.model_name_or_path is None:
            return dataset
        write = arguments.write
        for name, prepared in dataset.items():
            record = PreparationRecord.read(prepared)
            print(f"{name}: {record.reports[name]}")
            if record.cache is not None:
                size = num_bytes(prepared) / max(record.reports[name].num_trained_tokens, 1)
                print(f"{name}: {record.cache.describe()}, {size:.1f} bytes per trained-on token")
        print(f"Saved to {write.output_dir}: train with --dataset_name {write.output_dir}")
        if write.hub_dataset_id is not None:
            _push(dataset, arguments)
            print(f"Pushed to {write.hub_dataset_id}: train with --dataset_name {write.hub_dataset_id}")
    return dataset


def _prepared(arguments: PrepareArguments) -> DatasetDict | None:
    """From names to a saved dataset."""
    script, write, mixture = arguments.script, arguments.write, arguments.mixture
    writes, predicts, plan = arguments.answers.teacher_answers is not None, arguments.cache.teacher_cache, None
    if arguments.model.model_name_or_path is not None:
        teacher = script.teacher_model_name_or_path
        if writes and not predicts and kind_of(_teacher_model(arguments).config()) != DIFFUSION:
            teacher = None  # it writes the answers, and the student is trained on these alone
        plan = plan_from_names(teacher, arguments.model, arguments.run, predicts)
    rows = load_named(script) if script.dataset_name is not None else load_mixture(mixture, prompts_alone=writes)
    wanted = dict.fromkeys([script.dataset_train_split, script.dataset_test_split])
    splits = {name: rows[name] for name in wanted if name in rows}
    if not splits:
        sys.exit(
            f"The dataset has the splits {', '.join(rows)}, but none of {', '.join(wanted)}: set "
            "--dataset_train_split and --dataset_test_split."
        )
    source = _source(arguments, splits)
    if writes:
        answers_dir = arguments.answers.answers_dir or f"{write.output_dir}{'' if plan is None else '-answers'}"
        splits = _answered(arguments, splits, answers_dir, source)
        if splits is None or plan is None:
            return splits
        source = {**source, "answers": AnswerRecord.read(next(iter(splits.values()))).settings}
    portions = {"num_proc": arguments.run.dataset_num_proc, "rows_per_part": write.rows_per_part}
    if predicts:
        return _with_predictions(arguments, splits, plan, source, portions)
    return write_prepared(splits, plan.preparation, write.output_dir, source=source, **portions)


def _with_predictions(
    arguments: PrepareArguments, splits: dict, plan: RunPlan, source: dict, portions: dict
) -> DatasetDict | None:
    """Rows with the teacher's predictions; None in the further processes of a launch, which share the work."""
    folder, teacher, how = Path(arguments.write.output_dir), _teacher_model(arguments), arguments.cache
    cache = describe_predictions(teacher, plan, arguments.run, how)
    kept = plan_of(PreparationRecord.of(plan.preparation).settings, cache, source, list(splits))
    result = PartFolder(folder, kept, "teacher_cache.json", "rows with a teacher's predictions", "output_dir")
    is_main = launched()[0] == 0
    if not result.is_finished() and result.open(is_main, cache_rows_per_part=how.cache_rows_per_part):
        rows = result.work / "rows"
        if is_main:
            write_prepared(splits, plan.preparation, rows, source=source, **portions)
        # of a call that is resumed, the first process may have joined and removed all parts by now
        wait_until(lambda: rows.is_dir() or result.is_finished())
        if not result.is_finished():
            train_split = arguments.script.dataset_train_split
            add_predictions(load_from_disk(rows), cache, plan, teacher, how, result, train_split)
    return load_from_disk(folder) if is_main else None


def _teacher_model(arguments: PrepareArguments) -> TeacherModel:
    """The teacher that writes or predicts."""
    run, given = arguments.run, arguments.run.teacher_model_init_kwargs or {}
    given = json.loads(given) if isinstance(given, str) else given
    return TeacherModel(
        arguments.script.teacher_model_name_or_path, run.teacher_dtype, run.teacher_load_in_4bit, given
    )


def _answered(arguments: PrepareArguments, splits: dict, folder: str, source: dict) -> DatasetDict | None:
    """The answers of the teacher to all splits, with what became of them printed."""
    sources = _data_sources(arguments)
    answers = write_answers(
        splits,
        _teacher_model(arguments),
        arguments.answers,
        folder,
        source,
        arguments.run.chat_template_kwargs,
        arguments.run.dataset_num_proc,
        _license([*sources, *_writers(arguments)]),
    )
    if answers is not None:
        record = AnswerRecord.read(next(iter(answers.values())))
        for name in answers:
            print(f"{name}: {describe_answers(record.of_split(name))}")
        print(f"The answers are in {folder}: prepare them for any student with --dataset_name {folder}")
    return answers


def plan_from_names(
    teacher: str | None, model: ModelConfig, run: RunSettings, with_objective: bool = False
) -> RunPlan:
    """What a training run of these models with these settings would feed its networks; loads no weights.

    Args:
        teacher (`str`, *optional*): Hub name or folder; None for a run without teacher.
        model (`ModelConfig`): names the student.
        run (`RunSettings`): the settings that preparation and training have in common.
        with_objective (`bool`): whether the objective is decided too, and with it how the teacher is fed.
    """
    config = AutoConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    if not hasattr(config, "diffusion_type"):
        sys.exit(
            f"The student {model.model_name_or_path} (model_type={config.model_type!r}) is not a diffusion LM that "
            "this library knows: name one of its own (tide_…), a published one (a2d-…, LLaDA, LLaDA2, SDAR, Dream, "
            "WeDLM), or convert one with recipes/convert_ar.py."
        )
    decide = partial(resolve_objective, run) if with_objective else None
    if teacher is None:
        return resolve_plan(run, config, tokenizer, decide=decide)
    settings, teacher_tokenizer = AutoConfig.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    return resolve_plan(run, config, tokenizer, teacher_tokenizer, lambda: settings, decide)


def _push(dataset: DatasetDict, arguments: PrepareArguments) -> None:
    """Pushes the card first: no state on the Hub has rows without one, and `push_to_hub` adds its metadata to it."""
    write, api = arguments.write, HfApi()
    created = api.create_repo(
        write.hub_dataset_id, repo_type="dataset", private=write.hub_private or None, exist_ok=True
    )
    repo = {"repo_id": created.repo_id, "repo_type": "dataset"}
    try:
        existing = Path(api.hf_hub_download(filename=constants.REPOCARD_NAME, **repo)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        existing = ""
    sources = _data_sources(arguments)
    record = PreparationRecord.read(next(iter(dataset.values())))
    settings = {name: value for name, value in record.settings.items() if value is not None}
    tokenizers = {name: value for name, value in settings.items() if isinstance(value, dict)}
    card = dataset_card(
        repo_id=created.repo_id,
        reports=record.reports,
        sources=[source.name for source in sources if source.on_hub],
        student_tokenizer=tokenizers["tokenizer"]["name"],
        teacher_tokenizer=tokenizers["teacher_tokenizer"]["name"] if "teacher_tokenizer" in tokenizers else None,
        settings=settings | {name: f"fingerprint {value['fingerprint']}" for name, value in tokenizers.items()},
        languages=list(dict.fromkeys(code for source in sources for code in source.languages)),
        existing=existing,
        predictions=None if record.cache is None else record.cache.describe(),
        **_license([*sources, *_writers(arguments)]),
    )
    api.upload_file(
        path_or_fileobj=card.encode(), path_in_repo=constants.REPOCARD_NAME, commit_message="Dataset card", **repo
    )
    dataset.push_to_hub(created.repo_id)


def _data_sources(arguments: PrepareArguments) -> list[Source]:
    """The datasets that the rows come from."""
    script = arguments.script
    names = [part.path for part in arguments.mixture.datasets]
    names = names if script.dataset_name is None else [script.dataset_name]
    return [find_source(name, is_dataset=True) for name in dict.fromkeys(names)]


def _writers(arguments: PrepareArguments) -> list[Source]:
    """The teacher, if it wrote the answers."""
    writes = arguments.answers.teacher_answers is not None
    return [find_source(arguments.script.teacher_model_name_or_path)] if writes else []


def _license(sources: list[Source]) -> dict[str, str]:
    """The licence of rows from these sources: a restrictive one is carried over, others only where all agree."""
    stated = {source.license for source in sources}
    return resolve_license(sources) if len(stated) == 1 or stated - {None, *PERMISSIVE} else {}


def _source(arguments: PrepareArguments, splits: dict) -> dict:
    """What the rows are, so that an interrupted preparation is continued only with the same ones."""
    script, mixture = arguments.script, arguments.mixture
    if script.dataset_name is not None:
        named = {"dataset_name": script.dataset_name, "dataset_config": script.dataset_config}
    else:
        named = {"datasets": [vars(part) for part in mixture.datasets], "test_split_size": mixture.test_split_size}
    sizes = {name: len(rows) for name, rows in splits.items() if isinstance(rows, Dataset)}
    return {**named, "num_rows": sizes}
