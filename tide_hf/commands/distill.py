"""What the distillation recipes share: arguments as in TRL's scripts, and one run from names to a saved student."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import DatasetDict
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from ..data.loading import MixtureConfig, load_mixture, load_rows
from ..few_step import IDLMConfig, IDLMTrainer
from ..hub import NotAvailableError, PushError, require_available
from ..training.base import DiffusionTrainer
from ..training.config import DiffusionTrainingArguments, TIDEConfig
from ..training.nonfinite import NonFiniteError
from ..training.trainer import TIDETrainer


@dataclass
class DistillArguments(ScriptArguments):
    """TRL's dataset arguments, the teacher's name, and the seeds of an embedded comparison."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher: Hub name or folder. None only with --preset ce."}
    )
    seeds: int | None = field(
        default=None,
        metadata={"help": "Embedded comparisons only: how many seeds (sorting 3, python_stdlib and own data 1)."},
    )


@dataclass
class Arguments:
    """Everything a recipe was given; `given` names the flags that stood on the command line."""

    script: DistillArguments
    training: DiffusionTrainingArguments
    model: ModelConfig
    mixture: MixtureConfig
    given: set[str]


def parse_arguments(
    output_dir: str, command_line: list[str] | None = None, config_class: type[DiffusionTrainingArguments] = TIDEConfig
) -> Arguments:
    """Reads flags and `--config` file, and checks first that everything they name can be had.

    Args:
        output_dir (`str`): default of `--output_dir`.
        command_line (`list[str]`, *optional*): `sys.argv[1:]` by default.
        config_class (`type`): [`TIDEConfig`] or [`IDLMConfig`], whose fields are flags.

    Exits with one sentence if a model or dataset is neither local nor within reach.
    """
    command_line = sys.argv[1:] if command_line is None else command_line
    # names first: the training arguments are refused on a machine that does not fit them, whatever else is missing
    names = TrlParser((DistillArguments, ModelConfig, MixtureConfig))
    if not {"-h", "--help"} & set(command_line):
        check_available(*names.parse_args_and_config(command_line, return_remaining_strings=True)[:3])
    parser = TrlParser((DistillArguments, config_class, ModelConfig, MixtureConfig))
    parser.set_defaults(output_dir=output_dir)
    parsed = parser.parse_args_and_config(command_line)
    given = {flag[2:].split("=")[0].replace("-", "_") for flag in command_line if flag.startswith("--")}
    return Arguments(*parsed, given=given)


def run_distillation(arguments: Arguments) -> TIDETrainer:
    """Loads, trains, saves, and pushes where asked to."""
    return _run(arguments, lambda **kwargs: TIDETrainer(
        teacher=arguments.script.teacher_model_name_or_path, **kwargs
    ))  # fmt: skip


def run_inverse_distillation(arguments: Arguments) -> IDLMTrainer:
    """The same for a few-step student; `arguments.training` is an [`IDLMConfig`]."""
    if arguments.script.teacher_model_name_or_path is not None:
        sys.exit(
            "Inverse distillation takes no --teacher_model_name_or_path: the model of --model_name_or_path is "
            "teacher, fake and student."
        )
    assert isinstance(arguments.training, IDLMConfig)
    return _run(arguments, IDLMTrainer)


def _run(arguments: Arguments, make_trainer: Callable) -> DiffusionTrainer:
    """From names to a saved model."""
    script, training, model, mixture = arguments.script, arguments.training, arguments.model, arguments.mixture
    if not mixture.datasets and script.dataset_name is None:
        sys.exit("Nothing to train on: give --dataset_name (a Hub name, a .jsonl or .parquet file) or a mixture.")
    rows = load_named(script) if script.dataset_name is not None else load_mixture(mixture)
    evaluates = training.eval_strategy != "no"
    unread = [f"--{name}" for name in ("do_train", "do_eval", "do_predict") if getattr(training, name)]
    if unread and unread != ["--do_eval"] * evaluates:  # transformers sets do_eval where an eval_strategy is given
        sys.exit(f"{', '.join(unread)}: a recipe trains, and evaluates where --eval_strategy says so. Leave it out.")
    if evaluates and script.dataset_test_split not in rows:
        sys.exit(
            f"--eval_strategy {training.eval_strategy.value} needs a {script.dataset_test_split!r} split, and the "
            f"dataset has {', '.join(rows)}: set --dataset_test_split, or test_split_size in a mixture."
        )
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "quantization_config": get_quantization_config(model),
        **(training.model_init_kwargs or {}),
    }
    trainer = make_trainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=rows[script.dataset_train_split],
        eval_dataset=rows[script.dataset_test_split] if evaluates else None,
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision),
        peft_config=get_peft_config(model),
    )
    for name, report in trainer.preparation_reports.items():
        trainer.accelerator.print(f"{name}: {report}" if report.num_rows else f"{name}: prepared while streaming")
    trainer.set_data_sources([part.path for part in mixture.datasets] or [script.dataset_name])
    try:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        if training.push_to_hub:
            trainer.push_to_hub()
        else:
            trainer.save_model()
    except (NonFiniteError, PushError) as error:
        sys.exit(str(error))
    trainer.accelerator.print(f"Saved to {training.output_dir}")
    return trainer


def check_available(script: DistillArguments, model: ModelConfig, mixture: MixtureConfig) -> None:
    """Names everything a run with given models would miss; an embedded comparison needs nothing."""
    if model.model_name_or_path is None:
        return
    models = [name for name in (model.model_name_or_path, script.teacher_model_name_or_path) if name is not None]
    datasets = [part.path for part in mixture.datasets] if script.dataset_name is None else [script.dataset_name]
    try:
        require_available(models, list(dict.fromkeys(datasets)))
    except NotAvailableError as error:
        sys.exit(str(error))


def load_named(script: DistillArguments) -> DatasetDict:
    """All splits of one dataset; a single table counts as the training split."""
    rows = load_rows(script.dataset_name, script.dataset_config, split=None, streaming=script.dataset_streaming)
    return rows if isinstance(rows, dict) else DatasetDict({script.dataset_train_split: rows})
