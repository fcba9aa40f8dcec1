"""From conversations to aligned token rows: rendering, tokenising, truncation, EOS fill, chunk numbers."""

import hashlib
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..alignment import (
    ALIGNMENTS,
    Answer,
    Chat,
    LocatedTokens,
    TokenBytes,
    align_chunks,
    align_equal_tokens,
    answer_tokens,
    answers_in_bytes,
    character_spans,
    drop_cut_chunks,
    dropped_reasoning,
    left_out,
    locate_answers,
    read_template,
    require_fast,
    resolve_template_kwargs,
    unread_setting,
    write_defaults,
)
from .encoding import Encoder
from .formats import Conversation, RowSkipped, read_row

COLUMNS = ("row_key", "input_ids", "labels", "teacher_input_ids", "chunk_ids", "teacher_chunk_ids")
EOS_FILLS = ("none", "block", "end")
TRAINED_TURNS = ("all", "last")
STATUS, COVERAGE = "preparation_status", "preparation_coverage"
# what COVERAGE holds for each row; fields of the report
COVERAGE_COUNTS = (
    *("num_trained_tokens", "num_aligned_tokens", "num_chunks", "num_answer_bytes", "num_aligned_bytes"),
    *("num_teacher_tokens", "num_teacher_truncated"),
    *("num_turns", "num_unprompted_turns", "num_split_answers", "num_dropped_reasonings"),
)


def row_key(input_ids: list[int], labels: list[int]) -> int:
    """The key of a row's noise: a signed 64-bit hash of its student tokens and labels.

    A row has the same key wherever it is read: in a table or a stream, in any shard, split or mixture, by any worker
    or process. Repeated rows of a dataset get keys of their own: see [`nth_key`].

    Args:
        input_ids, labels (`list[int]`): the student's columns, of equal length.
    """
    return _hash(np.array([input_ids, labels], dtype="<i8").tobytes())


def nth_key(key: int, occurrence: int) -> int:
    """The key of a repeated row, so that it draws noise of its own.

    Args:
        key (`int`): of the first such row, see [`row_key`].
        occurrence (`int`): how many equal rows precede it in the dataset; 0 gives `key` itself.
    """
    return _hash(np.array([key, occurrence], dtype="<i8").tobytes()) if occurrence else key


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class _Side:
    """One row by one tokenizer: token ids, range of each token, answers in the same unit; bytes for chunks.

    `leading` are the ids that precede the text; `num_split` counts answers that the tokenizer would have joined with
    the text before them, `num_dropped` reasonings that are missing from the text.
    """

    ids: np.ndarray
    spans: np.ndarray
    answers: list[Answer]
    located: LocatedTokens | None = None
    leading: tuple[int, ...] = ()
    num_split: int = 0
    num_dropped: int = 0


