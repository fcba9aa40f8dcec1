"""What every trainer of a diffusion LM does alike: load, configure, prepare rows, keep batches on the host, save.

The batch of a step is noised on the host, before any network runs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from .data import RowStream, StreamLoader, is_prepared, prepare_dataset, require_same_preparation, without_weight
from .hub import HubTrainerMixin
from .models.masked_diffusion import block_visibility
from .teachers import resolve_mask_token_id


class DiffusionTrainer(HubTrainerMixin, Trainer):
    """`transformers.Trainer` for diffusion LMs; subclasses set `_preparation` and say what a step is.

    Attributes:
        preparation_reports (`dict`): what became of the rows of each dataset.
    """

    loss_is_scaled_for_ga = True
    # what `config.objective` of a model may be
    OBJECTIVES = ("block", "full")
    _train_stream: StreamLoader | None = None  # what training reads, if that is a stream
    _pass = 0  # over the training rows

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_StreamEpoch(self))

    def _refuse_other_objectives(self, model) -> None:
        """Says which models this trainer does not know the noise of."""
        objective = getattr(model.config, "objective", None)
        if objective is None:
            raise ValueError(
                f"The student is a {type(model).__name__} (model_type={model.config.model_type!r}), which is no "
                "diffusion LM of this library. Load a tide_… or a2d-… checkpoint, or make one with "
                "convert_to_diffusion."
            )
        if objective not in self.OBJECTIVES:
            raise ValueError(
                f"{type(self).__name__} trains diffusion LMs with objective {' or '.join(self.OBJECTIVES)}, got "
                f"{objective!r}. Uniform-state models go with UniformIDLMTrainer or, without a teacher, with "
                "transformers.Trainer; masked ones with TIDETrainer and IDLMTrainer."
            )

    def _configure_student(self, model, args, tokenizer) -> None:
        """Writes what the run decides into the student's config, so that a checkpoint generates as it was trained."""
        self._refuse_other_objectives(model)
        config = model.config
        config.mask_token_id = resolve_mask_token_id(args.mask_token_id, config, tokenizer, "student")
        if args.block_size is not None:
            config.block_size = args.block_size
        elif config.objective == "block" and args.max_length % config.block_size:
            raise ValueError(
                f"The student's block_size={config.block_size} does not fit max_length={args.max_length}: choose a "
                "multiple of it as max_length, or set block_size."
            )
        config.noise_schedule = args.schedule
        settings = model.generation_config
        settings.mask_token_id = config.mask_token_id
        # a whole-sequence student decodes the whole answer at once, unless a block size is asked for
        settings.block_size = config.block_size if config.objective == "block" else None
        if settings.eos_token_id is None:
            settings.eos_token_id = tokenizer.eos_token_id
        if settings.pad_token_id is None:
            settings.pad_token_id = pad_token_id(tokenizer)

    def _prepare_datasets(self, train_dataset, eval_dataset, args) -> tuple:
        """Both prepared, and what became of their rows noted."""
        self.preparation_reports = {}
        train_dataset = self._prepare("train", train_dataset, args)
        if isinstance(eval_dataset, dict):
            return train_dataset, {name: self._prepare(name, rows, args) for name, rows in eval_dataset.items()}
        return train_dataset, self._prepare("eval", eval_dataset, args)

    def _prepare(self, name: str, dataset, args):
        """Token columns for a raw dataset; one prepared for this run's tokenizers and settings passes."""
        if dataset is None:
            return None
        if is_prepared(dataset):
            report = require_same_preparation(dataset, self._preparation, name)
            if report is not None:
                self.preparation_reports[name] = report
            return dataset
        if isinstance(dataset, IterableDataset):
            stream = RowStream(dataset, self._preparation)
            self.preparation_reports[name] = stream.report  # grows as the stream is read
            return stream
        with args.main_process_first(desc=f"preparing the {name} dataset"):
            dataset, self.preparation_reports[name] = prepare_dataset(
                dataset, self._preparation, num_proc=args.dataset_num_proc
            )
        return dataset

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
        """Where to go on: a stream is read up to there, since nobody knows how long its passes are."""
        epoch, num_batches = super()._init_training_state(*args, **kwargs)
        if self._train_stream is None or self.args.ignore_data_skip:
            return epoch, num_batches
        return self._train_stream.seek(self.state.global_step)[0], 0

    def _run_epoch(self, **kwargs):
        """Counts the pass: `state.epoch` lags behind it on streams and after an epoch that was cut short."""
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
        """The batch in which rows that accelerate repeated, to fill the last one of a table, weigh nothing."""
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

    def _save(self, output_dir=None, state_dict=None):
        """Beside an adapter also the generation settings of the run, which its base may not have."""
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel):
            self.model.generation_config.save_pretrained(output_dir or self.args.output_dir)


class _StreamEpoch(TrainerCallback):
    """Says how far a stream is as an uninterrupted run would: Trainer counts the steps since the last resume."""

    def __init__(self, trainer: DiffusionTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        stream = self.trainer._train_stream
        if stream is not None:
            state.epoch = stream.epoch + stream.window / state.max_steps


def refuse_data_parallel(args) -> None:
    """Refuses several GPUs in one process.

    Raises:
        ValueError: with what to do instead.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would run DataParallel, which the trainers of diffusion LMs do not "
            "support: start the script with `accelerate launch`, or choose one GPU with CUDA_VISIBLE_DEVICES."
        )


def load_student(
    model: str | PreTrainedModel, args, processing_class: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """Model, tokenizer and the revision that was asked for, from instances or names."""
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.name_or_path)
    if not isinstance(model, str):
        return model, processing_class, None
    kwargs = args.model_init_kwargs or {}
    return AutoModelForCausalLM.from_pretrained(model, **kwargs), processing_class, kwargs.get("revision")


def run_packed(network, inputs: Mapping[str, torch.Tensor], head_fn: Callable):
    """A (wrapped) student's forward on a packed layout, `head_fn` in place of its head.

    Args:
        network (`Callable`): a student of this library, wrapped by accelerate or not.
        inputs (`Mapping`): `input_ids`, `position_ids`, `stream` and `block` of a [`~tide_hf.diffusion.PackedLayout`].
        head_fn (`Callable`): `head_fn(hidden (B, P, H), lm_head_weight (V, H)) -> (loss, terms)`.
    """
    stream, block = inputs["stream"], inputs["block"]
    return network(
        input_ids=inputs["input_ids"],
        attention_mask=block_visibility(stream, block, stream, block),
        position_ids=inputs["position_ids"],
        use_cache=False,
        head_fn=head_fn,
    )


def pad_token_id(tokenizer) -> int:
    """The tokenizer's padding id, or its EOS id: padding is never attended, so any id serves."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
