"""SDAR as transformers' Qwen3, SDAR-MoE (30B-A3B) as its Qwen3Moe, without remote code.

Block diffusion, 4 tokens per block unless config.json says otherwise; the published keys are the base classes'.
Source: JetAstra/SDAR. The MoE's shape is taken from third-party inference code; no published file was available.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from .configuration_tide import DiffusionConfig, TeacherFamily, TeacherView
from .modeling_tide import MaskedDiffusionMixin
from .published import PublishedConfig, packed_experts, register_key_layout

FAMILY = TeacherFamily(TeacherView("own"), mask_token_id=151_669)  # mask id: JetAstra's code


@strict
class SDARConfig(PublishedConfig, DiffusionConfig, Qwen3Config):
    """Configuration of SDAR.

    Other fields as in [`~tide_hf.models.configuration_tide.DiffusionConfig`] and [`~transformers.Qwen3Config`].

    Args:
        block_size (`int`): tokens per diffusion block, counted from absolute position 0.
    """

    model_type = "sdar"
    modeling = "modeling_sdar.SDARForCausalLM"
    default_theta = 1_000_000.0
    teacher_family = FAMILY
    spelled_out: ClassVar[dict] = {"fuse_cross_entropy": True}  # the published code reads it and has no default

    block_size: int = 4


class SDARForCausalLM(MaskedDiffusionMixin, Qwen3ForCausalLM):
    """SDAR, trained and generating like a student; the class name is the one its checkpoints carry."""

    config_class = SDARConfig
    config: SDARConfig


@strict
class SDARMoeConfig(PublishedConfig, DiffusionConfig, Qwen3MoeConfig):
    """Configuration of SDAR-MoE.

    Other fields as in [`~tide_hf.models.configuration_tide.DiffusionConfig`] and [`~transformers.Qwen3MoeConfig`].

    Args:
        block_size (`int`): as in [`SDARConfig`].
        head_dim (`int`): of each attention head.
        norm_topk_prob (`bool`): whether the chosen experts' weights sum to 1.
    """

    model_type = "sdar_moe"
    modeling = "modeling_sdar.SDARMoeForCausalLM"
    default_theta = 1_000_000.0
    teacher_family = FAMILY
    published_names: ClassVar[dict[str, str]] = {"num_experts": "num_experts"}  # newer transformers renamed it
    required_values: ClassVar[dict] = {"partial_rotary_factor": 1, "shared_expert_intermediate_size": 0}

    block_size: int = 4
    head_dim: int = 128
    norm_topk_prob: bool = True


class SDARMoeForCausalLM(MaskedDiffusionMixin, Qwen3MoeForCausalLM):
    """SDAR-MoE, trained and generating like a student; the class name is the one its checkpoints carry."""

    config_class = SDARMoeConfig
    config: SDARMoeConfig
    # transformers looks for the experts in the source of this module, and they are in the base's
    _can_set_experts_implementation_cached_value = True


register_key_layout(SDARMoeForCausalLM, packed_experts())
