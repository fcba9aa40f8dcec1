"""TIDEConfig: transformers' training arguments plus every knob of the distillation; and what other configs share."""

import math
import re
from dataclasses import dataclass, field, fields, make_dataclass
from inspect import get_annotations
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Union, get_args, get_origin

from transformers import TrainingArguments

from ..data import EOS_FILLS, TRAINED_TURNS
from ..losses import DIVERGENCES
from ..models.masked_diffusion import SCHEDULES, TIME_EPSILON
from .arguments import check_training_arguments
from .checks import check_block_size
from .objective import NO_DIVERGENCE
from .presets import PRESETS

CHOICES = {
    "preset": (*PRESETS, None),
    "alignment": ("auto", "token", "chunk"),
    "divergence": (*DIVERGENCES, NO_DIVERGENCE, None),
    "lambda_growth": ("cosine", "linear", None),
    "lambda_axes": ("both", "progress", "time", None),
    "timestep_weight": ("midrange", "uniform", None),
    "tidal_normalization": ("none", "expected", None),
    "schedule": (*SCHEDULES, None),
    "ce_weighting": ("schedule", "uniform"),
    "chunk_weighting": ("paper", "exact"),
    "loss_normalization": ("token", "sequence", "batch"),
    "eos_fill": EOS_FILLS,
    "trained_turns": TRAINED_TURNS,
    "nonfinite": ("stop", "skip"),
    "teacher_context": ("paper", "native"),
    "teacher_dtype": ("auto", "float32", "bfloat16", "float16"),
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
    **{name: (*knob.metadata["range"], False) for name, knob in PARAMETERS.items()},
    "time_epsilon": (0.0, 1.0, False),
}
# metrics of the trainers, all of them the smaller the better, with or without a dataset's name in front
OWN_METRIC = re.compile(r"(^|_)(loss|ce|ce_answer|distill|nll_[\d.e-]+)$")


def _knob(default, text: str):
    return field(default=default, metadata={"help": text})


def check_fields(config, choices: dict[str, tuple], ranges: dict[str, tuple[float, float, bool]]) -> None:
    """Checks those fields of a configuration that it has; None passes a range.

    Raises:
        ValueError: for an unknown choice or a number out of range, with what is allowed.
    """
    for name, allowed in choices.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            known = ", ".join(str(choice) for choice in allowed if choice is not None)
            raise ValueError(f"{name}={value!r} is not known; choose one of {known}.")
    for name, (low, high, closed) in ranges.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        inside = low <= value <= high if closed else low < value < high
        if not (inside and math.isfinite(value)):
            ends = "[]" if closed and high != float("inf") else "[)" if closed else "()"
            raise ValueError(f"{name}={value} is out of range; it must lie in {ends[0]}{low:g}, {high:g}{ends[1]}.")


def check_types(config) -> None:
    """Checks that the library's own fields of a configuration hold what they are declared to.

    Raises:
        ValueError: naming the field, its value and the declared type.
    """
    declared = {}
    for cls in reversed(type(config).__mro__):
        if issubclass(cls, DiffusionTrainingArguments):  # HfArgumentParser rewrites the types of dataclasses.fields
            declared |= {name: kind for name, kind in get_annotations(cls).items() if name[0] != "_"}
    for name, kind in declared.items():
        value, is_union = getattr(config, name), get_origin(kind) in (Union, UnionType)
        allowed = get_args(kind) if is_union else (kind,)
        if not any(_is_of(value, part) for part in allowed):
            names = " or ".join(
                "None" if part is NoneType else getattr(part, "__name__", str(part)) for part in allowed
            )
            raise ValueError(f"{name}={value!r} is a {type(value).__name__}; expected {names}.")


def _is_of(value, kind) -> bool:
    """Whether a value is of a declared type: an integer is a float too, and True is neither."""
    kind = get_origin(kind) or kind
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind))


