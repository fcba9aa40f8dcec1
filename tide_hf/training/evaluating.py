"""How TIDETrainer evaluates: gathered sums over gathered counts, under noise that never changes.

Shapes: B rows, L positions, N masked positions, R rows of all processes.
"""

from collections import defaultdict
from dataclasses import replace

import torch
from transformers.trainer_utils import EvalLoopOutput

from ..diffusion import Counts, NoisedBatch
from .measuring import Predictions, count_rows, fill_positions, mark_fill, on_rows, without_chunks


class EvaluationMixin:
    """The evaluation of [`~tide_hf.TIDETrainer`]; comes before its base."""

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Gathered sums over gathered counts, under noise that is the same at every evaluation.

        Arguments as in [`~transformers.Trainer.evaluation_loop`].

        Metrics, in nats; the same student is measured under the same masks, with a teacher or without:

        - `ce`: the denoising loss, as the run weighs and normalises it; masks are drawn token by token.
        - `ce_answer`: the same over answer tokens only, per answer token: of the trained-on EOS at a row's end only
          the first counts; the others are fill, which is easy to predict and would flatter the student.
        - `distill`: the divergence to the teacher, under masks that complete chunks. For TIDAL it is taken at λ = 1,
          ω = 1 and without the scale (forward KL or CALM): the training term changes with λ even at fixed weights.
        - `loss`: ce_weight · ce + distill_weight · distill.
        - `nll_t` for each t of `args.eval_noise_levels`: mean negative log-likelihood of a masked token at that time.

        Predictions, made when `compute_metrics` or `predict` asks for them, are `(rows, L)`, padded with −100: at the
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
        totals, names = 0.0, []
        for batch in self._evaluation_batches(dataloader):
            sums, predicted = self._measure(model, batch, predicts=not loss_only)
            names, device = list(sums), self.args.device
            # a row that only fills a batch, or stands in for a missing one, has no trained-on token
            counts_R = self.accelerator.gather((batch["labels"] != -100).any(1).to(device))
            rows = self.accelerator.gather(torch.stack(list(sums.values()), 1))[counts_R]
            totals = totals + rows.double().sum(0)
            if not loss_only:
                if "inputs" in self.args.include_for_metrics:
                    predicted["inputs"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100).to(device)
                padded = (self.accelerator.pad_across_processes(x, dim=1, pad_index=-100) for x in predicted.values())
                gathered = (self.accelerator.gather(rows)[counts_R] for rows in padded)
                kept.add(**dict(zip(predicted, gathered, strict=True)))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        totals = dict(zip(names, totals.tolist(), strict=True)) if names else {}
        metrics = self._metrics(totals)
        predictions, label_ids, further = kept.finish()
        metrics |= {name.removeprefix(f"{metric_key_prefix}_"): value for name, value in further.items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(
            predictions=predictions, label_ids=label_ids, metrics=metrics, num_samples=int(totals.get("rows", 0))
        )

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
    def _measure(self, model, batch, predicts: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Sums and counts of each row `(B,)`, by name; and, if asked for, predictions and their labels.

        `rows`; `tokens`, `answer_tokens` and `compared` (pairs of tokens, or active chunks), which divide `ce`,
        `ce_answer` and `distill`; `mean_ce`, the row's own mean; and `masked_t` and `nll_t` for each noise level t.
        """
        objective = self.objective.evaluated
        likelihood = replace(objective, divergence=None, loss_normalization="token", chunk_weighting="paper")
        fill_BL = fill_positions(batch["labels"], batch["attention_mask"].bool(), self.processing_class.eos_token_id)
        trained_BL = batch["labels"] != -100
        alone = without_chunks(batch)
        # one token per chunk: completing chunks masks nothing more, and one forward serves both terms
        once = objective.distills and objective.alignment == "token"
        main = mark_fill(self._noise(batch if once else alone, None), fill_BL)
        both = replace(likelihood, divergence=objective.divergence) if once else likelihood
        noised, terms = self._run_once(model, main, both, predicts)
        nothing = torch.zeros_like(noised.t)
        compared = {"compared": nothing, "distill": nothing}
        if once:
            compared = self._compared(noised, terms)
        elif objective.distills:
            compared = self._compared(*self._run_once(model, self._noise(batch, None), objective))
        tokens = trained_BL.sum(1).to(noised.t)
        sums = {
            "rows": torch.ones_like(noised.t),
            "tokens": tokens,
            "answer_tokens": (trained_BL & ~fill_BL).sum(1).to(noised.t),
            "ce": terms["ce"],
            "ce_answer": terms["ce_answer"],
            "mean_ce": terms["ce"] / tokens.clamp(min=1),
            **compared,
        }
        level = replace(likelihood, ce_weighting="uniform")
        for t in self.args.eval_noise_levels or []:
            at_level, of_level = self._run_once(model, self._noise(alone, None, t), level)
            sums |= {f"masked_{t:g}": count_rows(at_level.row, at_level.t), f"nll_{t:g}": of_level["ce"]}
        return sums, self._predicted(noised, terms, batch["labels"].shape[1]) if predicts else {}

    def _run_once(self, model, noised: NoisedBatch, objective, predicts: bool = False) -> tuple[NoisedBatch, dict]:
        """The batch on the device, and the terms of each row as plain sums."""
        batch = self._prepare_inputs(noised)
        batch = replace(batch, counts=Counts.ones(batch.t.device))
        return batch, self._run_student(model, batch, objective, predicts).terms

    def _compared(self, batch: NoisedBatch, terms: dict) -> dict[str, torch.Tensor]:
        """Paired tokens or active chunks of each row, and the sum of their divergences, (B,)."""
        return {"compared": count_rows(self.objective.compared_rows(batch), batch.t), "distill": terms["distill"]}

    def _predicted(self, batch: NoisedBatch, terms: dict, length: int) -> dict[str, torch.Tensor]:
        """Predictions and true tokens in their rows, −100 where nothing is predicted."""
        values = {"predictions": terms["predictions"], "label_ids": batch.student.targets}
        return {name: on_rows(values_N, batch, length) for name, values_N in values.items()}

    def _metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Metrics from the totals of `_measure`'s sums; 0 without rows."""
        objective, of = self.objective, defaultdict(float, totals)
        ce = of["mean_ce"] if objective.loss_normalization == "sequence" else of["ce"]
        divisor = of["tokens"] if objective.loss_normalization == "token" else of["rows"]
        metrics = {"ce": ce / max(divisor, 1), "ce_answer": of["ce_answer"] / max(of["answer_tokens"], 1)}
        if objective.distills:
            metrics["distill"] = of["distill"] / max(of["compared"], 1)
        metrics["loss"] = objective.ce_weight * metrics["ce"] + objective.distill_weight * metrics.get("distill", 0.0)
        for t in self.args.eval_noise_levels or []:
            metrics[f"nll_{t:g}"] = of[f"nll_{t:g}"] / max(of[f"masked_{t:g}"], 1)
        return metrics
