"""Raw rows from wherever they are: a Hub dataset, a local file or folder, or a mixture of several.

Imported only where it is used: TRL, whose dataset configuration it shares, takes seconds to import.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

MESSAGES = Features({"messages": List({"role": Value("string"), "content": Value("string")})})
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class MixturePart(DatasetConfig):
    """One dataset of a mixture: TRL's entry and a filter.

    Args:
        answer_contains (`str`, *optional*): keeps the rows whose last message contains this text.
    """

    answer_contains: str | None = None


@dataclass
class MixtureConfig(DatasetMixtureConfig):
    """TRL's mixture of datasets with [`MixturePart`] entries; parts are brought to `messages` and concatenated."""

    datasets: list[MixturePart] = field(
        default_factory=list, metadata={"help": "Datasets of the mixture (in a YAML file)."}
    )

    def __post_init__(self):
        self.datasets = [MixturePart(**part) if isinstance(part, dict) else part for part in self.datasets]
        if any(part.fraction is not None for part in self.datasets):
            raise ValueError("fraction is not supported in a mixture; take part of a dataset with split: train[:10%].")
        if self.streaming and self.test_split_size is not None:
            raise ValueError("test_split_size cannot split a stream: leave streaming off, or name a test dataset.")


def load_mixture(mixture: MixtureConfig) -> DatasetDict:
    """Loads every part, keeps its conversations as `messages`, and joins them; `train`, and `test` where asked for."""
    parts = []
    for part in mixture.datasets:
        rows = load_rows(part.path, part.name, part.split, mixture.streaming, part.data_dir, part.data_files)
        rows = rows if part.columns is None else rows.select_columns(part.columns)
        parts.append(as_messages(rows, part.answer_contains))
    rows = concatenate_datasets(parts)
    if mixture.test_split_size is None:
        return DatasetDict(train=rows)
    return rows.train_test_split(test_size=mixture.test_split_size, seed=42)


def load_rows(
    path: str,
    name: str | None = None,
    split: str | None = "train",
    streaming: bool = False,
    data_dir: str | None = None,
    data_files=None,
) -> Dataset | IterableDataset | DatasetDict:
    """One dataset by Hub name, local file (.jsonl, .json, .parquet, .csv) or folder written by `save_to_disk`.

    Raises:
        ValueError: for a local file of another kind.
    """
    local = Path(path)
    if local.is_file():
        if local.suffix not in FILE_FORMATS:
            raise ValueError(f"{path} ends in {local.suffix!r}; expected one of {', '.join(FILE_FORMATS)}.")
        return load_dataset(FILE_FORMATS[local.suffix], data_files=str(local), split=split, streaming=streaming)
    if (local / "dataset_info.json").is_file() or (local / "dataset_dict.json").is_file():
        return _part_of(load_from_disk(path), split)
    return load_dataset(path, name, split=split, streaming=streaming, data_dir=data_dir, data_files=data_files)


def _part_of(rows: Dataset | DatasetDict, split: str | None) -> Dataset | DatasetDict:
    """A split, or a slice such as train[:10%], of what was saved to disk; a single table counts as train."""
    if split is None:
        return rows
    splits = rows if isinstance(rows, DatasetDict) else DatasetDict(train=rows)
    slices = ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in slices])


def as_messages(rows: Dataset, answer_contains: str | None = None) -> Dataset:
    """Rows of `messages`, `prompt` + `completion` or `instruction` + `output` as `messages` alone.

    Raises:
        ValueError: if no column holds a conversation.
    """
    names = set(rows.column_names)
    if "messages" in names:
        convert = _plain_messages
    elif {"prompt", "completion"} <= names:
        convert = _from_pair("prompt", "completion")
    elif {"instruction", "output"} <= names:
        convert = _from_pair("instruction", "output")
    else:
        raise ValueError(
            f"A mixture needs conversations, but a part has the columns {', '.join(rows.column_names)}; expected "
            "'messages', 'prompt' and 'completion', or 'instruction' and 'output'."
        )
    rows = rows.map(convert, remove_columns=rows.column_names, features=MESSAGES)
    if answer_contains is not None:
        rows = rows.filter(lambda row: bool(row["messages"]) and answer_contains in row["messages"][-1]["content"])
    return rows


def _plain_messages(row: dict) -> dict:
    """Role and content of each message, nothing else, so that the parts of a mixture have the same features."""
    return {"messages": [{"role": message["role"], "content": message["content"]} for message in row["messages"]]}


def _from_pair(question: str, answer: str):
    """Converter of two columns of text, or of two lists of messages."""

    def convert(row: dict) -> dict:
        if isinstance(row[answer], list):
            return _plain_messages({"messages": [*row[question], *row[answer]]})
        return {
            "messages": [{"role": "user", "content": row[question]}, {"role": "assistant", "content": row[answer]}]
        }

    return convert
