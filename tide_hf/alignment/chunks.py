"""Chunk numbers per token: which student tokens and which teacher tokens represent the same text.

With a shared tokenizer a chunk is one token on each side: same id, same characters of the same answer. Across
tokenizers it is the shortest span of equal bytes.
"""

import math
from collections.abc import Sequence

import numpy as np

from .chat import Answer
from .stretches import equal_stretches
from .token_bytes import LocatedTokens


def answer_tokens(spans: np.ndarray, answers: Sequence[Answer]) -> list[tuple[int, int]]:
    """Finds the tokens inside each answer: those that begin and end in it.

    Tokenizers that trim offsets give a white-space token zero width, at the place where it ends; it is inside an
    answer if that place is, unless it is the answer's start.

    Args:
        spans (`np.ndarray` of shape `(n, 2)`): range of each token, in text order, in the unit of the answers.
        answers (`Sequence[Answer]`): in text order.

    Returns:
        `list[tuple[int, int]]`: first token and the one after the last, per answer.
    """
    starts, ends = _rising(spans)
    edges = np.array([(answer.start, answer.end) for answer in answers], dtype=np.int64).reshape(-1, 2)
    first = np.maximum(starts.searchsorted(edges[:, 0], "left"), ends.searchsorted(edges[:, 0], "right"))
    last = np.maximum(ends.searchsorted(edges[:, 1], "right"), first)
    return list(zip(first.tolist(), last.tolist(), strict=True))


def align_equal_tokens(
    student_ids: Sequence[int],
    student_spans: np.ndarray,
    student_answers: Sequence[Answer],
    teacher_ids: Sequence[int],
    teacher_spans: np.ndarray,
    teacher_answers: Sequence[Answer],
) -> tuple[np.ndarray, np.ndarray]:
    """Chunk numbers of two renderings of the same messages by one tokenizer.

    Two tokens share a chunk if they have the same id and cover the same characters, counted from where the content of
    their answer begins. If several tokens cover the same characters, they pair in order.

    Args:
        student_ids, teacher_ids (`Sequence[int]`): token ids.
        student_spans, teacher_spans (`np.ndarray` of shape `(n, 2)`): character range of each token in its text.
        student_answers, teacher_answers (`Sequence[Answer]`): the same answers in the two texts, in order.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: int64 chunk number of each student and each teacher token, −1 for none;
        numbers rise with the student's positions.

    Raises:
        ValueError: if the two sides do not have the same number of answers.
    """
    rows, chunks = [], []
    for ids, spans, answers in (
        (student_ids, student_spans, student_answers),
        (teacher_ids, teacher_spans, teacher_answers),
    ):
        ids, spans = np.asarray(ids, dtype=np.int64), np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        bounds = np.array(answer_tokens(spans, answers), dtype=np.int64).reshape(-1, 2)
        tokens = _ranges(bounds[:, 0], bounds[:, 1])
        answer = np.repeat(np.arange(len(bounds)), bounds[:, 1] - bounds[:, 0])
        anchors = np.array([place.anchor for place in answers], dtype=np.int64)
        starts, ends = spans[tokens].T
        rows.append((tokens, np.stack([answer, starts - anchors[answer], ends - starts, ids[tokens]], 1)))
        chunks.append(np.full(len(ids), -1))
    if len(student_answers) != len(teacher_answers):
        raise ValueError(f"the student has {len(student_answers)} answers, the teacher {len(teacher_answers)}")
    (tokens, keys), (teacher_tokens, teacher_keys) = rows
    # the two sides mostly differ only after the content: the common beginning pairs without a search
    size = min(len(keys), len(teacher_keys))
    different = (keys[:size] != teacher_keys[:size]).any(1)
    same = int(different.argmax()) if different.any() else size
    pair, teacher_pair = _equal_rows(keys[same:], teacher_keys[same:])
    order = pair.argsort()
    pair, teacher_pair = tokens[same:][pair[order]], teacher_tokens[same:][teacher_pair[order]]
    chunks[0][tokens[:same]] = chunks[1][teacher_tokens[:same]] = np.arange(same)
    chunks[0][pair] = chunks[1][teacher_pair] = same + np.arange(len(pair))
    return chunks[0], chunks[1]


