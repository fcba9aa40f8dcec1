"""Answers that a student wrote, as prepared rows: where they begin in a row, and their chunks with the teacher's.

A prepared row gives the prompt of either side; the answer is token ids, so that nothing of it is tokenised again for
the student. Only a teacher with another tokenizer gets it as text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Features, IterableDataset, Json

from ..alignment import Answer, LocatedTokens, align_chunks
from .formats import CONVERSATIONS, TEXT_IN_JSON, to_json
from .preparation import RowPreparation

STAND_IN = "1"  # a token that every tokenizer has


@dataclass(frozen=True)
class Prompt:
    """What an answer is written to.

    Args:
        ids, teacher_ids (`list[int]`): the tokens before the answer, of the student's row and of the teacher's.
    """

    ids: list[int]
    teacher_ids: list[int]


def holds_prompts_alone(dataset: Dataset | IterableDataset) -> bool:
    """Whether a `dataset` has prompts and no column of answers."""
    names = set(dataset.column_names or ())
    has_answers = names & {*CONVERSATIONS, "completion", "text"} or {"instruction", "output"} <= names
    return "prompt" in names and not has_answers


def with_stand_ins(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Gives rows that are prompts alone an answer that nobody reads, so that they are prepared like all others.

    Args:
        dataset (`Dataset` or `IterableDataset`): raw rows; those with answers keep them.
    """
    if "prompt" not in (dataset.column_names or ()):
        return dataset
    known = dataset.features
    # of a mixture some prompts may be text and others messages
    features = None if known is None else Features({**known, "completion": Json()})
    return dataset.map(_stand_in, features=features)


def _stand_in(row: dict) -> dict:
    completion, prompt = row.get("completion"), row["prompt"]
    others = any(row.get(name) is not None for name in (*CONVERSATIONS, "output", "text"))
    if completion is None and prompt is not None and not others:
        prompt = prompt.get(TEXT_IN_JSON) if isinstance(prompt, dict) else prompt
        completion = STAND_IN if isinstance(prompt, str) else [{"role": "assistant", "content": STAND_IN}]
    return {"completion": to_json(completion)}


def prompt_of(row: dict) -> Prompt | None:
    """The prompt of a prepared row: what precedes the first token of its last answer that is aligned with the teacher.

    Args:
        row (`dict`): the columns [`~tide_hf.data.preparation.COLUMNS`], as lists.

    Returns:
        [`Prompt`]; None for a row whose last answer has no aligned token.
    """
    chunk_ids = row["chunk_ids"]
    trained = [label != -100 for label in row["labels"]]
    if not any(trained):
        return None
    end = len(trained) - trained[::-1].index(True)
    first = end - 1
    while first > 0 and trained[first - 1]:
        first -= 1
    start = next((place for place in range(first, end) if chunk_ids[place] >= 0), None)
    if start is None:
        return None
    teacher_start = list(row["teacher_chunk_ids"]).index(chunk_ids[start])
    return Prompt(list(row["input_ids"][:start]), list(row["teacher_input_ids"][:teacher_start]))


def align_written(
    preparation: RowPreparation, answer: Sequence[int], is_ended: bool
) -> tuple[list[int], list[int], list[int]]:
    """The teacher's tokens of an answer that the student wrote, and chunk numbers as of a prepared row.

    With a shared tokenizer they are the same tokens, one per chunk. Across tokenizers the answer's bytes are tokenised
    by the teacher's tokenizer as the continuation of a text and cut wherever both sides have a boundary; the tokens
    that end the answer on the two sides are a chunk of their own, whatever their text.

    Args:
        preparation ([`RowPreparation`]): of the run, with the teacher's tokenizer.
        answer (`Sequence[int]`): token ids, at least one.
        is_ended (`bool`): whether the last of them ends the answer.

    Returns:
        `tuple[list[int], list[int], list[int]]`: the teacher's ids, the student's chunk numbers, and the teacher's; −1
        for none. An answer that the teacher would read a [MASK] in has no chunks.
    """
    if preparation.alignment == "token":
        teacher_ids, chunks = list(answer), list(range(len(answer)))
        teacher_chunks = list(chunks)
    else:
        teacher_ids, chunks, teacher_chunks = _across(preparation, list(answer), is_ended)
    if preparation.teacher_mask_token_id in teacher_ids:
        return teacher_ids, [-1] * len(chunks), [-1] * len(teacher_chunks)
    return teacher_ids, chunks, teacher_chunks


def _across(preparation: RowPreparation, answer: list[int], is_ended: bool) -> tuple[list[int], ...]:
    """The same for two tokenizers."""
    table, teacher_table = preparation._bytes, preparation._teacher_bytes
    ids = np.array(answer[: len(answer) - is_ended], dtype=np.int64)
    stream, nbytes = b"".join(table[index] for index in ids.tolist()), table.nbytes[ids]
    ends, num_read = nbytes.cumsum(), len(ids)
    # a network may write half a character: the tokens from there on are aligned with nothing
    while num_read and not _is_text(stream[: ends[num_read - 1]]):
        num_read -= 1
    data = stream[: ends[num_read - 1]] if num_read else b""
    spans = np.stack([ends - nbytes, ends], 1)[:num_read]
    student = LocatedTokens(ids[:num_read], spans, nbytes[:num_read], data, data, bool(nbytes.all()))
    text = data.decode()
    teacher, _ = teacher_table.locate(text, preparation._encoders[1].continuation(text))
    whole = [Answer(0, len(data), 0, anchored=True)]
    chunks, teacher_chunks = (side.tolist() for side in align_chunks(student, whole, teacher, whole))
    chunks, teacher_ids = [*chunks, *[-1] * (len(ids) - num_read)], teacher.ids.tolist()
    teacher_end = preparation.teacher_tokenizer.eos_token_id
    if is_ended and teacher_end is not None:
        number = max([-1, *chunks]) + 1
        return [*teacher_ids, teacher_end], [*chunks, number], [*teacher_chunks, number]
    return teacher_ids, [*chunks, *[-1] * is_ended], teacher_chunks


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
