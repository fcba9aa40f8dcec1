"""What the distillation recipes share: arguments as in TRL's scripts, and a run from names to a saved student."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict
from transformers import AutoTokenizer
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..data import DataError
from ..data.loading import MixtureConfig, load_mixture, load_rows
from ..few_step import IDLMConfig, IDLMTrainer
from ..hub import PushError, require_available
from ..hub.sources import is_hub_name
from ..training.base import DiffusionTrainer
from ..training.config import DiffusionTrainingArguments, TIDEConfig
from ..training.nonfinite import NonFiniteError
from ..training.trainer import TIDETrainer
from .parsing import RecipeParser
from .refusals import refusing


@dataclass
class DistillArguments(ScriptArguments):
    """TRL's dataset arguments, the teacher's name, and the seeds of an embedded comparison."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher: Hub name or folder. May be left out only with --preset ce."}
    )
    seeds: int | None = field(
        default=None,
        metadata={
            "help": "Embedded comparisons only: number of seeds (default: sorting 3, python_stdlib and own data 1)."
        },
    )


@dataclass
class Arguments:
    """Everything a recipe was given.

    Args:
        script ([`DistillArguments`]): teacher and dataset.
        training ([`DiffusionTrainingArguments`]): the run's.
        model (`ModelConfig`): the student, and how to load it.
        mixture ([`MixtureConfig`]): datasets of a YAML file.
        given (`set[str]`): names of the flags that stood on the command line.
    """

    script: DistillArguments
    training: DiffusionTrainingArguments
    model: ModelConfig
    mixture: MixtureConfig
    given: set[str]


def parse_arguments(
    output_dir: str, command_line: list[str] | None = None, config_class: type[DiffusionTrainingArguments] = TIDEConfig
) -> Arguments:
    """Reads flags and `--config` file, after checking that everything they name can be had.

    Exits with one line for a flag, choice or file that is wrong, and if a model or dataset is neither local nor within
    reach.

    Args:
        output_dir (`str`): default of `--output_dir`.
        command_line (`list[str]`, *optional*): `sys.argv[1:]` by default.
        config_class (`type`): [`TIDEConfig`] or [`IDLMConfig`], whose fields are flags.
    """
    command_line = sys.argv[1:] if command_line is None else command_line
    # what is missing is told first: the training arguments may be refused only for the machine they are read on
    names = RecipeParser((DistillArguments, ModelConfig, MixtureConfig))
    if not {"-h", "--help"} & set(command_line):
        check_available(*names.parse_args_and_config(command_line, return_remaining_strings=True)[:3])
    parser = RecipeParser((DistillArguments, config_class, ModelConfig, MixtureConfig))
    parser.set_defaults(output_dir=output_dir)
    parsed = parser.parse_args_and_config(command_line)
    given = {flag[2:].split("=")[0].replace("-", "_") for flag in command_line if flag.startswith("--")}
    return Arguments(*parsed, given=given)


def run_distillation(arguments: Arguments) -> TIDETrainer:
    """Loads, trains, saves, and pushes where asked to; exits with one line for what the user has to mend.

    Args:
        arguments ([`Arguments`]): as [`parse_arguments`] reads them, with a [`TIDEConfig`].

    Returns:
        [`TIDETrainer`]: after training.
    """
    return _run(arguments, lambda **kwargs: TIDETrainer(
        teacher=arguments.script.teacher_model_name_or_path, **kwargs
    ))  # fmt: skip


def run_inverse_distillation(arguments: Arguments) -> IDLMTrainer:
    """The same for a few-step student.

    Args:
        arguments ([`Arguments`]): as [`parse_arguments`] reads them, with an [`IDLMConfig`].

    Returns:
        [`IDLMTrainer`]: after training.
    """
    if arguments.script.teacher_model_name_or_path is not None:
        sys.exit(
            "Inverse distillation takes no --teacher_model_name_or_path: the model of --model_name_or_path is "
            "teacher, fake and student."
        )
    assert isinstance(arguments.training, IDLMConfig)
    return _run(arguments, IDLMTrainer)


