"""What every trainer of a diffusion LM does alike: load, configure, prepare rows, keep batches on the host, save.

The batch of a step is noised on the host, before any network runs.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.utils import logging

from .data import is_prepared, prepare_dataset, require_same_preparation
from .hub import HubTrainerMixin
from .models.masked_diffusion import block_visibility
from .nonfinite import StepGuard, require_finite
from .teachers import resolve_mask_token_id

logger = logging.get_logger(__name__)


class DiffusionTrainer(HubTrainerMixin, Trainer):
    """`transformers.Trainer` for diffusion LMs; subclasses set `_preparation` and say what a step is.

    Attributes:
        preparation_reports (`dict`): what became of the rows of each dataset.
    """

    loss_is_scaled_for_ga = True
    guard: StepGuard | None = None  # of the student's steps; made with its optimizer
    # what `config.objective` of a model may be
    OBJECTIVES = ("block", "full")

    def _refuse_other_objectives(self, model) -> None:
        """Says which models this trainer does not know the noise of."""
        objective = getattr(model.config, "objective", None)
        if objective is None:
            raise ValueError(
                f"The student is a {type(model).__name__} (model_type={model.config.model_type!r}), which is no "
                "diffusion LM of this library. Load a tide_… or a2d-… checkpoint, or make one with "
                "convert_to_diffusion."
            )
        if objective not in self.OBJECTIVES:
            raise ValueError(
                f"{type(self).__name__} trains diffusion LMs with objective {' or '.join(self.OBJECTIVES)}, got "
                f"{objective!r}. Uniform-state models go with UniformIDLMTrainer or, without a teacher, with "
                "transformers.Trainer; masked ones with TIDETrainer and IDLMTrainer."
            )

    def _configure_student(self, model, args, tokenizer) -> None:
        """Writes what the run decides into the student's config, so that a checkpoint generates as it was trained."""
        self._refuse_other_objectives(model)
        config = model.config
        config.mask_token_id = resolve_mask_token_id(args.mask_token_id, config, tokenizer, "student")
        if args.block_size is not None:
            config.block_size = args.block_size
        elif config.objective == "block" and args.max_length % config.block_size:
            raise ValueError(
                f"The student's block_size={config.block_size} does not fit max_length={args.max_length}: choose a "
                "multiple of it as max_length, or set block_size."
            )
        config.noise_schedule = args.schedule
        settings = model.generation_config
        settings.mask_token_id = config.mask_token_id
        # a whole-sequence student decodes the whole answer at once, unless a block size is asked for
        settings.block_size = config.block_size if config.objective == "block" else None
        if settings.eos_token_id is None:
            settings.eos_token_id = tokenizer.eos_token_id
        if settings.pad_token_id is None:
            settings.pad_token_id = pad_token_id(tokenizer)

    def _prepare_datasets(self, train_dataset, eval_dataset, args) -> tuple:
        """Both prepared, and what became of their rows noted."""
        self.preparation_reports = {}
        train_dataset = self._prepare("train", train_dataset, args)
        if isinstance(eval_dataset, dict):
            return train_dataset, {name: self._prepare(name, rows, args) for name, rows in eval_dataset.items()}
        return train_dataset, self._prepare("eval", eval_dataset, args)

    def _prepare(self, name: str, dataset, args):
        """Token columns for a raw dataset; one prepared for this run's tokenizers and settings passes."""
        if dataset is None:
            return None
        if is_prepared(dataset):
            report = require_same_preparation(dataset, self._preparation, name)
            if report is not None:
                self.preparation_reports[name] = report
            return dataset
        with args.main_process_first(desc=f"preparing the {name} dataset"):
            dataset, self.preparation_reports[name] = prepare_dataset(
                dataset, self._preparation, num_proc=args.dataset_num_proc
            )
        return dataset

    @contextmanager
    def _host_batches(self):
        """Data loaders made inside leave batches on the host, where the noise is drawn."""
        placement, self.accelerator.device_placement = self.accelerator.device_placement, False
        try:
            yield
        finally:
            self.accelerator.device_placement = placement

    def _get_dataloader(self, dataset, *args, **kwargs):
        with self._host_batches():
            return super()._get_dataloader(dataset, *args, **kwargs)

    # -- what is not finite is neither stepped on nor saved nor best ------------------------------------------------

    def _row_terms(self, batch: Mapping) -> dict[str, torch.Tensor]:
        """The loss's terms by row of one micro-batch of the host."""
        raise NotImplementedError

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        network = self.accelerator.unwrap_model(self.model)
        self.guard = StepGuard(self, "student", trained_parameters(network), self.optimizer, self._row_terms)
        return prepared

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Also decides, behind a step's last micro-batch, whether the optimizer may take it."""
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
        """What a checkpoint holds of this process, by name."""
        return trained_parameters(self.accelerator.unwrap_model(self.model))

    def _save_checkpoint(self, model, trial):
        self.guard.settle()
        require_finite(self._weights_of_checkpoint(), "The checkpoint", self.guard.anywhere)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None):
        """Beside an adapter also the generation settings of the run, which its base may not have."""
        weights = state_dict
        if weights is None:
            weights = trained_parameters(self.model) if isinstance(self.model, PeftModel) else self.model.state_dict()
        require_finite(weights, "The model")
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel):
            self.model.generation_config.save_pretrained(output_dir or self.args.output_dir)

    def create_model_card(self, *args, **kwargs):
        """See [`~tide_hf.hub.HubTrainerMixin.create_model_card`]; none of weights that are not finite."""
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


def refuse_data_parallel(args) -> None:
    """Refuses several GPUs in one process.

    Raises:
        ValueError: with what to do instead.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would run DataParallel, which the trainers of diffusion LMs do not "
            "support: start the script with `accelerate launch`, or choose one GPU with CUDA_VISIBLE_DEVICES."
        )


def load_student(
    model: str | PreTrainedModel, args, processing_class: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """Model, tokenizer and the revision that was asked for, from instances or names."""
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.name_or_path)
    if not isinstance(model, str):
        return model, processing_class, None
    kwargs = args.model_init_kwargs or {}
    return AutoModelForCausalLM.from_pretrained(model, **kwargs), processing_class, kwargs.get("revision")


def run_packed(network, inputs: Mapping[str, torch.Tensor], head_fn: Callable):
    """A (wrapped) student's forward on a packed layout, `head_fn` in place of its head.

    Args:
        network (`Callable`): a student of this library, wrapped by accelerate or not.
        inputs (`Mapping`): `input_ids`, `position_ids`, `stream` and `block` of a [`~tide_hf.diffusion.PackedLayout`].
        head_fn (`Callable`): `head_fn(hidden (B, P, H), lm_head_weight (V, H)) -> (loss, terms)`.
    """
    stream, block = inputs["stream"], inputs["block"]
    return network(
        input_ids=inputs["input_ids"],
        attention_mask=block_visibility(stream, block, stream, block),
        position_ids=inputs["position_ids"],
        use_cache=False,
        head_fn=head_fn,
    )


def trained_parameters(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def pad_token_id(tokenizer) -> int:
    """The tokenizer's padding id, or its EOS id: padding is never attended, so any id serves."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
