"""The small networks of the demos: dense students and teachers, and a mixture of experts of LLaDA2's class."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tide_hf.models import LLaDA2MoeConfig, LLaDA2MoeModelLM, TIDEQwen3Config, TIDEQwen3ForBlockDiffusion


@dataclass(frozen=True)
class Network:
    """Size and training of one network.

    Args:
        hidden, layers, heads (`int`): width, depth, attention heads.
        steps, batch_size (`int`), learning_rate, weight_decay (`float`): of AdamW with a linear schedule; no steps
            leave it as it was drawn.
        experts (`int`): routed experts of each layer but the first, two of them active; 0 makes it dense.
    """

    hidden: int
    layers: int
    heads: int
    steps: int
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    experts: int = 0


def build_network(network: Network, tokenizer: PreTrainedTokenizerBase, block_size: int, seed: int) -> PreTrainedModel:
    """A small diffusion LM with random weights drawn from the seed."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": network.hidden,
        "intermediate_size": 3 * network.hidden,
        "num_hidden_layers": network.layers,
        "num_attention_heads": network.heads,
        "num_key_value_heads": network.heads,
        "head_dim": network.hidden // network.heads,
        "block_size": block_size,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
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
