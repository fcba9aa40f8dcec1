"""LLaDA2.0 and LLaDA2.1 (mini 16 B, flash 100 B; MoE) as transformers' Glm4Moe, without remote code.

The two networks are the same: grouped sigmoid router with a bias that only selects, a shared expert, per-head query
and key norms before a rotation of the first half of each head. Keys differ: fused query_key_value, one tensor per
expert, names of their own. Source: inclusionAI dFactory and dInfer.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

from .configuration_tide import DiffusionConfig, TeacherFamily, TeacherView
from .modeling_tide import MaskedDiffusionMixin
from .published import MERGED, PublishedConfig, merged_experts, packed_experts, register_key_layout


@strict
class LLaDA2MoeConfig(PublishedConfig, DiffusionConfig, Glm4MoeConfig):
    """Configuration of LLaDA2. Other fields as in [`DiffusionConfig`] and [`~transformers.Glm4MoeConfig`].

    Args:
        head_dim (`int`, *optional*): `hidden_size / num_attention_heads` by default.
        use_qk_norm (`bool`): published configurations leave it out, and every model has the norms.
        rms_norm_eps (`float`): ε of the RMS norms.
        n_group, topk_group (`int`): groups of experts, and how many of them the experts of a token come from.
        routed_scaling_factor (`float`): multiplies the weights of the routed experts.
        num_mtp_layers (`int`): layers that predict further tokens; LLaDA2 has none.

    Raises:
        ValueError: for a router, bias or rotary size that no published LLaDA2 has.
    """

    model_type = "llada2_moe"
    modeling = "modeling_llada2.LLaDA2MoeModelLM"
    default_theta = 600_000.0
    # trained in blocks with a clean prefix; TIDE feeds the noised sequence alone. Mask id: dFactory and dInfer
    teacher_family = TeacherFamily(TeacherView("own"), paper=TeacherView("none"), mask_token_id=156_895)
    published_names: ClassVar[dict[str, str]] = {
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
    }
    required_values: ClassVar[dict] = {
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        # the published code renormalises whatever it says; the base class would not
        "norm_topk_prob": True,
        # the published code has the norms whatever it says
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "attention_bias": False,
        "use_bias": False,
        "use_qkv_bias": False,
        "norm_head": False,
        "rope_interleave": False,
        "embedding_dropout": 0,
        "output_dropout": 0,
        "num_nextn_predict_layers": 0,
        "use_sliding_window": False,
    }
    spelled_out: ClassVar[dict] = {"use_bias": False, "embedding_dropout": 0.0, "output_dropout": 0.0}

    head_dim: int | None = None
    use_qk_norm: bool = True
    rms_norm_eps: float = 1e-6
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    num_mtp_layers: int = 0
    harmless: ClassVar[frozenset[str]] = frozenset({"moe_shared_expert_intermediate_size"})

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_experts_per_tok == 1:
            raise ValueError(
                "num_experts_per_tok=1: the published code weighs a single expert by its score and this class by 1; "
                "no published LLaDA2 has it."
            )
        shared = kwargs.get("moe_shared_expert_intermediate_size")
        if shared not in (None, self.moe_intermediate_size):
            raise ValueError(
                f"moe_shared_expert_intermediate_size={shared}: this class gives shared experts the width of the "
                f"others, moe_intermediate_size={self.moe_intermediate_size}."
            )
        rotary_dim, factor = kwargs.get("rotary_dim"), kwargs.get("partial_rotary_factor")
        if factor is None:
            factor = 0.5 if rotary_dim is None else rotary_dim / self.head_dim
        if rotary_dim is not None and rotary_dim != int(self.head_dim * factor):
            raise ValueError(
                f"rotary_dim={rotary_dim} contradicts partial_rotary_factor={factor:g} of head_dim={self.head_dim}."
            )
        super().__post_init__(**{**kwargs, "partial_rotary_factor": factor})


class LLaDA2MoeModelLM(MaskedDiffusionMixin, Glm4MoeForCausalLM):
    """LLaDA2, trained and generating like a student; the class name is the one its checkpoints carry.

    Args:
        config ([`LLaDA2MoeConfig`]): of the model.
    """

    config_class = LLaDA2MoeConfig
    config: LLaDA2MoeConfig
    # transformers looks for the experts in the source of this module, and they are in the base's
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        # the base's body drops keys of layers 46 and 92, its own extra ones, without a word
        self._keys_to_ignore_on_load_unexpected = set()

    def save_pretrained(self, *args, **kwargs):
        """As in transformers, args and kwargs included, in the published layout, whichever was loaded."""
        used = getattr(self, "_weight_conversions", None)
        if used is None or any(conversion.source_patterns == MERGED for conversion in used):
            self._weight_conversions = PUBLISHED_LAYOUT
        return super().save_pretrained(*args, **kwargs)


PUBLISHED_LAYOUT = [
    WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
    WeightRenaming(r"\.attention\.dense\.", ".self_attn.o_proj."),
    WeightRenaming(r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
    WeightRenaming(r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
    WeightRenaming(r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
    WeightConverter(
        source_patterns="attention.query_key_value.weight",
        target_patterns=["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        operations=[Split(dim=0)],
    ),
    *packed_experts(),
]
register_key_layout(LLaDA2MoeModelLM, [*PUBLISHED_LAYOUT, *merged_experts()])
