"""Settings of a chat template besides the conversation, such as Qwen3's `enable_thinking`.

A run's settings are written at the head of the template that is saved with the checkpoint, as defaults that a caller
may override. So anyone who renders a prompt with it, in any library, gets the prompt the student was trained on.
"""

import json
import re
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

DEFAULTS = re.compile(r"\{#- chat_template_kwargs (\{.*?\}) #\}.*?\{#- end of chat_template_kwargs #\}\n", re.DOTALL)
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
# passed by the renderer itself
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
# published students are trained and prompted without reasoning
WITHOUT_REASONING = {"enable_thinking": False}


def read_template(given: str | None) -> str | None:
    """Reads the template of a `chat_template` setting.

    Args:
        given (`str`, *optional*): the template itself, or the path of a .jinja file; None gives None.

    Raises:
        ValueError: for a file that does not exist, or a template that renders no messages.
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
    """The settings stored in a tokenizer's template; None if none were ever written there."""
    for template in _templates(tokenizer).values():
        if found := DEFAULTS.match(template):
            return json.loads(found[1])
    return None


def without_defaults(template: str) -> str:
    """A template as it was before [`write_defaults`] changed it."""
    found = DEFAULTS.match(template)
    return template[found.end() :] if found else template


def write_defaults(tokenizer: PreTrainedTokenizerBase, settings: dict) -> None:
    """Writes settings as defaults into the tokenizer's template, replacing earlier ones.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): its `chat_template` is changed.
        settings (`dict`): name -> value; those that the template does not read are left out.
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
    """Whether a template contains a name outside its comments."""
    return re.search(rf"\b{re.escape(name)}\b", COMMENT.sub("", template)) is not None


def resolve_template_kwargs(given: dict | str | None, tokenizers: list[PreTrainedTokenizerBase]) -> dict:
    """The settings a run renders its conversations with.

    Args:
        given (`dict` or `str`, *optional*): the run's own, or their JSON. None: those stored in the first tokenizer's
            template, else `WITHOUT_REASONING` as far as a template reads it.
        tokenizers (`list`): of student and teacher.

    Raises:
        ValueError: if it is not a mapping of names, and for a name that the renderer itself uses or that no template
            reads.
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
    """Describes the first setting that cannot have an effect; None if there is none.

    Args:
        settings (`dict`): name -> value; empty values set nothing and pass.
        tokenizers (`list[PreTrainedTokenizerBase]`): whose templates may read them.
    """
    templates = [without_defaults(text) for tokenizer in tokenizers for text in _templates(tokenizer).values()]
    for name, value in settings.items():
        if name in RESERVED or not name.isidentifier():
            return f"{name!r}, which is not a template's own setting"
        empty = value is None or value in ("", [], {})
        if not empty and not any(mentions(template, name) for template in templates):
            return f"{name!r}, which no chat template of this run reads"
    return None


def _parsed(given: dict | str) -> dict:
    """Settings as a mapping, from their JSON if need be."""
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
    # Jinja drops this line break, so the template's own first line stays at the beginning of a line
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
