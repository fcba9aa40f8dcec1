"""TIDETrainer: transformers.Trainer that distils a diffusion LM.

The batch of a step is noised on the host, before any network runs; the counts that divide each term are therefore
known, and made global by one all-reduce, for the whole optimizer step. Head and loss run inside the student's wrapped
forward.
"""

import json
import math
from dataclasses import replace
from os import PathLike

import torch
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..alignment import resolve_alignment
from ..data import DistillationCollator, RowPreparation
from ..diffusion import LayoutSpec, Noising, row_uniforms
from ..losses import lambda_schedule
from ..teachers import Teacher, contract_for, load_teacher, resolve_mask_token_id
from .adapter import prepare_adapter
from .base import DiffusionTrainer, load_student, pad_token_id, run_packed
from .checks import refuse_loading_arguments, refuse_own_teacher, require_tokenizer, require_vocabulary
from .config import TIDEConfig
from .measuring import (
    Predictions,
    count_rows,
    fill_positions,
    mark_fill,
    on_rows,
    predict_masked,
    with_means,
    without_chunks,
)
from .objective import PRESET_DEFAULTS, resolve_objective

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
            [`~tide_hf.training.adapter.prepare_adapter`]).
        kwargs: further arguments of [`~transformers.Trainer`]: callbacks, optimizers, compute_metrics and
            preprocess_logits_for_metrics (see `evaluation_loop`); those of `training.arguments` are refused.

    Attributes:
        objective ([`~tide_hf.training.objective.Objective`]): what the run optimises, every field decided.
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
            *("preset", "divergence", "allow_reverse_tidal", "schedule", "time_epsilon"),
            *("ce_weighting", "chunk_weighting", "loss_normalization"),
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
        **kwargs,
    ):
        if isinstance(teacher, TrainingArguments):
            raise ValueError(
                "TIDETrainer's second argument is the teacher, and it was given training arguments: the order is "
                "model, teacher, args, train_dataset, eval_dataset, processing_class. Give args=…."
            )
        args = TIDEConfig() if args is None else args
        self._check_given(args, kwargs, train_dataset, eval_dataset)
        require_tokenizer("teacher_processing_class", teacher_processing_class)
        teacher = str(teacher) if isinstance(teacher, PathLike) else teacher
        refuse_own_teacher(model, teacher, adapts=peft_config is not None)
        model, processing_class, revision = load_student(model, args, processing_class)
        if teacher_processing_class is None:
            by_name = isinstance(teacher, str)
            teacher_processing_class = AutoTokenizer.from_pretrained(teacher) if by_name else processing_class
        self._configure_student(model, args, processing_class)

        alignment, shared_vocab_size = resolve_alignment(args.alignment, processing_class, teacher_processing_class)
        self.objective = resolve_objective(args, alignment, model.config.noise_schedule)
        logger.info(f"Objective: {json.dumps(self.objective.to_dict())}")
        self.teacher = self._load_teacher(teacher, args, teacher_processing_class, model.config.block_size)
        networks = [model] if self.teacher is None else [model, self.teacher.model]
        rows = min(network.config.vocab_size for network in networks)
        if args.shared_vocab_size is not None and args.shared_vocab_size > rows:
            raise ValueError(f"shared_vocab_size={args.shared_vocab_size} is more than the {rows} ids of a network.")
        self.shared_vocab_size = min(args.shared_vocab_size or shared_vocab_size, rows)
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
            data_collator=DistillationCollator(
                pad_token_id(processing_class),
                pad_token_id(teacher_processing_class),
                *(network.config.vocab_size for network in networks),
            ),
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
        if not isinstance(teacher, str):
            refuse_loading_arguments(args)
        else:
            teacher = load_teacher(
                teacher,
                dtype=args.teacher_dtype,
                load_in_4bit=args.teacher_load_in_4bit,
                **(args.teacher_model_init_kwargs or {}),
            )
        require_vocabulary("teacher", tokenizer, teacher.config)
        mask_token_id = resolve_mask_token_id(args.teacher_mask_token_id, teacher.config, tokenizer, "teacher")
        return Teacher(teacher, contract_for(teacher.config, mask_token_id, args.teacher_context, block_size))

    def _noising_for(self, student_config, args) -> Noising:
        """How student and teacher are fed."""
        full = student_config.diffusion_type == "full"
        return Noising(
            student=LayoutSpec(student_config.mask_token_id, None if full else student_config.block_size, not full),
            teacher=self.teacher.contract if self.objective.distills else None,
            schedule=self.objective.schedule,
            time_epsilon=args.time_epsilon,
            comp_demo=self.objective.comp_demo,
            demo_ratio=self.objective.demo_ratio,
        )

    def _resolve_again(self) -> None:
        """The objective and the noise that changed arguments make."""
        model = self.accelerator.unwrap_model(self.model)
        self._configure_student(model, self.args, self.processing_class)
        objective = resolve_objective(self.args, self.objective.alignment, model.config.noise_schedule)
        if objective.distills and self.teacher is None:
            raise ValueError(
                "The changed arguments ask for distillation, and this trainer was made without a teacher: make a new "
                "one with teacher=…."
            )
        self.objective = objective
        self.noising = self._noising_for(model.config, self.args)
        logger.info(f"Objective: {json.dumps(objective.to_dict())}")

    def _inner_training_loop(self, *args, **kwargs):
        """Begins with empty logs, also where a run was interrupted or starts anew with smaller batches."""
        self._step_sums, self._term_sums, self._term_steps = {}, {}, 0
        return super()._inner_training_loop(*args, **kwargs)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _noise(self, batch, epoch: int | None, t: float | None = None) -> dict:
        """One micro-batch, noised by draws keyed by (seed, epoch, row)."""
        uniforms = row_uniforms(self.args.seed, epoch, batch["row_key"].tolist(), batch["labels"].shape[1])
        return {**self.noising(batch, uniforms, t), "row_key": batch["row_key"]}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Noises all micro-batches of an optimizer step and makes their counts global."""
        batches = [self._noise(batch, self._pass) for batch in self._next_batches(epoch_iterator, num_batches)]
        if not batches:
            return [], None
        self._term_steps += 1
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

    def _run_student(self, model, inputs, counts, objective, predicts: bool = False):
        """The student's wrapped forward on a packed layout, the objective in place of its head."""
        teacher = ()
        if objective.distills:
            teacher = (self.teacher.hidden(inputs), self.teacher.logits, self.shared_vocab_size)

        def head_fn(hidden_BPH, weight_VH):
            hidden_NH = hidden_BPH.flatten(0, 1)[inputs["asked"]]
            loss, terms = objective.from_hidden(
                hidden_NH, weight_VH, inputs, counts, self._lambda_progress(), *teacher
            )
            if predicts:
                preprocess = self.preprocess_logits_for_metrics
                terms["predictions"] = predict_masked(hidden_NH, weight_VH, inputs["targets"], preprocess)
            return loss, terms

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

        Metrics, in nats, all of the same masks for the same student, with a teacher or without:

        - `ce`: the denoising loss, as the run weighs and normalises it; masks are drawn token by token.
        - `ce_answer`: the same over answer tokens alone, per answer token: of the trained-on EOS at a row's end only
          the first is counted, the others are fill, which is easy and flatters.
        - `distill`: the divergence to the teacher, under masks that complete chunks. Of TIDAL its value at λ = 1,
          ω = 1 and no scale (forward KL or CALM): the training term moves with λ while the weights stand still.
        - `loss`: ce_weight · ce + distill_weight · distill.
        - `nll_t` for each of `args.eval_noise_levels`: mean of a masked token at that diffusion time.

        Predictions, made where `compute_metrics` or `predict` ask for them, are `(rows, L)`, padded with −100: at the
        positions masked by the noise of `ce` the likeliest token, or what
        `preprocess_logits_for_metrics(logits (n, V), labels (n,)) -> (n, …)` makes of a slice of them at a time;
        `label_ids` are the true tokens there; −100 elsewhere. `include_for_metrics=["inputs"]` adds the rows'
        input_ids.
        """
        model, was_training = self._network_to_evaluate()
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        compute_metrics = None if loss_only else self.compute_metrics
        kept = Predictions(self.args, compute_metrics, keep=description == "Prediction")
        self.callback_handler.eval_dataloader = dataloader
        totals = 0.0
        for batch in self._evaluation_batches(dataloader):
            sums, predicted = self._measure(model, batch, predicts=not loss_only)
            device = self.args.device
            # a row that fills a batch up, or stands in for one, trains on nothing
            counts_R = self.accelerator.gather((batch["labels"] != -100).any(1).to(device))
            totals = totals + with_means(self.accelerator.gather(sums)[counts_R].double()).sum(0)
            if not loss_only:
                if "inputs" in self.args.include_for_metrics:
                    predicted["inputs"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100).to(device)
                padded = (self.accelerator.pad_across_processes(x, dim=1, pad_index=-100) for x in predicted.values())
                gathered = (self.accelerator.gather(rows)[counts_R] for rows in padded)
                kept.add(**dict(zip(predicted, gathered, strict=True)))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        metrics = self._metrics(totals.tolist())
        num_rows = int(metrics.pop("rows"))
        predictions, label_ids, further = kept.finish()
        metrics |= {name.removeprefix(f"{metric_key_prefix}_"): value for name, value in further.items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=predictions, label_ids=label_ids, metrics=metrics, num_samples=num_rows)

    def _network_to_evaluate(self) -> tuple:
        """The student, prepared and in eval mode and precision; and whether it was in training mode."""
        model = self._wrap_model(self.model, training=False)
        if len(self.accelerator._models) == 0 and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was_training = model.training
        for flag, dtype in (("fp16_full_eval", torch.float16), ("bf16_full_eval", torch.bfloat16)):
            if getattr(self.args, flag) and not self.is_in_train:
                model = model.to(dtype=dtype, device=self.args.device)
        model.eval()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()  # schedule-free optimizers keep two sets of weights
        return model, was_training

    @torch.no_grad()
    def _measure(self, model, batch, predicts: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sums and counts of each row: trained, answer and paired tokens (or chunks), ce, ce_answer, distill, and of
        each noise level masked tokens and nll; and, if asked for, predictions and their labels on the host's rows."""
        objective = self.objective.evaluated
        likelihood = replace(
            objective, divergence="none", loss_normalization="token", chunk_weighting="paper"
        )  # fmt: skip
        fill_BL = fill_positions(batch["labels"], batch["attention_mask"].bool(), self.processing_class.eos_token_id)
        trained_BL = batch["labels"] != -100
        alone = without_chunks(batch)
        # one token per chunk: completing chunks masks nothing more, and one forward serves both terms
        once = objective.distills and objective.alignment == "token"
        main = mark_fill(self._noise(batch if once else alone, None), fill_BL)
        both = replace(likelihood, divergence=objective.divergence) if once else likelihood
        inputs, terms = self._run_once(model, main, both, predicts)
        distilled = [torch.zeros_like(inputs["t"])] * 2
        if once:
            distilled = self._distilled(inputs, terms)
        elif objective.distills:
            distilled = self._distilled(*self._run_once(model, self._noise(batch, None), objective))
        columns = [trained_BL.sum(1), (trained_BL & ~fill_BL).sum(1), distilled[0], terms["ce"], terms["ce_answer"]]
        columns.append(distilled[1])
        for t in self.args.eval_noise_levels or []:
            level = replace(likelihood, ce_weighting="uniform")
            at_level, of_level = self._run_once(model, self._noise(alone, None, t), level)
            columns += [count_rows(at_level["row"], at_level["t"]), of_level["ce"]]
        predicted = {}
        if predicts:
            length = batch["labels"].shape[1]
            values = {"predictions": terms["predictions"], "label_ids": inputs["targets"]}
            predicted = {name: on_rows(values_N, inputs, length) for name, values_N in values.items()}
        return torch.stack([column.to(inputs["t"]) for column in columns], 1), predicted

    def _run_once(self, model, noised, objective, predicts: bool = False) -> tuple[dict, dict]:
        """The inputs on the device, and the terms of each row as plain sums."""
        inputs = self._prepare_inputs(noised)
        counts = torch.ones(4, device=inputs["t"].device)
        return inputs, self._run_student(model, inputs, counts, objective, predicts).terms

    def _distilled(self, inputs, terms) -> list[torch.Tensor]:
        """Paired tokens or active chunks of each row, and the sum of their divergences, (B,)."""
        rows = inputs["row"][: len(inputs["pair_chunk"])] if self.objective.by_token else inputs["chunk_row"]
        return [count_rows(rows, inputs["t"]), terms["distill"]]

    def _metrics(self, totals: list[float]) -> dict[str, float]:
        """Metrics from the sums of `with_means`, and the number of rows."""
        objective = self.objective
        rows, mean_ce, trained, answer, distilled, ce, ce_answer, distill, *levels = totals
        ce = {"token": ce / max(trained, 1), "sequence": mean_ce / max(rows, 1), "batch": ce / max(rows, 1)}
        metrics = {"ce": ce[objective.loss_normalization], "ce_answer": ce_answer / max(answer, 1)}
        if objective.distills:
            metrics["distill"] = distill / max(distilled, 1)
        metrics["loss"] = objective.ce_weight * metrics["ce"] + objective.distill_weight * metrics.get("distill", 0.0)
        for t, masked, nll in zip(self.args.eval_noise_levels or [], levels[::2], levels[1::2], strict=True):
            metrics[f"nll_{t:g}"] = nll / max(masked, 1)
        return metrics | {"rows": rows}
