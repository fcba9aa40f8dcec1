"""WeDLM as transformers' own Qwen3, so that the published weights load without remote code.

The published key layout is Qwen3's for the 8 B models and Qwen2.5's for the 7 B ones, under one class name.
Source: Tencent/WeDLM.
"""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from .configuration_tide import DiffusionConfig, TeacherFamily, TeacherView
from .modeling_tide import MaskedDiffusionMixin
from .published import PublishedConfig


@strict
class WeDLMConfig(PublishedConfig, DiffusionConfig, Qwen3Config):
    """Configuration of WeDLM.

    Other fields as in [`~tide_hf.models.configuration_tide.DiffusionConfig`] and [`~transformers.Qwen3Config`].

    Args:
        is_causal (`bool`): True: every position sees itself and those before it.
        qk_norm (`bool`): query and key normalisation. The 7 B models, built on Qwen2.5, have none.
        head_dim (`int`, *optional*): `hidden_size / num_attention_heads` by default.
    """

    model_type = "wedlm"
    modeling = "modeling_wedlm.WeDLMForCausalLM"
    DIFFUSION_TYPES = ("block",)
    default_theta = 1_000_000.0
    # trained on a reordered causal stream; TIDE feeds it bidirectional blocks of the student's size
    # mask id: Tencent's training and inference code
    teacher_family = TeacherFamily(
        TeacherView("own", causal=True), paper=TeacherView("student"), mask_token_id=151_665
    )

    is_causal: bool = True
    qk_norm: bool = True
    head_dim: int | None = None

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class WeDLMForCausalLM(MaskedDiffusionMixin, Qwen3ForCausalLM):
    """WeDLM, trained and generating like a student; the class name is the one its checkpoints carry.

    Everything is causal, in an order in which the masked tokens of a block come last: at a [MASK] the logits are those
    of the same position, and at the tokens of a clean text, as `forward` returns them without a mask, those of the
    next. The published training adds a next-token loss on the clean text to the denoising loss; here there is the
    latter alone.

    A 7 B model is Qwen2.5: it has no query and key norms. The output projection of the attention has no bias, even
    where query, key and value have theirs.

    Args:
        config ([`WeDLMConfig`]): of the model.
    """

    config_class = WeDLMConfig
    config: WeDLMConfig

    def __init__(self, config: WeDLMConfig):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.o_proj.bias = None
            if not config.qk_norm:
                layer.self_attn.q_norm, layer.self_attn.k_norm = nn.Identity(), nn.Identity()
