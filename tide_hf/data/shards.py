"""Preparing datasets in parts, so that an interrupted run can continue and a stream need not fit into memory.

Until the end everything is in a folder beside the output, `<output_dir>.parts`; the output then appears whole, by one
rename.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, IterableDataset, Json, concatenate_datasets, load_from_disk
from datasets.utils.tqdm import tqdm

from .dataset import is_prepared, number_equal_rows, prepare_table
from .formats import RAW_COLUMNS, to_json
from .preparation import RowPreparation
from .record import PreparationRecord
from .report import DataError, PreparationReport

PLAN_FILE, REPORT_FILE = "preparation.json", "report.json"


def write_prepared(
    splits: Mapping[str, Dataset | IterableDataset],
    preparation: RowPreparation,
    output_dir: str | Path,
    source: dict | None = None,
    num_proc: int | None = None,
    rows_per_part: int = 10_000,
) -> DatasetDict:
    """Prepares all splits and saves them, with their record and reports, for `load_from_disk`.

    Called again with the same arguments after an interruption, it keeps the finished parts and ends with the same
    dataset; called again after the end, it loads the result. For a moment two copies of the rows are on disk.

    Args:
        splits (`Mapping[str, Dataset]`): raw rows of each split; a stream must yield the same rows in the same order
            each time, and its finished parts are read but not prepared again.
        preparation ([`RowPreparation`]): what to do with each row.
        output_dir (`str`): a folder that does not exist, is empty, or is the result of the same call.
        source (`dict`, *optional*): describes the rows; parts are continued only if it is the same. JSON values.
        num_proc (`int`, *optional*): processes, as in `Dataset.map`.
        rows_per_part (`int`): raw rows per part, at least 1: the most that an interruption loses and that a stream
            holds in memory.

    Returns:
        `DatasetDict`: as [`prepare_dataset`] returns it. It carries a [`PreparationRecord`] with the reports of all
        splits, which are also in its `preparation.json`.

    Raises:
        ValueError: if the folder or its parts hold something else, with what differs, or a split is prepared already.
        DataError: for a split without any row left.
    """
    if rows_per_part < 1:
        raise ValueError(f"rows_per_part={rows_per_part} must be at least 1.")
    output, work = Path(output_dir), Path(f"{str(output_dir).rstrip('/')}.parts")
    settings = PreparationRecord.of(preparation).settings
    plan = json.loads(json.dumps({"settings": settings, "source": source, "splits": list(splits)}))
    if output.exists() and any(output.iterdir()):
        _require_same_plan(output, plan)
        shutil.rmtree(work, ignore_errors=True)
        return load_from_disk(output)
    _open_work(work, {**plan, "rows_per_part": rows_per_part})
    parts, reports = {}, {}
    for name, rows in splits.items():
        found = list(_parts(rows, name, preparation, work, num_proc, rows_per_part))
        parts[name], reports[name] = _checked(name, found)
    record = PreparationRecord(settings, reports)
    whole = DatasetDict({name: _joined(parts[name], name, record) for name in parts})
    staging = work / "whole"
    shutil.rmtree(staging, ignore_errors=True)
    whole.save_to_disk(staging)
    plan["reports"] = {name: asdict(report) for name, report in reports.items()}
    _write_json(staging / PLAN_FILE, plan)
    os.replace(staging, output)
    shutil.rmtree(work)
    return load_from_disk(output)


def _checked(name: str, found: list[tuple[Path | None, PreparationReport]]) -> tuple[list[Path], PreparationReport]:
    """Folders and report of a whole split, refused if it cannot be trained on."""
    report = PreparationReport.total(part for _, part in found)
    folders = [folder for folder, _ in found if folder is not None]
    if not folders:
        raise DataError(f"No row of the split {name!r} is left to train on: {report}")
    report.refuse_nothing_aligned()
    return folders, report


def _require_same_plan(folder: Path, plan: dict) -> None:
    """Refuses a folder that was begun for other rows, tokenizers or settings."""
    path = folder / PLAN_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds something other than prepared rows: choose a new or empty folder.")
    earlier = _read_json(path)
    before, now = PreparationRecord(earlier["settings"]), PreparationRecord(plan["settings"])
    # both ways, since only one of them notices a missing teacher
    different = before.differences(now) or now.differences(before)
    different += [
        f"{name}: prepared with {earlier[name]}, this run has {value}"
        for name, value in plan.items()
        if name != "settings" and earlier[name] != value
    ]
    if different:
        raise ValueError(
            f"{folder} was prepared for something else. {'; '.join(different)}. Give the same again to go on with it, "
            "choose another output folder, or remove this one."
        )


def _open_work(work: Path, plan: dict) -> None:
    """Begins a folder of parts, or checks that an existing one was begun for the same."""
    if work.exists():
        _require_same_plan(work, plan)
        return
    begun = work.with_name(f"{work.name}.new")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    _write_json(begun / PLAN_FILE, plan)
    os.replace(begun, work)


def _parts(
    rows: Dataset | IterableDataset,
    name: str,
    preparation: RowPreparation,
    work: Path,
    num_proc: int | None,
    rows_per_part: int,
) -> Iterator[tuple[Path | None, PreparationReport]]:
    """Folder (None if no row is left) and report of each part of a split, those of earlier runs first."""
    if is_prepared(rows):
        raise ValueError(f"The split {name!r} is prepared already: give raw rows of messages, completion or text.")
    folders = (work / f"{name}-{index:05d}" for index in count())
    done = 0
    total = len(rows) if isinstance(rows, Dataset) else None
    with tqdm(total=total, unit=" rows", desc=f"Preparing {name}") as bar:
        folder = next(folders)
        while (folder / REPORT_FILE).is_file():
            yield _read_part(folder)
            done += rows_per_part
            folder = next(folders)
        bar.update(min(done, total) if total is not None else done)
        for raw in _raw_parts(rows, done, rows_per_part):
            _write_part(folder, raw, preparation, num_proc)
            yield _read_part(folder)
            done += rows_per_part
            folder = next(folders)
            bar.update(len(raw))


def _raw_parts(rows: Dataset | IterableDataset, first: int, size: int) -> Iterator[Dataset]:
    """Tables of `size` raw rows each, beginning with row `first`."""
    if isinstance(rows, Dataset):
        for start in range(first, len(rows), size):
            yield rows.select(range(start, min(start + size, len(rows))))
        return
    rest = iter(rows.skip(first) if first else rows)
    while batch := list(islice(rest, size)):
        names = [name for name in RAW_COLUMNS if any(name in row for row in batch)]
        # without any known column the first row's columns go into the error message
        columns = {name: [to_json(row.get(name)) for row in batch] for name in names or batch[0]}
        # as JSON, since rows of several formats may have values of different types
        yield Dataset.from_dict(columns, features=Features({name: Json() for name in columns}) if names else None)


def _write_part(folder: Path, raw: Dataset, preparation: RowPreparation, num_proc: int | None) -> None:
    """Prepares one table; the folder gets its final name once all of it is written."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    scratch = unfinished / "scratch"
    scratch.mkdir(parents=True)
    prepared, report = prepare_table(raw, preparation, num_proc, scratch)
    if len(prepared):
        prepared.save_to_disk(unfinished / "rows")
    shutil.rmtree(scratch)
    _write_json(unfinished / REPORT_FILE, asdict(report))
    os.replace(unfinished, folder)


def _read_part(folder: Path) -> tuple[Path | None, PreparationReport]:
    rows = folder / "rows"
    return rows if rows.is_dir() else None, PreparationReport(**_read_json(folder / REPORT_FILE))


def _joined(parts: list[Path], name: str, record: PreparationRecord) -> Dataset:
    """The parts of a split as one table, still on disk, with the final record."""
    whole = record.attach(number_equal_rows(concatenate_datasets([load_from_disk(part) for part in parts])))
    return Dataset(whole.data, info=whole.info, split=name)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
