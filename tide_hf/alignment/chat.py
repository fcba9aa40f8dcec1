"""Where each answer lies in a rendered conversation, found through the template's own rendering.

An answer is never looked for as a string that may also stand in the prompt.
"""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

STAND_IN = "\ue000answer\ue001"  # private-use characters: no conversation holds them
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Answer:
    """A trained-on stretch of a rendered text, in characters, half-open.

    Args:
        start, end (`int`): the whole stretch, end-of-turn text included.
        anchor (`int`): where the message's content, stripped of white space, begins; `start` if it is not found.
        anchored (`bool`): whether it was found, so that the text from there on is known to be the content.
    """

    start: int
    end: int
    anchor: int
    anchored: bool = False


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], first_trained: int = 0
) -> tuple[str, list[Answer]]:
    """Renders a conversation with the tokenizer's chat template and locates its assistant turns.

    Templates with `{% generation %}` markers say themselves what the assistant writes. For the others a turn begins
    where the conversation before it, rendered with a generation prompt, ends.

    Args:
        messages (`list[dict]`): `{"role", "content"}` items.
        first_trained (`int`): assistant turns before this message index are left out (a prompt's own turns).

    Returns:
        the rendered text, and one [`Answer`] per assistant turn that is not left out.

    Raises:
        ValueError: if there is no template, or if it hides where a turn is.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.name_or_path or 'The tokenizer'} has no chat template, which rows of messages need: set "
            "tokenizer.chat_template, or give rows of 'prompt' and 'completion' text."
        )
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [index for index in turns if index >= first_trained]
    if GENERATION_MARKER.search(tokenizer.get_chat_template()):
        texts, spans = render_jinja_template(
            [messages],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        text, spans = texts[0], spans[0]
        if len(spans) != len(turns):
            raise ValueError(
                f"the chat template marks {len(spans)} generations for {len(turns)} assistant messages: every "
                "assistant turn needs one {% generation %} block."
            )
        spans = spans[len(turns) - len(trained) :]
    else:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = [_span_by_prefix(tokenizer, messages, index, text) for index in trained]
    answers = []
    for index, (start, end) in zip(trained, spans, strict=True):
        anchor = _anchor(tokenizer, messages, index, text, start, end)
        answers.append(Answer(start, end, start if anchor < 0 else anchor, anchor >= 0))
    return text, answers


def _anchor(tokenizer, messages, index, text, start, end) -> int:
    """Where the content begins within its turn, −1 if it is not there.

    Templates may strip the content: what both renderings have is anchored. Where the turn has it more than once, in
    the template's own words too ("think" in "<think>"), a stand-in shows which one it is.
    """
    content = messages[index]["content"].strip()
    anchor = text.find(content, start, end)
    if anchor < 0 or not content or text.find(content, anchor + 1, end) < 0:
        return anchor
    stand_in = [*messages[:index], {**messages[index], "content": STAND_IN}, *messages[index + 1 :]]
    head = tokenizer.apply_chat_template(stand_in, tokenize=False).partition(STAND_IN)[0]
    if not text.startswith(head):
        return anchor
    place = text.find(content, max(len(head), start), end)
    return anchor if place < 0 else place


def _span_by_prefix(tokenizer, messages, index, text) -> tuple[int, int]:
    """Character span of one assistant turn: from the generation prompt before it to its end-of-turn text.

    Where nothing stands before it, or the template treats a turn differently once more follows, the content is located
    by rendering the conversation with a stand-in for it: what stands before and behind the stand-in stands before and
    behind the content.
    """
    before = None
    if index > 0:
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        last = index == len(messages) - 1
        through = text if last else tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if text.startswith(through) and through.startswith(before):
            return len(before), len(through)
    stand_in = [*messages[:index], {**messages[index], "content": STAND_IN}, *messages[index + 1 :]]
    head, *tails = tokenizer.apply_chat_template(stand_in, tokenize=False).split(STAND_IN)
    if len(tails) != 1 or not (text.startswith(head) and text.endswith(tails[0])):
        raise ValueError(
            f"assistant message {index} cannot be located in the rendered text, because the template renders the rest "
            "differently with another content: use a template with {% generation %} markers."
        )
    eos = tokenizer.eos_token or ""
    end = len(text) - len(tails[0])
    start = len(before) if before is not None and head.startswith(before) else len(head)
    return start, end + len(eos) * text.startswith(eos, end)
