"""Whether two tokenizers share a vocabulary, and up to which id."""

from transformers import PreTrainedTokenizerBase

ALIGNMENTS = ("token", "chunk")  # one shared tokenizer, or two


def shared_vocab_size(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> tuple[int, str]:
    """Counts the leading ids that mean the same on both sides.

    Args:
        student, teacher (`PreTrainedTokenizerBase`): the two tokenizers.

    Returns:
        the number of ids, and a clause about the first id that differs (empty if none does).
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    student_tokens = {index: token for token, index in student_vocab.items()}
    teacher_tokens = {index: token for token, index in teacher_vocab.items()}
    for index in range(max(len(student_tokens), len(teacher_tokens))):
        ours, theirs = student_tokens.get(index), teacher_tokens.get(index)
        if ours != theirs:
            return index, f"id {index} is {ours!r} for the student and {theirs!r} for the teacher"
    return max(len(student_tokens), len(teacher_tokens)), ""


def resolve_alignment(
    alignment: str, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[str, int]:
    """Decides between the two pipelines.

    Args:
        alignment (`str`): `"token"` (one shared tokenizer), `"chunk"` (two tokenizers) or `"auto"`.
        student, teacher (`PreTrainedTokenizerBase`): the two tokenizers.

    Returns:
        `"token"` or `"chunk"`, and the shared vocabulary size. The tokenizers count as one if they agree on every id
        of both base vocabularies; special tokens added after these may differ.

    Raises:
        ValueError: `"token"` for tokenizers that do not agree, with the first id that differs.
    """
    size, difference = shared_vocab_size(student, teacher)
    agree = size >= max(student.vocab_size, teacher.vocab_size)
    if alignment == "token" and not agree:
        raise ValueError(
            f"alignment='token' needs one vocabulary on both sides, but {difference}, inside the base vocabulary of "
            f"{max(student.vocab_size, teacher.vocab_size)} ids. Use alignment='chunk' for two different tokenizers."
        )
    if alignment == "auto":
        alignment = "token" if agree else "chunk"
    return alignment, size
