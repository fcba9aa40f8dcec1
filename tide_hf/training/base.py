"""What all trainers of diffusion LMs share: loading, configuring, preparing rows, keeping batches on the host, saving.

The batch of a step is noised on the host, before any network runs.
"""

import json
import math
from collections.abc import Callable
from os import PathLike

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.utils import logging

from ..diffusion import PackedInputs, Record
from ..hub import HubTrainerMixin, RunFacts, named_model
from ..models.masked_diffusion import block_visibility
from .arguments import (
    check_engine,
    check_method_arguments,
    check_trainer_arguments,
    refuse_unread,
    snapshot,
)
from .checks import refuse_data_parallel, require_rows, require_tokenizer
from .config import DiffusionTrainingArguments
from .later_changes import LaterChangesMixin
from .nonfinite import StepGuard, require_finite
from .plan import RunPlan
from .row_reading import RowReadingMixin, StreamEpoch

logger = logging.get_logger(__name__)


class DiffusionTrainer(LaterChangesMixin, RowReadingMixin, HubTrainerMixin, Trainer):
    """`transformers.Trainer` for diffusion LMs; subclasses define what a step is.

    [`~tide_hf.training.arguments`] lists which arguments of `transformers` are used and which are refused.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the network that is trained.
        args ([`DiffusionTrainingArguments`]): all settings.
        plan ([`~tide_hf.training.plan.RunPlan`]): see below.
        train_dataset, eval_dataset (`Dataset`, `IterableDataset` or, for evaluation, a `dict` of them, *optional*):
            raw or prepared rows.
        kwargs: further arguments of [`~transformers.Trainer`].

    Attributes:
        plan ([`~tide_hf.training.plan.RunPlan`]): what the run feeds its networks, resolved once.
        preparation_reports (`dict`): what became of the rows of each dataset.
    """

    loss_is_scaled_for_ga = True
    guard: StepGuard | None = None  # checks the student's steps; made with its optimizer
    # what `config.diffusion_type` of a model may be
    DIFFUSION_TYPES = ("block", "full")
    CONFIG = DiffusionTrainingArguments
    # arguments of Trainer, and own fields of the config, that a trainer refuses when they are set -> why
    REFUSED_ARGUMENTS = {}  # noqa: RUF012
    UNREAD = {}  # noqa: RUF012

    def __init__(self, model, args, plan: RunPlan, train_dataset=None, eval_dataset=None, **kwargs):
        self._take(plan, args)
        train_dataset, eval_dataset = self._prepare_datasets(train_dataset, eval_dataset, args)
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if use_cache is not None:
            self.model.config.use_cache = use_cache  # Trainer writes its own default over the checkpoint's
        check_engine(self.accelerator)
        self._refuse_other_optimizer()
        self._optimizer_is_given = self.optimizer is not None
        self._args_before = snapshot(args)
        self.add_callback(StreamEpoch(self))

    def _check_given(self, args, kwargs: dict, train_dataset, eval_dataset) -> None:
        """Refuses, before anything is loaded, what could not be honoured."""
        who = type(self).__name__
        if not isinstance(args, self.CONFIG):
            raise ValueError(
                f"{who} expects args to be a {self.CONFIG.__name__}, which has every field of TrainingArguments; got "
                f"a {type(args).__name__}."
            )
        args.check()
        refuse_unread(args, self.UNREAD, who)
        refuse_data_parallel(args)
        check_trainer_arguments(kwargs, self.REFUSED_ARGUMENTS, who)
        for name in [name for name, value in kwargs.items() if value is None]:
            del kwargs[name]  # None means not given, for a refused argument too
        require_rows("train_dataset", train_dataset)
        for name, rows in eval_dataset.items() if isinstance(eval_dataset, dict) else [("", eval_dataset)]:
            require_rows(f"eval_dataset{name and f'[{name!r}]'}", rows)
        if not eval_dataset and not isinstance(eval_dataset, Dataset | IterableDataset):
            asked = [f"eval_strategy={args.eval_strategy.value!r}"] if args.eval_strategy != "no" else []
            asked += ["eval_on_start=True"] if args.eval_on_start else []
            if asked or eval_dataset is not None:
                raise ValueError(
                    f"{' and '.join(asked) or 'eval_dataset={}'} asks for evaluation, but there is no eval_dataset: "
                    "give one, or set eval_strategy='no'."
                )

    def _refuse_other_optimizer(self) -> None:
        """A given optimizer must hold what is trained: an adapter, made after it, would never be updated."""
        if self.optimizer is None:
            return
        learned = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        foreign = sum(id(parameter) not in learned for parameter in held)
        if foreign:
            raise ValueError(
                f"{foreign} of the optimizer's {len(held)} parameters are not trained by this run (they belong to "
                "another model, or to an adapter's frozen base): give optimizer_cls_and_kwargs instead of optimizers, "
                "or make the optimizer from the model that is trained."
            )

    def _refuse_other_diffusion_types(self, model) -> None:
        """Refuses models whose kind of noise this trainer does not know."""
        diffusion_type = getattr(model.config, "diffusion_type", None)
        if diffusion_type is None:
            raise ValueError(
                f"The student, a {type(model).__name__} (model_type={model.config.model_type!r}), is not a diffusion "
                "LM that this library knows. Load one of its own (tide_…), a published one (a2d-…, LLaDA, LLaDA2, "
                "SDAR, Dream, WeDLM), or make one with convert_to_diffusion."
            )
        if diffusion_type not in self.DIFFUSION_TYPES:
            raise ValueError(
                f"{type(self).__name__} trains diffusion LMs of diffusion_type {' or '.join(self.DIFFUSION_TYPES)}, "
                f"got {diffusion_type!r}. Train uniform-state models with UniformIDLMTrainer or, without a teacher, "
                "with transformers.Trainer, and masked ones with TIDETrainer or IDLMTrainer."
            )

    @property
    def objective(self):
        """What the run optimises, with every field decided."""
        return self.plan.objective

    def _take(self, plan: RunPlan, args) -> None:
        """Makes a plan that of the run, at construction or after a change of its arguments, and logs it."""
        self.plan = plan
        for what, values in (("Plan", self.plan.to_dict()), ("Objective", self.objective.to_dict())):
            logger.info(f"{what}: {json.dumps(values)}")

    def _configure_student(self, model, args, tokenizer, plan: RunPlan) -> None:
        """Writes what the run decides into the student's config, so that a checkpoint generates as it was trained."""
        config = model.config
        config.mask_token_id, config.noise_schedule = plan.student.mask_token_id, plan.schedule
        config.block_size = plan.block_size
        settings = model.generation_config
        settings.mask_token_id = config.mask_token_id
        # a whole-sequence student decodes the whole answer at once, unless its own settings say otherwise
        if config.diffusion_type == "block" and (args.block_size is not None or settings.block_size is None):
            settings.block_size = config.block_size
        if settings.eos_token_id is None:
            settings.eos_token_id = tokenizer.eos_token_id
        if settings.pad_token_id is None:
            settings.pad_token_id = pad_token_id(tokenizer)

    # -- training and evaluating --------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As [`~tide_hf.hub.HubTrainerMixin`] does; changes made to `args` in the meantime are applied, or refused."""
        check_method_arguments({"trial": trial, "ignore_keys_for_eval": ignore_keys_for_eval})
        self._honour_changes()
        try:
            return super().train(resume_from_checkpoint)
        finally:
            self.is_in_train = False

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As [`~transformers.Trainer.evaluate`].

        Args:
            eval_dataset (`Dataset`, `IterableDataset`, `dict` of them, or `str`, *optional*): rows as the constructor
                takes them, raw or prepared; several under their names; or the name of one given to the constructor.
            metric_key_prefix (`str`): prefix of each metric's name.
        """
        check_method_arguments({"ignore_keys": ignore_keys})
        if not self.is_in_train:
            self._honour_changes()
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepare_given(name, rows) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepare_given("evaluated", eval_dataset)
        return super().evaluate(eval_dataset, None, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """As [`~transformers.Trainer.predict`], for rows as the constructor takes them, raw or prepared."""
        check_method_arguments({"ignore_keys": ignore_keys})
        if not self.is_in_train:
            self._honour_changes()
        return super().predict(self._prepare_given("test", test_dataset), None, metric_key_prefix)

    def hyperparameter_search(self, *args, **kwargs):
        """Refused: it makes a new model for each trial."""
        raise ValueError(
            "hyperparameter_search needs model_init, but these trainers are made from a model: make one trainer for "
            "each trial, for example inside the objective of an optuna study."
        )

    def _prepare_inputs(self, inputs: Record) -> Record:
        """A noised micro-batch on the device."""
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs) -> int:
        """As [`~transformers.Trainer.floating_point_ops`], counted over the columns that the student is run on."""
        return super().floating_point_ops({"input_ids": inputs.inputs.input_ids})

    def _track_num_input_tokens(self, inputs) -> None:
        """Counts the columns that the student is run on: in packed layouts the noised and the clean copies."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        is_real = inputs.inputs.is_real
        count = is_real.sum() if self.args.include_num_input_tokens_seen == "non_padding" else is_real.numel()
        count = torch.as_tensor(count, device=self.args.device, dtype=torch.int64)
        self.state.num_input_tokens_seen += self.accelerator.gather(count).sum().item()

    # -- values that are not finite are never stepped on, saved or best -----------------------------------------------

    def _row_terms(self, batch: Record) -> dict[str, torch.Tensor]:
        """The terms of the loss for each row of one micro-batch on the host."""
        raise NotImplementedError

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        network = self.accelerator.unwrap_model(self.model)
        self.guard = StepGuard(self, "student", trained_parameters(network), self.optimizer, self._row_terms)
        return prepared

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Also decides, after a step's last micro-batch, whether the optimizer may take it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        return self.guard.saw(inputs, loss, is_last=self.accelerator.sync_gradients)

    def log(self, logs, start_time=None):
        """The loss is a mean over the steps that were taken; `nonfinite_steps` counts the others of the whole run."""
        if self.guard is not None and "loss" in logs:
            num_steps, num_skipped = self.guard.pop_counts()
            if num_skipped:
                logs["loss"] = logs["loss"] * num_steps / (num_steps - num_skipped or math.nan)
            if bool(self.guard.bad):
                logs["grad_norm"] = math.nan
            if self.guard.num_skipped:
                logs["nonfinite_steps"] = self.guard.num_skipped
        elif self.guard is not None and "train_loss" in logs:
            self.guard.settle()
        super().log(logs, start_time)

    def _weights_of_checkpoint(self) -> dict[str, torch.Tensor]:
        """The weights that a checkpoint holds of this process, by name."""
        return trained_parameters(self.accelerator.unwrap_model(self.model))

    def _save_checkpoint(self, model, trial):
        self.guard.settle()
        require_finite(self._weights_of_checkpoint(), "The checkpoint", self.guard.anywhere)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None):
        """With an adapter, also saves the run's generation settings, which its base may not have."""
        weights = state_dict
        if weights is None:
            weights = trained_parameters(self.model) if isinstance(self.model, PeftModel) else self.model.state_dict()
        require_finite(weights, "The model")
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel):
            self.model.generation_config.save_pretrained(output_dir or self.args.output_dir)

    def _teacher_sources(self) -> list[tuple[str, str | None]]:
        """Name, or folder, and commit of each teacher."""
        return [] if self.teacher is None else [named_model(self.teacher)]

    def _run_facts(self) -> RunFacts:
        """What the model card says of this run, as it stands now."""
        try:
            num_evaluated_rows = len(self.eval_dataset)
        except TypeError:  # streamed, or none
            report = self.preparation_reports.get("eval")
            num_evaluated_rows = 0 if report is None else report.num_kept
        return RunFacts(
            model=self.accelerator.unwrap_model(self.model),
            teachers=self._teacher_sources(),
            tokenizer=self.processing_class,
            args=self.args,
            objective=self.objective.to_dict(),
            plan=self.plan.to_dict(),
            preparation=self.preparation_reports,
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            log_history=self.state.log_history,
            num_evaluated_rows=num_evaluated_rows,
            evaluation=f"{type(self).__name__}.evaluate",
        )

    def create_model_card(self, *args, **kwargs):
        """See [`~tide_hf.hub.HubTrainerMixin.create_model_card`]; refused if weights are not finite."""
        require_finite(trained_parameters(self.accelerator.unwrap_model(self.model)), "The model card")
        super().create_model_card(*args, **kwargs)

    def _determine_best_metric(self, metrics, trial):
        """A metric that is not finite is never the best one."""
        odd = {name: value for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)}
        if odd:
            found = ", ".join(f"{name} = {value}" for name, value in odd.items())
            logger.warning(f"The evaluation after step {self.state.global_step} is not finite: {found}.")
        best = self.args.metric_for_best_model
        if best is not None and f"eval_{best.removeprefix('eval_')}" in odd:
            return False
        return super()._determine_best_metric(metrics, trial)


