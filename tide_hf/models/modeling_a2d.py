"""The community's diffusion LMs adapted from Qwen3, Qwen2.5 and Llama (`a2d-…`), loaded unchanged.

The published keys are those of the base classes; the configurations give no diffusion type, block size or mask id.
Both kinds are published: bd3lm (blocks of 32, the default here) and mdlm (load those with `diffusion_type="full"`).
The mask id is the tokenizer's. Saved again, they keep their model_type and keys, and carry this library's code instead
of their own, which transformers 5 cannot run. Source: dllm-hub Tiny-A2D, TIDE-dllm.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_tide import TeacherFamily, TeacherView, TIDELlamaConfig, TIDEQwen2Config, TIDEQwen3Config
from .modeling_tide import TIDELlamaForBlockDiffusion, TIDEQwen2ForBlockDiffusion, TIDEQwen3ForBlockDiffusion
from .published import PublishedConfig


@strict
class A2DQwen3Config(PublishedConfig, TIDEQwen3Config):
    """[`TIDEQwen3Config`] of an `a2d-qwen3` checkpoint."""

    model_type = "a2d-qwen3"
    modeling = "modeling_a2d.A2DQwen3LMHeadModel"
    # the first token after Qwen3's own, which the published tokenizers add
    teacher_family = TeacherFamily(TeacherView("own"), mask_token_id=151_669)


@strict
class A2DQwen2Config(PublishedConfig, TIDEQwen2Config):
    """[`TIDEQwen2Config`] of an `a2d-qwen2` checkpoint."""

    model_type = "a2d-qwen2"
    modeling = "modeling_a2d.A2DQwen2LMHeadModel"
    # the first token after Qwen2.5's own, which the published tokenizers add
    teacher_family = TeacherFamily(TeacherView("own"), mask_token_id=151_665)


@strict
class A2DLlamaConfig(PublishedConfig, TIDELlamaConfig):
    """[`TIDELlamaConfig`] of an `a2d-llama` checkpoint."""

    model_type = "a2d-llama"
    modeling = "modeling_a2d.A2DLlamaLMHeadModel"
    required_values: ClassVar[dict] = {"use_sliding_window": False}


class A2DQwen3LMHeadModel(TIDEQwen3ForBlockDiffusion):
    """`a2d-qwen3`; the class name is the one its checkpoints carry."""

    config_class = A2DQwen3Config
    config: A2DQwen3Config


class A2DQwen2LMHeadModel(TIDEQwen2ForBlockDiffusion):
    """`a2d-qwen2`; the class name is the one its checkpoints carry."""

    config_class = A2DQwen2Config
    config: A2DQwen2Config


class A2DLlamaLMHeadModel(TIDELlamaForBlockDiffusion):
    """`a2d-llama`; the class name is the one its checkpoints carry."""

    config_class = A2DLlamaConfig
    config: A2DLlamaConfig
