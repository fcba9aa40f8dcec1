"""Streams: rows that are read as they are needed, and train like a table of the same rows in the same order.

Every process reads the whole stream, prepares every n-th portion of it, and sends the result to the others. So all of
them know the order of the rows, whatever the number of shards, workers and processes, and each takes its share of
every optimizer step.
"""

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, count, islice
from typing import ClassVar

import torch
from datasets import IterableDataset
from transformers.utils import logging

from .collator import DistillationCollator
from .dataset import next_key, removed_columns, report_of, take_in
from .preparation import COLUMNS, COVERAGE, STATUS, RowPreparation
from .report import DataError, PreparationReport
from .teacher_cache import CACHE_COLUMNS

logger = logging.get_logger(__name__)
PREFETCH = 2  # portions per worker that are prepared ahead by default, as in torch's DataLoader


class RowStream(torch.utils.data.IterableDataset):
    """A streaming dataset whose rows are prepared as they are read; trainers keep streams in this form.

    Args:
        dataset (`IterableDataset`): raw rows, or prepared ones.
        preparation ([`RowPreparation`], *optional*): what to do with raw rows; None if they are prepared already.

    Attributes:
        report ([`PreparationReport`]): what became of the rows that were read so far in the first pass.

    Raises:
        ValueError: for a stream that is split over processes already, or has no column to train on.
    """

    column_names: ClassVar[list[str]] = list(COLUMNS)

    def __init__(self, dataset: IterableDataset, preparation: RowPreparation | None = None):
        if getattr(dataset, "_distributed", None) is not None:
            raise ValueError(
                "The streaming dataset is split over processes already (split_dataset_by_node), and the trainer "
                "splits it itself: give it the whole stream."
            )
        if preparation is not None:
            removed_columns(dataset)
        self.dataset, self.preparation = dataset, preparation
        self.report, self._is_counted = PreparationReport(), False

    @property
    def features(self):
        """Features of the rows as they are read; None if they are not known in advance."""
        return self.dataset.features

    def set_epoch(self, epoch: int) -> None:
        """Sets the pass, `epoch`, from which a shuffled stream draws its order; other streams keep theirs."""
        if _has_random_order(self.dataset):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        for row in self.dataset:
            yield from prepare_rows(self.preparation, [row])[0]

    def begin_pass(self) -> None:
        """Starts counting again, unless a whole pass has been counted."""
        if not self._is_counted:
            vars(self.report).update(vars(PreparationReport()))

    def take_in(self, part: PreparationReport) -> None:
        """Counts `part`, the report of a portion; see [`~tide_hf.data.dataset.take_in`]."""
        if self.preparation is not None and not self._is_counted:
            take_in(self.report, part)

    def end_pass(self) -> None:
        """Stops counting.

        Raises:
            DataError: if no row is left, or no answer is aligned with the teacher; with the counts.
        """
        if self.preparation is not None and not self._is_counted:
            logger.info(f"Prepared while streaming: {self.report}")
            if not self.report.num_kept:
                raise DataError(f"No row of the stream is left to train on: {self.report}")
            self.report.refuse_nothing_aligned()
        self._is_counted = True


