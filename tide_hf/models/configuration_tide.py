"""Configurations of the students: a transformers configuration plus what makes it a diffusion LM.

This file travels with checkpoints: it imports its siblings and transformers alone.
"""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from .masked_diffusion import SCHEDULES

OBJECTIVES = ("block", "full")


def check_diffusion_fields(config) -> None:
    """Refuses a block size, objective or schedule that is none."""
    if config.block_size < 1:
        raise ValueError(f"block_size must be at least 1 token, got {config.block_size}.")
    if config.objective not in OBJECTIVES:
        raise ValueError(f"objective must be 'block' or 'full', got {config.objective!r}.")
    if config.noise_schedule not in SCHEDULES:
        raise ValueError(f"noise_schedule must be one of {', '.join(SCHEDULES)}, got {config.noise_schedule!r}.")


@strict
class TIDEQwen3Config(Qwen3Config):
    """[`~transformers.Qwen3Config`] of a Qwen3 diffusion LM.

    Args:
        mask_token_id (`int`, *optional*): id of [MASK]; None where a published checkpoint leaves it to the tokenizer.
        block_size (`int`): tokens per diffusion block, counted from absolute position 0.
        objective (`str`): `"block"` (blocks in order, clean prefix) or `"full"` (one bidirectional sequence).
        noise_schedule (`str`): α(t) the model was trained with, `"linear"` or `"cosine"`.
    """

    model_type = "tide_qwen3"

    is_causal: bool = False
    mask_token_id: int | None = None
    block_size: int = 32
    objective: str = "block"
    noise_schedule: str = "linear"

    def __post_init__(self, **kwargs):
        check_diffusion_fields(self)
        super().__post_init__(**kwargs)


@strict
class A2DQwen3Config(TIDEQwen3Config):
    """The community's `a2d-qwen3` checkpoints (dllm-hub, TIDE-dllm): the same network under their own name."""

    model_type = "a2d-qwen3"
