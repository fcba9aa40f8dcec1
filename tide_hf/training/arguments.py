"""Which arguments of transformers' Trainer the trainers of diffusion LMs use, and which they refuse.

Each field of `TrainingArguments` and each argument of `Trainer(...)`, `train`, `evaluate` and `predict` is in one of
the tables: used as transformers does, or refused when it is set, with the reason and what to do. A test compares them
with the installed transformers; a field that is in none of them is refused when it is set.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from enum import Enum

from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# -- TrainingArguments ------------------------------------------------------------------------------------------------

USED = _names("""
    output_dir per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps max_grad_norm
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon optim_target_modules bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps auto_find_batch_size logging_strategy
    logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
    eval_on_start eval_do_concat_batches eval_accumulation_steps batch_eval_metrics save_only_model save_strategy
    save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo
    hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model
    greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
    fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint local_rank
    """)
# used in part: `_check_parts` refuses the rest
IN_PART = frozenset({"accelerator_config", "include_for_metrics", "parallelism_config", "remove_unused_columns"})

_LIGER = "Liger's kernels replace the heads and losses of model types that it knows, and no diffusion LM is among them"
# field -> why it is not used; leave it at its default
UNUSED = {
    "average_tokens_across_devices": (
        "every term of the loss is divided by its count over the whole global batch, whatever this says"
    ),
    "eval_use_gather_object": "evaluation gathers tensors of equal shapes",
    "label_names": "the labels of prepared rows are in the column 'labels'",
    "length_column_name": "rows are grouped by the length of their prepared input_ids",
    "liger_kernel_config": _LIGER,
    "use_cache": "training runs every forward without a cache; model.config.use_cache stays the checkpoint's",
}
# field -> why it is refused, and what to do instead
REFUSED = {
    "label_smoothing_factor": (
        "it would replace the denoising loss with a loss on the rows' labels, which a bidirectional network can copy "
        "from its input. Leave it at 0; softer targets come from a teacher (divergence, temperature)"
    ),
    "neftune_noise_alpha": (
        "it scales its noise by the length of the input, which here is a packed line of several blocks and rows, and "
        "draws it separately on every process, so results would depend on the batch and the number of processes. "
        "Leave it out"
    ),
    "use_liger_kernel": f"{_LIGER}. Leave it out; the loss is already computed in slices of the vocabulary",
}
# accelerator_config: its fields that are used, and the values of others that are refused, with the reason
ACCELERATOR_CONFIG_USED = frozenset({"use_seedable_sampler", "gradient_accumulation_kwargs", "use_configured_state"})
ACCELERATOR_CONFIG_REFUSED = {
    "split_batches": (True, "set each process's share with per_device_train_batch_size instead"),
    "dispatch_batches": (True, "every process reads and noises its own rows, and nothing is broadcast"),
    "even_batches": (False, "processes with unequal numbers of batches would wait for each other forever"),
    "non_blocking": (True, "batches stay on the host, where noise is added, so it would have no effect"),
}

# -- fields that are read once, when the trainer is made --------------------------------------------------------------

AT_CONSTRUCTION = _names("""
    bf16 fp16 torch_compile torch_compile_backend torch_compile_mode full_determinism log_level log_level_replica
    disable_tqdm report_to push_to_hub enable_jit_checkpoint data_seed use_cpu tf32 accelerator_config
    parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout fsdp fsdp_config deepspeed skip_memory_metrics load_best_model_at_end
    """)
# read when the repository is created, which is at construction if push_to_hub is set
BY_THE_HUB = _names("hub_model_id hub_token hub_private_repo hub_revision hub_always_push")
# read when the optimizer is made, at the first call of train()
BY_THE_OPTIMIZER = _names(
    "learning_rate optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules"
)

# -- arguments of methods ---------------------------------------------------------------------------------------------

TRAINER_USED = _names("""
    model args train_dataset eval_dataset processing_class compute_metrics callbacks optimizers
    optimizer_cls_and_kwargs preprocess_logits_for_metrics
    """)
TRAINER_REFUSED = {
    "data_collator": "rows are prepared columns, which the trainer's own collator pads. Leave it out",
    "model_init": (
        "everything is decided from the model when the trainer is made. Give model=…, and make one trainer for each "
        "trial of a search"
    ),
    "compute_loss_func": "the objective is the loss: choose it with preset, divergence and the weights of the config",
}
METHODS_USED = frozenset({"resume_from_checkpoint", "eval_dataset", "test_dataset", "metric_key_prefix"})
METHODS_REFUSED = {
    "trial": "trials of hyperparameter_search need model_init, which is refused; set trainer.args instead",
    "ignore_keys": "outputs have no keys that could be gathered",
    "ignore_keys_for_eval": "outputs have no keys that could be gathered",
}


def check_training_arguments(args, refused: Mapping[str, str] = {}) -> None:
    """Refuses fields of `TrainingArguments` that would be accepted but not used.

    Args:
        args (`TrainingArguments`): of the run.
        refused (`Mapping[str, str]`): further fields that one trainer refuses, with the reason.

    Raises:
        ValueError: naming the field, its value, why it is refused, and what to do.
    """
    for field in _inherited(args):
        value = getattr(args, field.name)
        if field.name in IN_PART or _is_default(value, field):
            continue
        given = f"{field.name}={value!r}"
        reason = refused.get(field.name) or REFUSED.get(field.name)
        if reason is not None:
            raise ValueError(f"{given} is refused by the trainers of diffusion LMs: {reason}.")
        if field.name in UNUSED:
            raise ValueError(
                f"{given} is not used by the trainers of diffusion LMs: {UNUSED[field.name]}. Leave it at its default."
            )
        if field.name not in USED:
            raise ValueError(
                f"{given} is a training argument that this version of tide_hf does not know and might not honour. "
                "Leave it at its default."
            )
    _check_parts(args)


def _check_parts(args) -> None:
    """Refuses those parts of fields that are not used."""
    config = args.accelerator_config
    for name, (value, reason) in ACCELERATOR_CONFIG_REFUSED.items():
        if getattr(config, name, None) is value:
            raise ValueError(f"accelerator_config.{name}={value} is refused: {reason}.")
    unknown = [name for name in args.include_for_metrics if name != "inputs"]
    if unknown:
        raise ValueError(
            f"include_for_metrics={unknown} is refused: compute_metrics gets predictions and label_ids and, with "
            "'inputs', the rows' input_ids. The loss is a mean over all rows and is among the metrics anyway."
        )
    if args.parallelism_config is not None:
        raise ValueError(
            "parallelism_config is refused: every process needs whole rows, and processes that share rows would count "
            "them several times. Shard with FSDP2 (fsdp_config) or DeepSpeed instead."
        )
    optim = OptimizerNames(args.optim).value
    if args.optim_target_modules is not None and not optim.startswith(("galore", "apollo")):
        raise ValueError(
            f"optim_target_modules={args.optim_target_modules!r} is only read by the GaLore and APOLLO optimizers, "
            f"and optim is {optim!r}: leave it out, or choose one of them."
        )


def refuse_unread(args, unread: Mapping[str, str], who: str) -> None:
    """Refuses those of the library's own fields that a trainer does not read, if they are set.

    Args:
        args ([`DiffusionTrainingArguments`]): of the run.
        unread (`Mapping[str, str]`): field -> why the trainer does not read it.
        who (`str`): the trainer's name, for the message.

    Raises:
        ValueError: naming the field, its value and the reason.
    """
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in unread and not _is_default(value, field):
            raise ValueError(f"{who} does not read {field.name}={value!r}: {unread[field.name]}.")


def check_trainer_arguments(given: Mapping, refused: Mapping[str, str] = {}, who: str = "The trainer") -> None:
    """Refuses arguments of `Trainer(...)` that would be accepted but not used.

    Args:
        given (`Mapping`): keyword arguments that are passed on to `transformers.Trainer`.
        refused (`Mapping[str, str]`): further ones that one trainer refuses, with the reason.
        who (`str`): the trainer's name, for the message.

    Raises:
        ValueError: naming the argument, why it is refused, and what to do.
        TypeError: for an argument that Trainer does not have.
    """
    for name, value in given.items():
        reason = refused.get(name) or TRAINER_REFUSED.get(name)
        if reason is not None and value is not None and value != (None, None):
            raise ValueError(f"{who} takes no {name}: {reason}.")
        if reason is None and name not in TRAINER_USED:
            raise TypeError(f"{who} got an unexpected keyword argument {name!r}.")


def check_method_arguments(given: Mapping) -> None:
    """The same for arguments of `train`, `evaluate` and `predict`.

    Args:
        given (`Mapping`): argument -> value.

    Raises:
        ValueError: naming the argument and why it is refused.
    """
    for name, value in given.items():
        if value is not None and name in METHODS_REFUSED:
            raise ValueError(f"{name}={value!r} is refused: {METHODS_REFUSED[name]}.")


def check_engine(accelerator) -> None:
    """Refuses processes that share rows, also when only accelerate's configuration asks for them.

    Args:
        accelerator (`Accelerator`): of the trainer.

    Raises:
        ValueError: with what to do.
    """
    config = getattr(accelerator, "parallelism_config", None)
    shared = [kind for kind in ("tp", "cp", "sp") if config is not None and getattr(config, f"{kind}_enabled", False)]
    if shared and accelerator.distributed_type != DistributedType.NO:
        raise ValueError(
            f"The accelerate configuration asks for parallelism over {', '.join(shared)}, whose processes share rows "
            "and would count them several times: use data parallelism, FSDP2 or DeepSpeed."
        )


def snapshot(args) -> dict:
    """All fields of a configuration, `args`, copied."""
    return {field.name: copy.deepcopy(getattr(args, field.name)) for field in fields(args)}


def changed_since(args, before: Mapping) -> set[str]:
    """The fields of `args` whose value is no longer that of `before`, a [`snapshot`]."""
    return {name for name, value in before.items() if getattr(args, name) != value}


def refuse_changes(changed: Iterable[str], args, before: Mapping) -> None:
    """Refuses changes to what a trainer has already used.

    Args:
        changed (`Iterable[str]`): fields; if there are none, nothing is refused.
        args (`TrainingArguments`): with the new values.
        before (`Mapping`): the old ones, a [`snapshot`].

    Raises:
        ValueError: naming each field with both values.
    """
    listed = ", ".join(f"{name} from {before[name]!r} to {getattr(args, name)!r}" for name in sorted(changed))
    if listed:
        raise ValueError(
            f"trainer.args was changed after the trainer was made: {listed}. These values were used to make it "
            "(models, prepared rows, processes), and changes would have no effect: make a new trainer with these "
            "arguments."
        )


def _inherited(args) -> list:
    """The fields of a configuration that it has from the installed transformers' `TrainingArguments`."""
    names = {field.name for field in fields(TrainingArguments)}
    return [field for field in fields(args) if field.name in names]


def _is_default(value, field) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    value = value.value if isinstance(value, Enum) else value
    return value == default or (not value and not default)  # None, "", 0 and False all mean "not set"
