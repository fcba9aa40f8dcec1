"""TIDETrainer: transformers.Trainer that distils a diffusion LM.

The batch of a step is noised on the host, before any network runs; the counts that divide each term are therefore
known, and made global by one all-reduce, for the whole optimizer step. Head and loss run inside the student's wrapped
forward.
"""

import json
import math
from dataclasses import replace
from itertools import islice

import torch
from transformers import AutoTokenizer, PreTrainedModel, set_seed
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from .adapter import prepare_adapter
from .alignment import resolve_alignment
from .config import TIDEConfig
from .data import DistillationCollator, Noising, RowPreparation
from .diffusion import LayoutSpec, row_uniforms
from .diffusion_trainer import DiffusionTrainer, load_student, pad_token_id, refuse_data_parallel, run_packed
from .losses import lambda_schedule
from .objective import resolve_objective
from .teachers import Teacher, contract_for, load_teacher, resolve_mask_token_id

logger = logging.get_logger(__name__)


class TIDETrainer(DiffusionTrainer):
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
        refuse_data_parallel(args)
        model, processing_class, revision = load_student(model, args, processing_class)
        if teacher_processing_class is None:
            by_name = isinstance(teacher, str)
            teacher_processing_class = AutoTokenizer.from_pretrained(teacher) if by_name else processing_class
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
        train_dataset, eval_dataset = self._prepare_datasets(train_dataset, eval_dataset, args)
        set_seed(args.seed)  # an adapter starts at random, and Trainer sets the seed only later
        model = prepare_adapter(model, peft_config, revision)
        self._term_sums: dict[str, torch.Tensor] = {}
        self._step_sums: dict[str, torch.Tensor] = {}  # of the step that is being made
        self._term_steps = 0  # optimizer steps since the terms were last logged
        super().__init__(
            model=model,
            args=args,
            data_collator=DistillationCollator(pad_token_id(processing_class), pad_token_id(teacher_processing_class)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.teacher is not None and not hasattr(self.teacher.model, "hf_device_map"):
            self.teacher.model.to(args.device)

    # -- set-up -------------------------------------------------------------------------------------------------------

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
                **(args.teacher_model_init_kwargs or {}),
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

    # -- one step -----------------------------------------------------------------------------------------------------

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
        """Each term by row."""
        inputs = self._prepare_inputs(batch)
        return self._run_student(self.model_wrapped, inputs, inputs["counts"], self.objective).terms

    def _run_student(self, model, inputs, counts, objective):
        """The student's wrapped forward on a packed layout, the objective in place of its head."""
        teacher = ()
        if objective.distills:
            teacher = (self.teacher.hidden(inputs), self.teacher.logits, self.shared_vocab_size)

        def head_fn(hidden_BPH, weight_VH):
            hidden_NH = hidden_BPH.flatten(0, 1)[inputs["asked"]]
            return objective.from_hidden(hidden_NH, weight_VH, inputs, counts, self._lambda_progress(), *teacher)

        return run_packed(model, inputs, head_fn)

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
            num_steps = self._term_steps - self.guard.settle() or math.nan
            sums = self.accelerator.reduce(torch.stack([self._term_sums[name] for name in names]), reduction="sum")
            logs |= {name: value / num_steps for name, value in zip(names, sums.tolist(), strict=True)}
            if self.objective.tidal:
                logs["lambda"] = self._lambda_progress()
            self._term_sums, self._term_steps = {}, 0
        super().log(logs, start_time)

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
