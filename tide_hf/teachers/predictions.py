"""What a teacher predicts for prepared rows, in the form in which a dataset carries it.

Shapes: B rows, L teacher positions, M asked positions, R of them, K hidden, U vocabulary of the teacher, k tokens.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..diffusion import NetworkInputs, Noising, causal_layout
from ..diffusion.cached import COUNTS, PREDICTIONS, CachedPredictions, predictable_positions
from ..losses import default_slice_rows, top_k_log_probs, true_token_log_probs
from .teacher import Teacher

SKIPPED = -1  # instead of the number of a pass


class TeacherPredictions:
    """Runs a teacher on batches of prepared rows and keeps what training needs of its predictions.

    Args:
        teacher ([`Teacher`]): on its device.
        shared_vocab_size (`int`): S, ids that mean the same on both sides.
        top_k (`int`): k ≤ S, the likeliest of these to keep; 0 keeps only the log-probabilities of the true tokens.
        temperature (`float`): of the likeliest tokens, see [`~tide_hf.losses.top_k_log_probs`].
    """

    def __init__(self, teacher: Teacher, shared_vocab_size: int, top_k: int, temperature: float = 1.0):
        self.teacher, self.shared_vocab_size = teacher, shared_vocab_size
        self.top_k, self.temperature = top_k, temperature

    @torch.no_grad()
    def of_clean_rows(self, batch: Mapping[str, torch.Tensor]) -> list[dict[str, np.ndarray]]:
        """The columns of each row of a collated `batch`, from an autoregressive teacher: they hold for any noise."""
        ids, valid = batch["teacher_input_ids"], batch["teacher_attention_mask"].bool()
        kept = predictable_positions(ids, valid, batch["teacher_chunk_ids"])
        layout = causal_layout(ids, valid, kept)
        targets = ids.flatten()[layout.asked_position]
        inputs = NetworkInputs(
            layout.input_ids, layout.position_ids, layout.stream, layout.block, layout.asked, targets
        )
        return _columns([self._predict(inputs)], [kept.sum(1)])

    @torch.no_grad()
    def of_noised_rows(
        self, batch: Mapping[str, torch.Tensor], noising: Noising, seed: int, epochs: Sequence[int | None]
    ) -> list[dict[str, np.ndarray]]:
        """The columns of each row, from a diffusion teacher.

        Args:
            batch (`Mapping`): collated rows.
            noising ([`~tide_hf.diffusion.Noising`]), seed (`int`): of the run.
            epochs (`Sequence`): which noises, in the order of the parts: that of evaluation (None), then those of the
                passes over the rows from 0 on. A part that nobody will ask for may be named by `SKIPPED`.
        """
        parts, counts = [], []
        for epoch in epochs:
            if epoch == SKIPPED:
                parts.append(self._nothing())
                counts.append(torch.zeros(len(batch["row_key"]), dtype=torch.long))
                continue
            noised = noising.keyed(batch, seed, epoch)
            pairs = noised.pairs
            parts.append(self._predict(noised.teacher))
            counts.append(torch.bincount(pairs.chunk_row[pairs.teacher_chunk], minlength=len(noised.t)))
        return _columns(parts, counts)

    def _predict(self, inputs: NetworkInputs) -> CachedPredictions:
        """At the asked positions of one batch, on the host."""
        hidden_MK, found = self.teacher.hidden(inputs), [self._nothing()]
        size = default_slice_rows(hidden_MK.device, self.teacher.model.config.vocab_size)
        for start in range(0, len(hidden_MK), size):
            rows = slice(start, start + size)
            logits_RU = self.teacher.logits(hidden_MK[rows])
            ids_Rk = logits_RU[:, : self.shared_vocab_size].topk(self.top_k).indices
            log_probs_RJ = top_k_log_probs(
                logits_RU, ids_Rk, temperature=self.temperature, shared_vocab_size=self.shared_vocab_size
            )
            of_true_R = true_token_log_probs(logits_RU, inputs.targets[rows].to(logits_RU.device))
            found.append(CachedPredictions(of_true_R.cpu(), ids_Rk.cpu(), log_probs_RJ.cpu()))
        return CachedPredictions(*(torch.cat(tensors) for tensors in zip(*found, strict=True)))

    def _nothing(self) -> CachedPredictions:
        """Predictions at no position."""
        num_outcomes = self.top_k + (self.top_k < self.shared_vocab_size)
        ids = torch.zeros(0, self.top_k, dtype=torch.long)
        return CachedPredictions(torch.zeros(0), ids, torch.zeros(0, num_outcomes))


def _columns(parts: Sequence[CachedPredictions], counts_WB: Sequence[torch.Tensor]) -> list[dict[str, np.ndarray]]:
    """From the parts of a batch to the columns of each row."""
    columns = {COUNTS: list(torch.stack(list(counts_WB), 1).numpy())}
    for name, field in zip(PREDICTIONS, CachedPredictions._fields, strict=True):
        of_parts = (
            getattr(part, field).split(counts_B.tolist()) for part, counts_B in zip(parts, counts_WB, strict=True)
        )
        columns[name] = [torch.cat(of_row).flatten().numpy() for of_row in zip(*of_parts, strict=True)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
