"""TIDETrainer: transformers.Trainer that distils a diffusion LM.

The batch of a step is noised on the host, before any network runs; the counts that divide each term are therefore
known, and made global by one all-reduce, for the whole optimizer step. Head and loss run inside the student's wrapped
forward.
"""

import math
from dataclasses import replace
from functools import partial
from os import PathLike

import torch
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments, set_seed
from transformers.utils import logging

from ..data import DistillationCollator
from ..diffusion import Counts, NoisedBatch, Noising, Written
from ..losses import Divergence, lambda_schedule
from ..teachers import Teacher, check_logits, load_teacher
from .adapter import prepare_adapter
from .base import DiffusionTrainer, load_student, pad_token_id, run_packed
from .cached_teacher import CachedTeacherMixin, check_predictions, record_of_predictions
from .checks import refuse_loading_arguments, refuse_own_teacher, require_divergence, require_tokenizer
from .config import PARAMETERS, TIDEConfig
from .evaluating import EvaluationMixin
from .measuring import predict_masked
from .objective import CachedStates, Objective, TeacherStates
from .on_policy import OnPolicyMixin
from .plan import RunPlan
from .presets import PRESET_DEFAULTS, resolve_objective, with_teacher

logger = logging.get_logger(__name__)


class TIDETrainer(EvaluationMixin, OnPolicyMixin, CachedTeacherMixin, DiffusionTrainer):
    """Trains a block-diffusion (or full-sequence) student, with a frozen teacher or without one.

    Args:
        model (`str` or `PreTrainedModel`): the student: an instance, a Hub name or a folder.
        teacher (`str` or `PreTrainedModel`, *optional*): a diffusion LM, or any autoregressive one of transformers;
            None with `preset="ce"`, and where the rows carry its predictions (recipes/prepare_data.py
            --teacher_cache): a name given beside them is only compared.
        args ([`TIDEConfig`], *optional*): all settings.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`): rows of `messages`, `prompt` + `completion` or
            `text` (with `on_policy_fraction=1` a `prompt` alone is enough to train on), or rows already prepared, for
            the same tokenizers and settings, by [`~tide_hf.data.prepare_dataset`] or recipes/prepare_data.py.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the student's tokenizer; from `model` by default.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*): the teacher's; from `teacher` if that is a
            name, otherwise the student's.
        peft_config (`peft.PeftConfig`, *optional*): trains an adapter instead of the whole student (see
            [`~tide_hf.training.prepare_adapter`]).
        objective ([`~tide_hf.losses.Divergence`], *optional*): a divergence of your own, instead of the preset's.
        kwargs: further arguments of [`~transformers.Trainer`]: callbacks, optimizers, compute_metrics and
            preprocess_logits_for_metrics (see `evaluation_loop`). [`~tide_hf.training.arguments`] lists refused ones.

    Attributes:
        teacher (`PreTrainedModel`, *optional*): the frozen model; None if the objective needs none.
        plan ([`~tide_hf.training.plan.RunPlan`]): what the run feeds its networks, and its objective, all decided.
        preparation_reports (`dict`): what became of the rows of each dataset.

    Raises:
        ValueError: for a combination that cannot train, with what to do.
    """

    loss_is_scaled_for_ga = True
    CONFIG = TIDEConfig
    LIVE = DiffusionTrainer.LIVE | {"eval_noise_levels"}
    RESOLVED = frozenset(
        {
            *PRESET_DEFAULTS,
            *PARAMETERS,
            *("preset", "divergence", "allow_reverse_tidal", "schedule", "time_epsilon"),
            *("ce_weighting", "chunk_weighting", "loss_normalization", "ar_targets", "suffix_mask_fraction"),
        }
    )

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher: str | PreTrainedModel | None = None,
        args: TIDEConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        teacher_processing_class=None,
        peft_config=None,
        objective: Divergence | None = None,
        **kwargs,
    ):
        if isinstance(teacher, TrainingArguments):
            raise ValueError(
                "TIDETrainer's second argument is the teacher, but training arguments were given there: the order is "
                "model, teacher, args, train_dataset, eval_dataset, processing_class. Give args=…."
            )
        args = TIDEConfig() if args is None else args
        self._check_given(args, kwargs, train_dataset, eval_dataset)
        require_tokenizer("teacher_processing_class", teacher_processing_class)
        require_divergence(objective)
        teacher = str(teacher) if isinstance(teacher, PathLike) else teacher
        refuse_own_teacher(model, teacher, adapts=peft_config is not None)
        self._teacher_record = record_of_predictions(train_dataset, teacher)
        model, processing_class, revision = load_student(model, args, processing_class)
        self._refuse_other_diffusion_types(model)
        if teacher_processing_class is None and isinstance(teacher, str):
            teacher_processing_class = AutoTokenizer.from_pretrained(teacher)
        self._given_divergence, self.teacher, self.signal = objective, None, None
        self._reset_terms()

        def teacher_config():
            self.teacher = self._load_teacher(teacher, args)
            return self.teacher.config

        tokenizers = processing_class, teacher_processing_class
        decide = partial(resolve_objective, args, given=objective)
        plan = self._resolve(model, args, tokenizers, teacher, teacher_config, decide)
        if plan.teacher is None and teacher is not None:
            logger.info("The objective has no distillation term: the teacher is not used.")
        self._configure_student(model, args, processing_class, plan)
        set_seed(args.seed)  # an adapter starts at random, and Trainer sets the seed only later
        model = prepare_adapter(model, peft_config, revision)
        networks = [model] if self.teacher is None else [model, self.teacher]
        super().__init__(
            model,
            args,
            plan,
            train_dataset,
            eval_dataset,
            data_collator=DistillationCollator(
                pad_token_id(processing_class),
                pad_token_id(teacher_processing_class or processing_class),
                *(network.config.vocab_size for network in networks),
            ),
            processing_class=processing_class,
            **kwargs,
        )
        if self.teacher is not None and not hasattr(self.teacher, "hf_device_map"):
            self.teacher.to(args.device)
        self._start_on_policy()
        if self.signal is not None and self.signal.contract.autoregressive:
            check_logits(self.signal)

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _load_teacher(self, teacher, args) -> PreTrainedModel:
        """The teacher's model; called only if the objective needs one."""
        if teacher is None:
            raise ValueError(f"preset={args.preset!r} distils and needs a teacher; preset='ce' trains without one.")
        if not isinstance(teacher, str):
            refuse_loading_arguments(args)
            return teacher
        return load_teacher(
            teacher,
            dtype=args.teacher_dtype,
            load_in_4bit=args.teacher_load_in_4bit,
            **(args.teacher_model_init_kwargs or {}),
        )

    def _take(self, plan: RunPlan, args: TIDEConfig) -> None:
        """Also makes from it what a step needs."""
        super()._take(plan, args)
        objective = plan.objective
        if plan.teacher is not None and plan.cache is None:
            self.signal = Teacher(self.teacher, plan.teacher)
        self.noising = Noising(
            student=plan.student,
            teacher=plan.teacher if objective.distills else None,
            schedule=plan.schedule,
            time_epsilon=args.time_epsilon,
            comp_demo=objective.comp_demo,
            demo_ratio=objective.demo_ratio,
            exact_targets=objective.ar_targets == "exact",
            suffix_mask_fraction=objective.suffix_mask_fraction,
        )

    def _resolve_again(self) -> None:
        """Makes objective and noise again from changed arguments."""
        config = self.accelerator.unwrap_model(self.model).config
        schedule = self.args.schedule or config.noise_schedule
        objective = resolve_objective(self.args, self.plan.alignment, schedule, self._given_divergence)
        if objective.distills and self.teacher is None and self.plan.cache is None:
            raise ValueError(
                "The changed arguments ask for distillation, but this trainer was made without a teacher: make a new "
                "one with teacher=…."
            )
        if objective.distills:
            objective = with_teacher(objective, self.args, self.plan.teacher.autoregressive)
        plan = replace(self.plan, objective=objective, schedule=schedule)
        if plan.cache is not None and objective.distills:
            check_predictions(self._teacher_record, plan, self.args, None)
        config.noise_schedule = schedule
        self._take(plan, self.args)

    def _inner_training_loop(self, *args, **kwargs):
        """Starts with empty logs, also after an interruption or a restart with smaller batches."""
        self._reset_terms()
        self._rollouts.start_log()
        return super()._inner_training_loop(*args, **kwargs)

    def _reset_terms(self) -> None:
        """Clears each term's sums over the current step and since the last log, and the number of steps since then."""
        self._step_sums: dict[str, torch.Tensor] = {}
        self._term_sums: dict[str, torch.Tensor] = {}
        self._term_steps = 0
        self._num_masked, self._num_targets = 0, 0

    # -- one step -----------------------------------------------------------------------------------------------------

    def _noise(self, batch, epoch: int | None, t: float | None = None, given: Written | None = None) -> NoisedBatch:
        """One micro-batch, noised by draws keyed by (seed, epoch, row), but for the rows whose masks are given."""
        return self.noising.keyed(batch, self._noise_seed(), epoch, t, given)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Noises all micro-batches of an optimizer step and makes their counts global."""
        rows = self._next_batches(epoch_iterator, num_batches)
        if not rows:
            return [], None
        batches = self._noised_batches(rows)
        self._term_steps += 1
        self._count_targets(batches)
        counts = torch.stack([torch.stack(batch.counts) for batch in batches]).sum(0)
        counts = Counts(*self.accelerator.reduce(counts.float().to(device), reduction="sum").unbind())
        return [replace(batch, counts=counts) for batch in batches], counts.tokens

    def _count_targets(self, batches: list[NoisedBatch]) -> None:
        """Adds the masked positions of a step, and those of them that are compared with the teacher."""
        for batch in batches:
            self._num_masked += len(batch.student.asked)
            self._num_targets += 0 if batch.pairs is None else len(batch.pairs.student_chunk)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted sum of the objective's terms, each divided by its global count."""
        outputs = self._run_student(model, inputs, self.objective)
        # DDP averages gradients over processes; the terms are already divided by global counts
        loss = outputs.loss * self.accelerator.num_processes
        if self.guard is not None and model.training:
            self.guard.before_backward(inputs, loss)
        self._terms = outputs.terms
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Also sums the terms of the steps that are taken."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        for name, term_B in self._terms.items():
            self._step_sums[name] = self._step_sums.get(name, 0) + term_B.sum()
        if self.accelerator.sync_gradients:
            for name, total in self._step_sums.items():
                self._term_sums[name] = self._term_sums.get(name, 0) + torch.where(self.guard.bad, 0.0, total)
            self._step_sums = {}
        return loss

    def _row_terms(self, batch):
        """Each term per row."""
        return self._run_student(self.model_wrapped, self._prepare_inputs(batch), self.objective).terms

    def _run_student(self, model, batch: NoisedBatch, objective: Objective, predicts: bool = False):
        """The student's wrapped forward on a packed layout, with the objective instead of its head."""
        states = None
        if objective.distills:
            states = self._teacher_states(batch)

        def head_fn(hidden_BPH, weight_VH):
            hidden_NH = hidden_BPH.flatten(0, 1)[batch.student.asked]
            progress = self.state.global_step / max(self.state.max_steps, 1)
            loss, terms = objective(hidden_NH, weight_VH, batch, self._lambda_progress(), states, progress)
            if predicts:
                preprocess = self.preprocess_logits_for_metrics
                terms["predictions"] = predict_masked(hidden_NH, weight_VH, batch.student.targets, preprocess)
            return loss, terms

        return run_packed(model, batch.student, head_fn, self.plan.student.causal)

    def _teacher_states(self, batch: NoisedBatch) -> TeacherStates | CachedStates:
        """What the teacher says of a batch: it is run, or the rows carry it."""
        if self.signal is None:
            return CachedStates(batch.cached, self.plan.shared_vocab_size)
        return TeacherStates(self.signal.hidden(batch.teacher), self.signal.logits, self.plan.shared_vocab_size)

    def _lambda_progress(self) -> float:
        """λ(s) at the current step."""
        objective = self.objective
        return lambda_schedule(
            self.state.global_step,
            max(self.state.max_steps, 1),
            lambda_init=objective.lambda_init,
            lambda_max=objective.lambda_max,
            growth=objective.lambda_growth,
        )

    def log(self, logs, start_time=None):
        """Adds the mean of each term over the optimizer steps since the last log, summed over all processes."""
        if "loss" in logs and self._term_sums:
            names = sorted(self._term_sums)
            num_steps = self._term_steps - self.guard.settle() or math.nan
            sums = self.accelerator.reduce(torch.stack([self._term_sums[name] for name in names]), reduction="sum")
            logs |= {name: value / num_steps for name, value in zip(names, sums.tolist(), strict=True)}
            if self.objective.tidal:
                logs["lambda"] = self._lambda_progress()
            logs |= self._rollout_logs()
            if self.objective.ar_targets is not None:
                counts = torch.tensor([self._num_targets, self._num_masked], device=self.args.device)
                num_targets, num_masked = self.accelerator.reduce(counts, reduction="sum").tolist()
                logs["target_share"] = num_targets / max(num_masked, 1)
            self._term_sums, self._term_steps = {}, 0
            self._num_masked, self._num_targets = 0, 0
        super().log(logs, start_time)