@dataclass(frozen=True)
class RowPreparation:
    """Turns one raw row into token columns; a callable for `Dataset.map`.

    Args:
        tokenizer, teacher_tokenizer (`PreTrainedTokenizerBase`): fast tokenizers; each brings its own chat template.
            The teacher's may be None (no distillation).
        max_length, teacher_max_length (`int`): maximum number of tokens of a row on each side.
        block_size (`int`): tokens per block, for `eos_fill="block"`.
        eos_fill (`str`): EOS tokens after the last answer, trained on: `"none"`; `"block"`, to the end of its block;
            `"end"`, to `max_length`.
        alignment (`str`): `"token"`, one shared tokenizer: equal tokens are paired; `"chunk"`, two tokenizers: spans
            of equal bytes are paired, but not the EOS fill, of which each side has its own.
        trained_turns (`str`): `"all"` trains on every assistant turn of a conversation, `"last"` only on the last.
        mask_token_id, teacher_mask_token_id (`int`, *optional*): rows whose text contains this token are skipped,
            since a network would take it for noise; None lets them pass.
        chat_template_kwargs (`dict`, *optional*): settings of both chat templates; a row's own take precedence. None:
            those stored in the student's template, else no reasoning (see
            [`~tide_hf.alignment.templates.resolve_template_kwargs`]).

    Raises:
        ValueError: for an unknown alignment, choice of turns or fill, a fill without an EOS token, a mask token
            outside the vocabulary, and tokenizers that are not fast.
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
    chat_template_kwargs: dict | None = None

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
                    f"The {who}'s mask token {tokenizer.mask_token!r} is not in its vocabulary: like all unknown text "
                    f"it becomes {tokenizer.unk_token!r}. Add it: "
                    f"tokenizer.add_special_tokens({{'mask_token': {tokenizer.mask_token!r}}}), or set another id."
                )
        tokenizers = [tokenizer for _, tokenizer, _ in self._masks()]
        settings = resolve_template_kwargs(self.chat_template_kwargs, tokenizers)
        object.__setattr__(self, "chat_template_kwargs", settings)
        object.__setattr__(self, "_encoders", [Encoder.of(tokenizer) for tokenizer in tokenizers])
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
        """Makes the preparation of a run and writes the template and settings it uses into the tokenizers.

        So the checkpoint's tokenizer renders prompts in the way the rows were rendered.

        Args:
            args ([`TIDEConfig`]): or any object with the fields that preparation reads.
            block_size (`int`): the student's.
            alignment (`str`): `"token"` or `"chunk"`, already decided.
            student, teacher (`tuple`): tokenizer and mask token id of each side; None without a teacher.
        """
        template = read_template(getattr(args, "chat_template", None))
        if template is not None:
            student[0].chat_template = template
            if teacher is not None and teacher[0].chat_template is None:
                teacher[0].chat_template = template
        preparation = cls(
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
            chat_template_kwargs=getattr(args, "chat_template_kwargs", None),
        )
        write_defaults(student[0], preparation.chat_template_kwargs)
        return preparation

    def __call__(self, row: dict) -> dict:
        """The columns `COLUMNS`, the row's status ("kept", "truncated", or why it is dropped) and its coverage."""
        try:
            columns, truncated, coverage = self._prepare(row)
        except RowSkipped as reason:
            empty = {name: [] for name in COLUMNS[1:]}
            return {"row_key": 0, **empty, STATUS: str(reason), COVERAGE: [0] * len(COVERAGE_COUNTS)}
        key = row_key(columns["input_ids"], columns["labels"])
        return {"row_key": key, **columns, STATUS: "truncated" if truncated else "kept", COVERAGE: coverage}

    def prepare_batch(self, batch: dict[str, list]) -> dict[str, list]:
        """Prepares many rows at once, which costs `Dataset.map` much less per row.

        Args:
            batch (`dict[str, list]`): columns of raw rows.

        Returns:
            `dict[str, list]`: the columns of a call, for all of them.
        """
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        prepared = [self(row) for row in rows]
        return {name: [row[name] for row in prepared] for name in (*COLUMNS, STATUS, COVERAGE)}

    def prepare(self, row: dict) -> tuple[dict[str, list[int]], bool]:
        """Prepares one `row`: its token columns, and whether the student's side was truncated.

        Raises:
            RowSkipped: for a row that cannot be trained on.
        """
        return self._prepare(row)[:2]

    def _prepare(self, row: dict) -> tuple[dict[str, list[int]], bool, list[int]]:
        """Token columns, whether the student's side was truncated, and the numbers that `COVERAGE_COUNTS` names."""
        sides = self._sides(row)
        student, teacher = sides if len(sides) == 2 else (*sides, None)
        chunks, teacher_chunks = self._align(student, teacher)
        trained = np.zeros(len(student.ids), dtype=bool)
        for first, stop in answer_tokens(student.spans, student.answers):
            trained[first:stop] = True
        if not trained.any():
            raise RowSkipped("no answer")
        # prepended tokens such as BOS are neither text nor trained on
        size = len(student.leading)
        ids, trained = np.concatenate([student.leading, student.ids]).astype(np.int64), np.pad(trained, (size, 0))
        chunks, teacher_ids = np.pad(chunks, (size, 0), constant_values=-1), np.zeros(0, dtype=np.int64)
        if teacher is not None:
            teacher_ids = np.concatenate([teacher.leading, teacher.ids]).astype(np.int64)
            teacher_chunks = np.pad(teacher_chunks, (len(teacher.leading), 0), constant_values=-1)
        truncated, teacher_truncated = len(ids) > self.max_length, len(teacher_ids) > self.teacher_max_length
        ids, trained, teacher_ids = (
            ids[: self.max_length],
            trained[: self.max_length],
            teacher_ids[: self.teacher_max_length],
        )
        if not trained.any():
            raise RowSkipped(f"no answer token within max_length={self.max_length}")
        self._refuse_mask_tokens(ids, teacher_ids)
        chunks, teacher_chunks = drop_cut_chunks(chunks, self.max_length, teacher_chunks, self.teacher_max_length)
        columns = {
            "input_ids": ids.tolist(),
            "labels": np.where(trained, ids, -100).tolist(),
            "teacher_input_ids": teacher_ids.tolist(),
            "chunk_ids": chunks.tolist(),
            "teacher_chunk_ids": teacher_chunks.tolist(),
        }
        coverage = self._coverage(ids, trained, chunks)
        if not truncated and trained[-1] and self.eos_fill != "none":
            filled = self._fill(columns, coverage[2], teacher is not None and not teacher_truncated)
            coverage[:3] = (count + more for count, more in zip(coverage, (*filled, filled[1]), strict=False))
        turns = {answer.turn: answer.prompted for answer in reversed(student.answers)}
        coverage += [len(columns["teacher_input_ids"]), teacher_truncated, len(turns)]
        coverage += [list(turns.values()).count(False), student.num_split, student.num_dropped]
        return columns, truncated, [int(n) for n in coverage]

    def _sides(self, row: dict) -> list["_Side"]:
        """The row by the student's tokenizer and, where there is one, by the teacher's."""
        content, tokenizers = read_row(row), [tokenizer for _, tokenizer, _ in self._masks()]
        settings = content.settings if isinstance(content, Conversation) else {}
        has_template = any(tokenizer.chat_template for tokenizer in tokenizers)
        if settings and has_template and (problem := unread_setting(settings, tokenizers)):
            raise RowSkipped(f"the row's chat_template_kwargs set {problem}")
        tables = (self._bytes, self._teacher_bytes)
        return [self._tokenize(content, *side) for side in zip(tokenizers, self._encoders, tables, strict=False)]

    def _coverage(self, ids: np.ndarray, trained: np.ndarray, chunks: np.ndarray) -> list[int]:
        """The first five numbers of `COVERAGE_COUNTS`, before any fill."""
        aligned, nbytes = chunks >= 0, self._bytes.nbytes[ids]
        numbers = chunks[aligned]
        num_chunks = int(np.count_nonzero(np.diff(numbers, prepend=-1)))  # they are non-decreasing
        return [np.count_nonzero(trained), len(numbers), num_chunks, nbytes[trained].sum(), nbytes[aligned].sum()]

    def _masks(self) -> list[tuple[str, PreTrainedTokenizerBase, int | None]]:
        """Name, tokenizer and mask token id of each side that exists."""
        sides = [("student", self.tokenizer, self.mask_token_id)]
        if self.teacher_tokenizer is not None:
            sides.append(("teacher", self.teacher_tokenizer, self.teacher_mask_token_id))
        return sides

    def _refuse_mask_tokens(self, *ids_of_sides: np.ndarray) -> None:
        """Skips a row whose own text contains [MASK]: it would be noise at any t, and in an answer even the target."""
        for (who, tokenizer, mask), ids in zip(self._masks(), ids_of_sides, strict=False):
            if mask is not None and (ids == mask).any():
                token = tokenizer.convert_ids_to_tokens(mask)
                raise RowSkipped(f"the {who}'s mask token {token!r} is part of the text")

    def _align(self, student: "_Side", teacher: "_Side | None") -> tuple[np.ndarray, np.ndarray]:
        """Chunk numbers of both sides, before truncation and fill."""
        if teacher is None:
            return np.full(len(student.ids), -1), np.zeros(0, dtype=np.int64)
        answers, teacher_answers = _pairs(student.answers, teacher.answers)
        if self.alignment == "chunk":
            return align_chunks(student.located, answers, teacher.located, teacher_answers)
        return align_equal_tokens(student.ids, student.spans, answers, teacher.ids, teacher.spans, teacher_answers)

    def _fill(self, columns: dict[str, list[int]], num_chunks: int, fill_teacher: bool) -> tuple[int, int]:
        """Appends trained-on EOS tokens to each side; with a shared tokenizer they are paired in order.

        Returns:
            the number of the student's, and how many of them are paired.
        """
        shared = self.alignment == "token"
        eos = self.tokenizer.eos_token_id
        teacher_eos = eos if shared or not fill_teacher else self.teacher_tokenizer.eos_token_id
        missing = self._missing(columns["input_ids"], self.max_length, eos)
        teacher_missing = 0
        if fill_teacher and teacher_eos is not None:
            teacher_missing = self._missing(columns["teacher_input_ids"], self.teacher_max_length, teacher_eos)
        pairs = min(missing, teacher_missing) if shared else 0
        numbers = [*range(num_chunks, num_chunks + pairs), *[-1] * (max(missing, teacher_missing) - pairs)]
        columns["input_ids"] += [eos] * missing
        columns["labels"] += [eos] * missing
        columns["teacher_input_ids"] += [teacher_eos] * teacher_missing
        columns["chunk_ids"] += numbers[:missing]
        columns["teacher_chunk_ids"] += numbers[:teacher_missing]
        return missing, pairs

    def _missing(self, ids: list[int], limit: int, eos: int) -> int:
        """Number of fill tokens for a row of at most `limit` tokens; at least one if it does not end in EOS."""
        room = limit - len(ids)
        to_end = -len(ids) % self.block_size or (self.block_size if ids[-1] != eos else 0)
        return room if self.eos_fill == "end" else min(to_end, room)

    def _tokenize(self, content, tokenizer, encoder: Encoder, token_bytes: TokenBytes | None) -> "_Side":
        """One row rendered and tokenised by one tokenizer."""
        if isinstance(content, Conversation):
            text, answers, num_dropped = self._render(content, tokenizer)
            leading = ()
        else:
            text, answers = self._join(content, tokenizer)
            leading, num_dropped = encoder.leading, 0
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowSkipped("text that is not valid Unicode (half of a surrogate pair)") from error
        encoding, num_split = encoder.encode(text, [answer.start for answer in answers])
        if not len(encoding):
            raise RowSkipped("empty row")
        counts = {"leading": leading, "num_split": num_split, "num_dropped": num_dropped}
        if self.alignment == "token":
            spans = character_spans(encoding)
            return _Side(np.array(encoding.ids, dtype=np.int64), spans, answers, **counts)
        located, positions = token_bytes.locate(text, encoding)
        return _Side(located.ids, located.spans, answers_in_bytes(answers, positions), located, **counts)

    def _join(self, content, tokenizer) -> tuple[str, list[Answer]]:
        """Plain text with the tokenizer's own EOS at its end, instead of one that the data may have."""
        answer = content.answer
        for _, other, _ in self._masks():
            if other.eos_token and answer.endswith(other.eos_token):
                answer = answer.removesuffix(other.eos_token)
                break
        start = len(content.prompt)
        text = content.prompt + answer + (tokenizer.eos_token or "")
        return text, [Answer(start, len(text), start, anchored=True)]

    def _render(self, content: Conversation, tokenizer) -> tuple[str, list[Answer], int]:
        """A conversation rendered by the chat template, its answers, and how many reasonings were dropped."""
        messages = content.messages
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or turns[-1] < content.first_trained:
            raise RowSkipped("no assistant message")
        first_trained = turns[-1] if self.trained_turns == "last" else content.first_trained
        chat = Chat(tokenizer, messages, content.tools, {**self.chat_template_kwargs, **content.settings})
        try:
            text, answers = locate_answers(chat, first_trained)
            missing = left_out(chat, text)
        except Exception as error:
            if tokenizer.chat_template is None:
                raise
            raise RowSkipped(f"chat template: {error}") from error
        if missing:
            raise RowSkipped(f"the chat template of {tokenizer.name_or_path or 'a tokenizer'} leaves out {missing}")
        # nothing may come between the end of the last answer and the EOS fill
        end = answers[-1].end
        rest = text[end:].strip()
        if turns[-1] == len(messages) - 1 and tokenizer.eos_token:
            rest = rest.replace(tokenizer.eos_token, "").strip()
        return (text if rest else text[:end]), answers, dropped_reasoning(messages, text)


def _pairs(answers: list[Answer], teacher_answers: list[Answer]) -> tuple[list[Answer], list[Answer]]:
    """The stretches of both sides that correspond: the first ones of each turn, the second ones, and so on."""
    if len(answers) == len(teacher_answers):
        return answers, teacher_answers
    sides = []
    for side in (answers, teacher_answers):
        places = [[answer.turn for answer in side[:place]].count(answer.turn) for place, answer in enumerate(side)]
        sides.append({(answer.turn, place): answer for place, answer in zip(places, side, strict=True)})
    both = [key for key in sides[0] if key in sides[1]]
    return [sides[0][key] for key in both], [sides[1][key] for key in both]
