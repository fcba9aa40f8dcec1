"""Finds, offline, what a model card lacks."""

import math
import re
from pathlib import Path

from huggingface_hub import ModelCard

from .front_matter import split_front_matter
from .provenance import SECRET
from .sources import HUB_NAME, IN_MEMORY, PERMISSIVE

# the Hub's licence ids that language models have; anything else is `other`, with a name
LICENSES = PERMISSIVE.union(
    [
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nc-nd-4.0",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigcode-openrail-m",
        "gpl-3.0",
        "agpl-3.0",
        "lgpl-3.0",
        "mpl-2.0",
        "cdla-sharing-1.0",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "gemma",
        "apple-amlr",
        "deepfloyd-if-license",
        "other",
    ]
)
RELATIONS = ("adapter", "merge", "quantized", "finetune")
REQUIRED = ("license", "language", "library_name", "pipeline_tag", "tags", "distillation")
SECTIONS = ("Load it", "Training", "Reproduce", "Limits", "License", "Citations")
LEFTOVERS = (
    "{{",
    "}}",
    "{%",
    "More Information Needed",
    "More information needed",
    "TODO",
    "TBD",
    "FIXME",
    "](/",
    "[](",
    "]()",
)
LOCAL_PATH = re.compile(r"(?<![\w:/.\])<-])(?:/(?!/)[\w.-]+(?:/[\w.-]+)+|~/[\w.-]+|[A-Za-z]:\\\w+)|file://")
PROVENANCE = ("harness", "settings", "num_samples", "date")


def check_card(card: str | Path) -> list[str]:
    """Lists what is missing or wrong, a sentence each; empty for a complete card.

    Args:
        card (`str` or `Path`): the text, or its file, beside which the images that it shows must lie.
    """
    folder = None
    if isinstance(card, Path) or ("\n" not in card and Path(card).is_file()):
        folder, card = Path(card).parent, Path(card).read_text(encoding="utf-8")
    try:
        metadata, body = split_front_matter(card)
        if not metadata:
            return ["There is no metadata between --- lines at the top."]
        lost = sorted(set(metadata) - set(ModelCard(card).data.to_dict()))
    except (TypeError, ValueError) as error:
        return [f"The metadata cannot be parsed: {error}"]
    return [
        *(f"The metadata key {key} does not survive huggingface_hub.ModelCard." for key in lost),
        *_check_metadata(metadata),
        *_check_results(metadata.get("model-index") or []),
        *_check_text(body),
        *_check_leaks(card),
        *_check_images(body, folder),
    ]


def _check_metadata(metadata: dict) -> list[str]:
    """Required keys, the Hub's vocabulary, and names that must be Hub names."""
    found = [f"The metadata has no {key}." for key in REQUIRED if not metadata.get(key)]
    start = (metadata.get("distillation") or {}).get("student_start")
    if not metadata.get("base_model") and start != IN_MEMORY:
        found.append(f"The metadata has no base_model, and the student started from {start!r}.")
    if metadata.get("base_model") and metadata.get("base_model_relation") not in RELATIONS:
        found.append(f"base_model_relation must be one of {', '.join(RELATIONS)}.")
    license_id = metadata.get("license")
    if license_id and license_id not in LICENSES:
        found.append(f"license {license_id!r} is not one of the Hub's ids: use other, with license_name.")
    if license_id == "other" and not metadata.get("license_name"):
        found.append("license is other: license_name must say which.")
    for key in ("base_model", "datasets"):
        names = metadata.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            if not HUB_NAME.fullmatch(str(name)):
                found.append(f"{key} {name!r} is not a Hub name.")
    languages = metadata.get("language") or []
    for code in [languages] if not isinstance(languages, list) else languages:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", str(code)):
            found.append(f"language {code!r} is not a language code.")
    return found


def _check_results(model_index: list[dict]) -> list[str]:
    """Whether each number of the model index is one, and says how it was measured."""
    found = []
    for result in (result for model in model_index for result in model.get("results", [])):
        for metric in result.get("metrics", []):
            name, value, args = metric.get("name"), metric.get("value"), metric.get("args") or {}
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                found.append(f"The value of {name} is {value!r}, which is not a finite number.")
            found += [f"The result {name} does not say its {key}." for key in PROVENANCE if not args.get(key)]
    return found


def _check_text(body: str) -> list[str]:
    """Sections, programs, and leftovers of a template."""
    outside_code = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    headings = re.findall(r"^##? (.+)$", outside_code, re.MULTILINE)
    found = [f"The section {name!r} is missing." for name in SECTIONS if name not in headings]
    programs = python_blocks(body)
    if not any("from_pretrained" in program for program in programs):
        found.append("No Python block loads the model.")
    for program in programs:
        try:
            compile(program, "card", "exec")
        except SyntaxError as error:
            found.append(f"A Python block does not compile: {error}")
    found += [f"The text contains {mark!r}, a leftover of a template." for mark in LEFTOVERS if mark in outside_code]
    if re.search(r"\|\s*(nan|inf|-inf)\s*(\||±)", outside_code):
        found.append("A table contains nan or inf, which are not measurements.")
    return found


def _check_leaks(card: str) -> list[str]:
    """Local paths and access tokens, anywhere in the card."""
    without_urls = re.sub(r"https?://\S+", "", card)
    found = [f"The card contains the local path {path!r}." for path in LOCAL_PATH.findall(without_urls)]
    return found + (["The card contains an access token."] if SECRET.search(card) else [])


def _check_images(body: str, folder: Path | None) -> list[str]:
    """Images that are shown and do not lie beside the card."""
    names = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", body)
    local = [name for name in names if "://" not in name]
    return [f"The image {name} is missing." for name in local if folder is not None and not (folder / name).is_file()]


def python_blocks(text: str) -> list[str]:
    """The Python programs of a card, in order.

    Args:
        text (`str`): Markdown.
    """
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)
