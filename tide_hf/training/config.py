"""TIDEConfig: transformers' training arguments plus every knob of the distillation; and what other configs share."""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from inspect import get_annotations
from itertools import chain
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

from transformers import TrainingArguments

from ..alignment import ALIGNMENTS
from ..data import EOS_FILLS, TRAINED_TURNS
from ..losses import DIVERGENCES
from ..models.masked_diffusion import SCHEDULES, TIME_EPSILON
from .arguments import check_training_arguments
from .checks import check_block_size
from .objective import NO_DIVERGENCE
from .presets import PRESETS
from .rollout_fields import ROLLOUT_FIELDS, ROLLOUT_RANGES, check_rollout_fields

# fields whose choices programs may add to: what the tables hold when a value is checked counts
REGISTRIES: dict[str, tuple[Collection[str], ...]] = {
    "schedule": (SCHEDULES,),
    "preset": (PRESETS,),
    "divergence": (DIVERGENCES, (NO_DIVERGENCE,)),
}
# parameters of the divergences, as fields of TIDEConfig: {divergence}_{parameter}
PARAMETERS = {f"{name}_{knob.name}": knob for name, cls in DIVERGENCES.items() for knob in fields(cls)}
# field -> (smallest, largest, whether the ends are allowed); None, NaN and infinities never lie in a range
RANGES = {
    "max_length": (1, float("inf"), True),
    "teacher_max_length": (1, float("inf"), True),
    "dataset_num_proc": (1, float("inf"), True),
    "mask_token_id": (0, float("inf"), True),
    "teacher_mask_token_id": (0, float("inf"), True),
    "shared_vocab_size": (1, float("inf"), True),
    "temperature": (0.0, float("inf"), False),
    "ce_weight": (0.0, float("inf"), True),
    "distill_weight": (0.0, float("inf"), True),
    "lambda_init": (0.0, 1.0, True),
    "lambda_max": (0.0, 1.0, True),
    "demo_ratio": (0.0, 1.0, True),
    "suffix_mask_fraction": (0.0, 1.0, True),
    **{name: (*knob.metadata["range"], False) for name, knob in PARAMETERS.items()},
    "time_epsilon": (0.0, 1.0, False),
    **ROLLOUT_RANGES,
}
# metrics of the trainers, all of them the smaller the better, with or without a dataset's name in front
OWN_METRIC = re.compile(r"(^|_)(loss|ce|ce_answer|distill|nll_[\d.e-]+)$")


def _knob(default, text: str):
    return field(default=default, metadata={"help": text})


def choices_of(name: str) -> tuple[str, ...]:
    """What the registries of a field, by `name`, hold at the moment; empty for a field without one."""
    return tuple(chain(*REGISTRIES.get(name, ())))


def declared_types(cls: type) -> dict[str, object]:
    """The library's own fields of a configuration and their types as written in the class.

    `dataclasses.fields` does not serve: HfArgumentParser overwrites the types there.

    Args:
        cls (`type`): a [`DiffusionTrainingArguments`] or a subclass.
    """
    declared = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, DiffusionTrainingArguments):
            declared |= {name: kind for name, kind in get_annotations(base).items() if name[0] != "_"}
    return declared


def check_types(config, declared: Mapping[str, object]) -> None:
    """Checks that the fields of a configuration hold what they are declared to.

    Args:
        config: any object with these fields.
        declared (`Mapping[str, object]`): field -> type; a `Literal` lists its choices, unless the field is one of
            `REGISTRIES`.

    Raises:
        ValueError: naming the field, its value, and the choices or types that are allowed.
    """
    for name, kind in declared.items():
        value = getattr(config, name)
        parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        choices = next((get_args(part) for part in parts if get_origin(part) is Literal), None)
        if choices is not None:
            choices = choices_of(name) or choices
            if value not in choices and not (value is None and NoneType in parts):
                raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}.")
        elif not any(_is_of(value, part) for part in parts):
            names = " or ".join("None" if part is NoneType else getattr(part, "__name__", str(part)) for part in parts)
            raise ValueError(f"{name}={value!r} has the type {type(value).__name__}; expected {names}.")


