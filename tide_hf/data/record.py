"""What a dataset was prepared with, carried by the dataset itself.

The record is stored as JSON in the `id` of the feature `row_key`. Only a dataset's features survive all of selecting,
shuffling, splitting, filtering, concatenating, `save_to_disk`, Parquet files and the Hub; and datasets with different
features, so with different records, cannot be concatenated.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from ..alignment import without_defaults
from .preparation import RowPreparation
from .report import PreparationReport
from .teacher_cache import TeacherCache

CARRIER = "row_key"
# 1: rows were numbered instead of hashed, had no BOS, and were trained on the generation prompt
VERSION = 2
# setting -> its name in messages, and whether it concerns only the teacher's side
SETTINGS = {
    "tokenizer": ("student tokenizer", False),
    "chat_template": ("student chat template", False),
    "chat_template_kwargs": ("chat_template_kwargs", False),
    "mask_token_id": ("student mask_token_id", False),
    "max_length": ("max_length", False),
    "block_size": ("block_size", False),
    "eos_fill": ("eos_fill", False),
    "trained_turns": ("trained_turns", False),
    "teacher_tokenizer": ("teacher tokenizer", True),
    "teacher_chat_template": ("teacher chat template", True),
    "teacher_mask_token_id": ("teacher_mask_token_id", True),
    "teacher_max_length": ("teacher_max_length", True),
    "alignment": ("alignment", True),
}


@dataclass(frozen=True)
class PreparationRecord:
    """What a dataset was prepared with, and what became of its rows.

    Args:
        settings (`dict`): a value for each of `SETTINGS`, None for one that plays no part; tokenizers as
            `{"name", "fingerprint"}`, of which only the fingerprint is compared.
        reports (`dict[str, PreparationReport]`): of each split; empty if they were not recorded.
        cache ([`TeacherCache`], *optional*): whose predictions the rows carry, if they carry any.
    """

    settings: dict
    reports: dict[str, PreparationReport] = field(default_factory=dict)
    cache: TeacherCache | None = None

    @classmethod
    def of(cls, preparation: RowPreparation) -> "PreparationRecord":
        """The record of what a `preparation` would do."""
        has_teacher = preparation.teacher_tokenizer is not None
        settings = {
            "tokenizer": _named_fingerprint(preparation.tokenizer),
            "chat_template": template_fingerprint(preparation.tokenizer),
            "chat_template_kwargs": json.dumps(preparation.chat_template_kwargs, sort_keys=True),
            "mask_token_id": preparation.mask_token_id,
            "max_length": preparation.max_length,
            "block_size": preparation.block_size if preparation.eos_fill == "block" else None,
            "eos_fill": preparation.eos_fill,
            "trained_turns": preparation.trained_turns,
            **{name: None for name, (_, teacher) in SETTINGS.items() if teacher},
        }
        if has_teacher:
            settings |= {
                "teacher_tokenizer": _named_fingerprint(preparation.teacher_tokenizer),
                "teacher_chat_template": template_fingerprint(preparation.teacher_tokenizer),
                "teacher_mask_token_id": preparation.teacher_mask_token_id,
                "teacher_max_length": preparation.teacher_max_length,
                "alignment": preparation.alignment,
            }
        return cls(settings)

    @classmethod
    def read(cls, dataset: Dataset | IterableDataset) -> "PreparationRecord | None":
        """The record that a `dataset` carries; None if it has none."""
        carried = getattr((dataset.features or {}).get(CARRIER), "id", None)
        try:
            content = json.loads(carried or "null")
        except json.JSONDecodeError:
            return None
        if not isinstance(content, dict) or content.get("tide_hf_preparation") != VERSION:
            return None
        reports = {name: PreparationReport(**report) for name, report in content["reports"].items()}
        cache = content.get("teacher_cache")
        return cls(content["settings"], reports, None if cache is None else TeacherCache(**cache))

    def feature(self) -> Value:
        """The feature of `row_key` that carries this record."""
        reports = {name: asdict(report) for name, report in self.reports.items()}
        content = {"tide_hf_preparation": VERSION, "settings": self.settings, "reports": reports}
        if self.cache is not None:
            content["teacher_cache"] = asdict(self.cache)
        return Value("int64", id=json.dumps(content))

    def attach(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """The rows of a `dataset`, carrying this record; nothing is copied."""
        if isinstance(dataset, IterableDataset):
            return dataset.cast_column(CARRIER, self.feature())
        recorded = dataset.select(range(len(dataset)))  # a view with its own description
        recorded.info.features = Features({**recorded.features, CARRIER: self.feature()})
        return recorded

    def differences(self, run: "PreparationRecord") -> list[str]:
        """One phrase for each setting in which a `run` differs; the teacher's side counts only if both have one."""
        ours, theirs = self.settings["teacher_tokenizer"], run.settings["teacher_tokenizer"]
        both_have_teachers = ours is not None and theirs is not None
        found = []
        if ours is None and theirs is not None:
            found = [f"the rows have no teacher side, and this run has the teacher tokenizer {_described(theirs)}"]
        for name, (label, of_teacher) in SETTINGS.items():
            ours, theirs = self.settings[name], run.settings[name]
            if _what_counts(ours) != _what_counts(theirs) and (both_have_teachers or not of_teacher):
                found.append(f"{label}: prepared with {_described(ours)}, this run has {_described(theirs)}")
        return found


