"""Checks of what a trainer is given, before anything is loaded or prepared: models, tokenizers, rows."""

from os import PathLike

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..losses import Divergence

logger = logging.get_logger(__name__)


def require_rows(name: str, dataset) -> None:
    """Refuses anything but a table or stream of the datasets library.

    Args:
        name (`str`): the argument's name, for the message.
        dataset: what was given; None passes.

    Raises:
        ValueError: naming what was given, and how to make a dataset of it.
    """
    if dataset is None or isinstance(dataset, Dataset | IterableDataset):
        return
    hint = "make one with datasets.Dataset.from_list or Dataset.from_generator"
    if isinstance(dataset, dict):
        hint = f"give one of its parts: {', '.join(map(repr, dataset))}"
    elif callable(dataset):
        hint = "positional arguments are in another order than those of transformers.Trainer, so name them"
    raise ValueError(
        f"{name} has the type {type(dataset).__name__}; expected a datasets.Dataset or "
        f"datasets.IterableDataset: {hint}."
    )


def require_tokenizer(name: str, tokenizer) -> None:
    """Refuses anything but a tokenizer.

    Args:
        name (`str`): the argument's name, for the message.
        tokenizer: what was given; None passes.

    Raises:
        ValueError: naming what was given.
    """
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"{name} has the type {type(tokenizer).__name__}; expected a tokenizer, as "
            "AutoTokenizer.from_pretrained returns it."
        )


def require_vocabulary(who: str, tokenizer, config, unused: int | None = None) -> None:
    """Refuses a tokenizer with ids that a network has no embedding for.

    Special tokens that the tokenizer never writes by itself only occur in texts that spell them out, and some
    tokenizer classes add theirs to any vocabulary: a warning names them, and a row that does contain one is refused
    when it is read.

    Args:
        who (`str`): `"student"` or `"teacher"`, for the message.
        tokenizer (`PreTrainedTokenizerBase`): encodes the rows.
        config (`PreTrainedConfig`): of the network.
        unused (`int`, *optional*): id of a token that the network is never given, and may have no embedding for.

    Raises:
        ValueError: naming the token, its id and the vocabulary.
    """
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= config.vocab_size}
    beyond.pop(unused, None)
    if not beyond:
        return
    written = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id}
    index = max(beyond)
    what = (
        f"The {who}'s tokenizer has the token {beyond[index]!r} with id {index}, and its embedding has "
        f"{config.vocab_size} rows, ids 0 to {config.vocab_size - 1}"
    )
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if written & beyond.keys() or beyond.keys() - special:
        raise ValueError(
            f"{what}: make room for it with model.resize_token_embeddings(len(tokenizer)), or give the tokenizer that "
            "belongs to the model."
        )
    logger.warning_once(f"{what}. Rows that contain it will be refused.")


def require_divergence(objective) -> None:
    """Refuses an `objective` that is not a divergence; None passes.

    Raises:
        ValueError: with how to write one.
    """
    if objective is not None and not isinstance(objective, Divergence):
        raise ValueError(
            f"objective={objective!r} is not a tide_hf.losses.Divergence: give an instance of a subclass that "
            "defines values(log_student, log_target). One of the library's is chosen by name, with divergence=…."
        )


def refuse_data_parallel(args) -> None:
    """Refuses several GPUs in one process.

    Args:
        args (`TrainingArguments`): of the run.

    Raises:
        ValueError: with what to do instead.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would run DataParallel, which the trainers of diffusion LMs do not "
            "support: start the script with `accelerate launch`, or choose one GPU with CUDA_VISIBLE_DEVICES."
        )


def refuse_own_teacher(model, teacher, adapts: bool) -> None:
    """Refuses anything but a model as teacher, and a teacher whose parameters are trained with the student.

    Args:
        model (`str` or `PreTrainedModel`), teacher (*optional*): as the trainer was given them.
        adapts (`bool`): whether the student gets an adapter, which leaves its own parameters frozen.

    Raises:
        ValueError: with what to do.
    """
    if teacher is None or isinstance(teacher, str):
        return
    if not isinstance(teacher, PreTrainedModel | PeftModel):
        raise ValueError(
            f"teacher has the type {type(teacher).__name__}; expected a name, a folder, or a model as from_pretrained "
            "returns it."
        )
    if isinstance(model, str | PathLike):
        return
    own = {value.data_ptr() for value in model.parameters() if value.requires_grad and not adapts}
    shared = teacher is model or any(value.data_ptr() in own for value in teacher.parameters() if value.numel())
    if shared:
        raise ValueError(
            "Teacher and student share parameters, so the teacher would change with the student: load the teacher a "
            "second time, or give its name."
        )


def refuse_loading_arguments(args) -> None:
    """Refuses arguments for loading a teacher that is given as an instance.

    Args:
        args ([`TIDEConfig`]): of the run.

    Raises:
        ValueError: naming them.
    """
    given = {
        "teacher_dtype": args.teacher_dtype != "auto",
        "teacher_load_in_4bit": args.teacher_load_in_4bit,
        "teacher_model_init_kwargs": args.teacher_model_init_kwargs is not None,
    }
    names = [name for name, is_given in given.items() if is_given]
    if names:
        raise ValueError(
            f"{', '.join(names)}: only used to load a teacher by name, but the teacher is given as an instance. "
            "Load it that way yourself, or give its name."
        )


def check_block_size(block_size: int, max_length: int) -> None:
    """Refuses blocks of `block_size` tokens that do not fill a row of `max_length`.

    Raises:
        ValueError: with what to do.
    """
    if block_size < 1 or max_length % block_size:
        raise ValueError(
            f"block_size={block_size} does not fit max_length={max_length}: the last block of a full row would be cut "
            "short. Choose a multiple of the block size as max_length, or set block_size."
        )
