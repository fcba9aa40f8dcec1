"""The two losses of inverse distillation for one noised micro-batch, run through the (wrapped) networks.

Each network's head is used inside its own wrapped forward, where alone it is whole under DDP, FSDP and PEFT. So the
forwards are nested: teacher and fake run where the student's head would. Hidden states are kept at the asked positions
alone, and logits exist a slice of positions at a time.

Shapes: see `batch`; H hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ..losses import (
    Segment,
    clean_token_probabilities,
    default_slice_rows,
    denoising_loss,
    inverse_distillation_loss,
    sample_tokens,
    sliced_loss,
    soft_denoising_loss,
    without_mask_token,
)
from ..training.base import run_packed
from .batch import InverseBatch, Positions


class InverseStep:
    """The two losses of a micro-batch; the object holds what is the same in every update.

    Args:
        mask_token_id (`int`): id of [MASK].
        slice_rows (`int`, *optional*): positions whose logits exist at a time; see [`~tide_hf.losses.sliced_loss`].
        causal (`bool`): whether a block is causal inside.
    """

    def __init__(self, mask_token_id: int, slice_rows: int | None = None, causal: bool = False):
        self.mask_token_id, self.slice_rows = mask_token_id, slice_rows
        self._run = partial(run_packed, causal=causal)

    def fake_loss(self, student: Callable, fake: Callable, batch: InverseBatch, by_row: bool = False) -> torch.Tensor:
        """L(f, q) with gradient through the fake alone: q is the student's prediction at positions it predicted, and
        the one-hot of the token at positions it saw.

        Args:
            student, fake (`Callable`): networks, wrapped or not.
            batch ([`InverseBatch`]): on the networks' device.
            by_row (`bool`): returns one loss per row `(B,)` instead of their sum.

        Returns:
            `torch.Tensor`: scalar or `(B,)`, nats.
        """
        found, learns = {}, torch.is_grad_enabled()

        def at_the_student(hidden_BPH, weight_VH):
            shown_AH = hidden_BPH.flatten(0, 1)[batch.student_asked]
            noised = self._with_drawn_tokens(shown_AH, weight_VH, batch)

            def at_the_fake(fake_BPH, fake_weight_VH):
                head = fake_BPH.flatten(0, 1), fake_weight_VH

                def loss_of(soft, seen):
                    return self._soft_loss(head, (shown_AH, weight_VH), soft, batch) + self._seen_loss(
                        head, seen, batch
                    )

                found["loss"] = _by_row(loss_of, batch, by_row)
                return found["loss"], None

            # the student's forward is without gradient, and the fake's is inside it
            with torch.set_grad_enabled(learns):
                found["output"] = self._run(fake, noised, at_the_fake)
            return None, None

        with torch.no_grad():
            self._run(student, batch.shown, at_the_student)
        # what the wrapped forward returns, not what was found inside: DDP prepares its gradients on the way out
        return found["loss"] if by_row else found["output"].loss

    def student_loss(
        self, student: Callable, teacher: Callable, fake: Callable, batch: InverseBatch, by_row: bool = False
    ) -> torch.Tensor:
        """L(f*, q) − L(f, q) with gradient through the student's predictions alone.

        Where the student saw the token, q is its one-hot: these positions only add a constant. The teacher runs in the
        precision of the fake, autocast included: where the two are equal the loss is 0.

        Args:
            student, teacher, fake (`Callable`): networks, wrapped or not.
            batch ([`InverseBatch`]): on the networks' device.
            by_row (`bool`): returns one loss per row `(B,)` instead of their sum.

        Returns:
            `torch.Tensor`: scalar or `(B,)`, nats.
        """
        learns = torch.is_grad_enabled()

        def at_the_student(hidden_BPH, weight_VH):
            shown_AH, found = hidden_BPH.flatten(0, 1)[batch.student_asked], {}
            noised = self._with_drawn_tokens(shown_AH, weight_VH, batch)

            def at_the_teacher(teacher_BPH, teacher_weight_VH):
                teacher_head = teacher_BPH.flatten(0, 1), teacher_weight_VH

                def at_the_fake(fake_BPH, fake_weight_VH):
                    fake_head = fake_BPH.flatten(0, 1), fake_weight_VH

                    def loss_of(soft, seen):
                        with torch.no_grad():
                            constant = self._seen_loss(teacher_head, seen, batch)
                            constant = constant - self._seen_loss(fake_head, seen, batch)
                        heads = (shown_AH, weight_VH), teacher_head, fake_head
                        return self._inverse_loss(*heads, soft, batch) + constant

                    # teacher and fake run without gradient, and the loss, inside both, needs the student's
                    with torch.set_grad_enabled(learns):
                        found["loss"] = _by_row(loss_of, batch, by_row)
                    return None, None

                self._run(fake, noised, at_the_fake)
                return None, None

            with torch.no_grad():
                self._run(teacher, noised, at_the_teacher)
            return found["loss"], None

        return self._run(student, batch.shown, at_the_student).loss

    @torch.no_grad()
    def _with_drawn_tokens(self, shown_AH, weight_VH, batch: InverseBatch):
        """x_t: its [MASK]s, seen tokens, and tokens drawn from the student's predictions."""
        ids, drawn = batch.noised.input_ids.clone(), batch.drawn
        size = self.slice_rows or default_slice_rows(weight_VH.device, len(weight_VH))
        for start in range(0, len(drawn.source), size):
            rows = slice(start, start + size)
            logits = shown_AH[drawn.source[rows]] @ weight_VH.T
            probabilities = clean_token_probabilities(logits, self.mask_token_id)
            ids.view(-1)[drawn.column[rows]] = sample_tokens(probabilities, drawn.uniform[rows])
        return replace(batch.noised, input_ids=ids)

    def _soft_loss(self, fake_head, student_head, soft: Positions, batch: InverseBatch) -> torch.Tensor:
        """L(f, q) of positions the student predicted."""
        (fake_XH, fake_weight_VH), (shown_AH, weight_VH) = fake_head, student_head

        def probabilities(rows):
            return clean_token_probabilities(shown_AH[soft.target[rows]] @ weight_VH.T, self.mask_token_id)

        def loss_fn(logits, rows, q):
            return soft_denoising_loss(
                logits, q, soft.weight[rows], num_items=batch.num_rows, mask_token_id=self.mask_token_id
            )

        return self._sliced(fake_XH[soft.column], fake_weight_VH, loss_fn, probabilities)

    def _seen_loss(self, head, seen: Positions, batch: InverseBatch) -> torch.Tensor:
        """L(f, q) of positions whose token the student saw."""
        hidden_XH, weight_VH = head

        def loss_fn(logits, rows):
            logits = without_mask_token(logits, self.mask_token_id)
            return denoising_loss(logits, seen.target[rows], seen.weight[rows], num_items=batch.num_rows)

        return self._sliced(hidden_XH[seen.column], weight_VH, loss_fn)

    def _inverse_loss(self, student_head, teacher_head, fake_head, soft: Positions, batch: InverseBatch):
        """L(f*, q) − L(f, q) of positions the student predicted."""
        shown_AH, weight_VH = student_head

        def logits_of(head):
            hidden_MH, head_VH = head[0][soft.column], head[1]
            return lambda rows: hidden_MH[rows] @ head_VH.T

        def loss_fn(logits, rows, teacher_logits, fake_logits):
            return inverse_distillation_loss(
                logits,
                teacher_logits,
                fake_logits,
                soft.weight[rows],
                num_items=batch.num_rows,
                mask_token_id=self.mask_token_id,
            )

        return self._sliced(shown_AH[soft.target], weight_VH, loss_fn, logits_of(teacher_head), logits_of(fake_head))

    def _sliced(self, hidden_NH, weight_VH, loss_fn: Callable, *frozen: Callable) -> torch.Tensor:
        """One loss over all of some positions."""
        segments = [Segment(slice(0, len(hidden_NH)), loss_fn, frozen)]
        return sliced_loss(hidden_NH, weight_VH, segments, slice_rows=self.slice_rows)


def _by_row(loss_of: Callable, batch: InverseBatch, by_row: bool) -> torch.Tensor:
    """The loss of all positions at once, or of each row's."""
    if not by_row:
        return loss_of(batch.soft, batch.seen)
    return torch.stack([loss_of(batch.soft.of_row(row), batch.seen.of_row(row)) for row in range(len(batch.row_key))])
