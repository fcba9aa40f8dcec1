"""Which stretches of two renderings of one answer are the same text, in bytes."""

from bisect import bisect

import numpy as np

from .chat import Answer

WINDOW = 8  # bytes that must be equal, and unique on each side, for two places to be matched


def equal_stretches(
    student: bytes, student_answer: Answer, teacher: bytes, teacher_answer: Answer
) -> list[tuple[int, int, int]]:
    """Stretches of equal bytes of one answer in two renderings.

    The two are aligned where the content begins and followed as far as they agree. Only if a template has rewritten
    the content itself (reasoning dropped, text inserted) is the rest searched for windows of `WINDOW` bytes that
    occur exactly once on each side.

    Args:
        student, teacher (`bytes`): the rendered texts.
        student_answer, teacher_answer (`Answer`): where the answer lies in each, in bytes.

    Returns:
        `list[tuple[int, int, int]]`: (start in the student's text, start in the teacher's, number of bytes), in order,
        without overlaps.
    """
    ours = student[student_answer.start : student_answer.end]
    theirs = teacher[teacher_answer.start : teacher_answer.end]
    at, there = student_answer.anchor - student_answer.start, teacher_answer.anchor - teacher_answer.start
    after = common_prefix(ours[at:], theirs[there:])
    before = common_prefix(ours[:at][::-1], theirs[:there][::-1])
    stretches = [(at - before, there - before, before + after)]
    if not (student_answer.anchored and teacher_answer.anchored):
        left, right = at + after, there + after
        rest = resynchronise(ours[left:], theirs[right:])
        stretches += [(left + one, right + two, size) for one, two, size in rest]
    return [(student_answer.start + one, teacher_answer.start + two, size) for one, two, size in stretches if size > 0]


def common_prefix(one: bytes, two: bytes) -> int:
    """Number of leading bytes in which `one` and `two` agree."""
    size = min(len(one), len(two))
    if one[:size] == two[:size]:
        return size
    different = np.frombuffer(one, np.uint8, size) != np.frombuffer(two, np.uint8, size)
    return int(different.argmax())


def resynchronise(one: bytes, two: bytes) -> list[tuple[int, int, int]]:
    """Stretches that two different texts share, found in O(n log n); see [`equal_stretches`].

    Args:
        one, two (`bytes`): the texts.

    Returns:
        `list[tuple[int, int, int]]`: (start in `one`, start in `two`, number of bytes), in order.
    """
    if min(len(one), len(two)) < WINDOW:
        return []
    places, counterparts = _unique_windows(one, two)
    chosen: list[tuple[int, int, int]] = []
    for start, other, size in _longest_first(places, counterparts):
        where = bisect(chosen, (start, other, size))
        left = chosen[where - 1] if where else (0, 0, 0)
        right = chosen[where] if where < len(chosen) else (len(one), len(two), 0)
        floor = (left[0] + left[2], left[1] + left[2])
        # a neighbour may by chance extend a byte or two into this one
        skip = max(floor[0] - start, floor[1] - other, 0)
        size = min(size, right[0] - start, right[1] - other) - skip
        if size <= 0:
            continue
        start, other = start + skip, other + skip
        # extended as far as the texts agree, beyond the unique windows
        before = common_prefix(one[floor[0] : start][::-1], two[floor[1] : other][::-1])
        after = common_prefix(one[start + size : right[0]], two[other + size : right[1]])
        chosen.insert(where, (start - before, other - before, before + size + after))
    return chosen


def _unique_windows(one: bytes, two: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Starts in `one`, rising, and in `two` of the windows that occur once in each."""
    sides = []
    for data in (one, two):
        windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), WINDOW)
        values, first, count = np.unique(
            np.ascontiguousarray(windows).view(np.uint64)[:, 0], return_index=True, return_counts=True
        )
        sides.append((values[count == 1], first[count == 1]))
    (ours, our_places), (theirs, their_places) = sides
    _, mine, other = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    order = our_places[mine].argsort()
    return our_places[mine][order], their_places[other][order]


def _longest_first(places: np.ndarray, counterparts: np.ndarray) -> list[tuple[int, int, int]]:
    """Runs of consecutive matching windows, as (start in one, start in two, number of bytes), longest first."""
    if not len(places):
        return []
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(counterparts) != 1)) + 1
    firsts, lasts = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(places)]]) - 1
    runs = zip(
        places[firsts].tolist(),
        counterparts[firsts].tolist(),
        (places[lasts] - places[firsts] + WINDOW).tolist(),
        strict=True,
    )
    return sorted(runs, key=lambda run: -run[2])
