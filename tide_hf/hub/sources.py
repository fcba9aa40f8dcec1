"""What a checkpoint is derived from: initial weights, teachers and data; their licences, and the one that follows."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from transformers.utils import logging

from .front_matter import as_list, split_front_matter

logger = logging.get_logger(__name__)

IN_MEMORY = "weights created in memory"
# licences whose only condition is attribution
PERMISSIVE = frozenset(
    [
        "apache-2.0",
        "mit",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc0-1.0",
        "cc-by-4.0",
        "odc-by",
        "isc",
        "unlicense",
        "cdla-permissive-2.0",
    ]
)
# start of a model's name -> a condition that its licence id does not tell. Source: LICENSE of WeDLM's repository
LICENSE_NOTES = {"wedlm": "the licence of WeDLM says that code and weights are not for use in the European Union"}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass
class Source:
    """A model or dataset that a checkpoint is derived from, as described by its own card.

    Args:
        name (`str`): the Hub name, the last part of a local path, `IN_MEMORY`, or a description in words.
        on_hub (`bool`): whether `name` can be looked up on the Hub.
        revision (`str`, *optional*): the commit that was loaded.
        license, license_name, license_link (`str`, *optional*): from the metadata of its card.
        languages (`list[str]`): from there too.
        base_model (`str`, *optional*): for a local model, the Hub name of the model that its card calls its base.
        arxiv_ids (`list[str]`): papers that its card links to.
    """

    name: str
    on_hub: bool = False
    revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: list[str] = field(default_factory=list)
    base_model: str | None = None
    arxiv_ids: list[str] = field(default_factory=list)

    @property
    def note(self) -> str | None:
        """A condition of its licence that readers must know about."""
        short = self.name.split("/")[-1].lower()
        return next((note for start, note in LICENSE_NOTES.items() if short.startswith(start)), None)

    @property
    def link(self) -> str:
        """The name in Markdown: linked if it is on the Hub, plain if it is a description in words."""
        if self.on_hub:
            return f"[{self.name}](https://huggingface.co/{'datasets/' * isinstance(self, DataSource)}{self.name})"
        return self.name if " " in self.name else f"`{self.name}`"


class DataSource(Source):
    """A [`Source`] that is a dataset."""


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of a Hub name and is not an existing path.

    Args:
        name (`str`): of a model or dataset.
    """
    return not Path(name).exists() and not name.startswith(".") and HUB_NAME.fullmatch(name) is not None


def find_source(
    name_or_path: str, is_dataset: bool = False, revision: str | None = None, token: str | None = None
) -> Source:
    """Describes a model or dataset from its card, which is read from its folder, the cache or the Hub.

    Without a card, or with one that cannot be read, only the name is known.

    Args:
        name_or_path (`str`): Hub name or path; empty for a model created in memory.
        is_dataset (`bool`): whether it is a dataset rather than a model.
        revision (`str`, *optional*): the commit that was loaded.
        token (`str`, *optional*): of the Hub, for a private repository.
    """
    kind = DataSource if is_dataset else Source
    if not name_or_path:
        return kind(IN_MEMORY)
    on_hub = is_hub_name(name_or_path)
    path = Path(name_or_path)
    found = kind(name_or_path if on_hub else path.name, on_hub, revision)
    try:
        if on_hub:
            repo_type = "dataset" if is_dataset else "model"
            path = hf_hub_download(
                name_or_path, constants.REPOCARD_NAME, repo_type=repo_type, revision=revision, token=token
            )
        elif path.is_dir():
            path = path / constants.REPOCARD_NAME
        if not Path(path).name.endswith(".md") or not Path(path).is_file():
            return found
        text = Path(path).read_text(encoding="utf-8")
        data, _ = split_front_matter(text)
    except (OSError, ValueError) as error:
        logger.info(f"The card of {name_or_path} could not be read: {error}")
        return found
    for key in ("license", "license_name", "license_link"):
        value = data.get(key)
        setattr(found, key, value[0] if isinstance(value, list) and value else value)
    found.languages = as_list(data.get("language"))
    base_models = as_list(data.get("base_model"))
    found.base_model = base_models[0] if len(base_models) == 1 and not on_hub else None
    found.arxiv_ids = list(dict.fromkeys(re.findall(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})", text)))
    return found


def resolve_license(sources: list[Source]) -> dict[str, str]:
    """The licence of a checkpoint that follows from the licences of its sources.

    If all of them are permissive, it is that of the initial weights. A single other licence is carried over. Several
    of them, or one with conditions of its own, make it `other`, named after them.

    Args:
        sources (`list[Source]`): the initial weights, then teachers and data.

    Returns:
        `license`, and `license_name` and `license_link` with `other`; empty if that of the initial weights is unknown
        and no other source restricts.
    """
    restricting = [source for source in sources if source.note or source.license not in (None, *PERMISSIVE)]
    if not restricting:
        return {"license": sources[0].license} if sources and sources[0].license else {}
    ids = {source.license for source in restricting}
    if len(ids) == 1 and not ids & {"other", None, *PERMISSIVE}:
        return {"license": ids.pop()}
    names = dict.fromkeys(_slug(source.license_name or source.name) for source in restricting)
    links = [source.license_link or f"https://huggingface.co/{source.name}" for source in restricting if source.on_hub]
    found = {"license": "other", "license_name": "-and-".join(names)}
    return found | ({"license_link": links[0]} if links else {})


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.split("/")[-1].lower()).strip("-")