def load_student(
    model: str | PreTrainedModel, args, processing_class: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """Model, tokenizer and the requested revision, from instances or names.

    Args:
        model (`str` or `PreTrainedModel`): an instance, a Hub name or a folder.
        args ([`DiffusionTrainingArguments`]): read for `model_init_kwargs`, which loading by name uses.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the tokenizer; by default the one saved with `model`.

    Raises:
        ValueError: if `model` is not a model or `processing_class` not a tokenizer, and for `model_init_kwargs` with
            an instance.
    """
    require_tokenizer("processing_class", processing_class)
    if isinstance(model, PathLike):
        model = str(model)
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise ValueError(
            f"model is a {type(model).__name__}; expected a name, a folder, or a model as from_pretrained returns it."
        )
    if not isinstance(model, str) and args.model_init_kwargs is not None:
        raise ValueError(
            "model_init_kwargs are arguments of from_pretrained, but the model is given as an instance: load it with "
            "them, or give its name."
        )
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.name_or_path)
    if not isinstance(model, str):
        return model, processing_class, None
    kwargs = args.model_init_kwargs or {}
    return AutoModelForCausalLM.from_pretrained(model, **kwargs), processing_class, kwargs.get("revision")


def run_packed(network, inputs: PackedInputs, head_fn: Callable, causal: bool = False):
    """A (wrapped) student's forward on a packed layout, with `head_fn` instead of its head.

    Args:
        network (`Callable`): a student of this library, wrapped by accelerate or not.
        inputs ([`~tide_hf.diffusion.PackedInputs`]): on its device.
        head_fn (`Callable`): `head_fn(hidden (B, P, H), lm_head_weight (V, H)) -> (loss, terms)`.
        causal (`bool`): whether a block is causal inside.
    """
    stream, block = inputs.stream, inputs.block
    return network(
        input_ids=inputs.input_ids,
        attention_mask=block_visibility(stream, block, stream, block, causal),
        position_ids=inputs.position_ids,
        use_cache=False,
        head_fn=head_fn,
    )


def trained_parameters(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a `network` that are trained, by name."""
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def pad_token_id(tokenizer) -> int:
    """The tokenizer's padding id, or its EOS id: padding is never attended, so any id serves."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
