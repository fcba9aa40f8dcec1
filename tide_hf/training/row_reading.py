"""From datasets to the batches of a step: rows prepared, read as tables or streams, each counted once in a pass.

Batches stay on the host, where they are noised. A row that is repeated to fill a batch, or stands in where a process
has none left, has no weight: all its labels are −100.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from transformers import TrainerCallback

from ..data import RowStream, StreamLoader, is_prepared, prepare_dataset, require_same_preparation, without_weight
from .checks import require_rows


class RowReadingMixin:
    """How a trainer of diffusion LMs reads its rows; comes before `transformers.Trainer` in the bases."""

    _train_stream: StreamLoader | None = None  # what training reads, if that is a stream
    _pass = 0  # over the training rows

    def _prepare_datasets(self, train_dataset, eval_dataset, args) -> tuple:
        """Prepares both, and records what became of their rows."""
        self.preparation_reports = {}
        train_dataset = self._prepare("train", train_dataset, args, self.preparation_reports)
        if not isinstance(eval_dataset, dict):
            return train_dataset, self._prepare("eval", eval_dataset, args, self.preparation_reports)
        prepared = {}
        for name, rows in eval_dataset.items():
            noted_as = f"eval_{name}" if name in self.preparation_reports else name
            prepared[name] = self._prepare(noted_as, rows, args, self.preparation_reports)
        return train_dataset, prepared

    def _prepare(self, name: str, dataset, args, reports: dict):
        """Token columns for a raw dataset; one prepared for this run's tokenizers and settings passes."""
        if dataset is None:
            return None
        if is_prepared(dataset):
            report = require_same_preparation(dataset, self.plan.preparation, name)
            if report is not None:
                reports[name] = report
            return dataset
        if isinstance(dataset, IterableDataset):
            stream = RowStream(dataset, self.plan.preparation)
            reports[name] = stream.report  # grows as the stream is read
            return stream
        with args.main_process_first(desc=f"preparing the {name} dataset"):
            dataset, reports[name] = prepare_dataset(dataset, self.plan.preparation, num_proc=args.dataset_num_proc)
        return dataset

    def _prepare_given(self, name: str, rows):
        """Rows given to a method, prepared; an eval_dataset of the constructor, or its name, as it is."""
        if isinstance(rows, RowStream):
            return rows
        if isinstance(rows, str):
            known = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            if rows not in known:
                raise ValueError(
                    f"There is no eval_dataset named {rows!r}; the constructor was given {', '.join(known) or 'none'} "
                    "by name. Give the rows themselves."
                )
            return rows
        if rows is None:
            raise ValueError(f"There are no rows to evaluate under the name {name!r}: got None.")
        require_rows(f"The dataset {name!r}", rows)
        return self._prepare(name, rows, self.args, {})

    def get_eval_dataloader(self, eval_dataset=None):
        """As [`~transformers.Trainer.get_eval_dataloader`], which with persistent workers would go on reading the rows
        it was given first."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        kept = getattr(self, "_eval_dataloaders", {}).pop("eval", None)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)
            if kept is not None:
                self._eval_dataloaders["eval"] = kept

    # -- loaders ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _host_batches(self, is_training: bool):
        """Data loaders made inside leave batches on the host, where the noise is drawn; no held-out row is dropped."""
        placement, self.accelerator.device_placement = self.accelerator.device_placement, False
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            yield
        finally:
            self.accelerator.device_placement, self.args.dataloader_drop_last = placement, drop_last

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        """A table's loader is accelerate's; a stream is read by the library's own."""
        if isinstance(dataset, IterableDataset):
            dataset = RowStream(dataset)
        loader = None
        if isinstance(dataset, RowStream):
            loader = self._stream_loader(dataset, batch_size, is_training)
        if is_training:
            self._train_stream = loader
        if loader is not None:
            return loader
        with self._host_batches(is_training):
            return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)

    def _stream_loader(self, stream: RowStream, batch_size: int, is_training: bool) -> StreamLoader:
        args, num_processes = self.args, self.accelerator.num_processes
        if not args.dataloader_in_order:
            raise ValueError(
                "dataloader_in_order=False would hand out the rows of a stream as its workers finish, and a resumed "
                "run could not find its place: leave it True for a streaming dataset."
            )
        return StreamLoader(
            stream,
            self.data_collator,
            batch_size,
            num_batches=args.gradient_accumulation_steps if is_training else 1,
            num_processes=num_processes,
            process_index=self.accelerator.process_index,
            gather=gather_object if num_processes > 1 else list,
            drop_last=args.dataloader_drop_last and is_training,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            start_method=args.dataloader_multiprocessing_context,
            persistent_workers=args.dataloader_persistent_workers and is_training,
        )

    # -- which rows a step sees ---------------------------------------------------------------------------------------

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        """Where to resume: a stream is read up to that point, since the length of its passes is unknown."""
        epoch, num_batches = super()._init_training_state(*args, **kwargs)
        if self._train_stream is None or self.args.ignore_data_skip:
            return epoch, num_batches
        return self._train_stream.seek(self.state.global_step)[0], 0

    def _run_epoch(self, **kwargs):
        """Notes the pass: `state.epoch` lags behind it on streams and after an epoch that was cut short."""
        self._pass = kwargs["epoch"]
        return super()._run_epoch(**kwargs)

    def _next_batches(self, iterator: Iterator, num_batches: int) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of an optimizer step; none at the end of a pass."""
        if self._train_stream is not None:
            return list(islice(iterator, num_batches))
        batches = islice(iterator, num_batches)
        if self.args.dataloader_drop_last or self.args.train_sampling_strategy == "batch_rebalance":
            return list(batches)  # nothing is repeated
        state, dataset = self.accelerator.gradient_state, self.train_dataset
        return [self._counted_once(batch, state.end_of_dataloader, dataset) for batch in batches]

    def _counted_once(self, batch: dict[str, torch.Tensor], is_last: bool, dataset) -> dict[str, torch.Tensor]:
        """The batch, without weight on rows that accelerate repeated to fill the last batch of a table."""
        num_rows, num_processes = len(batch["row_key"]), self.accelerator.num_processes
        num_new = len(dataset) % (num_rows * num_processes)
        if num_processes == 1 or not is_last or not num_new:
            return batch
        first = num_new - self.accelerator.process_index * num_rows
        return batch if first >= num_rows else without_weight(batch, max(first, 0))

    def _evaluation_batches(self, loader) -> Iterator[dict[str, torch.Tensor]]:
        """Batches in which every row of the dataset counts once."""
        for batch in loader:
            if not isinstance(loader, StreamLoader):
                batch = self._counted_once(batch, loader.end_of_dataloader, loader.dataset)
            yield batch


class StreamEpoch(TrainerCallback):
    """Sets `state.epoch` on streams to what an uninterrupted run has: Trainer counts from the last resume.

    Args:
        trainer ([`RowReadingMixin`]): whose stream is read.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        stream = self.trainer._train_stream
        if stream is not None:
            state.epoch = stream.epoch + stream.window / state.max_steps
