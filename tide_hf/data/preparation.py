"""Conversations -> aligned token rows: rendering, tokenising, truncation, EOS fill, chunk numbers."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, IterableDataset
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..alignment import (
    Answer,
    LocatedTokens,
    TokenBytes,
    align_chunks,
    align_equal_tokens,
    answer_tokens,
    answers_in_bytes,
    character_spans,
    drop_cut_chunks,
    render_chat,
)

logger = logging.get_logger(__name__)

COLUMNS = ("row_id", "input_ids", "labels", "teacher_input_ids", "chunk_ids", "teacher_chunk_ids")
EOS_FILLS = ("none", "block", "end")
ALIGNMENTS = ("token", "chunk")
STATUS, COVERAGE = "preparation_status", "preparation_coverage"
# what COVERAGE holds for each row; names of fields of the report
COVERAGE_COUNTS = ("num_trained_tokens", "num_aligned_tokens", "num_answer_bytes", "num_aligned_bytes")


@dataclass
class PreparationReport:
    """What became of the rows of one dataset.

    Args:
        num_rows (`int`): rows that came in.
        num_kept (`int`): rows that train.
        num_truncated (`int`): kept rows that were cut at `max_length`; their answers get no EOS fill.
        dropped (`dict[str, int]`): rows left out, by reason.
        num_trained_tokens, num_aligned_tokens (`int`): trained-on student tokens, and those in a chunk.
        num_answer_bytes, num_aligned_bytes (`int`): bytes of the trained-on tokens without EOS fill, and of those in a
            chunk.
    """

    num_rows: int = 0
    num_kept: int = 0
    num_truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    num_trained_tokens: int = 0
    num_aligned_tokens: int = 0
    num_answer_bytes: int = 0
    num_aligned_bytes: int = 0

    def __str__(self) -> str:
        share = self.num_aligned_tokens / max(self.num_trained_tokens, 1)
        byte_share = self.num_aligned_bytes / max(self.num_answer_bytes, 1)
        text = (
            f"{self.num_kept:,} of {self.num_rows:,} rows kept ({self.num_truncated:,} truncated), "
            f"{self.num_trained_tokens:,} trained-on tokens, {share:.1%} of them aligned with the teacher "
            f"({byte_share:.1%} of {self.num_answer_bytes:,} answer bytes)"
        )
        reasons = "; ".join(f"{count:,} dropped: {reason}" for reason, count in self.dropped.items())
        return f"{text}. {reasons}" if reasons else text


class RowSkipped(ValueError):
    """A row that cannot train, with the reason it is counted under."""


@dataclass(frozen=True)
class _Side:
    """One row by one tokenizer: token ids, range of each token, answers in the same unit; bytes for chunks."""

    ids: np.ndarray
    spans: np.ndarray
    answers: list[Answer]
    located: LocatedTokens | None = None


@dataclass(frozen=True)
class RowPreparation:
    """Turns one raw row into token columns; a callable for `Dataset.map`.

    Args:
        tokenizer, teacher_tokenizer (`PreTrainedTokenizerBase`): fast tokenizers; each brings its own chat template.
            The teacher's may be None (no distillation).
        max_length, teacher_max_length (`int`): tokens a row may have on each side.
        block_size (`int`): tokens per block, for `eos_fill="block"`.
        eos_fill (`str`): what follows the end of the last answer: `"none"`; `"block"`, EOS to the end of its block;
            `"end"`, EOS to `max_length`. Fill is trained on.
        alignment (`str`): `"token"`, one shared tokenizer: equal tokens pair; `"chunk"`, two tokenizers: spans of
            equal bytes do, and fill, which each side has of its own, does not.

    Raises:
        ValueError: for an unknown alignment, a fill without an EOS token, and tokenizers that are not fast.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    teacher_max_length: int
    block_size: int
    eos_fill: str = "block"
    alignment: str = "token"

    def __post_init__(self):
        if self.alignment not in ALIGNMENTS:
            raise ValueError(f"alignment is {self.alignment!r}; expected one of {', '.join(ALIGNMENTS)}.")
        if self.eos_fill != "none" and self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"eos_fill={self.eos_fill!r} fills with EOS, which the student's tokenizer does not have: set "
                "tokenizer.eos_token, or eos_fill='none'."
            )
        object.__setattr__(self, "_bytes", TokenBytes.of(self.tokenizer))
        across = self.teacher_tokenizer is not None and self.alignment == "chunk"
        object.__setattr__(self, "_teacher_bytes", TokenBytes.of(self.teacher_tokenizer) if across else None)

    def __call__(self, row: dict, index: int) -> dict:
        """Columns of [`COLUMNS`], the row's status ("kept", "truncated", or why it is dropped) and its coverage."""
        row_id = row.get("row_id", index)
        try:
            columns, truncated, coverage = self._prepare(row)
        except RowSkipped as reason:
            empty = {name: [] for name in COLUMNS[1:]}
            return {"row_id": row_id, **empty, STATUS: str(reason), COVERAGE: [0] * len(COVERAGE_COUNTS)}
        return {"row_id": row_id, **columns, STATUS: "truncated" if truncated else "kept", COVERAGE: coverage}

    def prepare_batch(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """The same for many rows as columns, which `Dataset.map` takes in at a fraction of its cost per row."""
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        prepared = [self(row, index) for row, index in zip(rows, indices, strict=True)]
        return {name: [row[name] for row in prepared] for name in (*COLUMNS, STATUS, COVERAGE)}

    def prepare(self, row: dict) -> tuple[dict[str, list[int]], bool]:
        """Token columns of one row, and whether the student's side was cut.

        Raises:
            RowSkipped: for a row that cannot train.
        """
        return self._prepare(row)[:2]

    def _prepare(self, row: dict) -> tuple[dict[str, list[int]], bool, list[int]]:
        """Token columns, whether the student's side was cut, and the numbers of [`COVERAGE_COUNTS`]."""
        student = self._tokenize(row, self.tokenizer, self._bytes)
        teacher = None
        if self.teacher_tokenizer is not None:
            teacher = self._tokenize(row, self.teacher_tokenizer, self._teacher_bytes)
        chunks, teacher_chunks = self._align(student, teacher)
        teacher_ids = np.zeros(0, dtype=np.int64) if teacher is None else teacher.ids
        ids, labels = student.ids, np.full(len(student.ids), -100)
        for first, behind in answer_tokens(student.spans, student.answers):
            labels[first:behind] = ids[first:behind]
        if (labels == -100).all():
            raise RowSkipped("no answer")
        truncated = len(ids) > self.max_length
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        trained = labels != -100
        if not trained.any():
            raise RowSkipped(f"no answer token within max_length={self.max_length}")
        chunks, teacher_chunks = drop_cut_chunks(chunks, self.max_length, teacher_chunks, self.teacher_max_length)
        nbytes = self._bytes.nbytes[ids]
        covered = nbytes[trained].sum(), nbytes[chunks >= 0].sum()
        columns = {
            "input_ids": ids,
            "labels": labels,
            "teacher_input_ids": teacher_ids[: self.teacher_max_length],
            "chunk_ids": chunks,
            "teacher_chunk_ids": teacher_chunks,
        }
        if not truncated and trained[-1] and self.eos_fill != "none":
            teacher_truncated = len(teacher_ids) > self.teacher_max_length
            columns = self._fill(columns, teacher is not None and not teacher_truncated)
        coverage = [np.count_nonzero(columns["labels"] != -100), np.count_nonzero(columns["chunk_ids"] >= 0), *covered]
        return {name: column.tolist() for name, column in columns.items()}, truncated, [int(n) for n in coverage]

    def _align(self, student: "_Side", teacher: "_Side | None") -> tuple[np.ndarray, np.ndarray]:
        """Chunk numbers of both sides, before any cut and fill."""
        if teacher is None:
            return np.full(len(student.ids), -1), np.zeros(0, dtype=np.int64)
        if self.alignment == "chunk":
            return align_chunks(student.located, student.answers, teacher.located, teacher.answers)
        return align_equal_tokens(
            student.ids, student.spans, student.answers, teacher.ids, teacher.spans, teacher.answers
        )

    def _fill(self, columns: dict[str, np.ndarray], fill_teacher: bool) -> dict[str, np.ndarray]:
        """Appends trained-on EOS tokens, each side its own; those of a shared tokenizer pair in order."""
        shared = self.alignment == "token"
        eos = self.tokenizer.eos_token_id
        teacher_eos = eos if shared or not fill_teacher else self.teacher_tokenizer.eos_token_id
        missing = self._missing(len(columns["input_ids"]), self.max_length)
        teacher_missing = 0
        if fill_teacher and teacher_eos is not None:
            teacher_missing = self._missing(len(columns["teacher_input_ids"]), self.teacher_max_length)
        pairs = min(missing, teacher_missing) if shared else 0
        numbers = np.full(max(missing, teacher_missing), -1)
        numbers[:pairs] = columns["chunk_ids"].max(initial=-1) + 1 + np.arange(pairs)
        added = {
            "input_ids": np.full(missing, eos),
            "labels": np.full(missing, eos),
            "teacher_input_ids": np.full(teacher_missing, teacher_eos if teacher_missing else 0),
            "chunk_ids": numbers[:missing],
            "teacher_chunk_ids": numbers[:teacher_missing],
        }
        return {name: np.concatenate([column, added[name]]) for name, column in columns.items()}

    def _missing(self, length: int, limit: int) -> int:
        """Fill tokens behind a row of `length` tokens that may have `limit`."""
        room = limit - length
        return room if self.eos_fill == "end" else min(-length % self.block_size, room)

    def _tokenize(self, row: dict, tokenizer, token_bytes: TokenBytes | None) -> "_Side":
        """One row rendered and tokenised by one tokenizer."""
        text, answers = self._render(row, tokenizer)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowSkipped("text that is not Unicode (half of a surrogate pair)") from error
        encoding = _encode(tokenizer, text)
        if not len(encoding):
            raise RowSkipped("empty row")
        if self.alignment == "token":
            spans = character_spans(encoding)
            return _Side(np.array(encoding.ids, dtype=np.int64), spans, answers)
        located, positions = token_bytes.locate(text, encoding)
        return _Side(located.ids, located.spans, answers_in_bytes(answers, positions), located)

    def _render(self, row: dict, tokenizer) -> tuple[str, list[Answer]]:
        """Text and answers of a row of `messages`, `prompt` + `completion`, or `text`."""
        if row.get("messages") is not None:
            return self._render_messages(row["messages"], tokenizer)
        if row.get("completion") is not None:
            prompt, completion = row.get("prompt"), row["completion"]
            if isinstance(completion, list):
                prompt = [] if prompt is None else prompt
                return self._render_messages([*prompt, *completion], tokenizer, first_trained=len(prompt))
            prompt = prompt or ""
            text = prompt + completion + (tokenizer.eos_token or "")
            return text, [Answer(len(prompt), len(text), len(prompt), anchored=True)]
        if row.get("text") is not None:
            text = row["text"] + (tokenizer.eos_token or "")
            return text, [Answer(0, len(text), 0, anchored=True)]
        raise RowSkipped("no messages, completion or text in the row")

    def _render_messages(self, messages, tokenizer, first_trained: int = 0):
        """A conversation by the chat template; conversations that cannot train are skipped with the reason."""
        if not messages:
            raise RowSkipped("empty conversation")
        if any(not isinstance(message.get("content"), str) for message in messages):
            raise RowSkipped("a message's content is not text")
        if not any(message["role"] == "assistant" for message in messages[first_trained:]):
            raise RowSkipped("no assistant message")
        try:
            text, answers = render_chat(tokenizer, messages, first_trained)
        except Exception as error:
            if tokenizer.chat_template is None:
                raise
            raise RowSkipped(f"chat template: {error}") from error
        # white space behind the last answer would stand between its end and the EOS fill
        end = answers[-1].end
        return (text if text[end:].strip() else text[:end]), answers


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoding:
    """Tokens of a whole text without added ones, in the tokenizer's own form (`tokenizer(text)` makes lists of it)."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend.encode(text, add_special_tokens=False)


def prepare_dataset(
    dataset: Dataset | IterableDataset, preparation: RowPreparation, num_proc: int | None = None
) -> tuple[Dataset | IterableDataset, PreparationReport | None]:
    """Prepares every row of a dataset once.

    Args:
        dataset (`Dataset` or `IterableDataset`): rows of `messages`, `prompt` and `completion`, or `text`.
        preparation ([`RowPreparation`]): what to do with each row.
        num_proc (`int`, *optional*): processes, as in `Dataset.map`.

    Returns:
        the prepared dataset with the columns of [`COLUMNS`], and the report; None for a streaming dataset, whose
        dropped rows are logged as they are met.

    Raises:
        ValueError: if no column can train, or no row is left, with the counts.
    """
    names = dataset.column_names
    if names is not None and not {"messages", "completion", "text"} & set(names):
        raise ValueError(
            f"The dataset has the columns {', '.join(names)}; expected 'messages', 'prompt' and 'completion', or "
            "'text'. Rename the column that holds the conversation: dataset.rename_column(old, 'messages')."
        )
    removed = [name for name in names or [] if name not in COLUMNS]
    if isinstance(dataset, IterableDataset):
        prepared = dataset.map(preparation, with_indices=True, remove_columns=removed)
        return prepared.filter(_keep_and_log, input_columns=[STATUS]).remove_columns([STATUS, COVERAGE]), None
    prepared = dataset.map(
        preparation.prepare_batch,
        batched=True,
        batch_size=100,
        with_indices=True,
        remove_columns=removed,
        num_proc=num_proc,
        desc="Preparing rows",
    )
    status_of_rows = prepared[STATUS][:]
    statuses = Counter(status_of_rows)
    kept = [index for index, status in enumerate(status_of_rows) if status in ("kept", "truncated")]
    report = PreparationReport(
        num_rows=len(prepared),
        num_kept=len(kept),
        num_truncated=statuses["truncated"],
        dropped={status: count for status, count in statuses.items() if status not in ("kept", "truncated")},
    )
    if not kept:
        raise ValueError(f"No row is left to train on: {report}")
    prepared = prepared.select(kept)
    for batch in prepared.select_columns([COVERAGE]).iter(1000):
        for name, count in zip(COVERAGE_COUNTS, np.sum(batch[COVERAGE], axis=0), strict=True):
            setattr(report, name, getattr(report, name) + int(count))
    prepared = prepared.remove_columns([STATUS, COVERAGE])
    logger.info(f"Prepared dataset: {report}")
    return prepared, report


def is_prepared(dataset) -> bool:
    """Whether a dataset already has the token columns."""
    return dataset.column_names is not None and set(COLUMNS) <= set(dataset.column_names)


_SEEN_REASONS: Counter = Counter()


def _keep_and_log(status: str) -> bool:
    """Filter of a streaming dataset; logs each reason at its 1st, 10th, 100th, … row."""
    if status in ("kept", "truncated"):
        return True
    _SEEN_REASONS[status] += 1
    count = _SEEN_REASONS[status]
    if str(count).strip("0") == "1":
        logger.warning(f"Streaming: {count:,} row(s) dropped so far: {status}")
    return False
