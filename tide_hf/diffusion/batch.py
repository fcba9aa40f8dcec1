"""The tensors of one training step, by name: what each network is run on, and which of its positions count.

Shapes: B rows, D lines of P packed columns, N asked positions, M of them paired with M_T of the teacher's, C chunks.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple, get_args, get_type_hints

import torch

from ..models.masked_diffusion import PADDING_STREAM, STREAMS_PER_ROW
from .cached import CachedPredictions


class Record:
    """A dataclass of tensors and of other records."""

    def to(self, device: torch.device):
        """A copy with every tensor on a `device`."""
        return type(self)(**{field.name: _moved(getattr(self, field.name), device) for field in fields(self)})

    def to_dict(self) -> dict:
        """Plain dictionaries of tensors, for a file that is read without running code; see `from_dict`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value.to_dict() if isinstance(value, Record) else value._asdict() if _is_named(value) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: dict) -> "Record":
        """The record whose `to_dict` returned these `values`."""
        kinds = get_type_hints(cls)
        return cls(**{name: _made(kinds[name], value) for name, value in values.items()})


def _moved(value, device):
    """A tensor, a record, or a named tuple of tensors, on a device; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Record):
        return value.to(device)
    return type(value)(*(_moved(item, device) for item in value)) if _is_named(value) else value


def _is_named(value) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_asdict")


def _made(kind, value):
    """A field's value from plain dictionaries; `kind` is its declared type."""
    if not isinstance(value, dict):
        return value
    kind = next(part for part in get_args(kind) or (kind,) if isinstance(part, type) and part is not type(None))
    return kind.from_dict(value) if issubclass(kind, Record) else kind(**value)


class Counts(NamedTuple):
    """Divisors of the terms of a step, of one micro-batch or summed over the global batch; scalar tensors.

    Args:
        tokens (`torch.Tensor`): trained-on tokens.
        pairs (`torch.Tensor`): masked student positions that are aligned with a teacher's.
        chunks (`torch.Tensor`): active chunks.
        rows (`torch.Tensor`): rows with trained-on tokens.
        written_pairs, written_chunks (`torch.Tensor`): as `pairs` and `chunks`, of the rows that the student wrote,
            which the other counts leave out.
    """

    tokens: torch.Tensor
    pairs: torch.Tensor
    chunks: torch.Tensor
    rows: torch.Tensor
    written_pairs: torch.Tensor
    written_chunks: torch.Tensor

    @classmethod
    def ones(cls, device: torch.device) -> "Counts":
        """Counts that divide nothing, on a `device`: the terms are plain sums."""
        return cls(*torch.ones(len(cls._fields), device=device).unbind())


@dataclass
class PackedInputs(Record):
    """What one network is run on.

    Args:
        input_ids, position_ids, stream, block (`torch.LongTensor` of shape `(D, P)`): see
            [`~tide_hf.diffusion.PackedLayout`].
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    stream: torch.Tensor
    block: torch.Tensor

    @property
    def is_real(self) -> torch.Tensor:
        """bool `(D, P)`: False at padding."""
        return self.stream != PADDING_STREAM

    def row_ids(self, columns: torch.Tensor) -> torch.Tensor:
        """Token ids of the row that flat `columns` lie in; for block students its clean copy, then the noised one."""
        if not len(columns):
            return columns
        # a line holds several rows
        line, column = divmod(int(columns[0]), self.stream.shape[1])
        stream = self.stream[line]
        own = (stream // STREAMS_PER_ROW == stream[column] // STREAMS_PER_ROW) & self.is_real[line]
        return self.input_ids[line][own][stream[own].argsort(stable=True)]


@dataclass
class NetworkInputs(PackedInputs):
    """What one network is run on, and the positions at which it is asked for predictions.

    Args:
        asked (`torch.LongTensor` of shape `(N,)`): flat columns whose hidden states go through the head.
        targets (`torch.LongTensor` of shape `(N,)`): the true token of each.
    """

    asked: torch.Tensor
    targets: torch.Tensor


@dataclass
class Pairs(Record):
    """Active chunks: those whose likelihoods, or with one token per chunk whose distributions, are compared.

    Args:
        student_chunk (`torch.LongTensor` of shape `(M,)`), teacher_chunk (`torch.LongTensor` of shape `(M_T,)`): the
            chunk, 0 … C−1 in order, of the first M asked positions of the student and of all those of the teacher.
        chunk_row (`torch.LongTensor` of shape `(C,)`): the row of each chunk.
        chunk_ends (`list[int]`): on the host, for each chunk the student position after its last one.
        is_exact (`torch.BoolTensor` of shape `(C,)`, *optional*): of an autoregressive teacher: chunks with no token
            to their right that the student sees in the block or blocks that they lie in.
    """

    student_chunk: torch.Tensor
    teacher_chunk: torch.Tensor
    chunk_row: torch.Tensor
    chunk_ends: list[int]
    is_exact: torch.Tensor | None = None


class Written(NamedTuple):
    """Which rows of a batch the student wrote itself, and the states at which it is compared with the teacher.

    Args:
        is_written_B (`torch.BoolTensor` of shape `(B,)`): those rows.
        masked_BL (`torch.BoolTensor` of shape `(B, L)`): their masked positions, trained-on ones.
    """

    is_written_B: torch.Tensor
    masked_BL: torch.Tensor


@dataclass
class NoisedBatch(Record):
    """One micro-batch of a distillation step, as [`~tide_hf.diffusion.Noising`] makes it.

    Args:
        student ([`NetworkInputs`]): the N masked positions are asked; the paired ones first, by row and chunk.
        teacher ([`NetworkInputs`], *optional*): M_T positions are asked, by row and chunk. None without a teacher.
        pairs ([`Pairs`], *optional*): None without a teacher.
        t (`torch.Tensor` of shape `(B,)`): diffusion time of each row.
        row_tokens (`torch.LongTensor` of shape `(B,)`): trained-on tokens of each row.
        row_key (`torch.LongTensor` of shape `(B,)`): what the noise was keyed by.
        row (`torch.LongTensor` of shape `(N,)`): row of each masked position.
        chunk_tokens (`torch.LongTensor` of shape `(N,)`): trained-on tokens of its chunk.
        counts ([`Counts`]): of this micro-batch, until the trainer replaces them by those of the global batch.
        is_fill (`torch.BoolTensor` of shape `(N,)`, *optional*): masked positions that hold EOS fill, in evaluation.
        is_written (`torch.BoolTensor` of shape `(B,)`, *optional*): rows that the student wrote itself.
        suffix_weight (`torch.Tensor` of shape `(N,)`, *optional*): weight of the denoising loss in rows that suffix
            masks were drawn for; 0 in other rows.
        cached ([`~tide_hf.diffusion.cached.CachedPredictions`], *optional*): the teacher's predictions, if the rows
            carry them.
    """

    student: NetworkInputs
    teacher: NetworkInputs | None
    pairs: Pairs | None
    t: torch.Tensor
    row_tokens: torch.Tensor
    row_key: torch.Tensor
    row: torch.Tensor
    chunk_tokens: torch.Tensor
    counts: Counts
    is_fill: torch.Tensor | None = None
    is_written: torch.Tensor | None = None
    suffix_weight: torch.Tensor | None = None
    cached: CachedPredictions | None = None

    @property
    def inputs(self) -> PackedInputs:
        """What the student is run on."""
        return self.student

    def row_ids(self, row: int) -> torch.Tensor:
        """Token ids of a `row` as the student is given them."""
        return self.student.row_ids(self.student.asked[self.row == row])
