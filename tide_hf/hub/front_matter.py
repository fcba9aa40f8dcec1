"""Reading the metadata between the --- lines at the top of a card."""

import yaml
from huggingface_hub import RepoCard


def split_front_matter(text: str) -> tuple[dict, str]:
    """The metadata of a card, without keys that have no value, and the Markdown below it.

    Args:
        text (`str`): the whole card; the first result is empty if it has no metadata.

    Raises:
        ValueError: if the metadata is not a YAML mapping from names to values.
    """
    # RepoCard keeps each value as it is; ModelCard would rewrite tags and the model index
    try:
        card = RepoCard(text.removeprefix("\ufeff"))
    except (TypeError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error
    return card.data.to_dict(), card.text


def as_list(value: object) -> list[str]:
    """Metadata that is one value, several or none, as a list of text; YAML reads the language `no` as False."""
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return ["no" if item is False else str(item) for item in values]
