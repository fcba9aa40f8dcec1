"""Preparing a whole dataset."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers.utils import logging

from .answers import AnswerRecord
from .formats import unread_columns
from .preparation import COLUMNS, COVERAGE, COVERAGE_COUNTS, STATUS, RowPreparation, nth_key
from .record import CARRIER, PreparationRecord
from .report import DataError, PreparationReport

logger = logging.get_logger(__name__)
FIRST_ROWS = 100  # of a stream: none of them aligned with the teacher is an error


def prepare_dataset(
    dataset: Dataset | IterableDataset, preparation: RowPreparation, num_proc: int | None = None
) -> tuple[Dataset | IterableDataset, PreparationReport | None]:
    """Prepares every row of a dataset once.

    Args:
        dataset (`Dataset` or `IterableDataset`): rows in any format of [`~tide_hf.data.formats`].
        preparation ([`RowPreparation`]): what to do with each row.
        num_proc (`int`, *optional*): processes, as in `Dataset.map`.

    Returns:
        the prepared dataset with the columns `COLUMNS`, which carries its [`PreparationRecord`], and the report; None
        for a streaming dataset, whose dropped rows are logged as they are met.

    Raises:
        ValueError: if no column holds anything to train on.
        DataError: if no row is left, or no answer is aligned with the teacher; with the counts.
    """
    if isinstance(dataset, IterableDataset):
        removed = removed_columns(dataset)
        features = None if dataset.column_names is None else _features(PreparationRecord.of(preparation))
        prepared = dataset.map(preparation, remove_columns=removed, features=features)
        return prepared.filter(
            partial(_keep_and_log, PreparationReport()), input_columns=[STATUS, COVERAGE]
        ).remove_columns([STATUS, COVERAGE]), None
    prepared, report = prepare_table(dataset, preparation, num_proc)
    if not report.num_kept:
        raise DataError(f"No row is left to train on: {report}")
    report.refuse_nothing_aligned()
    logger.info(f"Prepared dataset: {report}")
    return number_equal_rows(prepared), report


def number_equal_rows(dataset: Dataset) -> Dataset:
    """Gives repeated rows keys of their own, in the order of the dataset; see [`nth_key`].

    Args:
        dataset (`Dataset`): prepared rows, each with the key of its content.
    """
    columns, features = dataset.column_names, dataset.features
    found = Counter()
    keys = [next_key(key, found) for key in dataset[CARRIER][:]]
    if len(found) == len(keys):
        return dataset
    rest = dataset.remove_columns(CARRIER)
    return rest.add_column(CARRIER, keys, feature=features[CARRIER]).select_columns(columns)


def next_key(key: int, found: Counter) -> int:
    """The key of the next row with this content, which is counted.

    Args:
        key (`int`): of the content, see [`row_key`].
        found (`Counter`): how often each key has occurred so far.
    """
    found[key] += 1
    return nth_key(key, found[key] - 1)


def prepare_table(
    dataset: Dataset, preparation: RowPreparation, num_proc: int | None = None, scratch: Path | None = None
) -> tuple[Dataset, PreparationReport]:
    """Does the same as [`prepare_dataset`] for a table that may end up empty.

    Args:
        dataset (`Dataset`), preparation ([`RowPreparation`]), num_proc (`int`, *optional*): as there.
        scratch (`Path`, *optional*): an empty folder to write the rows to, instead of the datasets library's cache.
    """
    caching = (
        {} if scratch is None else {"cache_file_name": str(scratch / "rows.arrow"), "load_from_cache_file": False}
    )
    prepared = dataset.map(
        preparation.prepare_batch,
        batched=True,
        batch_size=100,
        remove_columns=removed_columns(dataset),
        features=_features(PreparationRecord.of(preparation)),
        num_proc=num_proc,
        desc="Preparing rows",
        **caching,
    )
    written = AnswerRecord.read(dataset)
    report, kept = PreparationReport(answers=written.of_split(str(dataset.split)) if written else {}), []
    for batch in prepared.select_columns([STATUS, COVERAGE]).iter(1000):
        indices, part = report_of(batch[STATUS], batch[COVERAGE])
        kept += [report.num_rows + index for index in indices]
        report.add(part)
    return prepared.select(kept).remove_columns([STATUS, COVERAGE]), report


def report_of(statuses: list[str], coverages: list[list[int]]) -> tuple[list[int], PreparationReport]:
    """Reports on some rows.

    Args:
        statuses (`list[str]`), coverages (`list[list[int]]`): the columns `STATUS` and `COVERAGE` of prepared rows.

    Returns:
        the indices of the rows that can be trained on, and the report.
    """
    kept = [index for index, status in enumerate(statuses) if status in ("kept", "truncated")]
    dropped = Counter(status for status in statuses if status not in ("kept", "truncated"))
    counts = np.sum(coverages, axis=0, dtype=np.int64).tolist()  # dropped rows contribute 0
    return kept, PreparationReport(
        num_rows=len(statuses),
        num_kept=len(kept),
        num_truncated=statuses.count("truncated"),
        dropped=dict(dropped),
        **dict(zip(COVERAGE_COUNTS, counts, strict=True)),
    )


def is_prepared(dataset) -> bool:
    """Whether a dataset already has the token columns."""
    return dataset.column_names is not None and set(COLUMNS) <= set(dataset.column_names)


def removed_columns(dataset) -> list[str]:
    """Lists the columns of a `dataset` that preparation does not keep.

    Raises:
        ValueError: if it has no column that preparation can read.
    """
    names = dataset.column_names
    unread = [] if names is None else [name for name in unread_columns(names) if name not in COLUMNS]
    if unread:
        logger.warning_once(f"Columns that are not used, since no text depends on them: {', '.join(unread)}.")
    return [name for name in names or [] if name not in COLUMNS]


def _features(record: PreparationRecord) -> Features:
    """Types of the prepared columns, given because they cannot be inferred from a batch of empty lists."""
    return Features(
        {
            **dict.fromkeys(COLUMNS, List(Value("int32"))),
            CARRIER: record.feature(),
            STATUS: Value("string"),
            COVERAGE: List(Value("int64")),
        }
    )


def _keep_and_log(report: PreparationReport, status: str, coverage: list[int]) -> bool:
    """The filter of a streaming dataset; it counts what it drops."""
    _, part = report_of([status], [coverage])
    take_in(report, part)
    return part.num_kept == 1


def take_in(report: PreparationReport, part: PreparationReport) -> None:
    """Adds further rows of a stream to a report, and logs each reason for dropping at its 1st, 10th, 100th, … row.

    Args:
        report ([`PreparationReport`]): of the stream so far, updated.
        part ([`PreparationReport`]): of the further rows.

    Raises:
        DataError: if no answer of the first hundred rows is aligned with the teacher.
    """
    before, num_kept = report.dropped, report.num_kept
    report.add(part)
    for reason, count in report.dropped.items():
        if len(str(count)) > len(str(before.get(reason, ""))):
            logger.warning(f"Streaming: {count:,} row(s) dropped so far: {reason}")
    if num_kept < FIRST_ROWS <= report.num_kept:
        report.refuse_nothing_aligned()
