"""The tensors of one inverse-distillation update, by name.

Shapes: B rows, A positions masked in x_t′, S drawn tokens, M positions masked in both, K masked in x_t alone.
"""

from dataclasses import dataclass

import torch

from ..diffusion import PackedInputs, Record


@dataclass
class Drawn(Record):
    """Tokens to draw from the student's predictions, and where they go.

    Args:
        column (`torch.LongTensor` of shape `(S,)`): flat column of x_t.
        source (`torch.LongTensor` of shape `(S,)`): index into the positions asked of the student.
        uniform (`torch.Tensor` of shape `(S,)`): draws in [0, 1).
    """

    column: torch.Tensor
    source: torch.Tensor
    uniform: torch.Tensor


@dataclass
class Positions(Record):
    """Positions masked in x_t that share a kind of target.

    Args:
        column (`torch.LongTensor` of shape `(M,)`): flat column of x_t.
        row (`torch.LongTensor` of shape `(M,)`): row of the batch.
        weight (`torch.Tensor` of shape `(M,)`): w(t) of the row.
        target (`torch.LongTensor` of shape `(M,)`): where the student predicted, index into the positions asked of it;
            where it saw the token, that token.
    """

    column: torch.Tensor
    row: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor

    def of_row(self, row: int) -> "Positions":
        """The positions of one `row`."""
        selected = self.row == row
        return Positions(*(tensor[selected] for tensor in (self.column, self.row, self.weight, self.target)))


@dataclass
class InverseBatch(Record):
    """One micro-batch of an inverse-distillation update, as [`~tide_hf.few_step.InverseNoising`] makes it.

    Args:
        shown ([`~tide_hf.diffusion.PackedInputs`]): x_t′, which the student is run on.
        student_asked (`torch.LongTensor` of shape `(A,)`): flat columns of the positions masked in x_t′.
        noised ([`~tide_hf.diffusion.PackedInputs`]): x_t, which teacher and fake are run on, with the row's own tokens
            where drawn ones go.
        drawn ([`Drawn`]): S tokens of x_t.
        soft ([`Positions`]): M positions that the student predicted, `target` an index into its predictions.
        seen ([`Positions`]): K positions whose token it saw, `target` that token.
        row_key (`torch.LongTensor` of shape `(B,)`): what the noise was keyed by.
        num_rows (`torch.Tensor`): the loss's divisor: rows of this micro-batch, until the trainer replaces it by those
            of the global batch.
    """

    shown: PackedInputs
    student_asked: torch.Tensor
    noised: PackedInputs
    drawn: Drawn
    soft: Positions
    seen: Positions
    row_key: torch.Tensor
    num_rows: torch.Tensor

    @property
    def inputs(self) -> PackedInputs:
        """What the student is run on."""
        return self.shown

    def row_ids(self, row: int) -> torch.Tensor:
        """Token ids of a `row` as teacher and fake are given them, before any token is drawn."""
        columns = [positions.of_row(row).column for positions in (self.soft, self.seen)]
        return self.noised.row_ids(torch.cat(columns))
