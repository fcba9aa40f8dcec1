"""IDLMConfig: the arguments of an inverse distillation."""

from dataclasses import asdict, dataclass
from typing import Literal

from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from ..training.config import DiffusionTrainingArguments, _knob, check_ranges

# optimizers and schedules that the fake cannot have, since the trainer itself steps them
_REFUSED_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")
_REFUSED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")

RANGES = {
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "fake_warmup_steps"),
        (0.0, float("inf"), True),
    ),
    "ema_decay": (0.0, 1.0, True),
    "fake_learning_rate": (0.0, float("inf"), True),
    "fake_weight_decay": (0.0, float("inf"), True),
    "fake_max_grad_norm": (0.0, float("inf"), True),
    "num_steps": (1, float("inf"), True),
    "fake_steps_per_student_step": (1, float("inf"), True),
    "input_temperature": (1e-6, float("inf"), True),
    "head_slice_size": (1, float("inf"), True),
}


@dataclass
class IDLMConfig(DiffusionTrainingArguments):
    """Arguments of [`IDLMTrainer`].

    Everything in [`DiffusionTrainingArguments`], and the fields below. Learning rate, scheduler, weight decay and
    clipping of [`~transformers.TrainingArguments`] are the student's; their defaults here are the published ones
    (AdamW, 1e-6 constant with warm-up, no weight decay, no clipping, float32). Steps are student steps.

    Raises:
        ValueError: for an unknown choice, a number out of range, or settings that cannot train.
    """

    learning_rate: float = _knob(1e-6, "The student's initial learning rate.")
    lr_scheduler_type: str = _knob("constant_with_warmup", "The student's learning-rate schedule.")
    warmup_steps: float = _knob(100, "The student's warm-up: a number of steps or, below 1, a fraction of them.")
    weight_decay: float = _knob(0.0, "The student's weight decay.")
    max_grad_norm: float = _knob(0.0, "Gradient norm at which the student's gradients are clipped; 0 does not clip.")

    num_steps: int = _knob(
        8,
        "Network calls S that the student is trained to decode with, at least 1: per block or, for a full-sequence "
        "student, per answer. The saved generation config decodes with as many.",
    )
    student_times: Literal["uniform", "grid"] = _knob(
        "uniform",
        "Times t′ at which the student learns: uniform (IDLM), or grid, the num_steps times at which it decodes: 1, "
        "1 − 1/S, …, 1/S.",
    )
    stratified_times: bool = _knob(
        True, "Spread the diffusion times of a global batch evenly over [ε, 1), as antithetic sampling does (IDLM)."
    )
    fake_steps_per_student_step: int = _knob(
        1, "Updates of the fake network before each update of the student, at least 1."
    )
    fake_learning_rate: float | None = _knob(None, "The fake's learning rate; the student's by default.")
    fake_lr_scheduler_type: str | None = _knob(None, "The fake's learning-rate schedule; the student's by default.")
    fake_warmup_steps: float | None = _knob(
        None, "The fake's warm-up in its own updates or, below 1, a fraction of them; the student's by default."
    )
    fake_optim: str | None = _knob(None, "The fake's optimizer; the student's by default.")
    fake_weight_decay: float | None = _knob(None, "The fake's weight decay; the student's by default.")
    fake_max_grad_norm: float | None = _knob(
        None, "Gradient norm at which the fake's gradients are clipped, 0 does not clip; the student's by default."
    )
    ema_decay: float = _knob(0.9999, "Decay per step of the moving average of the student's weights, in [0, 1].")
    save_weights: Literal["ema", "student"] = _knob(
        "ema",
        "Which weights are evaluated and saved: ema (the moving average) or student (the current weights).",
    )
    input_temperature: float = _knob(
        1e-3,
        "Uniform-state models only: τ > 0 of the soft inputs softmax(x_t/τ); small values are nearly one-hot (Duo).",
    )
    head_slice_size: int | None = _knob(
        None,
        "Number of positions whose vocabulary logits are held in memory at a time, at least 1; by default as many as "
        "take 32 MB on a CPU or 128 MB on a GPU.",
    )

    REFUSED = {  # noqa: RUF012
        "auto_find_batch_size": (
            "a restart with smaller batches would start the student over while the fake has already moved. Set "
            "per_device_train_batch_size and gradient_accumulation_steps"
        ),
        "debug": "it would watch only the student, not the fake. Leave it out",
        **dict.fromkeys(
            ("bf16_full_eval", "fp16_full_eval"),
            "it would cast the student permanently, but neither the fake nor the average. Use bf16=True, or load the "
            "model in that precision",
        ),
        **dict.fromkeys(
            ("prediction_loss_only", "batch_eval_metrics", "include_for_metrics", "eval_accumulation_steps"),
            "IDLMTrainer evaluates two losses of three networks and has no predictions. Leave it out",
        ),
        "eval_do_concat_batches": (
            "IDLMTrainer evaluates two losses of three networks and has no predictions. Leave it out"
        ),
    }

    def check_own_fields(self) -> None:
        """As [`DiffusionTrainingArguments.check_own_fields`]; also the fake's optimizer and schedule.

        Raises:
            ValueError: also for an optimizer or schedule, its own or the student's, that the fake cannot have.
        """
        super().check_own_fields()
        check_ranges(self, RANGES)
        optim, schedule = OptimizerNames(self.for_fake("optim")), SchedulerType(self.for_fake("lr_scheduler_type"))
        if optim.value.startswith(_REFUSED_OPTIMIZERS):
            raise ValueError(
                f"The fake cannot be trained with optim={optim.value!r}, which takes over the parameters or must be "
                "told when evaluation begins: set fake_optim (adamw_torch, sgd, …)."
            )
        if schedule.value in _REFUSED_SCHEDULES:
            raise ValueError(
                f"The fake cannot follow lr_scheduler_type={schedule.value!r}, which waits for evaluations: set "
                "fake_lr_scheduler_type (constant_with_warmup, cosine, …)."
            )
        if self.fp16:
            raise ValueError(
                "fp16=True would use one loss scaler for two optimizers: train in float32, as published, or with "
                "bf16=True."
            )

    def for_fake(self, name: str):
        """A setting of the fake: its own if given, otherwise the student's.

        Args:
            name (`str`): a field that has a counterpart `fake_{name}`.
        """
        own = getattr(self, f"fake_{name}")
        return getattr(self, name) if own is None else own


@dataclass(frozen=True)
class InverseObjective:
    """What one run optimises. Fields as in [`IDLMConfig`]."""

    schedule: str
    num_steps: int
    student_times: str
    stratified_times: bool
    fake_steps_per_student_step: int
    ema_decay: float
    save_weights: str

    def to_dict(self) -> dict:
        """Plain values, for logs and cards."""
        return {"method": "idlm", "alignment": "token", **asdict(self)}
