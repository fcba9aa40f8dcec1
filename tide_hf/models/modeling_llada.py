"""LLaDA-8B (and 1.5) as transformers' Llama, LLaDA-MoE as its Qwen3Moe, without remote code.

Both carry model_type `llada`; `architectures` tells them apart. Full-sequence diffusion, bidirectional, logits for the
same position. Source: GSAI-ML/LLaDA-8B, inclusionAI/LLaDA-MoE.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.core_model_loading import WeightRenaming

from .configuration_tide import DiffusionConfig, TeacherFamily, TeacherView
from .modeling_tide import MaskedDiffusionMixin
from .published import PublishedConfig, packed_experts, register_key_layout


@strict
class LLaDAConfig(PublishedConfig, DiffusionConfig, LlamaConfig):
    """Configuration of the dense LLaDA; a LLaDA-MoE's config.json gives a [`LLaDAMoEConfig`].

    Other fields as in [`~tide_hf.models.configuration_tide.DiffusionConfig`] and [`~transformers.LlamaConfig`].

    Args:
        num_key_value_heads (`int`, *optional*): key and value heads; `num_attention_heads` by default.
        bos_token_id, eos_token_id (`int`, *optional*): ids of the first and the last token of a text.
        use_cache (`bool`): of `forward`. The published code refuses True.

    Raises:
        ValueError: for an option of the code's ancestry (OLMo) that no published LLaDA uses.
    """

    model_type = "llada"
    modeling = "modeling_llada.LLaDAModelLM"
    default_theta = 500_000.0
    DIFFUSION_TYPES = ("full", "block")
    # mask id: GSAI-ML's code
    teacher_family = TeacherFamily(TeacherView("own"), mask_token_id=126_336)
    published_names: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
        "embedding_size": "vocab_size",
        "weight_tying": "tie_word_embeddings",
    }
    not_written: ClassVar[frozenset[str]] = frozenset({"hidden_size", "num_attention_heads", "num_hidden_layers"})
    required_values: ClassVar[dict] = {
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
        "rope_full_precision": True,
        "alibi": False,
        "clip_qkv": 0,
        "block_group_size": 1,
        "layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "multi_query_attention": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "scale_logits": False,
    }
    spelled_out: ClassVar[dict] = {
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
    }
    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "alibi_bias_max",
            "attention_layer_norm_with_affine",
            "embedding_dropout",
            "layer_norm_eps",
            "mlp_ratio",  # read where mlp_hidden_size is missing
            "residual_dropout",
            "train_max_sequence_length",
        }
    )

    num_key_value_heads: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool = False

    def __post_init__(self, **kwargs):
        if kwargs.get("mlp_hidden_size") is None and kwargs.get("mlp_ratio") and "d_model" in kwargs:
            kwargs["mlp_hidden_size"] = int(kwargs["mlp_ratio"] * kwargs["d_model"])
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; `architectures` in `config_dict` tells the two networks of this model_type apart."""
        is_moe = "LLaDAMoEModelLM" in (config_dict.get("architectures") or ()) or "num_experts" in config_dict
        return LLaDAMoEConfig.from_dict(config_dict, **kwargs) if is_moe else super().from_dict(config_dict, **kwargs)


class LLaDAModelLM(MaskedDiffusionMixin, LlamaForCausalLM):
    """LLaDA-8B, trained and generating like a student; the class name is the one its checkpoints carry."""

    config_class = LLaDAConfig
    config: LLaDAConfig


@strict
class LLaDAMoEConfig(PublishedConfig, DiffusionConfig, Qwen3MoeConfig):
    """Configuration of LLaDA-MoE.

    Other fields as in [`~tide_hf.models.configuration_tide.DiffusionConfig`] and [`~transformers.Qwen3MoeConfig`].

    Args:
        head_dim (`int`, *optional*): `hidden_size / num_attention_heads` by default.

    Raises:
        ValueError: for a router, norm or layer plan that no published LLaDA-MoE has.
    """

    model_type = "llada"
    modeling = "modeling_llada.LLaDAMoEModelLM"
    default_theta = 50_000.0
    DIFFUSION_TYPES = ("full", "block")
    # mask id: inclusionAI's dInfer
    teacher_family = TeacherFamily(TeacherView("own"), mask_token_id=156_895)
    published_names: ClassVar[dict[str, str]] = {
        "expert_intermediate_size": "moe_intermediate_size",
        "dense_intermediate_size": "intermediate_size",
        "num_experts": "num_experts",  # which newer releases of transformers call num_local_experts
    }
    required_values: ClassVar[dict] = {
        "qk_layernorm": True,
        "clip_qkv": 0,
        "n_group": 1,
        "topk_group": 1,
        "use_bias": False,
        "use_qkv_bias": False,
        "partial_rotary_factor": 1,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "routed_scaling_factor": 1,
        "shared_expert_intermediate_size": 0,
        "num_shared_experts": 0,
    }
    # without the last of them, the published class builds a shared expert
    spelled_out: ClassVar[dict] = {
        "qk_layernorm": True,
        "partial_rotary_factor": 1,
        "shared_expert_intermediate_size": None,
    }
    harmless: ClassVar[frozenset[str]] = frozenset(
        {"moe_layer_freq", "moe_router_topk_scaling_factor", "router_num_group", "router_topk_group"}
    )

    head_dim: int | None = None

    def __post_init__(self, **kwargs):
        if any(step != 1 for step in kwargs.get("moe_layer_freq") or []):
            raise ValueError(f"moe_layer_freq={kwargs['moe_layer_freq']}: only models with experts in every layer.")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        kwargs.setdefault("moe_layer_freq", [1] * self.num_hidden_layers)  # the published class has none by default
        # the published code never renormalises, whatever its config says
        self.norm_topk_prob = False
        super().__post_init__(**kwargs)


class LLaDAMoEModelLM(MaskedDiffusionMixin, Qwen3MoeForCausalLM):
    """LLaDA-MoE, trained and generating like a student; the class name is the one its checkpoints carry."""

    config_class = LLaDAMoEConfig
    config: LLaDAMoEConfig
    # transformers looks for the experts in the source of this module, and they are in the base's
    _can_set_experts_implementation_cached_value = True


register_key_layout(
    LLaDAModelLM,
    [
        # ff_out is the head outside the blocks and the down projection inside
        WeightRenaming(r"^model\.transformer\.ff_out\.", "lm_head."),
        WeightRenaming(r"^model\.transformer\.wte\.", "model.embed_tokens."),
        WeightRenaming(r"^model\.transformer\.ln_f\.", "model.norm."),
        WeightRenaming(r"^model\.transformer\.blocks\.", "model.layers."),
        WeightRenaming(r"\.attn_norm\.", ".input_layernorm."),
        WeightRenaming(r"\.ff_norm\.", ".post_attention_layernorm."),
        WeightRenaming(r"\.q_proj\.", ".self_attn.q_proj."),
        WeightRenaming(r"\.k_proj\.", ".self_attn.k_proj."),
        WeightRenaming(r"\.v_proj\.", ".self_attn.v_proj."),
        WeightRenaming(r"\.attn_out\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.ff_proj\.", ".mlp.gate_proj."),
        WeightRenaming(r"\.up_proj\.", ".mlp.up_proj."),
        WeightRenaming(r"\.ff_out\.", ".mlp.down_proj."),
    ],
)
register_key_layout(LLaDAMoEModelLM, packed_experts())
