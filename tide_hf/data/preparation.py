"""Conversations -> aligned token rows: rendering, tokenising, truncation, EOS fill, chunk numbers."""

import hashlib
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

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
    require_fast,
)

COLUMNS = ("row_key", "input_ids", "labels", "teacher_input_ids", "chunk_ids", "teacher_chunk_ids")
RAW_COLUMNS = ("messages", "prompt", "completion", "text")
EOS_FILLS = ("none", "block", "end")
ALIGNMENTS = ("token", "chunk")
TRAINED_TURNS = ("all", "last")
STATUS, COVERAGE = "preparation_status", "preparation_coverage"
# what COVERAGE holds for each row; names of fields of the report
COVERAGE_COUNTS = ("num_trained_tokens", "num_aligned_tokens", "num_chunks", "num_answer_bytes", "num_aligned_bytes")


def row_key(input_ids: list[int], labels: list[int]) -> int:
    """What a row's noise is keyed by: a 64-bit hash of its student tokens and labels, signed, as Arrow stores it.

    A row has the same key wherever it is read: in a table or a stream, in any shard, split or mixture, by any worker
    or process. Rows that are equal share their key, and so their noise within one pass; from pass to pass it differs.
    """
    content = np.array([input_ids, labels], dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


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
        trained_turns (`str`): `"all"` trains on every assistant turn of a conversation, `"last"` on the last alone.
        mask_token_id, teacher_mask_token_id (`int`, *optional*): rows whose text holds this token are skipped, for a
            network would take it for noise; None lets them pass.

    Raises:
        ValueError: for an unknown alignment or choice of turns, a fill without an EOS token, a mask token outside the
            vocabulary, and tokenizers that are not fast.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    max_length: int
    teacher_max_length: int
    block_size: int
    eos_fill: str = "block"
    alignment: str = "token"
    trained_turns: str = "all"
    mask_token_id: int | None = None
    teacher_mask_token_id: int | None = None

    def __post_init__(self):
        for name, known in (("alignment", ALIGNMENTS), ("trained_turns", TRAINED_TURNS), ("eos_fill", EOS_FILLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}.")
        if self.eos_fill != "none" and self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"eos_fill={self.eos_fill!r} fills with EOS, which the student's tokenizer does not have: set "
                "tokenizer.eos_token, or eos_fill='none'."
            )
        for who, tokenizer, mask in self._masks():
            require_fast(tokenizer)
            unknown = tokenizer.unk_token_id
            if mask is not None and mask == unknown == tokenizer.mask_token_id:
                raise ValueError(
                    f"The {who}'s mask token {tokenizer.mask_token!r} is not in its vocabulary: it stands for "
                    f"{tokenizer.unk_token!r}, as all unknown text does. Add it: "
                    f"tokenizer.add_special_tokens({{'mask_token': {tokenizer.mask_token!r}}}), or set another id."
                )
        object.__setattr__(self, "_bytes", TokenBytes.of(self.tokenizer))
        across = self.teacher_tokenizer is not None and self.alignment == "chunk"
        object.__setattr__(self, "_teacher_bytes", TokenBytes.of(self.teacher_tokenizer) if across else None)

    @classmethod
    def for_run(
        cls,
        args,
        block_size: int,
        alignment: str,
        student: tuple[PreTrainedTokenizerBase, int],
        teacher: tuple[PreTrainedTokenizerBase, int] | None,
    ) -> "RowPreparation":
        """The preparation of a run.

        Args:
            args ([`TIDEConfig`]): or anything else that has its fields of the preparation.
            block_size (`int`): the student's.
            alignment (`str`): `"token"` or `"chunk"`, already decided.
            student, teacher (`tuple`): tokenizer and mask token id of each side; no teacher: None.
        """
        return cls(
            tokenizer=student[0],
            teacher_tokenizer=None if teacher is None else teacher[0],
            max_length=args.max_length,
            teacher_max_length=getattr(args, "teacher_max_length", None) or args.max_length,
            block_size=block_size,
            eos_fill=args.eos_fill,
            alignment=alignment,
            trained_turns=args.trained_turns,
            mask_token_id=student[1],
            teacher_mask_token_id=None if teacher is None else teacher[1],
        )

    def __call__(self, row: dict) -> dict:
        """Columns of [`COLUMNS`], the row's status ("kept", "truncated", or why it is dropped) and its coverage."""
        try:
            columns, truncated, coverage = self._prepare(row)
        except RowSkipped as reason:
            empty = {name: [] for name in COLUMNS[1:]}
            return {"row_key": 0, **empty, STATUS: str(reason), COVERAGE: [0] * len(COVERAGE_COUNTS)}
        key = row_key(columns["input_ids"], columns["labels"])
        return {"row_key": key, **columns, STATUS: "truncated" if truncated else "kept", COVERAGE: coverage}

    def prepare_batch(self, batch: dict[str, list]) -> dict[str, list]:
        """The same for many rows as columns, which `Dataset.map` takes in at a fraction of its cost per row."""
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        prepared = [self(row) for row in rows]
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
        trained = np.zeros(len(student.ids), dtype=bool)
        for first, behind in answer_tokens(student.spans, student.answers):
            trained[first:behind] = True
        if not trained.any():
            raise RowSkipped("no answer")
        truncated, teacher_truncated = len(trained) > self.max_length, len(teacher_ids) > self.teacher_max_length
        ids, trained, teacher_ids = (
            student.ids[: self.max_length],
            trained[: self.max_length],
            teacher_ids[: self.teacher_max_length],
        )
        if not trained.any():
            raise RowSkipped(f"no answer token within max_length={self.max_length}")
        self._refuse_mask_tokens(ids, teacher_ids)
        chunks, teacher_chunks = drop_cut_chunks(chunks, self.max_length, teacher_chunks, self.teacher_max_length)
        aligned, nbytes = chunks >= 0, self._bytes.nbytes[ids]
        numbers = chunks[aligned]
        num_chunks = np.count_nonzero(np.diff(numbers, prepend=-1))  # they rise
        coverage = [np.count_nonzero(trained), len(numbers), num_chunks, nbytes[trained].sum(), nbytes[aligned].sum()]
        columns = {
            "input_ids": ids.tolist(),
            "labels": np.where(trained, ids, -100).tolist(),
            "teacher_input_ids": teacher_ids.tolist(),
            "chunk_ids": chunks.tolist(),
            "teacher_chunk_ids": teacher_chunks.tolist(),
        }
        if not truncated and trained[-1] and self.eos_fill != "none":
            num_filled, num_pairs = self._fill(columns, int(num_chunks), teacher is not None and not teacher_truncated)
            coverage[:3] = coverage[0] + num_filled, coverage[1] + num_pairs, coverage[2] + num_pairs
        return columns, truncated, [int(n) for n in coverage]

    def _masks(self) -> list[tuple[str, PreTrainedTokenizerBase, int | None]]:
        """Who, tokenizer and mask token id of each side there is."""
        sides = [("student", self.tokenizer, self.mask_token_id)]
        if self.teacher_tokenizer is not None:
            sides.append(("teacher", self.teacher_tokenizer, self.teacher_mask_token_id))
        return sides

    def _refuse_mask_tokens(self, *ids_of_sides: np.ndarray) -> None:
        """Skips a row whose own text says [MASK]: it would be noise at any t, and as an answer the target."""
        for (who, tokenizer, mask), ids in zip(self._masks(), ids_of_sides, strict=False):
            if mask is not None and (ids == mask).any():
                token = tokenizer.convert_ids_to_tokens(mask)
                raise RowSkipped(f"the {who}'s mask token {token!r} stands in the text")

    def _align(self, student: "_Side", teacher: "_Side | None") -> tuple[np.ndarray, np.ndarray]:
        """Chunk numbers of both sides, before any cut and fill."""
        if teacher is None:
            return np.full(len(student.ids), -1), np.zeros(0, dtype=np.int64)
        if self.alignment == "chunk":
            return align_chunks(student.located, student.answers, teacher.located, teacher.answers)
        return align_equal_tokens(
            student.ids, student.spans, student.answers, teacher.ids, teacher.spans, teacher.answers
        )

    def _fill(self, columns: dict[str, list[int]], num_chunks: int, fill_teacher: bool) -> tuple[int, int]:
        """Appends trained-on EOS tokens, each side its own; those of a shared tokenizer pair in order.

        Returns:
            how many the student has, and how many of them have a pair.
        """
        shared = self.alignment == "token"
        eos = self.tokenizer.eos_token_id
        teacher_eos = eos if shared or not fill_teacher else self.teacher_tokenizer.eos_token_id
        missing = self._missing(len(columns["input_ids"]), self.max_length)
        teacher_missing = 0
        if fill_teacher and teacher_eos is not None:
            teacher_missing = self._missing(len(columns["teacher_input_ids"]), self.teacher_max_length)
        pairs = min(missing, teacher_missing) if shared else 0
        numbers = [*range(num_chunks, num_chunks + pairs), *[-1] * (max(missing, teacher_missing) - pairs)]
        columns["input_ids"] += [eos] * missing
        columns["labels"] += [eos] * missing
        columns["teacher_input_ids"] += [teacher_eos] * teacher_missing
        columns["chunk_ids"] += numbers[:missing]
        columns["teacher_chunk_ids"] += numbers[:teacher_missing]
        return missing, pairs

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
        for part in ("role", "content"):
            if any(not isinstance(message.get(part), str) for message in messages):
                raise RowSkipped(f"a message's {part} is not text")
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or turns[-1] < first_trained:
            raise RowSkipped("no assistant message")
        if self.trained_turns == "last":
            first_trained = turns[-1]
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
