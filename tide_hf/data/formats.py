"""The one reader of raw rows: every documented format becomes a conversation or plain text.

| columns | meaning |
|---|---|
| `messages` | a conversation; also `tools` and `chat_template_kwargs`, as in TRL |
| `conversations` or `conversation` | the same in ShareGPT's `from`/`value` or in `role`/`content` |
| `prompt` + `completion` | plain text, or two lists of messages, the second of which is trained on |
| `instruction` (+ `input`) + `output` | a conversation of two turns |
| `text` | plain text, all of it trained on |

If a row has several of these, the first one counts. A `system` or `system_prompt` column begins a conversation.
"""

import json
from dataclasses import dataclass, field

CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt")
RAW_COLUMNS = (
    *(*CONVERSATIONS, "prompt", "completion", "instruction", "input", "output", "text"),
    *(*SYSTEMS, "tools", "chat_template_kwargs"),
)
# columns that belong to a conversation's text but are not supported: rows that have something there are skipped
UNREADABLE = (
    *("documents", "functions", "function_call", "history"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
# wraps text in a JSON column, where the datasets library would read '12' as a number
TEXT_IN_JSON = "__text__"
# ShareGPT's names for the speakers
SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
FORMATS = "'messages', 'conversations' (ShareGPT), 'prompt' and 'completion', 'instruction' and 'output', or 'text'"


class RowSkipped(ValueError):
    """A row that cannot be trained on; its message is the reason that the report counts."""


@dataclass(frozen=True)
class Conversation:
    """A row of messages, for a chat template.

    Args:
        messages (`list[dict]`): role, content and whatever else a template reads; parts that are None are left out.
        first_trained (`int`): index of the first message that may be trained on; earlier ones belong to a prompt.
        tools (`list[dict]`, *optional*): JSON schemas.
        settings (`dict`): the row's own template settings.
    """

    messages: list[dict]
    first_trained: int = 0
    tools: list[dict] | None = None
    settings: dict = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """The last message's text."""
        return (self.messages[-1].get("content") or "") if self.messages else ""


@dataclass(frozen=True)
class PlainText:
    """A row of text to which no template is applied.

    Args:
        prompt (`str`): not trained on; may be empty.
        answer (`str`): what follows it, trained on.
    """

    prompt: str
    answer: str


def unread_columns(names: list[str], prompts_alone: bool = False) -> list[str]:
    """Lists the columns that are ignored because no text depends on them, such as an id or a score.

    Args:
        names (`list[str]`): all columns of a dataset.
        prompts_alone (`bool`): whether prompts without answers will do, because somebody is going to answer them.

    Raises:
        ValueError: if no column holds anything to train on.
    """
    there = set(names)
    if not there & {*CONVERSATIONS, "completion", "text"} and not {"instruction", "output"} <= there:
        what = f"The dataset has the columns {', '.join(names)}; expected {FORMATS}."
        if {"chosen", "rejected"} & there:
            raise ValueError(
                f"{what} For preference data, choose what to train on: dataset.rename_column('chosen', …)."
            )
        if "prompt" in there and not prompts_alone:
            raise ValueError(
                f"{what} A prompt alone has no answer to train on: have a teacher write it (recipes/prepare_data.py "
                "--teacher_answers greedy), or the student (on_policy_fraction=1)."
            )
        if "prompt" not in there:
            raise ValueError(
                f"{what} Rename the column that holds the conversation: dataset.rename_column(old, 'messages')."
            )
    return [name for name in names if name not in (*RAW_COLUMNS, *UNREADABLE)]


def to_json(value):
    """Wraps a `value` of a raw row for a JSON column; [`read_row`] restores it."""
    return {TEXT_IN_JSON: value} if isinstance(value, str) else value


def read_row(row: dict) -> Conversation | PlainText:
    """Reads a raw row of any format.

    Args:
        row (`dict`): column -> value.

    Raises:
        RowSkipped: for a row that holds nothing to train on, or something that is not supported.
    """
    row = {
        name: value.get(TEXT_IN_JSON, value) if isinstance(value, dict) else value
        for name, value in row.items()
        if value is not None
    }
    for name in CONVERSATIONS:
        if row.get(name) is not None:
            messages = _parsed(row[name], name) if isinstance(row[name], str) else row[name]
            return _conversation(row, messages if name == "messages" else _sharegpt(messages))
    if row.get("completion") is not None:
        return _completion(row)
    if row.get("instruction") is not None and row.get("output") is not None:
        asked = [_text(row, "instruction"), *([_text(row, "input")] if row.get("input") else [])]
        turns = [
            {"role": "user", "content": "\n\n".join(asked)},
            {"role": "assistant", "content": _text(row, "output")},
        ]
        return _conversation(row, turns)
    if row.get("text") is not None:
        return _plain(row, "", "text")
    raise RowSkipped("no conversation, completion or text in the row")


def _completion(row: dict) -> Conversation | PlainText:
    """A prompt and its completion, both text or both messages."""
    prompt, completion = row.get("prompt"), row["completion"]
    if isinstance(completion, str) and (prompt is None or isinstance(prompt, str)):
        return _plain(row, prompt or "", "completion")
    if isinstance(completion, list) and (prompt is None or isinstance(prompt, list)):
        return _conversation(row, [*(prompt or []), *completion], len(prompt or []))
    raise RowSkipped("one of prompt and completion is text, the other messages")


def _plain(row: dict, prompt: str, name: str) -> PlainText:
    for other in ("tools", *SYSTEMS):
        if row.get(other):
            raise RowSkipped(f"{other!r} beside plain text, to which no template is applied")
    return PlainText(prompt, _text(row, name))


def _text(row: dict, name: str) -> str:
    if not isinstance(row[name], str):
        raise RowSkipped(f"{name!r} is not text")
    return row[name]


def _conversation(row: dict, messages, first_trained: int = 0) -> Conversation:
    """Checks messages, and adds the columns that belong to them."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowSkipped("the conversation is not a list of messages")
    if not messages:
        raise RowSkipped("empty conversation")
    for name in UNREADABLE:
        if row.get(name):
            raise RowSkipped(f"the column {name!r} belongs to the text but is not supported")
    messages = [_message(message) for message in messages]
    system = next((row[name] for name in SYSTEMS if row.get(name)), None)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        first_trained += bool(first_trained)
    tools = _parsed(row.get("tools") or None, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowSkipped("'tools' is not a list of JSON schemas")
    settings = _parsed(row.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    if not isinstance(settings, dict):
        raise RowSkipped("'chat_template_kwargs' is not a mapping")
    return Conversation(messages, first_trained, tools or None, settings)


def _message(message: dict) -> dict:
    """A message without the parts that are None only because other rows of the table have them."""
    message = {name: without_nulls(part) for name, part in message.items() if part is not None}
    if not isinstance(message.get("role"), str):
        raise RowSkipped("a message's role is not text")
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
    elif calls is not None:
        del message["tool_calls"]
    if not isinstance(message.get("content"), str) and not ("content" not in message and calls):
        raise RowSkipped("a message's content is not text")
    # a template may print the parts in order: role and content come first
    return {name: message[name] for name in ("role", "content") if name in message} | message


def _tool_call(call: dict) -> dict:
    """A tool call with its arguments as a mapping, as templates expect; OpenAI's format has them as JSON text."""
    if not isinstance(call, dict):
        raise RowSkipped("a tool call is not a mapping")
    function = call.get("function", call)
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            function = {**function, "arguments": json.loads(function["arguments"])}
        except json.JSONDecodeError as error:
            raise RowSkipped("a tool call's arguments are not valid JSON") from error
    return {**call, "function": function} if "function" in call else function


def _sharegpt(messages) -> list[dict]:
    """ShareGPT's `from` and `value` as role and content."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowSkipped("the conversation is not a list of messages")
    return [_spoken(message) if message.get("from") is not None else message for message in messages]


def _spoken(message: dict) -> dict:
    """One ShareGPT message."""
    speaker, value = message["from"], message.get("value")
    if speaker not in SPEAKERS:
        raise RowSkipped(f"unknown speaker {speaker!r} in a conversation")
    others = {name: part for name, part in message.items() if name not in ("from", "value")}
    if speaker == "function_call":
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": _parsed(value, "function_call")}]}
    return {"role": SPEAKERS[speaker], "content": value, **others}


def _parsed(value, name: str):
    """Parses a column that holds JSON as text, as TRL does; other values only lose their nulls."""
    if not isinstance(value, str):
        return without_nulls(value)
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowSkipped(f"{name!r} is text, but not valid JSON") from error


def without_nulls(value):
    """A `value` without the keys that are None: Arrow adds them where other rows have something there."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value