def check_ranges(config, ranges: Mapping[str, tuple[float, float, bool]]) -> None:
    """Checks those numbers of a configuration that it has; None always passes.

    Args:
        config: any object with fields.
        ranges (`Mapping[str, tuple]`): field -> smallest and largest value, and whether these two are allowed.

    Raises:
        ValueError: naming the field, its value and the range.
    """
    for name, (low, high, closed) in ranges.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        inside = low <= value <= high if closed else low < value < high
        if not (inside and math.isfinite(value)):
            ends = "[]" if closed and high != float("inf") else "[)" if closed else "()"
            raise ValueError(f"{name}={value} is out of range; it must lie in {ends[0]}{low:g}, {high:g}{ends[1]}.")


def _is_of(value, kind) -> bool:
    """Whether a value is of a declared type: an integer is a float too, and True is neither."""
    kind = get_origin(kind) or kind
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind))


@dataclass
class DiffusionTrainingArguments(TrainingArguments):
    """What the trainers of diffusion LMs have in common: forward process, blocks, rows.

    Everything in [`~transformers.TrainingArguments`], and the fields below.

    Raises:
        ValueError: for an unknown choice or a number out of range, with what is allowed.
    """

    schedule: Literal[tuple(SCHEDULES)] | None = _knob(
        None,
        "α(t), the probability that a position is still clean at diffusion time t: linear, 1−t, or cosine; by default "
        "the student's own. A schedule given here is written into the student's config.",
    )
    time_epsilon: float = _knob(TIME_EPSILON, "Smallest diffusion time, in (0, 1).")
    block_size: int | None = _knob(
        None,
        "Tokens per diffusion block, a divisor of max_length; by default the student's own. A size given here is "
        "written into the student's config and generation config.",
    )
    max_length: int = _knob(512, "Maximum number of tokens in a student row; longer rows are truncated.")
    eos_fill: Literal[EOS_FILLS] = _knob(
        "block",
        "EOS tokens after the last answer, trained on: none; block, to the end of its block (also of a full-sequence "
        "student's, which is not fed blocks); end, to max_length.",
    )
    trained_turns: Literal[TRAINED_TURNS] = _knob(
        "all", "Assistant turns of a conversation that are trained on: all of them, or only the last."
    )
    chat_template: str | None = _knob(
        None, "Chat template to use instead of the tokenizer's: a .jinja file or the template itself."
    )
    chat_template_kwargs: dict | str | None = _knob(
        None,
        "Settings passed to the chat templates (JSON on a command line). By default those stored in the student's "
        "template, else enable_thinking=false where a template reads it.",
    )
    dataset_num_proc: int | None = _knob(None, "Number of processes that prepare the dataset.")
    mask_token_id: int | None = _knob(None, "Id of the student's [MASK]; by default from its config or tokenizer.")
    nonfinite: Literal["stop", "skip"] = _knob(
        "stop",
        "What to do about a NaN or infinite loss or gradient: stop the run before the optimizer steps, or skip the "
        "step (ten in a row stop the run). Either way the step's batches are written to nonfinite-step….pt.",
    )
    model_init_kwargs: dict | str | None = _knob(
        None, "Arguments of from_pretrained for the student (JSON on a command line)."
    )
    remove_unused_columns: bool | None = _knob(
        False, "Must stay False: a training step needs row_key and the chunk columns."
    )
    logging_nan_inf_filter: bool = _knob(
        False,
        "transformers' filter, which hides a non-finite loss from the log and makes the host wait for the GPU twice "
        "per micro-batch. Not needed here: see nonfinite.",
    )

    _VALID_DICT_FIELDS = [  # noqa: RUF012  (transformers')
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "chat_template_kwargs",
    ]

    # further fields of TrainingArguments that a trainer refuses -> why
    REFUSED = {}  # noqa: RUF012

    def __post_init__(self):
        self.check_own_fields()
        for name in self._VALID_DICT_FIELDS:  # transformers reads this JSON too, and its error names no field
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name}={value!r} is not valid JSON: {error}.") from None
        metric = self.metric_for_best_model
        if self.greater_is_better is None and metric is not None and OWN_METRIC.search(metric):
            self.greater_is_better = False  # transformers' default is True unless the name ends in "loss"
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # every process reads a streaming dataset itself and draws noise on the host: nothing is broadcast
            self.accelerator_config.dispatch_batches = False
        self.check()

    def check(self) -> None:
        """Checks all fields. Trainers call it at construction and before training: fields can be assigned later.

        Raises:
            ValueError: naming the field, its value, and what is allowed.
        """
        self.check_own_fields()
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            value = getattr(self, name, None)
            if isinstance(value, str):
                raise ValueError(
                    f"{name}={value!r} is not a dictionary; on a command line give JSON: '{{\"dtype\": …}}'."
                )
        check_training_arguments(self, self.REFUSED)

    def check_own_fields(self) -> None:
        """Checks the fields that transformers does not know.

        Raises:
            ValueError: naming the field, its value, and what is allowed.
        """
        check_types(self, declared_types(type(self)))
        check_ranges(self, RANGES)
        if self.block_size is not None:
            check_block_size(self.block_size, self.max_length)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop row_key, which keys the noise; leave it False.")


