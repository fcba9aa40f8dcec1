"""WeDLM as transformers' own Qwen3, so that the published 8 B weights load without anybody's remote code.

The published key layout is Qwen3's, so nothing is renamed. Source: Tencent/WeDLM.
"""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config, Qwen3ForCausalLM


@strict
class WeDLMConfig(Qwen3Config):
    """[`~transformers.Qwen3Config`] of WeDLM 8B.

    Args:
        mask_token_id (`int`, *optional*): id of [MASK]; published configurations leave it out.
        qk_norm (`bool`): query and key normalisation. The 7 B models, built on Qwen2.5, have none.
    """

    model_type = "wedlm"

    mask_token_id: int | None = None
    qk_norm: bool = True

    def __post_init__(self, **kwargs):
        if not self.qk_norm:
            raise ValueError(
                "This is a WeDLM of the 7B kind (qk_norm=false, Qwen2.5 based), which is not supported yet; "
                "WeDLM-8B (qk_norm=true) is."
            )
        super().__post_init__(**kwargs)


class WeDLMForCausalLM(Qwen3ForCausalLM):
    """WeDLM 8B; the class name is the one its checkpoints carry."""

    config_class = WeDLMConfig
    config: WeDLMConfig