def _run(arguments: Arguments, make_trainer: Callable) -> DiffusionTrainer:
    """From names to a saved model."""
    training, mixture = arguments.training, arguments.mixture
    with refusing():
        trainer = _prepared_trainer(arguments, make_trainer)
    for name, report in trainer.preparation_reports.items():
        trainer.accelerator.print(f"{name}: {report}" if report.num_rows else f"{name}: prepared while streaming")
    trainer.set_data_sources([part.path for part in mixture.datasets] or [arguments.script.dataset_name])
    # from here on other errors are not the user's, and keep their traceback
    with refusing(kinds=(DataError, NonFiniteError, PushError)):
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        if training.push_to_hub:
            trainer.push_to_hub()
        else:
            trainer.save_model()
    trainer.accelerator.print(f"Saved to {training.output_dir}")
    return trainer


def _prepared_trainer(arguments: Arguments, make_trainer: Callable) -> DiffusionTrainer:
    """Loads rows and models."""
    script, training, model = arguments.script, arguments.training, arguments.model
    _check_resume(training.resume_from_checkpoint)
    rows = _load_rows(arguments)
    evaluates = training.eval_strategy != "no"
    if script.dataset_train_split not in rows:
        sys.exit(
            f"The dataset has no {script.dataset_train_split!r} split, but {', '.join(rows)}: set "
            "--dataset_train_split."
        )
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
    return make_trainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=rows[script.dataset_train_split],
        eval_dataset=rows[script.dataset_test_split] if evaluates else None,
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision),
        peft_config=get_peft_config(model),
    )


def _load_rows(arguments: Arguments) -> DatasetDict:
    """All splits of the dataset or mixture that is named."""
    script, training, mixture = arguments.script, arguments.training, arguments.mixture
    if not mixture.datasets and script.dataset_name is None:
        sys.exit("Nothing to train on: give --dataset_name (a Hub name, a .jsonl or .parquet file) or a mixture.")
    unread = [f"--{name}" for name in ("do_train", "do_eval", "do_predict") if getattr(training, name)]
    evaluates = training.eval_strategy != "no"
    if unread and unread != ["--do_eval"] * evaluates:  # transformers sets do_eval where an eval_strategy is given
        sys.exit(f"{', '.join(unread)}: a recipe trains, and evaluates where --eval_strategy says so. Leave it out.")
    if script.dataset_name is not None:
        return load_named(script)
    return load_mixture(mixture, prompts_alone=getattr(training, "on_policy_fraction", 0) == 1)


def _check_resume(name: str | None) -> None:
    """Refuses a checkpoint that is neither a folder nor a name on the Hub, before anything is loaded."""
    if name is None or (Path(name) / TRAINER_STATE_NAME).is_file():
        return
    if Path(name).exists() or "/" not in name or not is_hub_name(name.split("@")[0]):
        sys.exit(
            f"--resume_from_checkpoint {name} holds no {TRAINER_STATE_NAME}: give a checkpoint-… folder of an earlier "
            "run, or the Hub repository that it pushed to."
        )


def check_available(script: DistillArguments, model: ModelConfig, mixture: MixtureConfig) -> None:
    """Exits with one line that names everything a run with given models would miss; an embedded comparison needs none.

    Args:
        script ([`DistillArguments`]): names teacher and dataset.
        model (`ModelConfig`): names the student; without a name nothing is checked.
        mixture ([`MixtureConfig`]): names datasets, unless `script` does.
    """
    if model.model_name_or_path is None:
        return
    models = [name for name in (model.model_name_or_path, script.teacher_model_name_or_path) if name is not None]
    datasets = [part.path for part in mixture.datasets] if script.dataset_name is None else [script.dataset_name]
    with refusing():
        require_available(models, list(dict.fromkeys(datasets)))


def load_named(script: DistillArguments) -> DatasetDict:
    """Loads all splits of the dataset that `--dataset_name` names; a single table counts as the training split.

    Args:
        script ([`DistillArguments`]): names the dataset, its configuration and splits.
    """
    rows = load_rows(script.dataset_name, script.dataset_config, split=None, streaming=script.dataset_streaming)
    return rows if isinstance(rows, dict) else DatasetDict({script.dataset_train_split: rows})