class StreamLoader:
    """Batches of one process, in whole windows: what all processes together put into one optimizer step.

    A window is the next `num_processes × num_batches × batch_size` prepared rows, in the order of the stream. The last
    window of a pass may be short: processes and batches without a row get one without weight, so that all processes
    make the same number of batches and every pass ends with an optimizer step.

    Args:
        stream ([`RowStream`]): read from its beginning in each pass.
        collator ([`DistillationCollator`]): makes a batch of rows.
        batch_size (`int`): rows per batch.
        num_batches (`int`): batches per window, the steps of gradient accumulation.
        num_processes, process_index (`int`): how many processes share the stream, and which one this is.
        gather (`Callable`): takes a list on each process and returns all of them concatenated in process order.
        drop_last (`bool`): leave out rows at the end of a pass that do not fill a batch on every process.
        num_workers (`int`): processes that prepare rows ahead; 0 prepares in this one.
        prefetch_factor (`int`, *optional*): portions per worker that are prepared ahead; 2 by default.
        start_method (`str`, *optional*): how workers are started, as in `multiprocessing`.
        persistent_workers (`bool`): keep the workers between passes.

    Attributes:
        epoch (`int`), window (`int`): current pass, and number of its windows handed out so far.
    """

    def __init__(
        self,
        stream: RowStream,
        collator: DistillationCollator,
        batch_size: int,
        num_batches: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        gather: Callable[[list], list] = list,
        drop_last: bool = False,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        start_method: str | None = None,
        persistent_workers: bool = False,
    ):
        self.dataset, self.collator, self.batch_size, self.num_batches = stream, collator, batch_size, num_batches
        self.num_processes, self.process_index, self.gather = num_processes, process_index, gather
        self.drop_last, self.num_workers = drop_last, num_workers
        self.prefetch_factor, self.start_method = prefetch_factor or PREFETCH, start_method
        self.persistent_workers, self._pool = persistent_workers, None
        self.epoch = self.window = 0
        self._found = None  # where `seek` stopped reading: pass, windows before, and those still to come

    def set_epoch(self, epoch: int) -> None:
        """Sets which pass, `epoch`, the next iteration is."""
        self.epoch = epoch

    def seek(self, num_windows: int) -> tuple[int, int]:
        """Moves to where a run is after some windows; the next iteration begins there.

        The rows before are read again. All passes are taken to be as long as the first, whatever their order.

        Args:
            num_windows (`int`): counted from the beginning of the first pass.

        Returns:
            the pass, and the number of its windows that are done.
        """
        windows = self._windows(0)
        skipped = sum(1 for _ in islice(windows, num_windows))
        following = next(windows, None) if skipped == num_windows else None
        if following is not None:
            self.epoch, done, rest = 0, num_windows, chain([following], windows)
        else:
            self.epoch, done = divmod(num_windows, max(skipped, 1))
            rest = islice(self._windows(self.epoch), done, None)
        self._found = (self.epoch, done, rest)
        return self.epoch, done

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        found, self._found = self._found, None
        if found is not None and found[0] == self.epoch:
            _, self.window, windows = found
        else:
            self.window, windows = 0, self._windows(self.epoch)
        for rows in windows:
            self.window += 1
            for index in range(self.num_batches):
                start = (index * self.num_processes + self.process_index) * self.batch_size
                batch = rows[start : start + self.batch_size]
                # batches are gathered, so they need the same number of rows on all processes
                missing = self.batch_size - len(batch) if self.num_processes > 1 else not batch
                yield self.collator(batch + [self.collator.empty_row()] * missing)

    def _windows(self, epoch: int) -> Iterator[list[dict]]:
        """Rows of all processes, one window at a time."""
        step = self.num_processes * self.batch_size
        size = step * self.num_batches
        self.dataset.set_epoch(epoch)
        self.dataset.begin_pass()
        portions, rows, ended = self._portions(self.num_batches * self.batch_size), [], False
        found = Counter()  # of keys; some hundred bytes per distinct row of a pass
        while True:
            while len(rows) < size and not ended:
                for part in self.gather([_next_or_error(portions)]):
                    if isinstance(part, Exception):
                        raise part  # on all processes, so that none waits for the others forever
                    ended |= part is None
                    if part is not None:
                        rows += [{**row, "row_key": next_key(row["row_key"], found)} for row in part[0]]
                        self.dataset.take_in(part[1])
            if ended and not rows:
                break
            window, rows = rows[:size], rows[size:]
            if self.drop_last:
                window = window[: len(window) // step * step]
            if window:
                yield window
        self.dataset.end_pass()

    def _portions(self, size: int) -> Iterator[tuple[list[dict], PreparationReport]]:
        """Every n-th portion of the stream, which this process prepares: its rows that are kept, and the report."""
        preparation = self.dataset.preparation
        raw = self._raw_portions(size)
        if preparation is None or not self.num_workers:
            yield from (prepare_rows(preparation, portion) for portion in raw)
            return
        if self._pool is None:
            context = multiprocessing.get_context(self.start_method)
            self._pool = ProcessPoolExecutor(self.num_workers, context, _hold_preparation, (preparation,))
        ahead = deque()
        try:
            for portion in raw:
                ahead.append(self._pool.submit(_prepare_in_worker, portion))
                if len(ahead) > self.num_workers * self.prefetch_factor:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for unread in ahead:  # the pass was left before its end
                unread.cancel()
            if not self.persistent_workers:
                self._pool.shutdown()
                self._pool = None

    def _raw_portions(self, size: int) -> Iterator[list[dict]]:
        rows = iter(self.dataset.dataset)
        for number in count():
            portion = list(islice(rows, size))
            if not portion:
                return
            if number % self.num_processes == self.process_index:
                yield portion


def prepare_rows(preparation: RowPreparation | None, rows: list[dict]) -> tuple[list[dict], PreparationReport]:
    """Prepares rows of a stream.

    Args:
        preparation ([`RowPreparation`], *optional*): what to do with them; None if they are prepared already.
        rows (`list[dict]`): of one portion.

    Returns:
        those that are kept, with the columns `COLUMNS` and a teacher's predictions, if they carry any; and the report
        on all.
    """
    if preparation is None:
        further = [name for name in CACHE_COLUMNS if rows and name in rows[0]]
        kept = [{name: row[name] for name in (*COLUMNS, *further)} for row in rows]
        return kept, PreparationReport(num_rows=len(rows), num_kept=len(rows))
    prepared = [preparation(row) for row in rows]
    kept, report = report_of([row[STATUS] for row in prepared], [row[COVERAGE] for row in prepared])
    return [{name: prepared[index][name] for name in COLUMNS} for index in kept], report


def _has_random_order(dataset: IterableDataset) -> bool:
    """Whether shuffling or random interleaving is among the steps of a stream.

    Asked because `set_epoch` of datasets 5 reorders the shards of any stream, shuffled or not.
    """
    steps = [dataset._ex_iterable]
    while steps:
        step = steps.pop()
        if getattr(step, "generator", None) is not None:
            return True
        steps += [*filter(None, [getattr(step, "ex_iterable", None)]), *getattr(step, "ex_iterables", [])]
    return False


def _next_or_error(portions: Iterator):
    """The next portion, None at the end, or the error, which is sent to all processes."""
    try:
        return next(portions, None)
    except Exception as error:
        return error


_held: list[RowPreparation] = []  # the preparation of a worker process


def _hold_preparation(preparation: RowPreparation) -> None:
    _held[:] = [preparation]


def _prepare_in_worker(rows: list[dict]) -> tuple[list[dict], PreparationReport]:
    return prepare_rows(_held[0], rows)
