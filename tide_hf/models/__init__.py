"""Students and teacher families as transformers classes; importing this package registers them with the Auto classes.

Every other file here imports its siblings, torch and transformers alone, because it travels with pushed checkpoints. A
new family is a modeling file and its entry in this one: its configuration class says how it is fed as a teacher.
"""

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from .configuration_tide import TIDELlamaConfig, TIDEQwen2Config, TIDEQwen3Config
from .configuration_uniform import TIDEUniformQwen3Config
from .conversion import convert_to_diffusion
from .generation_tide import BlockDiffusionOutput, TIDEGenerationConfig
from .masked_diffusion import (
    CLEAN_STREAM,
    NOISED_STREAM,
    PADDING_STREAM,
    SCHEDULES,
    TIME_EPSILON,
    NoiseSchedule,
    attention_mask_for,
    block_visibility,
    loss_weight,
    masked_probability,
)
from .modeling_a2d import (
    A2DLlamaConfig,
    A2DLlamaLMHeadModel,
    A2DQwen2Config,
    A2DQwen2LMHeadModel,
    A2DQwen3Config,
    A2DQwen3LMHeadModel,
)
from .modeling_dream import DreamConfig, DreamModel, DreamTokenizer
from .modeling_llada import LLaDAConfig, LLaDAModelLM, LLaDAMoEConfig, LLaDAMoEModelLM
from .modeling_llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from .modeling_sdar import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM
from .modeling_tide import (
    MaskedDiffusionMixin,
    MaskedDiffusionOutput,
    TIDELlamaForBlockDiffusion,
    TIDEQwen2ForBlockDiffusion,
    TIDEQwen3ForBlockDiffusion,
)
from .modeling_uniform import TIDEUniformQwen3ForDiffusion
from .modeling_wedlm import WeDLMConfig, WeDLMForCausalLM
from .reveal_rules_tide import MaskedPositions, RevealRule
from .uniform_diffusion import NOISE_EPSILON, reverse_step, uniform_divergence

MODELS = {
    TIDEQwen3Config: TIDEQwen3ForBlockDiffusion,
    TIDEQwen2Config: TIDEQwen2ForBlockDiffusion,
    TIDELlamaConfig: TIDELlamaForBlockDiffusion,
    TIDEUniformQwen3Config: TIDEUniformQwen3ForDiffusion,
    A2DQwen3Config: A2DQwen3LMHeadModel,
    A2DQwen2Config: A2DQwen2LMHeadModel,
    A2DLlamaConfig: A2DLlamaLMHeadModel,
    LLaDA2MoeConfig: LLaDA2MoeModelLM,
    WeDLMConfig: WeDLMForCausalLM,
    # one model_type, two architectures: the one registered last reads config.json, and passes a LLaDA-MoE's on
    LLaDAMoEConfig: LLaDAMoEModelLM,
    LLaDAConfig: LLaDAModelLM,
    DreamConfig: DreamModel,
    SDARConfig: SDARForCausalLM,
    SDARMoeConfig: SDARMoeForCausalLM,
}
# model_types that other training code writes into copies of the same checkpoints
ALIASES = {
    "llada21_moe": LLaDA2MoeConfig,
    "llada2_moe_veomni": LLaDA2MoeConfig,
    "lladamoe": LLaDAMoEConfig,
}

for config_class, model_class in MODELS.items():
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        auto_class.register(config_class, model_class, exist_ok=True)
for alias, config_class in ALIASES.items():
    CONFIG_MAPPING.register(alias, config_class, exist_ok=True)
AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer, exist_ok=True)

__all__ = [
    "CLEAN_STREAM",
    "NOISED_STREAM",
    "NOISE_EPSILON",
    "PADDING_STREAM",
    "SCHEDULES",
    "TIME_EPSILON",
    "A2DLlamaConfig",
    "A2DLlamaLMHeadModel",
    "A2DQwen2Config",
    "A2DQwen2LMHeadModel",
    "A2DQwen3Config",
    "A2DQwen3LMHeadModel",
    "BlockDiffusionOutput",
    "DreamConfig",
    "DreamModel",
    "DreamTokenizer",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "MaskedDiffusionMixin",
    "MaskedDiffusionOutput",
    "MaskedPositions",
    "NoiseSchedule",
    "RevealRule",
    "SDARConfig",
    "SDARForCausalLM",
    "SDARMoeConfig",
    "SDARMoeForCausalLM",
    "TIDEGenerationConfig",
    "TIDELlamaConfig",
    "TIDELlamaForBlockDiffusion",
    "TIDEQwen2Config",
    "TIDEQwen2ForBlockDiffusion",
    "TIDEQwen3Config",
    "TIDEQwen3ForBlockDiffusion",
    "TIDEUniformQwen3Config",
    "TIDEUniformQwen3ForDiffusion",
    "WeDLMConfig",
    "WeDLMForCausalLM",
    "attention_mask_for",
    "block_visibility",
    "convert_to_diffusion",
    "loss_weight",
    "masked_probability",
    "reverse_step",
    "uniform_divergence",
]
