"""Conversations -> aligned token rows: rendering, tokenising, truncation, EOS fill, chunk numbers."""

from collections import Counter
from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..alignment import Answer, align_equal_tokens, answer_tokens, render_chat

logger = logging.get_logger(__name__)

COLUMNS = ("row_id", "input_ids", "labels", "teacher_input_ids", "chunk_ids", "teacher_chunk_ids")
EOS_FILLS = ("none", "block", "end")
STATUS = "preparation_status"


@dataclass
class PreparationReport:
    """What became of the rows of one dataset.

    Args:
        num_rows (`int`): rows that came in.
        num_kept (`int`): rows that train.
        num_truncated (`int`): kept rows that were cut at `max_length`; their answers get no EOS fill.
        dropped (`dict[str, int]`): rows left out, by reason.
        num_trained_tokens, num_aligned_tokens (`int`): trained-on student tokens, and those in a chunk.
    """

    num_rows: int = 0
    num_kept: int = 0
    num_truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    num_trained_tokens: int = 0
    num_aligned_tokens: int = 0

    def __str__(self) -> str:
        share = self.num_aligned_tokens / max(self.num_trained_tokens, 1)
        text = (
            f"{self.num_kept:,} of {self.num_rows:,} rows kept ({self.num_truncated:,} truncated), "
            f"{self.num_trained_tokens:,} trained-on tokens, {share:.1%} of them aligned with the teacher"
        )
        reasons = "; ".join(f"{count:,} dropped: {reason}" for reason, count in self.dropped.items())
        return f"{text}. {reasons}" if reasons else text


class RowSkipped(ValueError):
    """A row that cannot train, with the reason it is counted under."""


@dataclass(frozen=True)
class RowPreparation:
    """Turns one raw row into token columns; a callable for `Dataset.map`.

    Args:
        tokenizer, teacher_tokenizer (`PreTrainedTokenizerBase`): fast tokenizers of one shared vocabulary; each brings
            its own chat template. The teacher's may be None (no distillation).
        max_length, teacher_max_length (`int`): tokens a row may have on each side.
        block_size (`int`): tokens per block, for `eos_fill="block"`.
        eos_fill (`str`): what follows the end of the last answer: `"none"`; `"block"`, EOS to the end of its block;
            `"end"`, EOS to `max_length`. Fill is trained on.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    teacher_max_length: int
    block_size: int
    eos_fill: str = "block"

    def __call__(self, row: dict, index: int) -> dict:
        """Columns of [`COLUMNS`] plus the row's status: "kept", "truncated", or why it is dropped."""
        row_id = row.get("row_id", index)
        try:
            columns, truncated = self.prepare(row)
        except RowSkipped as reason:
            return {"row_id": row_id, **{name: [] for name in COLUMNS[1:]}, STATUS: str(reason)}
        return {"row_id": row_id, **columns, STATUS: "truncated" if truncated else "kept"}

    def prepare(self, row: dict) -> tuple[dict[str, list[int]], bool]:
        """Token columns of one row, and whether the student's side was cut.

        Raises:
            RowSkipped: for a row that cannot train.
        """
        ids, offsets, answers = self._tokenize(row, self.tokenizer)
        if self.teacher_tokenizer is None:
            teacher_ids, chunks, teacher_chunks = [], [-1] * len(ids), []
        else:
            teacher_ids, teacher_offsets, teacher_answers = self._tokenize(row, self.teacher_tokenizer)
            chunks, teacher_chunks = align_equal_tokens(
                ids, offsets, answers, teacher_ids, teacher_offsets, teacher_answers
            )
        trained = {index for tokens in answer_tokens(offsets, answers) for index in tokens}
        labels = [token if index in trained else -100 for index, token in enumerate(ids)]
        truncated = len(ids) > self.max_length
        if not truncated:
            self._fill(ids, labels, chunks, teacher_ids, teacher_chunks)
        ids, labels, chunks = ids[: self.max_length], labels[: self.max_length], chunks[: self.max_length]
        if all(label == -100 for label in labels):
            raise RowSkipped(f"no answer token within max_length={self.max_length}" if trained else "no answer")
        teacher_ids = teacher_ids[: self.teacher_max_length]
        teacher_chunks = teacher_chunks[: self.teacher_max_length]
        # a chunk that lost its partner to a cut is dropped on both sides
        both = set(chunks) & set(teacher_chunks)
        columns = {
            "input_ids": ids,
            "labels": labels,
            "teacher_input_ids": teacher_ids,
            "chunk_ids": [chunk if chunk in both else -1 for chunk in chunks],
            "teacher_chunk_ids": [chunk if chunk in both else -1 for chunk in teacher_chunks],
        }
        return columns, truncated

    def _fill(self, ids, labels, chunks, teacher_ids, teacher_chunks) -> None:
        """Appends trained-on EOS tokens in place on both sides, the k-th paired with the k-th."""
        if self.eos_fill == "none" or labels[-1] == -100:
            return
        next_chunk = max(chunks, default=-1) + 1
        for side_ids, side_chunks, limit in (
            (ids, chunks, self.max_length),
            (teacher_ids, teacher_chunks, self.teacher_max_length),
        ):
            if not side_ids:
                continue
            missing = -len(side_ids) % self.block_size if self.eos_fill == "block" else limit - len(side_ids)
            side_ids += [self.tokenizer.eos_token_id] * missing
            side_chunks += list(range(next_chunk, next_chunk + missing))
        labels += ids[len(labels) :]

    def _tokenize(self, row: dict, tokenizer) -> tuple[list[int], list[tuple[int, int]], list[Answer]]:
        """Ids, character offsets and answers of one row by one tokenizer."""
        text, answers = self._render(row, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if not encoded["input_ids"]:
            raise RowSkipped("empty row")
        return encoded["input_ids"], encoded["offset_mapping"], answers

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
            return text, [Answer(len(prompt), len(text), len(prompt))]
        if row.get("text") is not None:
            text = row["text"] + (tokenizer.eos_token or "")
            return text, [Answer(0, len(text), 0)]
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
        return prepared.filter(_keep_and_log, input_columns=[STATUS]).remove_columns([STATUS]), None
    prepared = dataset.map(
        preparation, with_indices=True, remove_columns=removed, num_proc=num_proc, desc="Preparing rows"
    )
    statuses = Counter(prepared[STATUS])
    kept = [index for index, status in enumerate(prepared[STATUS]) if status in ("kept", "truncated")]
    report = PreparationReport(
        num_rows=len(prepared),
        num_kept=len(kept),
        num_truncated=statuses["truncated"],
        dropped={status: count for status, count in statuses.items() if status not in ("kept", "truncated")},
    )
    if not kept:
        raise ValueError(f"No row is left to train on: {report}")
    prepared = prepared.select(kept).remove_columns([STATUS])
    for batch in prepared.select_columns(["labels", "chunk_ids"]).iter(1000):
        report.num_trained_tokens += sum(label != -100 for labels in batch["labels"] for label in labels)
        report.num_aligned_tokens += sum(chunk >= 0 for chunks in batch["chunk_ids"] for chunk in chunks)
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
