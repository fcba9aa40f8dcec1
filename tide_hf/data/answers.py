"""Datasets of answers that a teacher wrote: the prompts they answer, their columns, and what they say of themselves.

A row has a `prompt` and a `completion`, conversational or plain as the row that it answers, so that any student's
tokenizer can prepare it and only the teacher's turn is trained on. `prompt_index` is the number of the answered row,
`answer_number` counts its answers from 0, `finished` tells whether the teacher ended the answer itself. The record of
who wrote them is carried by `answer_number` in the way that a prepared dataset's is by `row_key`.
"""

import json
from dataclasses import dataclass, replace

from datasets import Dataset, Features, IterableDataset, Json, Value

from .formats import CONVERSATIONS, Conversation, PlainText, RowSkipped, read_row, to_json

CARRIER = "answer_number"
VERSION = 1
# a table would fill one row's tool calls with the keys of another's
ROW = {
    **dict.fromkeys(("prompt", "completion", "tools", "chat_template_kwargs"), Json()),
    "prompt_index": Value("int32"),
    CARRIER: Value("int32"),
    "finished": Value("bool"),
}


def read_prompt(row: dict) -> Conversation | PlainText:
    """Reads what a raw row asks, without the answer that it may have.

    A conversation is read up to its last assistant turn, which is answered anew: of one with several turns the earlier
    ones stay as they are and are not trained on. One that ends with a user's turn, or with a tool's, is all prompt. Of
    `prompt` and `completion`, or a `prompt` alone (text or messages), the prompt is read.

    Args:
        row (`dict`): column -> value.

    Returns:
        [`Conversation`] whose messages all belong to the prompt, or [`PlainText`] without an answer.

    Raises:
        RowSkipped: for a row that asks nothing, such as plain text, or that cannot be read.
    """
    given = {name for name, value in row.items() if value is not None}
    asks_alone = "prompt" in given and not given & {*CONVERSATIONS, "completion", "output"}
    if asks_alone:
        row = {**row, "completion": [] if isinstance(row["prompt"], list) else ""}
    content = read_row(row)
    if isinstance(content, PlainText):
        if not content.prompt:
            raise RowSkipped("plain text without a prompt, to which no answer can be written")
        return PlainText(content.prompt, "")
    end = content.first_trained
    if not end:
        turns = [index for index, message in enumerate(content.messages) if message["role"] == "assistant"]
        asked_last = content.messages[-1]["role"] in ("user", "tool")
        end = len(content.messages) if asked_last or not turns else turns[-1]
    if not end:
        raise RowSkipped("a conversation without a prompt before its answer")
    return replace(content, messages=content.messages[:end], first_trained=end)


def answer_row(content: Conversation | PlainText, text: str, finished: bool, prompt_index: int, number: int) -> dict:
    """One row of a dataset of answers.

    Args:
        content ([`Conversation`] or [`PlainText`]): of [`read_prompt`].
        text (`str`), finished (`bool`): the answer.
        prompt_index (`int`), number (`int`): the answered row, and which of its answers this is.
    """
    said = {"prompt_index": prompt_index, CARRIER: number, "finished": finished}
    if isinstance(content, PlainText):
        return {**dict.fromkeys(ROW), "prompt": to_json(content.prompt), "completion": to_json(text), **said}
    return {
        "prompt": content.messages,
        "completion": [{"role": "assistant", "content": text}],
        "tools": content.tools,
        "chat_template_kwargs": content.settings or None,
        **said,
    }


@dataclass(frozen=True)
class AnswerRecord:
    """Who wrote the answers of a dataset, and how.

    Args:
        settings (`dict`): teacher and its revision, kind, decoding, seed and the like, as plain values.
        counts (`dict[str, dict]`): of each split: raw rows, prompts, answers written, kept, and left out by reason.
    """

    settings: dict
    counts: dict[str, dict]

    @classmethod
    def read(cls, dataset: Dataset | IterableDataset) -> "AnswerRecord | None":
        """The record that a `dataset` carries; None if no teacher is known to have written it."""
        carried = getattr((dataset.features or {}).get(CARRIER), "id", None)
        try:
            content = json.loads(carried or "null")
        except json.JSONDecodeError:
            return None
        if not isinstance(content, dict) or content.get("tide_hf_answers") != VERSION:
            return None
        return cls(content["settings"], content["counts"])

    def features(self) -> Features:
        """The columns of a dataset of answers; one of them carries this record."""
        content = {"tide_hf_answers": VERSION, "settings": self.settings, "counts": self.counts}
        return Features({**ROW, CARRIER: Value("int32", id=json.dumps(content))})

    def of_split(self, name: str) -> dict:
        """Settings and counts of the split of that `name`, or of the only one: what a report of its rows says."""
        counts = self.counts.get(name)
        if counts is None:
            counts = next(iter(self.counts.values())) if len(self.counts) == 1 else {}
        return {**self.settings, **counts}


def describe_answers(answers: dict) -> str:
    """One sentence about who wrote the answers of a dataset.

    Args:
        answers (`dict`): of [`AnswerRecord.of_split`].
    """
    revision = f" at commit {answers['revision']}" if answers["revision"] else ""
    text = f"answers written by {answers['teacher']}{revision} ({answers['kind']}, {answers['decoding']})"
    if "num_prompts" not in answers:
        return text
    text += (
        f": {answers['num_kept']:,} answers to {answers['num_prompts']:,} prompts kept of {answers['num_written']:,} "
        f"written, {answers['num_unfinished']:,} of them unfinished, {answers['num_empty']:,} empty"
    )
    if answers["num_repeated"]:
        text += f", {answers['num_repeated']:,} repeated"
    dropped = [f"{count:,} rows not answered: {reason}" for reason, count in answers["dropped"].items()]
    return "; ".join([text, *dropped])
