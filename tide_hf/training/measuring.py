"""What evaluation measures in a noised batch, row by row, and the predictions it keeps.

Shapes: B rows, L positions, N masked positions, H hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import EvalPrediction, denumpify_detensorize

from ..diffusion import NoisedBatch

IGNORED = -100
# logits that are in memory at once when predictions are made
SLICE_LOGITS = 2**25


def without_chunks(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The `batch` as if no token had a chunk: masks are drawn per token, and nothing is paired with a teacher."""
    chunks = {name: torch.full_like(batch[name], -1) for name in ("chunk_ids", "teacher_chunk_ids") if name in batch}
    return {**batch, **chunks}


def fill_positions(labels_BL: torch.Tensor, valid_BL: torch.Tensor, eos_token_id: int | None) -> torch.Tensor:
    """Finds the EOS tokens that fill a row after its answer.

    They are the trained-on EOS tokens at the very end of a row, except for the first, which ends the answer.

    Args:
        labels_BL (`torch.LongTensor` of shape `(B, L)`): −100 where not trained on.
        valid_BL (`torch.BoolTensor` of shape `(B, L)`): False at padding, which stands at the end.
        eos_token_id (`int`, *optional*): of the student's tokenizer; without one there is no fill.

    Returns:
        `torch.BoolTensor` of shape `(B, L)`.
    """
    if eos_token_id is None:
        return torch.zeros_like(valid_BL)
    position = torch.arange(labels_BL.shape[1])
    last_other_B = torch.where(valid_BL & (labels_BL != eos_token_id), position, -1).amax(1)
    return valid_BL & (position > last_other_B[:, None] + 1)


def mark_fill(batch: NoisedBatch, fill_BL: torch.Tensor) -> NoisedBatch:
    """A `batch` with `is_fill`, from the positions `fill_BL (B, L)` of its rows."""
    return replace(batch, is_fill=fill_BL[batch.row, _positions(batch)])


def count_rows(rows: torch.Tensor, like_B: torch.Tensor) -> torch.Tensor:
    """Counts how often each row number occurs in `rows`; `(B,)`, with dtype and device of `like_B`."""
    return torch.zeros_like(like_B).index_add_(0, rows, torch.ones_like(rows, dtype=like_B.dtype))


@torch.no_grad()
def predict_masked(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor, preprocess: Callable | None
) -> torch.Tensor:
    """Predicts the masked positions: the most probable token, or whatever `preprocess` makes of the logits.

    Args:
        hidden_NH (`torch.Tensor` of shape `(N, H)`): hidden states before the head.
        weight_VH (`torch.Tensor` of shape `(V, H)`): of the head.
        targets_N (`torch.LongTensor` of shape `(N,)`): true tokens.
        preprocess (`Callable`, *optional*): `(logits (n, V), labels (n,)) -> (n, …)`, called for a slice of the
            positions at a time.

    Returns:
        `torch.Tensor` of shape `(N,)`, or `(N, …)` with `preprocess`.

    Raises:
        ValueError: if `preprocess` returns anything but a tensor with one entry per position.
    """
    found, size = [], max(SLICE_LOGITS // len(weight_VH), 1)
    for start in range(0, max(len(hidden_NH), 1), size):  # also without any position, for the shape of an entry
        logits, labels = hidden_NH[start : start + size] @ weight_VH.T, targets_N[start : start + size]
        result = logits.argmax(-1) if preprocess is None else preprocess(logits, labels)
        if not isinstance(result, torch.Tensor) or result.shape[:1] != labels.shape:
            shape = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise ValueError(
                f"preprocess_logits_for_metrics was given logits {tuple(logits.shape)} and labels "
                f"{tuple(labels.shape)} of {len(labels)} masked positions and returned {shape}; expected a tensor "
                "with one entry per position."
            )
        found.append(result)
    return torch.cat(found)


def on_rows(values_N: torch.Tensor, batch: NoisedBatch, length: int) -> torch.Tensor:
    """Puts values of masked positions into their rows.

    Args:
        values_N (`torch.Tensor` of shape `(N, …)`): of the masked positions.
        batch (`NoisedBatch`): they belong to.
        length (`int`): L of the rows.

    Returns:
        `torch.Tensor` of shape `(B, L, …)`, −100 where nothing is masked.
    """
    values_N = values_N.long() if values_N.dtype == torch.bool else values_N
    rows = values_N.new_full((len(batch.t), length, *values_N.shape[1:]), IGNORED)
    rows[batch.row, _positions(batch)] = values_N
    return rows


def _positions(batch: NoisedBatch) -> torch.Tensor:
    """Where in its row each masked position is, (N,)."""
    return batch.student.position_ids.flatten()[batch.student.asked]


class Predictions:
    """Collects what `compute_metrics` and `predict` are given, in the way transformers does.

    Args:
        args (`TrainingArguments`): eval_do_concat_batches, eval_accumulation_steps, batch_eval_metrics and
            include_for_metrics are read.
        compute_metrics (`Callable`, *optional*): the user's.
        keep (`bool`): whether to keep predictions even if metrics are computed batch by batch.
    """

    def __init__(self, args, compute_metrics: Callable | None, keep: bool):
        self.args, self.compute_metrics = args, compute_metrics
        self.by_batch = args.batch_eval_metrics and compute_metrics is not None
        self.keep = keep or not self.by_batch
        self.kept = {
            name: EvalLoopContainer(args.eval_do_concat_batches, padding_index=IGNORED)
            for name in ("predictions", "label_ids", "inputs")
        }
        self._last = None
        self._num_batches = 0

    def add(self, **tensors: torch.Tensor) -> None:
        """Adds a batch: `predictions`, `label_ids` and, if asked for, `inputs`, with the rows of all processes."""
        if self.by_batch:
            if self._last is not None:
                self._compute(self._last, compute_result=False)
            self._last = tensors
        if self.keep:
            for name, tensor in tensors.items():
                self.kept[name].add(tensor)
            self._num_batches += 1
            if self.args.eval_accumulation_steps and self._num_batches % self.args.eval_accumulation_steps == 0:
                for container in self.kept.values():
                    container.to_cpu_and_numpy()

    def finish(self) -> tuple:
        """Predictions and label ids (numpy, or None), and the user's metrics."""
        arrays = {name: container.get_arrays() for name, container in self.kept.items()}
        metrics = {}
        if self.by_batch and self._last is not None:
            metrics = self._compute(self._last, compute_result=True)
        elif self.compute_metrics is not None and arrays["predictions"] is not None:
            metrics = self._compute(arrays)
        return arrays["predictions"], arrays["label_ids"], denumpify_detensorize(metrics)

    def _compute(self, arrays: Mapping, **kwargs) -> dict:
        further = {"inputs": arrays["inputs"]} if "inputs" in self.args.include_for_metrics else {}
        found = EvalPrediction(predictions=arrays["predictions"], label_ids=arrays["label_ids"], **further)
        return self.compute_metrics(found, **kwargs)
