"""What a checkpoint derives from: student start, teachers, data; their licences, and the one that follows."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard, ModelCard, constants, hf_hub_download
from transformers.utils import logging

logger = logging.get_logger(__name__)

IN_MEMORY = "weights made in the program"
# licences that ask for nothing but attribution
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
# start of a model's name -> what its licence says beside its id. Source: LICENSE of the WeDLM repository.
LICENSE_NOTES = {"wedlm": "the licence of WeDLM, code and weights, says that it is not for use in the European Union"}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass
class Source:
    """A model or dataset that a checkpoint derives from, as far as its own card says.

    Args:
        name (`str`): Hub name; of a local one the last part of its path; or `IN_MEMORY`.
        on_hub (`bool`): whether `name` can be looked up on the Hub.
        revision (`str`, *optional*): commit that was loaded.
        license, license_name, license_link (`str`, *optional*): as in the metadata of its card.
        languages (`list[str]`): likewise.
        base_model (`str`, *optional*): of a local model, the Hub name its card derives it from.
        arxiv_ids (`list[str]`): papers its card links to.
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
        """What a reader has to know of its licence beside the id."""
        short = self.name.split("/")[-1].lower()
        return next((note for start, note in LICENSE_NOTES.items() if short.startswith(start)), None)

    @property
    def link(self) -> str:
        """Markdown: the name, linked where it is on the Hub."""
        kind = "datasets/" if isinstance(self, DataSource) else ""
        return f"[{self.name}](https://huggingface.co/{kind}{self.name})" if self.on_hub else f"`{self.name}`"


class DataSource(Source):
    """A [`Source`] that is a dataset."""


def is_hub_name(name: str) -> bool:
    """Whether a name can be one of the Hub's: not an existing path, and of its form."""
    return not Path(name).exists() and not name.startswith(".") and HUB_NAME.fullmatch(name) is not None


def find_source(
    name_or_path: str, is_dataset: bool = False, revision: str | None = None, token: str | None = None
) -> Source:
    """Reads the card of a model or dataset: from its folder, the cache or the Hub; without one, only its name.

    Args:
        name_or_path (`str`): Hub name or path; empty for a model made in memory.
        is_dataset (`bool`): which of the two it is.
        revision (`str`, *optional*): commit that was loaded.
        token (`str`, *optional*): for a private repository.
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
        data = (DatasetCard if is_dataset else ModelCard)(text, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.info(f"The card of {name_or_path} could not be read: {error}")
        return found
    for key in ("license", "license_name", "license_link"):
        value = data.get(key)
        setattr(found, key, value[0] if isinstance(value, list) and value else value)
    found.languages = _as_list(data.get("language"))
    base_models = _as_list(data.get("base_model"))
    found.base_model = base_models[0] if len(base_models) == 1 and not on_hub else None
    found.arxiv_ids = list(dict.fromkeys(re.findall(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})", text)))
    return found


def resolve_license(sources: list[Source]) -> dict[str, str]:
    """The licence that follows from those of the student start (first), the teachers and the data.

    Permissive sources leave the start's. A single other licence in the chain is carried over; several, or one with
    conditions of its own, make it `other`, named after them.

    Returns:
        `license`, and `license_name` and `license_link` with `other`; empty where the start's is unknown and nothing
        in the chain restricts.
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


def _as_list(value) -> list[str]:
    """Metadata that is one string, a list or missing; YAML reads the language `no` as False."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return ["no" if item is False else str(item) for item in values]
