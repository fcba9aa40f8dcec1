"""Configuration of the uniform-state diffusion LM.

This file travels with checkpoints: it imports its siblings and transformers alone.
"""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from .configuration_tide import TypedDiffusionConfig


@strict
class TIDEUniformQwen3Config(TypedDiffusionConfig, Qwen3Config):
    """[`~transformers.Qwen3Config`] of a Qwen3 uniform-state diffusion LM.

    Args:
        is_causal (`bool`): False: every position sees every other.
        diffusion_type (`str`, *optional*): `"uniform"`, the only one.
        num_steps (`int`): network calls of `generate`, at least 1.
    """

    model_type = "tide_uniform_qwen3"
    modeling = "modeling_uniform.TIDEUniformQwen3ForDiffusion"

    DIFFUSION_TYPES = ("uniform",)

    is_causal: bool = False
    num_steps: int = 32
