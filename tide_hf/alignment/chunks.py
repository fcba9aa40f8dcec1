"""Chunk numbers per token: which student tokens and which teacher tokens stand for the same text.

With a shared tokenizer a chunk is one token on each side: same id, same characters of the same answer.
"""

from collections import defaultdict
from collections.abc import Sequence

from .chat import Answer


def answer_tokens(offsets: Sequence[tuple[int, int]], answers: Sequence[Answer]) -> list[list[int]]:
    """Token indices inside each answer: those that begin and end in it.

    Tokenizers that trim offsets give a token of white space no width and the place where it ends; it is inside if that
    place is, the answer's start excepted.

    Args:
        offsets (`Sequence[tuple[int, int]]`): character range of each token, in text order.
        answers (`Sequence[Answer]`): in text order.

    Returns:
        `list[list[int]]`: one list per answer.
    """
    inside: list[list[int]] = [[] for _ in answers]
    current = 0
    for index, (start, end) in enumerate(offsets):
        while current < len(answers) and start > answers[current].end - (start < end):
            current += 1
        if current == len(answers):
            break
        first = answers[current].start + (start == end)
        if first <= start and end <= answers[current].end:
            inside[current].append(index)
    return inside


def align_equal_tokens(
    student_ids: Sequence[int],
    student_offsets: Sequence[tuple[int, int]],
    student_answers: Sequence[Answer],
    teacher_ids: Sequence[int],
    teacher_offsets: Sequence[tuple[int, int]],
    teacher_answers: Sequence[Answer],
) -> tuple[list[int], list[int]]:
    """Chunk numbers of two renderings of the same messages by one tokenizer.

    Two tokens share a chunk if they have the same id and cover the same characters, counted from where the content of
    the same answer begins. Several tokens on the same characters pair in order.

    Args:
        student_ids, teacher_ids (`Sequence[int]`): token ids.
        student_offsets, teacher_offsets (`Sequence[tuple[int, int]]`): character range of each token in its text.
        student_answers, teacher_answers (`Sequence[Answer]`): the same answers in the two texts, in order.

    Returns:
        `tuple[list[int], list[int]]`: chunk number of each student and each teacher token, −1 for none; numbers rise
        with the student's positions.
    """
    student_chunks, teacher_chunks = [-1] * len(student_ids), [-1] * len(teacher_ids)
    chunk = 0
    for student_answer, teacher_answer, student_tokens, teacher_tokens in zip(
        student_answers,
        teacher_answers,
        answer_tokens(student_offsets, student_answers),
        answer_tokens(teacher_offsets, teacher_answers),
        strict=True,
    ):
        waiting = defaultdict(list)  # teacher tokens by what they cover, last first
        for index in reversed(teacher_tokens):
            start, end = teacher_offsets[index]
            key = (start - teacher_answer.anchor, end - teacher_answer.anchor, teacher_ids[index])
            waiting[key].append(index)
        for index in student_tokens:
            start, end = student_offsets[index]
            partners = waiting.get((start - student_answer.anchor, end - student_answer.anchor, student_ids[index]))
            if partners:
                student_chunks[index] = teacher_chunks[partners.pop()] = chunk
                chunk += 1
    return student_chunks, teacher_chunks
