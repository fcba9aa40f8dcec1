"""What a chat template is told beside the conversation: its own settings, such as Qwen3's `enable_thinking`.

The settings of a run stand at the head of the template that is saved with the checkpoint, as defaults that a caller
may override. So whoever renders a prompt with it, this library or another, gets the prompt the student was trained on.
"""

import json
import re
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

DEFAULTS = re.compile(r"\{#- chat_template_kwargs (\{.*?\}) #\}.*?\{#- end of chat_template_kwargs #\}\n", re.DOTALL)
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
# what the renderer itself passes
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
# published students are prompted, and their prompts masked, without reasoning
WITHOUT_REASONING = {"enable_thinking": False}


def read_template(given: str | None) -> str | None:
    """The template of a `chat_template` setting: the text itself, or that of a .jinja file.

    Raises:
        ValueError: for a file that is not there, or a text that writes no message.
    """
    if given is None:
        return None
    if "{" in given:
        template = given
    elif Path(given).is_file():
        template = Path(given).read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"chat_template={given!r} is neither a file nor a template: expected the path of a .jinja file, or the "
            "template itself."
        )
    if "messages" not in template:
        raise ValueError(
            "The given chat_template never reads 'messages': expected a Jinja template of a conversation."
        )
    return template


def template_defaults(tokenizer: PreTrainedTokenizerBase) -> dict | None:
    """The settings that stand in a tokenizer's template; None if none were ever written there."""
    for template in _templates(tokenizer).values():
        if found := DEFAULTS.match(template):
            return json.loads(found[1])
    return None


def without_defaults(template: str) -> str:
    """A template as it was before [`write_defaults`]."""
    found = DEFAULTS.match(template)
    return template[found.end() :] if found else template


def write_defaults(tokenizer: PreTrainedTokenizerBase, settings: dict) -> None:
    """Writes settings as defaults into the tokenizer's template, in place of those that may stand there.

    Those that the template does not read are left out.
    """
    written = {}
    for name, template in _templates(tokenizer).items():
        template = without_defaults(template)
        read = {key: value for key, value in settings.items() if mentions(template, key)}
        written[name] = _head(read) + template if read else template
    if written:
        several = isinstance(tokenizer.chat_template, dict)
        tokenizer.chat_template = written if several else next(iter(written.values()))


@lru_cache(1000)
def mentions(template: str, name: str) -> bool:
    """Whether a template has this name outside its comments."""
    return re.search(rf"\b{re.escape(name)}\b", COMMENT.sub("", template)) is not None


def resolve_template_kwargs(given: dict | str | None, tokenizers: list[PreTrainedTokenizerBase]) -> dict:
    """The settings a run renders its conversations with.

    Args:
        given (`dict` or `str`, *optional*): the run's own, or their JSON. None: those of the first tokenizer's
            template, else [`WITHOUT_REASONING`] where a template reads that.
        tokenizers (`list`): of student and teacher.

    Raises:
        ValueError: for something that is no mapping of names, a name that the renderer itself uses, and one that no
            template reads.
    """
    templates = [template for tokenizer in tokenizers for template in _templates(tokenizer).values()]
    if given is None:
        own = template_defaults(tokenizers[0])
        if own is not None:
            return own
        return {
            name: value
            for name, value in WITHOUT_REASONING.items()
            if any(mentions(template, name) for template in templates)
        }
    settings = _parsed(given)
    if problem := unread_setting(settings, tokenizers):
        raise ValueError(f"chat_template_kwargs sets {problem}: correct its name, or leave it out.")
    return settings


def unread_setting(settings: dict, tokenizers: list[PreTrainedTokenizerBase]) -> str | None:
    """The first setting that changes no rendering, and why; None if there is none. Empty values set nothing."""
    templates = [without_defaults(text) for tokenizer in tokenizers for text in _templates(tokenizer).values()]
    for name, value in settings.items():
        if name in RESERVED or not name.isidentifier():
            return f"{name!r}, which is not a template's own setting"
        empty = value is None or value in ("", [], {})
        if not empty and not any(mentions(template, name) for template in templates):
            return f"{name!r}, which no chat template of this run reads"
    return None


def _parsed(given: dict | str) -> dict:
    """A mapping, or the JSON of one."""
    settings = given
    if isinstance(given, str):
        try:
            settings = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(
                f'chat_template_kwargs={given!r} is not valid JSON ({error}): give {{"name": value}}.'
            ) from None
    if not isinstance(settings, dict):
        raise ValueError(f'chat_template_kwargs is {settings!r}; expected a mapping, {{"name": value}}.')
    return settings


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokenizer's templates by name."""
    template = tokenizer.chat_template
    return template if isinstance(template, dict) else {} if template is None else {"default": template}


def _head(settings: dict) -> str:
    """Jinja that gives names their defaults; its settings also as JSON, to be read back."""
    words = json.dumps(settings, ensure_ascii=False).replace("#", "\\u0023")
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in settings.items()
    ]
    # the line break, which Jinja drops, leaves the template's own first line a first line
    return f"{{#- chat_template_kwargs {words} #}}{''.join(lines)}{{#- end of chat_template_kwargs #}}\n"


def _literal(value) -> str:
    """A JSON value in Jinja's notation."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
