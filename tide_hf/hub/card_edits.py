"""What people wrote into a card is kept when the card is written again.

A run writes, and rewrites at every save, the text between two marks. Text outside the marks belongs to whoever wrote
it. Metadata keys that the run does not write are kept too; of those that it writes, `language` and the `license` keys
keep the value that the card already has.
"""

import yaml
from transformers.utils import logging

from .front_matter import as_list, split_front_matter

logger = logging.get_logger(__name__)

BEGIN = "<!-- tide_hf writes from here; edits between the marks are overwritten -->"
END = "<!-- tide_hf writes up to here; text below and above is kept -->"
# keys that only a run writes: the value of an earlier state must not outlive it
DERIVED = (
    "library_name",
    "pipeline_tag",
    "base_model",
    "base_model_relation",
    "datasets",
    "distillation",
    "model-index",
)
HELD = ("language", "license", "license_name", "license_link")
# sentences of the cards that libraries generate, which hold nothing that a person wrote
STOCK_CARDS = (
    "Provide a quick summary of what the model is/does",
    "generated automatically according to the information",
)


def assemble_card(metadata: dict, text: str) -> str:
    """A card with nothing in it but what the run says.

    Args:
        metadata (`dict`): its YAML head.
        text (`str`): Markdown, put between the marks.
    """
    return _join(metadata, "", f"{BEGIN}\n\n{text}\n\n{END}", "")


def adopt_edits(card: str, other: str, given: tuple[str, ...] = ()) -> str:
    """Adds to a card what people wrote into another version of it.

    Args:
        card (`str`): as the run wrote it; text of its own above or below the marks wins over the other's.
        other (`str`): the version that people may have edited.
        given (`tuple[str, ...]`): metadata keys that the user set for the run: they keep the card's value.
    """
    if not other.strip():
        return card
    above, below, metadata = split_card(card)
    other_above, other_below, kept = split_card(other)
    tags = list(dict.fromkeys([*as_list(metadata.get("tags")), *as_list(kept.pop("tags", None))]))
    held = _held(kept, given)
    if "license" in held:
        metadata = {name: value for name, value in metadata.items() if not name.startswith("license")}
    run = card[card.index(BEGIN) : card.index(END) + len(END)]
    kept = {name: value for name, value in kept.items() if name not in DERIVED and not name.startswith("license")}
    return _join({**kept, **metadata, **held, "tags": tags}, above or other_above, run, below or other_below)


def held_metadata(other: str, given: tuple[str, ...]) -> dict:
    """Language and licence that an `other` version of the card states, except the `given` keys."""
    return _held(split_card(other)[2], given)


def _held(metadata: dict, given: tuple[str, ...]) -> dict:
    return {name: metadata[name] for name in HELD if metadata.get(name) and name.split("_")[0] not in given}


def _join(metadata: dict, above: str, run: str, below: str) -> str:
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()
    return "\n\n".join(part for part in (f"---\n{head}\n---", above, run, below) if part) + "\n"


def split_card(text: str) -> tuple[str, str, dict]:
    """What a person wrote above and below the marks, and the metadata; nothing of a card that a library generated.

    Metadata that cannot be parsed is a person's too: it is kept as text above the marks, and a warning says so.
    """
    if not text.strip() or (BEGIN not in text and any(sentence in text for sentence in STOCK_CARDS)):
        return "", "", {}
    try:
        metadata, body = split_front_matter(text)
    except ValueError as error:
        logger.warning_once(f"The metadata of the existing card cannot be read and is kept as text: {error}")
        metadata, body = {}, text
    if BEGIN not in body or END not in body:
        return body.strip(), "", metadata
    above, rest = body.split(BEGIN, 1)
    return above.strip(), rest.split(END, 1)[1].strip(), metadata