def require_same_preparation(
    dataset: Dataset | IterableDataset, preparation: RowPreparation, name: str = "train"
) -> PreparationReport | None:
    """Refuses a prepared dataset that was made for other tokenizers or settings.

    Args:
        dataset (`Dataset` or `IterableDataset`): rows of token columns.
        preparation ([`RowPreparation`]): what the run would have prepared them with.
        name (`str`): which dataset of the run it is, for the message and for the report.

    Returns:
        the report of the preparation if the dataset carries one: that of its own split, else of `name`, else the only
        one. It covers all rows that were prepared, whatever was selected from them since.

    Raises:
        ValueError: naming every setting that differs; also for a dataset without a record.
    """
    record, run = PreparationRecord.read(dataset), PreparationRecord.of(preparation)
    if record is None:
        raise ValueError(
            f"The {name} dataset has token columns but no record of the tokenizers and settings it was prepared with, "
            "so they cannot be compared with this run's. Prepare it again (recipes/prepare_data.py), or, if you "
            "know what it was made with, record it: "
            "tide_hf.data.PreparationRecord.of(RowPreparation(...)).attach(dataset)."
        )
    different = record.differences(run)
    if different:
        raise ValueError(
            f"The {name} dataset was prepared for something else. {'; '.join(different)}. Prepare it again "
            "(recipes/prepare_data.py) with this run's models and settings, or change the run to those."
        )
    reports = record.reports
    only = next(iter(reports.values())) if len(reports) == 1 else None
    report = only or reports.get(str(dataset.split), reports.get(name))
    if report is not None and preparation.teacher_tokenizer is not None:
        report.refuse_nothing_aligned()
    return report


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits for what a fast `tokenizer` does with a text, whatever its name, folder or padding."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {
        # set by callers, not part of what the tokenizer is
        "backend": {name: part for name, part in state.items() if name not in ("truncation", "padding")},
        "special": [tokenizer.bos_token, tokenizer.eos_token],
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    return _digest(json.dumps(content, sort_keys=True))


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """16 hexadecimal digits for the `tokenizer`'s chat template without written defaults; None without one."""
    return None if tokenizer.chat_template is None else _digest(without_defaults(tokenizer.get_chat_template()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _named_fingerprint(tokenizer) -> dict[str, str]:
    """A tokenizer in a record; only the last part of a local path, since the record may be published."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    return {"name": Path(name).name if Path(name).exists() else name, "fingerprint": tokenizer_fingerprint(tokenizer)}


def _what_counts(value):
    return value["fingerprint"] if isinstance(value, dict) else value


def _described(value) -> str:
    if isinstance(value, dict):
        return f"{value['name']} (fingerprint {value['fingerprint']})"
    return "none" if value is None else str(value)
