"""A whole dataset prepared once."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers.utils import logging

from .formats import unread_columns
from .preparation import COLUMNS, COVERAGE, COVERAGE_COUNTS, STATUS, RowPreparation
from .record import CARRIER, PreparationRecord
from .report import PreparationReport

logger = logging.get_logger(__name__)
FIRST_ROWS = 100  # of a stream, by which a teacher must have seen an answer


def prepare_dataset(
    dataset: Dataset | IterableDataset, preparation: RowPreparation, num_proc: int | None = None
) -> tuple[Dataset | IterableDataset, PreparationReport | None]:
    """Prepares every row of a dataset once.

    Args:
        dataset (`Dataset` or `IterableDataset`): rows in any format of [`~tide_hf.data.formats`].
        preparation ([`RowPreparation`]): what to do with each row.
        num_proc (`int`, *optional*): processes, as in `Dataset.map`.

    Returns:
        the prepared dataset with the columns of [`COLUMNS`], which carries its [`PreparationRecord`], and the report;
        None for a streaming dataset, whose dropped rows are logged as they are met.

    Raises:
        ValueError: if no column can train, or no row is left, with the counts.
    """
    if isinstance(dataset, IterableDataset):
        removed = _removed_columns(dataset)
        features = None if dataset.column_names is None else _features(PreparationRecord.of(preparation))
        prepared = dataset.map(preparation, with_indices=True, remove_columns=removed, features=features)
        return prepared.filter(partial(_keep_and_log, Counter()), input_columns=[STATUS, COVERAGE]).remove_columns(
            [STATUS, COVERAGE]
        ), None
    prepared, report = prepare_table(dataset, preparation, num_proc)
    if not report.num_kept:
        raise ValueError(f"No row is left to train on: {report}")
    report.refuse_nothing_aligned()
    logger.info(f"Prepared dataset: {report}")
    return prepared, report


def prepare_table(
    dataset: Dataset, preparation: RowPreparation, num_proc: int | None = None, scratch: Path | None = None
) -> tuple[Dataset, PreparationReport]:
    """[`prepare_dataset`] of a table, which may end up empty.

    Args:
        scratch (`Path`, *optional*): an empty folder for the rows, in place of the datasets library's cache.
    """
    caching = (
        {} if scratch is None else {"cache_file_name": str(scratch / "rows.arrow"), "load_from_cache_file": False}
    )
    prepared = dataset.map(
        preparation.prepare_batch,
        batched=True,
        batch_size=100,
        with_indices=True,
        remove_columns=_removed_columns(dataset),
        features=_features(PreparationRecord.of(preparation)),
        num_proc=num_proc,
        desc="Preparing rows",
        **caching,
    )
    status_of_rows = prepared[STATUS][:]
    statuses = Counter(status_of_rows)
    kept = [index for index, status in enumerate(status_of_rows) if status in ("kept", "truncated")]
    report = PreparationReport(
        num_rows=len(prepared),
        num_kept=len(kept),
        num_truncated=statuses["truncated"],
        dropped={status: count for status, count in statuses.items() if status not in ("kept", "truncated")},
    )
    prepared = prepared.select(kept)
    for batch in prepared.select_columns([COVERAGE]).iter(1000):
        for name, count in zip(COVERAGE_COUNTS, np.sum(batch[COVERAGE], axis=0), strict=True):
            setattr(report, name, getattr(report, name) + int(count))
    return prepared.remove_columns([STATUS, COVERAGE]), report


def is_prepared(dataset) -> bool:
    """Whether a dataset already has the token columns."""
    return dataset.column_names is not None and set(COLUMNS) <= set(dataset.column_names)


def _removed_columns(dataset) -> list[str]:
    """The columns that preparation does not keep; refuses a dataset without any that it can read."""
    names = dataset.column_names
    unread = [] if names is None else [name for name in unread_columns(names) if name not in COLUMNS]
    if unread:
        logger.warning_once(f"Columns that are not read, for no text depends on them: {', '.join(unread)}.")
    return [name for name in names or [] if name not in COLUMNS]


def _features(record: PreparationRecord) -> Features:
    """Types of the prepared columns, said rather than guessed: a batch of empty lists has no type of its own."""
    return Features(
        {
            **dict.fromkeys(COLUMNS, List(Value("int32"))),
            CARRIER: record.feature(),
            STATUS: Value("string"),
            COVERAGE: List(Value("int64")),
        }
    )


def _keep_and_log(seen: Counter, status: str, coverage: list[int]) -> bool:
    """Filter of a streaming dataset; logs each reason at its 1st, 10th, 100th, … row.

    Raises:
        ValueError: if a teacher sees no answer of the first hundred rows.
    """
    seen[status] += 1
    count = seen[status]
    if status in ("kept", "truncated"):
        if seen["kept"] + seen["truncated"] <= FIRST_ROWS:
            counts = dict(zip(COVERAGE_COUNTS, coverage, strict=True))
            seen.update({name: counts[name] for name in ("num_teacher_tokens", "num_aligned_tokens")})
        if seen["kept"] + seen["truncated"] == FIRST_ROWS:
            names = ("num_teacher_tokens", "num_aligned_tokens")
            PreparationReport(FIRST_ROWS, FIRST_ROWS, **{name: seen[name] for name in names}).refuse_nothing_aligned()
        return True
    if str(count).strip("0") == "1":
        logger.warning(f"Streaming: {count:,} row(s) dropped so far: {status}")
    return False