@dataclass
class DiffusionTrainingArguments(TrainingArguments):
    """What every trainer of a diffusion LM is told: forward process, blocks, rows.

    Everything of [`~transformers.TrainingArguments`], and the fields below.

    Raises:
        ValueError: for an unknown choice or a number out of range, with what is allowed.
    """

    schedule: str | None = _knob(
        None,
        "α(t), the probability that a position stays clean: linear 1−t or cosine; the student's own by default. A "
        "given one is written into its config.",
    )
    time_epsilon: float = _knob(TIME_EPSILON, "Smallest diffusion time, in (0, 1).")
    block_size: int | None = _knob(
        None,
        "Tokens per diffusion block; the student's own by default. Divides max_length. A given one is written into "
        "its config and generation config.",
    )
    max_length: int = _knob(512, "Tokens of a student row; longer rows are cut.")
    eos_fill: str = _knob(
        "block", "What follows the last answer's end: none, EOS to the block's end (trained on), EOS to max_length."
    )
    trained_turns: str = _knob("all", "Assistant turns of a conversation that are trained on: all, or the last alone.")
    chat_template: str | None = _knob(None, "Chat template in place of the tokenizer's: a .jinja file or the text.")
    chat_template_kwargs: dict | str | None = _knob(
        None, "Settings of the chat templates (JSON on a command line); enable_thinking=false where one reads that."
    )
    dataset_num_proc: int | None = _knob(None, "Processes that prepare the dataset.")
    mask_token_id: int | None = _knob(None, "Student's [MASK]; from its config or tokenizer by default.")
    nonfinite: str = _knob(
        "stop",
        "A step whose loss or a gradient is NaN or infinite: stop the run before it is taken, or skip it and go on "
        "(ten in a row stop the run). Either writes its batches to a file, nonfinite-step….pt.",
    )
    model_init_kwargs: dict | str | None = _knob(
        None, "from_pretrained arguments of the student (JSON on a command line)."
    )
    remove_unused_columns: bool | None = _knob(False, "Kept False: the step needs row_key and the chunk columns.")
    logging_nan_inf_filter: bool = _knob(
        False,
        "transformers': replaces a loss that is not finite in the log, and has the host wait for a GPU twice per "
        "micro-batch to see it. Not needed here: see nonfinite.",
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
        metric = self.metric_for_best_model
        if self.greater_is_better is None and metric is not None and OWN_METRIC.search(metric):
            self.greater_is_better = False  # transformers takes what does not end in "loss" for a score
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # a streaming dataset is read by every process: noise is drawn on the host, nothing is broadcast
            self.accelerator_config.dispatch_batches = False
        self.check()

    def check(self) -> None:
        """Checks all fields; trainers call it when they are made and when they begin, for fields can be assigned.

        Raises:
            ValueError: naming the field, its value, and what is allowed.
        """
        self.check_own_fields()
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            value = getattr(self, name, None)
            if isinstance(value, str):
                raise ValueError(
                    f"{name}={value!r} is no dictionary; on a command line give JSON: '{{\"dtype\": …}}'."
                )
        check_training_arguments(self, self.REFUSED)

    def check_own_fields(self) -> None:
        """Checks the fields that transformers does not know."""
        check_types(self)
        check_fields(self, CHOICES, RANGES)
        if self.block_size is not None:
            check_block_size(self.block_size, self.max_length)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop row_key, which keys the noise; leave it False.")


_DivergenceParameters = make_dataclass(
    "_DivergenceParameters",
    [
        (name, float | None, _knob(None, f"{knob.metadata['help']}. {knob.default:g}."))
        for name, knob in PARAMETERS.items()
    ],
    bases=(DiffusionTrainingArguments,),
)


@dataclass
class TIDEConfig(_DivergenceParameters):
    """Arguments of [`TIDETrainer`].

    Everything of [`DiffusionTrainingArguments`], and the fields below. Those that default to None are filled from
    `preset` once both tokenizers are known (see `trainer.objective`); a given value always wins.

    Raises:
        ValueError: for an unknown choice or a number out of range, with what is allowed.
    """

    preset: str | None = _knob(
        "tide-shared",
        "Objective to start from: tide-shared (CE + TIDAL + CompDemo), tide-cross (CE + Reverse CALM; with a shared "
        "tokenizer reverse KL), or a baseline: kl, reverse-kl, calm, ce (no teacher). SPEC: TIDE 2604.26951, table of "
        "hyperparameters.",
    )
    alignment: str = _knob(
        "auto", "token (one shared tokenizer), chunk (two tokenizers), or auto: decided from the two tokenizers."
    )
    divergence: str | None = _knob(
        None,
        "; ".join(
            f"of {pairs}s: {', '.join(name for name, cls in DIVERGENCES.items() if cls.pairs == pairs)}"
            for pairs in ("token", "chunk")
        )
        + "; or none.",
    )
    tidal: bool | None = _knob(None, "TIDAL: targets that move from the student's to the teacher's distribution.")
    allow_reverse_tidal: bool = _knob(False, "Allow tidal with reverse_calm, an ablation of the paper's code.")
    comp_demo: bool | None = _knob(
        None, "CompDemo: the teacher predicts each half of the masked positions with the other half revealed."
    )
    demo_ratio: float | None = _knob(None, "CompDemo: probability that a masked position is in the first half. 0.5.")
    ce_weight: float | None = _knob(None, "Weight of the denoising loss on the data. 1.")
    distill_weight: float | None = _knob(None, "Weight of the divergence or of TIDAL. 1.")
    temperature: float | None = _knob(
        None, "T > 0 of both softmaxes, or root of the chunk probabilities. Token terms are multiplied by T². 2."
    )
    lambda_init: float | None = _knob(None, "TIDAL: λ at the start of training, in [0, 1]. 0.1.")
    lambda_max: float | None = _knob(None, "TIDAL: λ at the end of training, in [0, 1]. 0.9.")
    lambda_growth: str | None = _knob(None, "TIDAL: cosine or linear growth of λ over training. cosine.")
    lambda_axes: str | None = _knob(None, "TIDAL: both λ(s)(1−t), progress λ(s), or time λ_max(1−t). both.")
    timestep_weight: str | None = _knob(None, "TIDAL: ω(t), midrange exp(−(t−½)²/(2·0.15²)) or uniform. midrange.")
    tidal_normalization: str | None = _knob(
        None,
        "none (paper), or expected: divide TIDAL by its average strength against KL (0.0856 with the defaults), so "
        "that distill_weight means the same for every objective. none.",
    )
    ce_weighting: str = _knob(
        "schedule", "Weight of the denoising loss: schedule −α′/(1−α), 1/t if linear; or uniform."
    )
    chunk_weighting: str = _knob(
        "exact",
        "Two tokenizers: denoising weight of a position masked by completion of a chunk of k trained-on tokens: exact "
        "−α′/(1−α^k), or paper, w(t), which weighs long chunks too much, since they are masked more often.",
    )
    loss_normalization: str = _knob(
        "token",
        "What the denoising sum is divided by: trained-on tokens of the global batch (token), those of each sequence "
        "and the number of sequences (sequence), or the number of sequences (batch).",
    )
    teacher_max_length: int | None = _knob(None, "Tokens of a teacher row; as max_length by default.")
    eval_noise_levels: list[float] | None = _knob(
        None, "Diffusion times at which evaluation also reports the negative log-likelihood per masked token, in nats."
    )
    teacher_mask_token_id: int | None = _knob(
        None, "Teacher's [MASK]; from its config, tokenizer or family by default."
    )
    shared_vocab_size: int | None = _knob(
        None, "First ids that mean the same on both sides; found by comparing the tokenizers by default."
    )
    teacher_context: str = _knob(
        "paper", "What the teacher sees: paper (as published TIDE fed it) or native (as it was trained)."
    )
    teacher_dtype: str = _knob("auto", "Precision the teacher is loaded in: auto, float32, bfloat16, float16.")
    teacher_load_in_4bit: bool = _knob(False, "Load the teacher in 4 bits (needs the quant extra).")
    teacher_model_init_kwargs: dict | str | None = _knob(
        None, "from_pretrained arguments of the teacher (JSON on a command line)."
    )

    _VALID_DICT_FIELDS = [*DiffusionTrainingArguments._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012

    def check_own_fields(self) -> None:
        """Also the noise levels of evaluation, of which each is reported under a name of its own."""
        super().check_own_fields()
        levels = self.eval_noise_levels or []
        for level in levels:
            if isinstance(level, bool) or not isinstance(level, Real) or not 0 < level <= 1:
                raise ValueError(f"eval_noise_levels must lie in (0, 1], got {level}.")
        names = [f"nll_{level:g}" for level in levels]
        if len(set(names)) < len(names):
            raise ValueError(f"eval_noise_levels={levels} would report two levels under one name, of {names}.")
