"""What became of the rows of a dataset."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields


@dataclass
class PreparationReport:
    """What became of the rows of one dataset.

    Args:
        num_rows (`int`): rows that came in.
        num_kept (`int`): rows that train.
        num_truncated (`int`): kept rows that were cut at `max_length`; their answers get no EOS fill.
        dropped (`dict[str, int]`): rows left out, by reason.
        num_trained_tokens, num_aligned_tokens (`int`): trained-on student tokens, and those in a chunk.
        num_chunks (`int`): chunks; with one shared tokenizer every one is a token.
        num_answer_bytes, num_aligned_bytes (`int`): bytes of the trained-on tokens without EOS fill, and of those in a
            chunk.
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

    def __str__(self) -> str:
        share = self.num_aligned_tokens / max(self.num_trained_tokens, 1)
        byte_share = self.num_aligned_bytes / max(self.num_answer_bytes, 1)
        text = (
            f"{self.num_kept:,} of {self.num_rows:,} rows kept ({self.num_truncated:,} truncated), "
            f"{self.num_trained_tokens:,} trained-on tokens, {share:.1%} of them aligned with the teacher "
            f"in {self.num_chunks:,} chunks ({byte_share:.1%} of {self.num_answer_bytes:,} answer bytes)"
        )
        reasons = "; ".join(f"{count:,} dropped: {reason}" for reason, count in self.dropped.items())
        return f"{text}. {reasons}" if reasons else text

    def add(self, part: "PreparationReport") -> None:
        """Takes in what became of further rows."""
        self.dropped = dict(Counter(self.dropped) + Counter(part.dropped))
        for name in (part.name for part in fields(self) if part.name != "dropped"):
            setattr(self, name, getattr(self, name) + getattr(part, name))

    @classmethod
    def total(cls, reports: Iterable["PreparationReport"]) -> "PreparationReport":
        """The report of several parts of one dataset."""
        whole = cls()
        for report in reports:
            whole.add(report)
        return whole
