"""The small networks of the embedded comparisons, and how they are trained."""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from tide_hf.models import LLaDA2MoeConfig, LLaDA2MoeModelLM, TIDEQwen3Config, TIDEQwen3ForBlockDiffusion
from tide_hf.training.config import TIDEConfig

from .harness import Ticks


@dataclass(frozen=True)
class Network:
    """Size and training of one network.

    Args:
        hidden, layers, heads (`int`): width, depth, attention heads.
        steps, batch_size (`int`), learning_rate, weight_decay (`float`): of AdamW; with 0 steps the weights stay as
            they were drawn.
        experts (`int`): routed experts of each layer but the first, two of them active; 0 for a dense network.
    """

    hidden: int
    layers: int
    heads: int
    steps: int
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    experts: int = 0


def shape_of(network: Network, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Fields of a config of Qwen3's kind, for a network that reads a tokenizer's ids."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": network.hidden,
        "intermediate_size": 3 * network.hidden,
        "num_hidden_layers": network.layers,
        "num_attention_heads": network.heads,
        "num_key_value_heads": network.heads,
        "head_dim": network.hidden // network.heads,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_network(network: Network, tokenizer: PreTrainedTokenizerBase, block_size: int, seed: int) -> PreTrainedModel:
    """A small diffusion LM with random weights: dense, or a mixture of experts of LLaDA2's class.

    Args:
        network ([`Network`]): its size.
        tokenizer (`PreTrainedTokenizerBase`): gives the vocabulary and the special tokens.
        block_size (`int`): tokens per block.
        seed (`int`): of the weights.
    """
    torch.manual_seed(seed)
    shape = {**shape_of(network, tokenizer), "block_size": block_size, "mask_token_id": tokenizer.mask_token_id}
    if not network.experts:
        return TIDEQwen3ForBlockDiffusion(TIDEQwen3Config(**shape))
    config = LLaDA2MoeConfig(
        **shape,
        num_experts=network.experts,
        num_experts_per_tok=2,
        num_shared_experts=1,
        moe_intermediate_size=network.hidden,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        tie_word_embeddings=False,
    )
    return LLaDA2MoeModelLM(config)


def training_arguments(
    network: Network, path: str | Path, seed: int, config_class: type[TrainingArguments] = TIDEConfig, **fields
) -> TrainingArguments:
    """Settings of a run on the CPU that prints nothing and saves once, at its end.

    Args:
        network ([`Network`]): gives steps, batch size, learning rate and weight decay.
        path (`str` or `Path`): where the run is saved.
        seed (`int`): of rows and noise.
        config_class (`type`): [`TIDEConfig`], [`IDLMConfig`] or `TrainingArguments`.
        fields: of it; they win over the ones given here.
    """
    defaults = {
        "output_dir": str(path),
        "max_steps": network.steps or -1,
        "per_device_train_batch_size": network.batch_size,
        "learning_rate": network.learning_rate,
        "weight_decay": network.weight_decay,
        "logging_steps": max(network.steps // 10, 1),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }
    return config_class(**{**defaults, **fields})


def train(
    trainer_class: type[Trainer],
    model: PreTrainedModel | str,
    args: TrainingArguments,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: tuple = (),
    **others,
) -> Trainer:
    """Trains and saves a network.

    Args:
        trainer_class (`type`): of the run.
        model (`PreTrainedModel` or `str`): where it starts.
        args (`TrainingArguments`): see [`training_arguments`].
        rows (`Dataset`), tokenizer (`PreTrainedTokenizerBase`): what it learns from.
        callbacks (`tuple`): beside the one that moves the progress bar.
        others: further arguments of the trainer.
    """
    trainer = trainer_class(
        model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[Ticks(), *callbacks],
        **others,
    )
    trainer.remove_callback(PrinterCallback)
    if args.max_steps > 0:
        trainer.train()
    trainer.save_model()
    return trainer
