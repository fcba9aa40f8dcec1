"""Where each answer lies in a rendered conversation, found through the template's own rendering.

An answer begins where the generation prompt ends, since that is where generation begins. It is never searched for as a
string, which might also occur in the prompt.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .templates import without_defaults

STAND_IN = "\ue000answer\ue001"  # private-use characters, which no conversation contains
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = [{"role": "user", "content": "?"}]


@dataclass(frozen=True)
class Answer:
    """A trained-on stretch of a rendered text, in characters, half-open.

    Args:
        start, end (`int`): the whole stretch, with the end-of-turn text but without white space after it.
        anchor (`int`): where the message's content, stripped of white space, begins; `start` if it is not found.
        anchored (`bool`): whether it was found, so that the text from there on is known to be the content.
        turn (`int`): index of its message; a template may mark several stretches of one message.
        prompted (`bool`): whether the text before it is what a model is given at inference: the conversation so far
            and the generation prompt.
    """

    start: int
    end: int
    anchor: int
    anchored: bool = False
    turn: int = 0
    prompted: bool = True


@dataclass(frozen=True)
class Chat:
    """A conversation and everything its rendering depends on.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        messages (`list[dict]`): as transformers documents them: role, content, tool calls, reasoning.
        tools (`list[dict]`, *optional*): JSON schemas.
        settings (`dict`): the template's own, such as `enable_thinking`.
    """

    tokenizer: PreTrainedTokenizerBase
    messages: list[dict]
    tools: list[dict] | None = None
    settings: dict = field(default_factory=dict)

    @cached_property
    def template(self) -> str:
        """The chat template without defaults written by an earlier run, so that only `settings` count."""
        return without_defaults(self.tokenizer.get_chat_template(tools=self.tools))

    @cached_property
    def text(self) -> str:
        """The whole conversation, rendered."""
        return self.render(self.messages)

    @property
    def turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def render(self, messages: list[dict], prompt: bool = False, settings: dict | None = None, **changed) -> str:
        """Renders messages with the chat's template.

        Args:
            messages (`list[dict]`): need not be the conversation's own.
            prompt (`bool`): whether to add a generation prompt.
            settings (`dict`, *optional*): used instead of the chat's.
            changed: further arguments of `apply_chat_template`, such as `tools`.
        """
        return self.tokenizer.apply_chat_template(
            messages,
            **{"tools": self.tools, **changed},
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=prompt,
            **(self.settings if settings is None else settings),
        )

    def replaced(self, index: int, **parts) -> str:
        """Renders the conversation with one message changed.

        Args:
            index (`int`): of the message.
            parts: its new values; those that are None are removed from it.
        """
        message = {name: part for name, part in {**self.messages[index], **parts}.items() if part is not None}
        return self.render([*self.messages[:index], message, *self.messages[index + 1 :]])


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    first_trained: int = 0,
    tools: list[dict] | None = None,
    settings: dict | None = None,
) -> tuple[str, list[Answer]]:
    """Renders a conversation with the tokenizer's chat template and locates its assistant turns.

    Templates with `{% generation %}` markers state what the assistant writes. With others, a turn begins where the
    conversation before it ends when rendered with a generation prompt. The generation prompt is given at inference and
    is never part of an answer, with markers or without.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        messages (`list[dict]`): `{"role", "content"}` items.
        first_trained (`int`): assistant turns before this message index are left out (a prompt's own turns).
        tools (`list[dict]`, *optional*): JSON schemas of the tools.
        settings (`dict`, *optional*): the template's own settings.

    Returns:
        the rendered text, and the [`Answer`]s of all assistant turns that are not left out, in order.

    Raises:
        ValueError: if there is no template, or if a turn cannot be located in what it renders.
    """
    return locate_answers(Chat(tokenizer, messages, tools, settings or {}), first_trained)


def locate_answers(chat: Chat, first_trained: int = 0) -> tuple[str, list[Answer]]:
    """Does the same as [`render_chat`] for a [`Chat`].

    Args:
        chat ([`Chat`]): the conversation.
        first_trained (`int`): assistant turns before this message index are left out.

    Returns and raises as [`render_chat`].
    """
    if chat.tokenizer.chat_template is None:
        raise ValueError(
            f"{chat.tokenizer.name_or_path or 'The tokenizer'} has no chat template, which conversations need: give "
            "one with chat_template (a .jinja file or the template itself), or rows of 'prompt' and 'completion' text."
        )
    trained = [index for index in chat.turns if index >= first_trained]
    answers = []
    if GENERATION_MARKER.search(chat.template):
        text, spans = _marked(chat)
        for index in trained:
            (start, end), *others = spans[index]
            start, prompted = _after_prompt(chat, index, text, start, end)
            answers += _answers(chat, index, text, [(min(start, end), end), *others], prompted)
    else:
        text = chat.text
        for index in trained:
            start, end, prompted = _span_by_prefix(chat, index)
            answers += _answers(chat, index, text, [(start, end)], prompted)
    return text, answers


def _answers(chat: Chat, index: int, text: str, spans: Sequence[tuple[int, int]], prompted: bool) -> list[Answer]:
    """The stretches of one turn, each without the white space after its end."""
    content = chat.messages[index].get("content") or ""
    # two templates may write tool calls differently: what follows the content need not be the same text
    known = not chat.messages[index].get("tool_calls")
    answers = []
    for start, end in spans:
        anchor = -1
        if not any(answer.anchored for answer in answers):
            anchor = _anchor(chat, index, text, start, end)
        written = start
        if anchor >= 0:
            written = anchor + len(content.strip())
            if text.startswith(content.lstrip(), anchor):
                written = anchor + len(content.lstrip())
        end = max(start + len(text[start:end].rstrip()), min(written, end))
        answers.append(Answer(start, end, start if anchor < 0 else anchor, anchor >= 0 and known, index, prompted))
    return answers


def _anchor(chat: Chat, index: int, text: str, start: int, end: int) -> int:
    """Where the content begins within its turn, −1 if it is not there.

    Templates may strip the content, so the stripped content is located. If it occurs in the turn more than once, also
    in the template's own words ("think" in "<think>"), a stand-in shows which occurrence it is.
    """
    content = (chat.messages[index].get("content") or "").strip()
    anchor = text.find(content, start, end)
    if anchor < 0 or not content or text.find(content, anchor + 1, end) < 0:
        return anchor
    head = chat.replaced(index, content=STAND_IN).partition(STAND_IN)[0]
    if not text.startswith(head):
        return anchor
    place = text.find(content, max(len(head), start), end)
    return anchor if place < 0 else place


# -- where a turn begins ----------------------------------------------------------------------------------------------


def _after_prompt(chat: Chat, index: int, text: str, start: int, end: int) -> tuple[int, bool]:
    """Where a turn that is marked from `start` to `end` begins, and whether the generation prompt stands before it."""
    usual = _generation_prompt(chat)
    before = next((size for size in range(len(usual), 0, -1) if text.endswith(usual[:size], 0, start)), 0)
    if before and text.startswith(usual[before:], start):
        return start + len(usual) - before, True
    given, prompted = _prompt_end(chat, index, text)
    if given is not None:
        # text between the generation prompt and the marker is neither given at inference nor trained on
        return max(start, given), prompted and given >= start
    if index == 0:
        return start, True
    # as much of the generation prompt as the text has, but nothing of the content
    pairs = enumerate(zip(text, chat.render(chat.messages[:index], prompt=True), strict=False))
    given = next((place for place, (ours, theirs) in pairs if ours != theirs), start)
    return max(start, min(given, _anchor(chat, index, text, start, end))), False


def _prompt_end(chat: Chat, index: int, text: str) -> tuple[int | None, bool]:
    """Where the text given at inference ends, and whether the text begins with what this run would give.

    A turn may be rendered in another mode than the run's (with reasoning, or as turns are that others follow): it then
    begins where the template's generation prompt ends when rendered without any settings.
    """
    if index == 0:
        return None, True
    before = chat.render(chat.messages[:index], prompt=True)
    if text.startswith(before):
        return len(before), True
    if chat.settings:
        before = chat.render(chat.messages[:index], prompt=True, settings={})
        if text.startswith(before):
            return len(before), False
    return None, False


def _generation_prompt(chat: Chat) -> str:
    """What the template adds after a user's message for the assistant to continue; "" if that cannot be told."""
    settings = tuple(sorted((name, repr(value)) for name, value in chat.settings.items()))
    key = (chat.template, settings)
    if key not in _PROMPTS:
        if len(_PROMPTS) > 100:
            _PROMPTS.clear()
        try:
            short, whole = chat.render(PROBE, tools=None), chat.render(PROBE, prompt=True, tools=None)
        except Exception:  # a template may refuse the probe for any reason of its own
            short, whole = "", ""
        _PROMPTS[key] = whole[len(short) :] if whole.startswith(short) else ""
    return _PROMPTS[key]


_PROMPTS: dict[tuple, str] = {}


# -- turns of templates with markers ----------------------------------------------------------------------------------


def _marked(chat: Chat) -> tuple[str, dict[int, list[tuple[int, int]]]]:
    """The rendered text, and the marked stretches of each assistant message."""
    text, spans = _generations(chat, chat.messages)
    turns = chat.turns
    if len(spans) == len(turns):
        return text, {index: [span] for index, span in zip(turns, spans, strict=True)}
    # some turn has several: the number of stretches up to each turn tells which are its own
    counts = [len(_generations(chat, chat.messages[: index + 1])[1]) for index in turns[:-1]]
    counts = [0, *counts, len(spans)]
    own = {index: spans[counts[place] : counts[place + 1]] for place, index in enumerate(turns)}
    if not all(own.values()):
        raise ValueError(
            f"the chat template marks {len(spans)} generations for {len(turns)} assistant messages: every "
            "assistant turn needs a {% generation %} block."
        )
    return text, own


def _generations(chat: Chat, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """Rendered text and marked stretches; adjacent ones are merged."""
    texts, spans = render_jinja_template(
        [messages],
        tools=chat.tools,
        chat_template=chat.template,
        return_assistant_tokens_mask=True,
        **{**chat.tokenizer.special_tokens_map, **chat.settings},
    )
    joined: list[tuple[int, int]] = []
    for start, end in spans[0]:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return texts[0], joined


# -- turns of templates without ---------------------------------------------------------------------------------------


def _span_by_prefix(chat: Chat, index: int) -> tuple[int, int, bool]:
    """Start and end of one assistant turn, end-of-turn text included; and whether it follows this run's prompt.

    If nothing precedes the turn, or the template renders a turn differently once others follow, the message is located
    by rendering the conversation with a stand-in for it: the text before and after the stand-in is also the text
    before and after the message.
    """
    text, last = chat.text, index == len(chat.messages) - 1
    start, prompted = _prompt_end(chat, index, text)
    end = len(text) if last else None
    if not last:
        through = chat.render(chat.messages[: index + 1])
        if text.startswith(through) and len(through) >= (start or 0):
            end = len(through)
    if start is not None and end is not None:
        return start, end, prompted
    stand_in = {"role": "assistant", "content": STAND_IN}
    messages = [*chat.messages[:index], stand_in, *chat.messages[index + 1 :]]
    head, *tails = chat.render(messages).split(STAND_IN)
    found = len(tails) == 1
    if found and start is None:
        found, start = text.startswith(head), len(head)
    if found and end is None:
        found, end = text.endswith(tails[0]), len(text) - len(tails[0])
        end += _end_of_turn(chat, messages[: index + 1], tails[0])
    if not found or end < start:
        raise ValueError(
            f"assistant message {index} cannot be located in the rendered text, because the rest of the text changes "
            "with the message's content: use a template with {% generation %} markers."
        )
    return start, end, prompted


def _end_of_turn(chat: Chat, through: list[dict], tail: str) -> int:
    """How much of the text after a message ends its turn: what is there when nothing follows, or EOS."""
    eos = chat.tokenizer.eos_token or ""
    closing = chat.render(through).partition(STAND_IN)[2]
    for ending in (closing, closing.removesuffix(eos), eos):
        if ending and tail.startswith(ending):
            return len(ending)
    return 0
