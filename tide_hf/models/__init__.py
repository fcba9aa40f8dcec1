"""Students and teacher families as transformers classes; importing this package registers them with the Auto classes.

Every file here imports its siblings, torch and transformers alone, because it travels with pushed checkpoints.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .configuration_tide import A2DQwen3Config, TIDEQwen3Config
from .generation_tide import BlockDiffusionOutput, TIDEGenerationConfig
from .masked_diffusion import (
    CLEAN_STREAM,
    NOISED_STREAM,
    PADDING_STREAM,
    SCHEDULES,
    TIME_EPSILON,
    attention_mask_for,
    block_visibility,
    loss_weight,
    masked_probability,
)
from .modeling_tide import A2DQwen3LMHeadModel, MaskedDiffusionMixin, MaskedDiffusionOutput, TIDEQwen3ForBlockDiffusion
from .modeling_wedlm import WeDLMConfig, WeDLMForCausalLM

MODELS = {
    TIDEQwen3Config: TIDEQwen3ForBlockDiffusion,
    A2DQwen3Config: A2DQwen3LMHeadModel,
    WeDLMConfig: WeDLMForCausalLM,
}

for config_class, model_class in MODELS.items():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        auto_class.register(config_class, model_class, exist_ok=True)

__all__ = [
    "CLEAN_STREAM",
    "NOISED_STREAM",
    "PADDING_STREAM",
    "SCHEDULES",
    "TIME_EPSILON",
    "A2DQwen3Config",
    "A2DQwen3LMHeadModel",
    "BlockDiffusionOutput",
    "MaskedDiffusionMixin",
    "MaskedDiffusionOutput",
    "TIDEGenerationConfig",
    "TIDEQwen3Config",
    "TIDEQwen3ForBlockDiffusion",
    "WeDLMConfig",
    "WeDLMForCausalLM",
    "attention_mask_for",
    "block_visibility",
    "loss_weight",
    "masked_probability",
]
