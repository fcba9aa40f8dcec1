"""TIDETrainer: transformers.Trainer that distils a diffusion LM.

The batch of a step is noised on the host, before any network runs; the counts that divide each term are therefore
known, and made global by one all-reduce, for the whole optimizer step. Head and loss run inside the student's wrapped
forward.
"""

import json
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, set_seed
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from .adapter import prepare_adapter
from .alignment import resolve_alignment
from .config import TIDEConfig
from .data import (
    DistillationCollator,
    Noising,
    RowPreparation,
    is_prepared,
    prepare_dataset,
    require_same_preparation,
)
from .diffusion import LayoutSpec, row_uniforms
from .hub import HubTrainerMixin
from .losses import lambda_schedule
from .models.masked_diffusion import block_visibility
from .objective import resolve_objective
from .teachers import Teacher, contract_for, load_teacher, resolve_mask_token_id

logger = logging.get_logger(__name__)


class TIDETrainer(HubTrainerMixin, Trainer):
    """Trains a block-diffusion (or full-sequence) student, with a frozen diffusion LM as teacher or without one.

    Args:
        model (`str` or `PreTrainedModel`): the student: an instance, a Hub name or a folder.
        teacher (`str` or `PreTrainedModel`, *optional*): the teacher; None only with `preset="ce"`.
        args ([`TIDEConfig`], *optional*): every knob.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`): rows of `messages`, `prompt` + `completion` or
            `text`, or rows already prepared, for the same tokenizers and settings, by
            [`~tide_hf.data.prepare_dataset`] or recipes/prepare_data.py.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the student's tokenizer; from `model` by default.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*): the teacher's; from `teacher` if that is a
            name, otherwise the student's.
        peft_config (`peft.PeftConfig`, *optional*): trains an adapter in place of the whole student (see
            [`~tide_hf.adapter.prepare_adapter`]).
        kwargs: further arguments of [`~transformers.Trainer`] (callbacks, optimizers, …).

    Attributes:
        objective ([`~tide_hf.objective.Objective`]): what the run optimises, every field decided.
        preparation_reports (`dict`): what became of the rows of each dataset.

    Raises:
        ValueError: for a combination that cannot train, with what to do.
    """

    loss_is_scaled_for_ga = True

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
        **kwargs,
    ):
        args = TIDEConfig() if args is None else args
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would run DataParallel, which TIDETrainer does not support: start "
                "the script with `accelerate launch`, or choose one GPU with CUDA_VISIBLE_DEVICES."
            )
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.name_or_path)
        if teacher_processing_class is None:
            by_name = isinstance(teacher, str)
            teacher_processing_class = AutoTokenizer.from_pretrained(teacher) if by_name else processing_class
        revision = None
        if isinstance(model, str):
            revision = (args.model_init_kwargs or {}).get("revision")
            model = AutoModelForCausalLM.from_pretrained(model, **_init_kwargs(args.model_init_kwargs))
        self._configure_student(model, args, processing_class)

        alignment, shared_vocab_size = resolve_alignment(args.alignment, processing_class, teacher_processing_class)
        self.objective = resolve_objective(args, alignment)
        logger.info(f"Objective: {json.dumps(self.objective.to_dict())}")
        self.teacher = self._load_teacher(teacher, args, teacher_processing_class, model.config.block_size)
        networks = [model] if self.teacher is None else [model, self.teacher.model]
        self.shared_vocab_size = min(
            args.shared_vocab_size or shared_vocab_size, *(network.config.vocab_size for network in networks)
        )
        self.noising = self._noising_for(model.config, args)

        teacher_side = self.noising.teacher and (teacher_processing_class, self.noising.teacher.mask_token_id)
        self._preparation = RowPreparation.for_run(
            args, model.config.block_size, alignment, (processing_class, model.config.mask_token_id), teacher_side
        )
        self.preparation_reports = {}
        train_dataset = self._prepare("train", train_dataset, args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepare(name, rows, args) for name, rows in eval_dataset.items()}
        else:
            eval_dataset = self._prepare("eval", eval_dataset, args)
        set_seed(args.seed)  # an adapter starts at random, and Trainer sets the seed only later
        model = prepare_adapter(model, peft_config, revision)
        self._term_sums: dict[str, torch.Tensor] = {}
        self._term_steps = 0  # optimizer steps since the terms were last logged
        super().__init__(
            model=model,
            args=args,
            data_collator=DistillationCollator(
                _pad_token_id(processing_class), _pad_token_id(teacher_processing_class)
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.teacher is not None and not hasattr(self.teacher.model, "hf_device_map"):
            self.teacher.model.to(args.device)

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _configure_student(self, model, args, tokenizer) -> None:
        """Writes what the run decides into the student's config, so that a checkpoint generates as it was trained."""
        config = model.config
        if not hasattr(config, "objective"):
            raise ValueError(
                f"The student is a {type(model).__name__} (model_type={config.model_type!r}), which is no diffusion "
                "LM of this library. Load a tide_… or a2d-… checkpoint, or make one with convert_to_diffusion."
            )
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
            settings.pad_token_id = _pad_token_id(tokenizer)

    def _load_teacher(self, teacher, args, tokenizer, block_size) -> Teacher | None:
        """The frozen teacher and its contract; None where the objective needs none."""
        if not self.objective.distills:
            if teacher is not None:
                logger.info("The objective has no distillation term: the teacher is not used.")
            return None
        if teacher is None:
            raise ValueError(f"preset={args.preset!r} distils and needs a teacher; preset='ce' trains without one.")
        if isinstance(teacher, str):
            teacher = load_teacher(
                teacher,
                dtype=args.teacher_dtype,
                load_in_4bit=args.teacher_load_in_4bit,
                **_init_kwargs(args.teacher_model_init_kwargs),
            )
        mask_token_id = resolve_mask_token_id(args.teacher_mask_token_id, teacher.config, tokenizer, "teacher")
        return Teacher(teacher, contract_for(teacher.config, mask_token_id, args.teacher_context, block_size))

    def _noising_for(self, student_config, args) -> Noising:
        """How student and teacher are fed."""
        full = student_config.objective == "full"
        return Noising(
            student=LayoutSpec(student_config.mask_token_id, None if full else student_config.block_size, not full),
            teacher=None if self.teacher is None else self.teacher.contract,
            schedule=args.schedule,
            time_epsilon=args.time_epsilon,
            comp_demo=self.objective.comp_demo,
            demo_ratio=self.objective.demo_ratio,
        )

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

    # -- one step -----------------------------------------------------------------------------------------------------

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

    def _noise(self, batch, epoch: int | None, t: float | None = None) -> dict:
        """One micro-batch, noised by draws keyed by (seed, epoch, row)."""
        uniforms = row_uniforms(self.args.seed, epoch, batch["row_id"].tolist(), batch["labels"].shape[1])
        return self.noising(batch, uniforms, t)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Noises all micro-batches of an optimizer step and makes their counts global."""
        self._term_steps += 1
        epoch = int(self.state.epoch or 0)
        batches = [self._noise(batch, epoch) for batch in islice(epoch_iterator, num_batches)]
        counts = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            counts += batch["counts"]
        counts = self.accelerator.reduce(counts.float().to(device), reduction="sum")
        for batch in batches:
            batch["counts"] = counts
        return batches, counts[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted sum of the objective's terms, each over its global count."""
        outputs = self._run_student(model, inputs, inputs["counts"], self.objective)
        for name, term_B in outputs.terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0) + term_B.sum()
        # DDP averages gradients over processes; the terms are already divided by global counts
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _run_student(self, model, inputs, counts, objective):
        """The student's wrapped forward on a packed layout, the objective in place of its head."""
        teacher = ()
        if objective.distills:
            teacher = (self.teacher.hidden(inputs), self.teacher.logits, self.shared_vocab_size)

        def head_fn(hidden_BPH, weight_VH):
            hidden_NH = hidden_BPH.flatten(0, 1)[inputs["asked"]]
            return objective.from_hidden(hidden_NH, weight_VH, inputs, counts, self._lambda_progress(), *teacher)

        stream, block = inputs["stream"], inputs["block"]
        return model(
            input_ids=inputs["input_ids"],
            attention_mask=block_visibility(stream, block, stream, block),
            position_ids=inputs["position_ids"],
            use_cache=False,
            head_fn=head_fn,
        )

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
        """Adds each term, mean over the optimizer steps since the last log, over all processes."""
        if "loss" in logs and self._term_sums:
            names = sorted(self._term_sums)
            sums = self.accelerator.reduce(torch.stack([self._term_sums[name] for name in names]), reduction="sum")
            logs |= {name: value / self._term_steps for name, value in zip(names, sums.tolist(), strict=True)}
            if self.objective.tidal:
                logs["lambda"] = self._lambda_progress()
            self._term_sums, self._term_steps = {}, 0
        super().log(logs, start_time)

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save(self, output_dir=None, state_dict=None):
        """Beside an adapter also the generation settings of the run, which its base may not have."""
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel):
            self.model.generation_config.save_pretrained(output_dir or self.args.output_dir)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Gathered sums over gathered counts, under noise that is the same at every evaluation.

        Metrics, in nats: `loss` (the objective), `ce` and `distill` (its terms), and `nll_t` for each of
        `args.eval_noise_levels`: mean negative log-likelihood of a masked token at that diffusion time.
        """
        model = self._wrap_model(self.model, training=False)
        if len(self.accelerator._models) == 0 and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        levels, objective = self.args.eval_noise_levels or [], self.objective
        likelihood = replace(
            objective, divergence="none", ce_weighting="uniform", loss_normalization="token", chunk_weighting="paper"
        )
        totals = 0.0
        for batch in dataloader:
            sums = [self._evaluate_rows(model, self._noise(batch, None), self.objective)]
            sums += [self._evaluate_rows(model, self._noise(batch, None, t), likelihood) for t in levels]
            # rows that a data loader repeats to fill the last batch are cut off by gather_for_metrics
            rows = self.accelerator.gather_for_metrics(torch.cat(sums, dim=1))
            totals = totals + rows.double().sum(0)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        (trained, pairs, chunks, _, rows, ce, distill), *at_levels = totals.reshape(-1, 7).tolist()
        units = rows if objective.loss_normalization != "token" else trained
        distilled = pairs if objective.by_token else chunks
        metrics = {"ce": ce / max(units, 1)}
        if self.teacher is not None:
            metrics["distill"] = distill / max(distilled, 1)
        metrics["loss"] = objective.ce_weight * metrics["ce"] + objective.distill_weight * metrics.get("distill", 0.0)
        for t, (_, _, _, masked, _, nll, _) in zip(levels, at_levels, strict=True):
            metrics[f"nll_{t:g}"] = nll / max(masked, 1)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(rows))

    @torch.no_grad()
    def _evaluate_rows(self, model, batch, objective) -> torch.Tensor:
        """Sums and counts of each row, (B, 7): trained, pairs, chunks, masked tokens, 1, ce, distill."""
        batch = self._prepare_inputs(batch)
        ones_B = torch.ones_like(batch["t"])
        terms = self._run_student(model, batch, torch.ones(4, device=ones_B.device), objective).terms
        num_pairs = len(batch.get("pair_chunk", ()))
        columns = [
            batch["row_tokens"],
            _count_rows(batch["row"][:num_pairs], ones_B),
            _count_rows(batch.get("chunk_row", batch["row"][:0]), ones_B),
            _count_rows(batch["row"], ones_B),
            ones_B,
            terms["ce"],
            terms.get("distill", torch.zeros_like(ones_B)),
        ]
        return torch.stack([column.to(ones_B) for column in columns], 1)


def _count_rows(rows: torch.Tensor, like_B: torch.Tensor) -> torch.Tensor:
    """How often each row number occurs, (B,)."""
    return torch.zeros_like(like_B).index_add_(0, rows, torch.ones_like(rows, dtype=like_B.dtype))


def _init_kwargs(given: dict | None) -> dict:
    """A copy of from_pretrained arguments."""
    return dict(given or {})


def _pad_token_id(tokenizer) -> int:
    """The tokenizer's padding id, or its EOS id: padding is never attended, so any id serves."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
