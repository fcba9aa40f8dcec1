"""Tiny networks and runs that several tests share."""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from tide_hf import TIDEConfig, TIDETrainer
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.losses import Divergence, parameter
from tide_hf.models import MODELS, TIDEQwen3Config

MASK, VOCAB, BLOCK = 23, 24, 4
# a network without a tokenizer; weights far from zero, so that a wrong mask or a wrong position shows
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,
)
# training arguments of runs whose parameters are sharded
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "fsdp_version": 2,
        "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    },
}
ZERO3 = {
    "use_cpu": False,  # accelerate takes DeepSpeed alone where it may look for an accelerator
    "ddp_backend": "gloo",
    "deepspeed": {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    },
}


@dataclass(frozen=True)
class Hellinger(Divergence):
    """A divergence of a user's own: the squared Hellinger distance, times a factor."""

    factor: float = parameter(1.0, "what it is multiplied by")

    def values(self, log_student, log_target):
        return self.factor * (1 - (0.5 * (log_student + log_target)).exp().sum(-1))


def shard_on_cpus(args) -> None:
    """Lets accelerate shard, if the arguments say so: it does where it sees accelerators, and its code, torch's and
    DeepSpeed's run on CPUs as well."""
    state = PartialState._shared_state
    if args.fsdp:
        state["distributed_type"] = DistributedType.MULTI_GPU
    elif args.deepspeed:
        state["num_processes"] = torch.distributed.get_world_size()
        state["process_index"] = state["local_process_index"] = torch.distributed.get_rank()


def tiny_model(seed: int = 0, hidden: int = 32, dtype=torch.float64, config_class=TIDEQwen3Config, **overrides):
    """A random two-layer network on the sorting vocabulary; float64, so that equal means equal."""
    tokenizer = build_tokenizer()
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": hidden // 2,
        "block_size": 4,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # sharper than the usual 0.02, so that a wrong mask or position changes the loss visibly
        "initializer_range": 0.2,
        **overrides,
    }
    torch.manual_seed(seed)
    return MODELS[config_class](config_class(**values)).to(dtype)


def tiny_trainer(output_dir, rows=None, model=None, teacher=None, trainer_kwargs=None, **overrides) -> TIDETrainer:
    """A trainer on sixteen dirty sorting rows, eight rows per optimizer step."""
    values = {
        "output_dir": str(output_dir),
        "preset": "ce" if teacher is None else "tide-shared",
        "max_length": 16,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }
    args = TIDEConfig(**values)
    shard_on_cpus(args)
    return TIDETrainer(
        model=tiny_model() if model is None else model,
        teacher=teacher,
        args=args,
        train_dataset=sorting_rows(16, seed=3, wrong=0.3) if rows is None else rows,
        **{"processing_class": build_tokenizer(), **(trainer_kwargs or {})},
    )
