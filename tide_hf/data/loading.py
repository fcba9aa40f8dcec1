"""Raw rows from a Hub dataset, a local file or folder, or a mixture of several.

Imported only where it is used: TRL, whose dataset configuration it shares, takes seconds to import.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Json,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from .formats import RAW_COLUMNS, UNREADABLE, Conversation, RowSkipped, read_row, to_json, unread_columns

TEXT_TYPES = ("string", "large_string", "string_view", "null")
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class MixturePart(DatasetConfig):
    """One dataset of a mixture: TRL's entry and a filter.

    Args:
        answer_contains (`str`, *optional*): keeps the rows whose last message, or completion, contains this text.
    """

    answer_contains: str | None = None


@dataclass
class MixtureConfig(DatasetMixtureConfig):
    """TRL's mixture of datasets, with [`MixturePart`] entries, each of which may have a format of its own."""

    datasets: list[MixturePart] = field(
        default_factory=list, metadata={"help": "Datasets of the mixture (in a YAML file)."}
    )

    def __post_init__(self):
        self.datasets = [_mixture_part(part) for part in self.datasets]
        if any(part.fraction is not None for part in self.datasets):
            raise ValueError(
                "fraction is not supported in a mixture; take a part of a dataset with split: train[:10%]."
            )
        if self.streaming and self.test_split_size is not None:
            raise ValueError("test_split_size cannot split a stream: turn streaming off, or name a test dataset.")


def _mixture_part(given) -> MixturePart:
    """An entry of a YAML file's `datasets`, checked."""
    if isinstance(given, MixturePart):
        return given
    known = [part.name for part in fields(MixturePart)]
    if not isinstance(given, dict) or "path" not in given or not given.keys() <= set(known):
        raise ValueError(f"datasets has the entry {given!r}; expected a path and, optionally, {', '.join(known[1:])}.")
    return MixturePart(**given)


def load_mixture(mixture: MixtureConfig, prompts_alone: bool = False) -> DatasetDict:
    """Loads all parts of a mixture and joins them, every row unchanged.

    Args:
        mixture ([`MixtureConfig`]): what to load, and whether to split off a test set.
        prompts_alone (`bool`): whether prompts without answers will do, because somebody is going to answer them.

    Returns:
        `DatasetDict`: `train`, and `test` where `test_split_size` is given.

    Raises:
        ValueError: for a part that has no column to train on, or a split that does not exist.
    """
    parts = []
    for part in mixture.datasets:
        rows = load_rows(part.path, part.name, part.split, mixture.streaming, part.data_dir, part.data_files)
        rows = rows if part.columns is None else rows.select_columns(part.columns)
        parts.append(_filtered(rows, part.answer_contains))
    rows = concatenate_datasets(_of_same_columns(parts, prompts_alone))
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
    """Loads one dataset.

    Args:
        path (`str`): a name on the Hub, a local file (.jsonl, .json, .parquet, .csv), or a folder written by
            `save_to_disk`.
        name (`str`, *optional*): configuration of a Hub dataset.
        split (`str`, *optional*): a split or a part of one, such as `train[:10%]`; None loads all of them.
        streaming (`bool`): read the rows of a Hub dataset or file as they are needed.
        data_dir, data_files (*optional*): as in [`~datasets.load_dataset`].

    Raises:
        ValueError: for a local file that is of another kind or cannot be parsed.
    """
    local = Path(path)
    if local.is_file():
        if local.suffix not in FILE_FORMATS:
            raise ValueError(f"{path} ends in {local.suffix!r}; expected one of {', '.join(FILE_FORMATS)}.")
        arguments = {"path": FILE_FORMATS[local.suffix], "data_files": str(local)}
    elif (local / "dataset_info.json").is_file() or (local / "dataset_dict.json").is_file():
        return _part_of(load_from_disk(path), split)
    else:
        arguments = {"path": path, "name": name, "data_dir": data_dir, "data_files": data_files}
    try:
        return load_dataset(**arguments, split=split, streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read as a dataset: {error.__cause__ or error}") from error


def _part_of(rows: Dataset | DatasetDict, split: str | None) -> Dataset | DatasetDict:
    """A split, or a slice such as train[:10%], of what was saved to disk; a single table counts as train."""
    if split is None:
        return rows
    splits = rows if isinstance(rows, DatasetDict) else DatasetDict(train=rows)
    slices = ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in slices])


def as_messages(rows: Dataset) -> Dataset:
    """Converts conversations of any format to a table with `messages` alone, for comparing answers to prompts.

    Args:
        rows (`Dataset`): raw rows.

    Raises:
        ValueError: if no column holds conversations, or a row is plain text.
    """
    unread_columns(rows.column_names)

    def convert(row: dict) -> dict:
        content = read_row(row)
        if not isinstance(content, Conversation):
            raise ValueError("Expected conversations, got rows of plain text: give 'messages'.")
        return {"messages": content.messages}

    return rows.map(convert, remove_columns=rows.column_names, features=Features({"messages": Json()}))


def _filtered(rows: Dataset | IterableDataset, answer_contains: str | None) -> Dataset | IterableDataset:
    """Rows whose answer contains a text, without those that cannot be read."""
    if answer_contains is None:
        return rows

    def contains(row: dict) -> bool:
        try:
            return answer_contains in read_row(row).answer
        except RowSkipped:
            return False

    return rows.filter(contains)


def _of_same_columns(parts: list, prompts_alone: bool) -> list:
    """The parts with equal columns, so that they can be joined: those that are read and that any part has.

    What is not text in all parts is kept as JSON: a table would fill one row's tool calls with the keys of another's.
    """
    parts = [rows._resolve_features() if isinstance(rows, IterableDataset) else rows for rows in parts]
    for rows in parts:
        unread_columns(rows.column_names, prompts_alone)
    columns = {}
    for name in (*RAW_COLUMNS, *UNREADABLE):
        kinds = [getattr(rows.features[name], "dtype", None) for rows in parts if name in rows.features]
        if kinds:
            columns[name] = Value("string") if all(kind in TEXT_TYPES for kind in kinds) else Json()
    features = Features(columns)

    def chosen(row: dict) -> dict:
        return {
            name: to_json(row.get(name)) if isinstance(column, Json) else row.get(name)
            for name, column in columns.items()
        }

    return [rows.map(chosen, remove_columns=rows.column_names, features=features) for rows in parts]
