"""The community's diffusion LMs adapted from Qwen2.5 and Llama (`a2d-qwen2`, `a2d-llama`), loaded unchanged.

The published keys are the base classes'. Source: dllm-hub Tiny-A2D.
"""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from .configuration_tide import check_diffusion_fields
from .modeling_tide import MaskedDiffusionMixin
from .published import PublishedConfig


@strict
class A2DQwen2Config(PublishedConfig, Qwen2Config):
    """[`~transformers.Qwen2Config`] of an `a2d-qwen2` diffusion LM; the fields are those of [`TIDEQwen3Config`].

    The published ones are full-sequence (mdlm) models, and their configurations do not say so.
    """

    model_type = "a2d-qwen2"

    is_causal: bool = False
    mask_token_id: int | None = None
    block_size: int = 32
    objective: str = "full"
    noise_schedule: str = "linear"

    def __post_init__(self, **kwargs):
        check_diffusion_fields(self)
        super().__post_init__(**kwargs)


@strict
class A2DLlamaConfig(PublishedConfig, LlamaConfig):
    """[`~transformers.LlamaConfig`] of an `a2d-llama` diffusion LM; the fields are those of [`TIDEQwen3Config`]."""

    model_type = "a2d-llama"

    is_causal: bool = False
    mask_token_id: int | None = None
    block_size: int = 32
    objective: str = "full"
    noise_schedule: str = "linear"

    def __post_init__(self, **kwargs):
        check_diffusion_fields(self)
        super().__post_init__(**kwargs)


class A2DQwen2LMHeadModel(MaskedDiffusionMixin, Qwen2ForCausalLM):
    """`a2d-qwen2`; the class name is the one its checkpoints carry."""

    config_class = A2DQwen2Config
    config: A2DQwen2Config


class A2DLlamaLMHeadModel(MaskedDiffusionMixin, LlamaForCausalLM):
    """`a2d-llama`; the class name is the one its checkpoints carry."""

    config_class = A2DLlamaConfig
    config: A2DLlamaConfig