def cut_equal_bytes(student_nbytes: np.ndarray, teacher_nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts two tokenisations of the same bytes wherever both have a token boundary.

    Args:
        student_nbytes (`np.ndarray` of shape `(n,)`), teacher_nbytes (`np.ndarray` of shape `(m,)`): bytes of each
            token.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: int64 chunk number 0 … C−1 of each student and each teacher token, rising;
        −1 for tokens of no bytes.

    Raises:
        ValueError: if the two do not add up to the same number of bytes.

    Source: TIDE (arXiv 2604.26951), §2.3, maximal split.
    """
    ends, teacher_ends = np.cumsum(student_nbytes), np.cumsum(teacher_nbytes)
    total, teacher_total = (int(side[-1]) if len(side) else 0 for side in (ends, teacher_ends))
    if total != teacher_total:
        raise ValueError(
            f"the student's tokens have {total} bytes and the teacher's {teacher_total}: only tokenisations of the "
            "same bytes can be cut. Use align_chunks for texts that differ."
        )
    if total == 0:
        return np.full(len(ends), -1), np.full(len(teacher_ends), -1)
    is_end, is_teacher_end = np.zeros((2, total + 1), dtype=bool)
    is_end[ends] = is_teacher_end[teacher_ends] = True
    is_end[0] = False
    # a chunk's number is the number of common boundaries before it
    number = (is_end & is_teacher_end)[:-1].cumsum()
    chunks, teacher_chunks = number[ends - 1], number[teacher_ends - 1]
    chunks[np.equal(student_nbytes, 0)] = teacher_chunks[np.equal(teacher_nbytes, 0)] = -1
    return chunks, teacher_chunks


def align_chunks(
    student: LocatedTokens,
    student_answers: Sequence[Answer],
    teacher: LocatedTokens,
    teacher_answers: Sequence[Answer],
) -> tuple[np.ndarray, np.ndarray]:
    """Chunk numbers of two renderings of the same messages by two tokenizers.

    Both are cut wherever both have a token boundary at the same place in the same answer. A piece whose bytes differ
    (normalised on one side, a space dropped or prepended) is left out, its neighbours are not; one whose bytes agree
    is cut again by bytes, which also finds boundaries inside a character.

    Args:
        student, teacher (`LocatedTokens`): the tokens of each rendering.
        student_answers, teacher_answers (`Sequence[Answer]`): the same answers in the two texts, in order, in bytes.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: int64 chunk number 0 … C−1 of each student and each teacher token, rising, −1
        for none. The tokens of a chunk are consecutive and have the same bytes on both sides.

    Raises:
        ValueError: if the two sides do not have the same number of answers.
    """
    stretches = [
        stretch
        for ours, theirs in zip(student_answers, teacher_answers, strict=True)
        for stretch in equal_stretches(student.text, ours, teacher.text, theirs)
    ]
    pieces = _common_pieces(student, teacher, np.array(stretches, dtype=np.int64).reshape(-1, 3))
    if student.exact and teacher.exact:
        return _numbers(len(student.nbytes), *pieces[:2]), _numbers(len(teacher.nbytes), *pieces[2:])
    pieces = _of_equal_bytes(student, teacher, pieces)
    chunks, teacher_chunks = np.full(len(student.nbytes), -1), np.full(len(teacher.nbytes), -1)
    tokens, teacher_tokens = _ranges(pieces[0], pieces[1]), _ranges(pieces[2], pieces[3])
    chunks[tokens], teacher_chunks[teacher_tokens] = cut_equal_bytes(
        student.nbytes[tokens], teacher.nbytes[teacher_tokens]
    )
    return chunks, teacher_chunks


def drop_cut_chunks(
    chunks: np.ndarray, length: int, teacher_chunks: np.ndarray, teacher_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chunk numbers after truncation: a chunk that lost a token, or all of one side, is dropped on both sides.

    Args:
        chunks (`np.ndarray` of shape `(n,)`), teacher_chunks (`np.ndarray` of shape `(m,)`): numbers, −1 for none.
        length, teacher_length (`int`): number of tokens that are kept on each side.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: shapes `(min(n, length),)` and `(min(m, teacher_length),)`.
    """
    if len(chunks) <= length and len(teacher_chunks) <= teacher_length:
        return chunks, teacher_chunks
    num_chunks = max(chunks.max(initial=-1), teacher_chunks.max(initial=-1)) + 1
    # the last entry, which index −1 addresses, is for tokens without a chunk
    has, teacher_has, lost = np.zeros((3, num_chunks + 1), dtype=bool)
    has[chunks[:length]] = teacher_has[teacher_chunks[:teacher_length]] = True
    lost[chunks[length:]] = lost[teacher_chunks[teacher_length:]] = lost[-1] = True
    number = np.where(has & teacher_has & ~lost, np.arange(num_chunks + 1), -1)
    return number[chunks[:length]], number[teacher_chunks[:teacher_length]]


def _rising(spans) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends, each made non-decreasing: a token out of order overlaps its neighbours."""
    starts, ends = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
    return np.minimum.accumulate(starts[::-1])[::-1], np.maximum.accumulate(ends)


def _ranges(firsts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """first, first + 1, … stop − 1 of each pair, joined."""
    if len(firsts) == 1:
        return np.arange(firsts[0], stops[0])
    counts = stops - firsts
    return np.repeat(firsts - counts.cumsum() + counts, counts) + np.arange(counts.sum())


def _numbers(num_tokens: int, firsts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """0 for the tokens of the first range, 1 for those of the second, …; −1 for tokens in none, `(num_tokens,)`."""
    if not len(firsts):
        return np.full(num_tokens, -1)
    is_first = np.zeros(num_tokens, dtype=bool)
    is_first[firsts] = True
    number = is_first.cumsum() - 1
    return np.where(np.arange(num_tokens) < stops[number], number, -1)


def _equal_rows(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of equal rows of two tables; the k-th of several equal ones pairs with the k-th."""
    if not len(one) or not len(two):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    table = np.concatenate([one, two])
    table -= table.min(0, initial=0)
    sizes = [int(size) + 1 for size in table.max(0, initial=0)]
    fits = math.prod(sizes) < 2**63
    _, kind = np.unique(
        np.ravel_multi_index(tuple(table.T), sizes) if fits else table, axis=None if fits else 0, return_inverse=True
    )
    keys = []
    for side in (kind[: len(one)], kind[len(one) :]):
        order = side.argsort(kind="stable")
        first = np.searchsorted(side[order], side[order], "left")
        times = np.empty_like(order)
        times[order] = np.arange(len(order)) - first
        keys.append(side * (len(kind) + 1) + times)
    return np.intersect1d(*keys, assume_unique=True, return_indices=True)[1:]


def _cut_points(located: LocatedTokens) -> tuple[np.ndarray, np.ndarray]:
    """Places of a text where its tokens can be cut apart, rising, and how many tokens end at or before each."""
    if located.exact:
        return np.concatenate([[0], located.spans[:, 1]]), np.arange(len(located.spans) + 1)
    starts, ends = _rising(located.spans)
    # text between two tokens may be covered by neither: both of its edges are cut points
    edges = np.empty((len(ends) + 1, 2), dtype=np.int64)
    edges[0, 0], edges[1:, 0], edges[:-1, 1], edges[-1, 1] = 0, ends, starts, len(located.text)
    places = edges[edges[:, 0] <= edges[:, 1]].ravel()  # rises, as starts and ends do
    places = places[np.diff(places, prepend=-1) > 0]
    return places, ends.searchsorted(places, "right")


def _common_pieces(student: LocatedTokens, teacher: LocatedTokens, stretches: np.ndarray) -> np.ndarray:
    """Token ranges between consecutive places of the equal stretches where both sides can be cut.

    Returns:
        `np.ndarray` of shape `(4, C)`: first student token and the one after the last, then the same for the teacher.
    """
    # places are renumbered: each stretch gets a range of its own, the same on both sides
    base = (stretches[:, 2] + 1).cumsum() - stretches[:, 2] - 1
    sides = []
    for side, starts in ((student, stretches[:, 0]), (teacher, stretches[:, 1])):
        places, index = _cut_points(side)
        first, stop = places.searchsorted(starts, "left"), places.searchsorted(starts + stretches[:, 2], "right")
        chosen = _ranges(first, stop)
        sides.append((places[chosen] + np.repeat(base - starts, stop - first), index[chosen]))
    (ours, index), (theirs, teacher_index) = sides
    if not len(ours) or not len(theirs):
        return np.zeros((4, 0), dtype=np.int64)
    where = theirs.searchsorted(ours)
    common = np.flatnonzero(theirs[np.minimum(where, len(theirs) - 1)] == ours)
    stretch = base.searchsorted(ours[common], "right")
    index, teacher_index = index[common], teacher_index[where[common]]
    pieces = np.stack([index[:-1], index[1:], teacher_index[:-1], teacher_index[1:]])
    whole = (np.diff(stretch) == 0) & (pieces[0] < pieces[1]) & (pieces[2] < pieces[3])
    return pieces[:, whole]


def _of_equal_bytes(student: LocatedTokens, teacher: LocatedTokens, pieces: np.ndarray) -> np.ndarray:
    """Those pieces whose tokens have the same bytes on both sides."""
    bounds = []
    for side, (first, stop) in ((student, pieces[:2]), (teacher, pieces[2:])):
        ends = np.concatenate([[0], side.nbytes.cumsum()])
        bounds.append((ends[first], ends[stop]))
    (start, end), (teacher_start, teacher_end) = bounds
    same = end - start == teacher_end - teacher_start
    pieces, start, end = pieces[:, same], start[same], end[same]
    teacher_start, teacher_end = teacher_start[same], teacher_end[same]
    ours = np.frombuffer(student.stream, np.uint8)[_ranges(start, end)]
    theirs = np.frombuffer(teacher.stream, np.uint8)[_ranges(teacher_start, teacher_end)]
    differences = np.concatenate([[0], (ours != theirs).cumsum()])
    stop = (end - start).cumsum()
    return pieces[:, differences[stop] == differences[stop - (end - start)]]
