"""What became of the rows of a dataset in preparation."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields


class DataError(ValueError):
    """The rows are at fault: nothing is left to train on, or they do not suit the models."""


@dataclass
class PreparationReport:
    """What became of the rows of one dataset.

    Args:
        num_rows (`int`): raw rows.
        num_kept (`int`): rows that can be trained on.
        num_truncated, num_teacher_truncated (`int`): kept rows that were truncated at `max_length`, and at
            `teacher_max_length`; a truncated side gets no EOS fill.
        dropped (`dict[str, int]`): rows left out, by reason.
        num_trained_tokens, num_aligned_tokens (`int`): trained-on student tokens, and those in a chunk.
        num_chunks (`int`): chunks; with one shared tokenizer each is one token.
        num_answer_bytes, num_aligned_bytes (`int`): bytes of the trained-on tokens without EOS fill, and of those in a
            chunk.
        num_teacher_tokens (`int`): tokens of the teacher's rows; 0 without a teacher.
        num_turns (`int`): trained-on turns.
        num_unprompted_turns (`int`): those that do not follow the generation prompt of inference in the rendered text:
            turns in another mode of the template, or that it renders differently once others follow.
        num_split_answers (`int`): answers whose beginning the tokenizer would have joined with the end of the prompt;
            the two are tokenised separately, as at inference.
        num_dropped_reasonings (`int`): reasonings, mostly of earlier turns, that the chat template leaves out.
        answers (`dict`): who wrote the answers, if a teacher did; see [`~tide_hf.data.answers.AnswerRecord`].
    """

    num_rows: int = 0
    num_kept: int = 0
    num_truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    num_trained_tokens: int = 0
    num_aligned_tokens: int = 0
    num_chunks: int = 0
    num_answer_bytes: int = 0
    num_aligned_bytes: int = 0
    num_teacher_tokens: int = 0
    num_teacher_truncated: int = 0
    num_turns: int = 0
    num_unprompted_turns: int = 0
    num_split_answers: int = 0
    num_dropped_reasonings: int = 0
    answers: dict = field(default_factory=dict)

    def __str__(self) -> str:
        cut = f"{self.num_truncated:,} truncated"
        if self.num_teacher_truncated:
            cut += f", {self.num_teacher_truncated:,} on the teacher's side"
        text = (
            f"{self.num_kept:,} of {self.num_rows:,} rows kept ({cut}), {self.num_trained_tokens:,} trained-on tokens"
        )
        if self.num_teacher_tokens or self.num_aligned_tokens:
            share = self.num_aligned_tokens / max(self.num_trained_tokens, 1)
            byte_share = self.num_aligned_bytes / max(self.num_answer_bytes, 1)
            text += (
                f", {share:.1%} of them aligned with the teacher in {self.num_chunks:,} chunks "
                f"({byte_share:.1%} of {self.num_answer_bytes:,} answer bytes)"
            )
        notes = [
            (
                self.num_unprompted_turns,
                f"of {self.num_turns:,} turns do not follow the generation prompt of inference",
            ),
            (self.num_split_answers, "answers tokenised separately from the prompt they would be joined with"),
            (self.num_dropped_reasonings, "reasonings left out by the chat template"),
        ]
        parts = [f"{count:,} {what}" for count, what in notes if count]
        parts += [f"{count:,} dropped: {reason}" for reason, count in self.dropped.items()]
        return f"{text}. {'; '.join(parts)}" if parts else text

    def refuse_nothing_aligned(self) -> None:
        """Refuses rows for a distillation if no answer is aligned with the teacher.

        Raises:
            DataError: with the counts and what to do.
        """
        if self.num_teacher_tokens and not self.num_aligned_tokens:
            raise DataError(
                f"No token of any answer is aligned with the teacher, so nothing would be distilled: {self}. Raise "
                "teacher_max_length if rows are truncated on the teacher's side, compare the chat templates, or train "
                "without a teacher (preset='ce')."
            )

    def add(self, part: "PreparationReport") -> None:
        """Adds `part`, the report of further rows."""
        self.dropped = dict(Counter(self.dropped) + Counter(part.dropped))
        self.answers = self.answers or part.answers
        for name in (part.name for part in fields(self) if part.name not in ("dropped", "answers")):
            setattr(self, name, getattr(self, name) + getattr(part, name))

    @classmethod
    def total(cls, reports: Iterable["PreparationReport"]) -> "PreparationReport":
        """The sum of the `reports` of several parts of one dataset."""
        whole = cls()
        for report in reports:
            whole.add(report)
        return whole
