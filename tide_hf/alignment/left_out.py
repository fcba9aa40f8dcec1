"""What a chat template leaves out of a conversation: text that is not rendered must not count as trained on."""

from .chat import STAND_IN, Chat

REASONING = ("reasoning_content", "reasoning", "thinking")  # transformers' names for one thing
# parts of a message that carry text of their own
CARRIERS = (*REASONING, "tool_calls", "function_call", "tool_responses", "images", "audio", "videos")


def left_out(chat: Chat, text: str) -> str | None:
    """Describes what the template does not render of a conversation; None if it renders everything.

    Reasoning in turns before the last, which templates drop by design, does not count: see [`dropped_reasoning`].

    Args:
        chat ([`Chat`]): the conversation.
        text (`str`): the conversation as rendered.
    """
    for index, message in enumerate(chat.messages):
        if reason := _message_left_out(chat, index, message, text):
            return reason
    if chat.tools and chat.render(chat.messages, tools=None) == text:
        return "the tools"
    return None


def dropped_reasoning(messages: list[dict], text: str) -> int:
    """Counts the assistant turns whose reasoning is missing from the rendered text.

    Args:
        messages (`list[dict]`): the conversation.
        text (`str`): the conversation as rendered.
    """
    reasonings = [_reasoning(message) for message in messages if message["role"] == "assistant"]
    return sum(bool(reasoning) and reasoning not in text for reasoning in reasonings)


def _message_left_out(chat: Chat, index: int, message: dict, text: str) -> str | None:
    """Describes what is not rendered of one message."""
    content = (message.get("content") or "").strip()
    who = f"the {message['role']}'s"
    # the content is mostly rendered unchanged; where it is not, the template may have rewritten it
    if content and content not in text and _same(chat, index, text, content=STAND_IN):
        return f"{who} content"
    if len(message) == 2:
        return None
    last = index == chat.turns[-1] if chat.turns else False
    for name in CARRIERS:
        if not message.get(name):
            continue
        if name in REASONING:
            if last and _reasoning(message) not in text:
                return f"{who} {name!r}"
        elif _same(chat, index, text, **{name: None}):
            return f"{who} {name!r}"
    return None


def _same(chat: Chat, index: int, text: str, **parts) -> bool:
    """Whether the rendering stays the same when parts of a message change: then they are not rendered."""
    try:
        return chat.replaced(index, **parts) == text
    except Exception:  # a template that fails without a part reads it
        return False


def _reasoning(message: dict) -> str:
    """The reasoning of a message, from a field of its own or inside the content."""
    for name in REASONING:
        if isinstance(message.get(name), str):
            return message[name].strip()
    head, mark, _ = (message.get("content") or "").partition("</think>")
    return head.rpartition("<think>")[2].strip() if mark else ""
