"""The two losses of inverse distillation for one noised micro-batch, run through the (wrapped) networks.

Each network's head is used inside its own wrapped forward, where alone it is whole under DDP, FSDP and PEFT. So the
forwards are nested: teacher and fake run in the place of the student's head. Hidden states are kept at the asked
positions alone, and logits exist one chunk of positions at a time.

Shapes: see `noising`; H hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping

import torch

from ..losses import (
    chunked_head_loss,
    clean_token_probabilities,
    denoising_loss,
    inverse_distillation_loss,
    sample_tokens,
    soft_denoising_loss,
    without_mask_token,
)
from ..training.base import run_packed


class InverseStep:
    """What is the same in every update.

    Args:
        mask_token_id (`int`): id of [MASK].
        chunk_size (`int`): positions whose logits exist at a time.
    """

    def __init__(self, mask_token_id: int, chunk_size: int):
        self.mask_token_id, self.chunk_size = mask_token_id, chunk_size

    def fake_loss(self, student: Callable, fake: Callable, batch: Mapping, num_rows, by_row: bool = False):
        """L(f, q) with gradient through the fake alone: at positions the student predicted on its soft predictions,
        at those it saw on the seen tokens.

        Args:
            student, fake (`Callable`): networks, wrapped or not.
            batch (`Mapping`): of [`InverseNoising`], on the networks' device.
            num_rows (`torch.Tensor` or `float`): rows of the global batch.
            by_row (`bool`): one loss per row `(B,)` rather than their sum.

        Returns:
            `torch.Tensor`: scalar or `(B,)`, nats.
        """
        found, learns = {}, torch.is_grad_enabled()

        def at_the_student(hidden_BPH, weight_VH):
            shown_NH = hidden_BPH.flatten(0, 1)[batch["student_asked"]]
            noised = {**batch, "input_ids": self._drawn_ids(shown_NH, weight_VH, batch)}

            def at_the_fake(fake_BPH, fake_weight_VH):
                def soft(selected):
                    return self._soft_loss(
                        fake_BPH, fake_weight_VH, shown_NH[batch["soft_from"][selected]], weight_VH, batch, selected,
                        num_rows,
                    )  # fmt: skip

                def seen(selected):
                    return self._seen_loss(fake_BPH, fake_weight_VH, batch, selected, num_rows)

                found["loss"] = _over_rows(soft, batch, "soft", by_row) + _over_rows(seen, batch, "seen", by_row)
                return found["loss"], None

            with torch.set_grad_enabled(learns):
                found["output"] = run_packed(fake, noised, at_the_fake)
            return None, None

        with torch.no_grad():
            run_packed(student, _student_inputs(batch), at_the_student)
        return found["loss"] if by_row else found["output"].loss

    def student_loss(
        self, student: Callable, teacher: Callable, fake: Callable, batch: Mapping, num_rows, by_row: bool = False
    ):
        """L(f*, q) − L(f, q) with gradient through the student's predictions alone; arguments as in `fake_loss`.

        Where the student saw the token q is its one-hot: these positions are a constant of the value.
        The teacher runs in the precision of the fake, autocast's too: where the two are equal the loss is 0.
        """
        learns = torch.is_grad_enabled()

        def at_the_student(hidden_BPH, weight_VH):
            shown_NH, found = hidden_BPH.flatten(0, 1)[batch["student_asked"]], {}
            noised = {**batch, "input_ids": self._drawn_ids(shown_NH, weight_VH, batch)}

            def at_the_teacher(teacher_BPH, teacher_weight_VH):
                def at_the_fake(fake_BPH, fake_weight_VH):
                    heads = ((fake_BPH, fake_weight_VH), (teacher_BPH, teacher_weight_VH))

                    def soft(selected):
                        return self._inverse_loss(shown_NH, weight_VH, heads, batch, selected, num_rows)

                    def seen(selected):
                        teacher_loss, fake_loss = (
                            self._seen_loss(hidden_BPH, weight_VH, batch, selected, num_rows)
                            for hidden_BPH, weight_VH in heads[::-1]
                        )
                        return teacher_loss - fake_loss

                    constant = _over_rows(seen, batch, "seen", by_row)
                    with torch.set_grad_enabled(learns):
                        found["loss"] = _over_rows(soft, batch, "soft", by_row) + constant
                    return None, None

                run_packed(fake, noised, at_the_fake)
                return None, None

            with torch.no_grad():
                run_packed(teacher, noised, at_the_teacher)
            return found["loss"], None

        return run_packed(student, _student_inputs(batch), at_the_student).loss

    @torch.no_grad()
    def _drawn_ids(self, shown_NH, weight_VH, batch) -> torch.Tensor:
        """x_t: its [MASK]s, seen tokens, and tokens drawn from the student's predictions."""
        ids = batch["input_ids"].clone()
        for start in range(0, len(batch["drawn_from"]), self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            logits = shown_NH[batch["drawn_from"][chunk]] @ weight_VH.T
            probabilities = clean_token_probabilities(logits, self.mask_token_id)
            ids.view(-1)[batch["drawn_column"][chunk]] = sample_tokens(probabilities, batch["drawn_uniform"][chunk])
        return ids

    def _soft_loss(self, fake_BPH, fake_weight_VH, shown_MH, weight_VH, batch, selected, num_rows):
        """Of positions the student predicted."""
        weights = batch["soft_weights"][selected]

        def loss_fn(logits_NV, chunk):
            with torch.no_grad():
                q_NV = clean_token_probabilities(shown_MH[chunk] @ weight_VH.T, self.mask_token_id)
            return soft_denoising_loss(
                logits_NV, q_NV, weights[chunk], num_items=num_rows, mask_token_id=self.mask_token_id
            )

        hidden_MH = fake_BPH.flatten(0, 1)[batch["soft"][selected]]
        return chunked_head_loss(loss_fn, hidden_MH, fake_weight_VH, self.chunk_size)

    def _seen_loss(self, fake_BPH, fake_weight_VH, batch, selected, num_rows):
        """Of positions whose token the student saw."""
        weights, targets = batch["seen_weights"][selected], batch["seen_targets"][selected]

        def loss_fn(logits_NV, chunk):
            logits_NV = without_mask_token(logits_NV, self.mask_token_id)
            return denoising_loss(logits_NV, targets[chunk], weights[chunk], num_items=num_rows)

        hidden_KH = fake_BPH.flatten(0, 1)[batch["seen"][selected]]
        return chunked_head_loss(loss_fn, hidden_KH, fake_weight_VH, self.chunk_size)

    def _inverse_loss(self, shown_NH, weight_VH, heads, batch, selected, num_rows):
        """Of positions the student predicted, against the two frozen networks."""
        columns, weights = batch["soft"][selected], batch["soft_weights"][selected]
        frozen = [(hidden_BPH.flatten(0, 1)[columns], head_VH) for hidden_BPH, head_VH in heads]

        def loss_fn(logits_NV, chunk):
            with torch.no_grad():
                fake_NV, teacher_NV = (hidden[chunk] @ head.T for hidden, head in frozen)
            return inverse_distillation_loss(
                logits_NV,
                teacher_NV,
                fake_NV,
                weights[chunk],
                num_items=num_rows,
                mask_token_id=self.mask_token_id,
            )

        return chunked_head_loss(loss_fn, shown_NH[batch["soft_from"][selected]], weight_VH, self.chunk_size)


def _student_inputs(batch: Mapping) -> dict[str, torch.Tensor]:
    """x_t′ under the names of a packed layout."""
    return {name: batch[f"student_{name}"] for name in ("input_ids", "position_ids", "stream", "block")}


def _over_rows(loss_of: Callable, batch: Mapping, kind: str, by_row: bool) -> torch.Tensor:
    """The loss of all positions of a kind at once, or of each row's."""
    rows = batch[f"{kind}_row"]
    if not by_row:
        return loss_of(slice(None))
    return torch.stack([loss_of((rows == row).nonzero().squeeze(-1)) for row in range(int(batch["num_rows"]))])