_DivergenceParameters = make_dataclass(
    "_DivergenceParameters",
    [
        (name, float | None, _knob(None, f"{knob.metadata['help']}. By default {knob.default:g}."))
        for name, knob in PARAMETERS.items()
    ]
    + [(name, kind, _knob(default, text)) for name, (kind, default, text) in ROLLOUT_FIELDS.items()],
    bases=(DiffusionTrainingArguments,),
)


@dataclass
class TIDEConfig(_DivergenceParameters):
    """Arguments of [`TIDETrainer`].

    Everything in [`DiffusionTrainingArguments`], and the fields below. Those that default to None are filled in from
    `preset` once both tokenizers are known (see `trainer.objective`); a given value always wins.

    Raises:
        ValueError: for an unknown choice or a number out of range, with what is allowed.
    """

    preset: Literal[tuple(PRESETS)] | None = _knob(
        "tide-shared",
        "Objective to start from: tide-shared (CE + TIDAL + CompDemo), tide-cross (CE + Reverse CALM; with one shared "
        "tokenizer reverse KL), or a baseline: kl, reverse-kl, calm, ce (no teacher). Source: TIDE (arXiv "
        "2604.26951), table of hyperparameters. With an autoregressive teacher: ar-kl (shared tokenizer) or ar-calm.",
    )
    alignment: Literal[("auto", *ALIGNMENTS)] = _knob(
        "auto", "token (one shared tokenizer), chunk (two tokenizers), or auto: decided by comparing the tokenizers."
    )
    divergence: Literal[(*DIVERGENCES, NO_DIVERGENCE)] | None = _knob(
        None,
        "Divergence between student and teacher, "
        + "; ".join(
            f"of {pairs}s: {', '.join(name for name, cls in DIVERGENCES.items() if cls.pairs == pairs)}"
            for pairs in ("token", "chunk")
        )
        + "; or none.",
    )
    tidal: bool | None = _knob(
        None, "TIDAL: the target moves from the student's own distribution to the teacher's as training progresses."
    )
    allow_reverse_tidal: bool = _knob(False, "Allow tidal with reverse_calm, an ablation in the paper's code.")
    comp_demo: bool | None = _knob(
        None, "CompDemo: the teacher predicts each half of the masked positions with the other half revealed."
    )
    ar_targets: Literal["exact", "all", "annealed"] | None = _knob(
        None,
        "Which masked positions an autoregressive teacher is a target at: exact, those without a visible token to "
        "their right in their block, where its prediction is right on average; all, which teaches faster and is "
        "biased in the end; annealed, all, with a weight of the inexact ones that falls from 1 to 0 over training "
        "(the term is divided by the number of all of them). By default all.",
    )
    suffix_mask_fraction: float | None = _knob(
        None,
        "Share of the rows, drawn anew for each pass, in which the end of each block is masked from a uniform cut on, "
        "instead of single tokens: what decoding from left to right sees. Their denoising loss has the weight 1/P, P "
        "the probability with which a token is masked so. By default 0; 0.5 where ar_targets is exact.",
    )
    demo_ratio: float | None = _knob(
        None, "CompDemo: probability that a masked position falls into the first half. Preset value: 0.5."
    )
    ce_weight: float | None = _knob(None, "Weight of the denoising loss on the data. Preset value: 1.")
    distill_weight: float | None = _knob(None, "Weight of the divergence or of TIDAL. Preset value: 1.")
    temperature: float | None = _knob(
        None,
        "Temperature T > 0 of both softmaxes, whose term is multiplied by T²; chunk probabilities are taken to the "
        "power 1/T. Preset value: 2.",
    )
    lambda_init: float | None = _knob(
        None, "TIDAL: λ, the teacher's share of the target, at the start of training, in [0, 1]. Preset value: 0.1."
    )
    lambda_max: float | None = _knob(None, "TIDAL: λ at the end of training, in [0, 1]. Preset value: 0.9.")
    lambda_growth: Literal["linear", "cosine"] | None = _knob(
        None, "TIDAL: how λ grows over training. Preset value: cosine."
    )
    lambda_axes: Literal["both", "progress", "time"] | None = _knob(
        None,
        "TIDAL: what λ depends on: both training progress s and diffusion time t, λ(s)(1−t); progress alone, λ(s); or "
        "time alone, λ_max(1−t). Preset value: both.",
    )
    timestep_weight: Literal["midrange", "uniform"] | None = _knob(
        None, "TIDAL: ω(t), midrange exp(−(t−½)²/(2·0.15²)) or uniform. Preset value: midrange."
    )
    tidal_normalization: Literal["none", "expected"] | None = _knob(
        None,
        "none (as in the paper), or expected: divide TIDAL by its average strength relative to KL (0.0856 with the "
        "defaults), so that distill_weight means the same for every objective. Preset value: none.",
    )
    ce_weighting: Literal["schedule", "uniform"] = _knob(
        "schedule",
        "Weight of the denoising loss at time t: schedule, −α′/(1−α), which is 1/t for the linear schedule; or "
        "uniform.",
    )
    chunk_weighting: Literal["paper", "exact"] = _knob(
        "exact",
        "With two tokenizers, a chunk of k trained-on tokens is masked as a whole, so more often than a single token. "
        "exact weights its denoising loss by −α′/(1−α^k); paper ignores this and gives long chunks too much weight.",
    )
    loss_normalization: Literal["token", "sequence", "batch"] = _knob(
        "token",
        "What the denoising loss is divided by: the trained-on tokens of the global batch (token), those of each "
        "sequence and then the number of sequences (sequence), or only the number of sequences (batch).",
    )
    teacher_max_length: int | None = _knob(None, "Maximum number of tokens in a teacher row; by default max_length.")
    eval_noise_levels: list[float] | None = _knob(
        None, "Diffusion times at which evaluation also reports the negative log-likelihood per masked token, in nats."
    )
    teacher_mask_token_id: int | None = _knob(
        None, "Id of the teacher's [MASK]; by default from its config, tokenizer or model family."
    )
    shared_vocab_size: int | None = _knob(
        None, "Number of leading ids that mean the same on both sides; by default found by comparing the tokenizers."
    )
    teacher_context: Literal["paper", "native"] = _knob(
        "paper", "What the teacher sees: paper (as published TIDE fed it) or native (as it was trained)."
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _knob(
        "auto", "Precision to load the teacher in; auto is the checkpoint's own."
    )
    teacher_load_in_4bit: bool = _knob(False, "Load the teacher in 4 bits (needs the quant extra).")
    teacher_model_init_kwargs: dict | str | None = _knob(
        None, "Arguments of from_pretrained for the teacher (JSON on a command line)."
    )

    _VALID_DICT_FIELDS = [*DiffusionTrainingArguments._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012

    def check_own_fields(self) -> None:
        """As [`DiffusionTrainingArguments.check_own_fields`]; also the noise levels of evaluation.

        Raises:
            ValueError: also for levels out of range, or so close that they would be reported under one name.
        """
        super().check_own_fields()
        check_rollout_fields(self)
        levels = self.eval_noise_levels or []
        for level in levels:
            if isinstance(level, bool) or not isinstance(level, Real) or not 0 < level <= 1:
                raise ValueError(f"eval_noise_levels must lie in (0, 1], got {level}.")
        names = [f"nll_{level:g}" for level in levels]
        if len(set(names)) < len(names):
            raise ValueError(f"eval_noise_levels={levels} would report two levels under the same name: {names}.")
