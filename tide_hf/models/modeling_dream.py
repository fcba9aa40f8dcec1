"""Dream 7B as transformers' Qwen2, without remote code; the published keys are Qwen2's.

Full-sequence diffusion with logits for the NEXT position: those of [MASK] at position i stand at i − 1. Source:
HKUNLP/Dream.
"""

from functools import wraps

import torch
from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging

from .configuration_tide import DiffusionConfig, TeacherFamily, TeacherView
from .modeling_tide import MaskedDiffusionMixin
from .published import PublishedConfig

logger = logging.get_logger(__name__)
# `alg` of the published sampler -> settings here, over those of decoding="dream"
ORDERS = {
    "entropy": {},
    "maskgit_plus": {"remasking": "confidence"},
    "topk_margin": {"remasking": "margin"},
    "origin": {"remasking": "random", "step_quota": "binomial"},
}
# settings of the published sampler that ask for nothing, or for what is done anyway
DEFAULTS = (
    ("eps", 1e-3),
    ("alg_temp", 0),
    ("output_history", False),
    ("return_dict", False),
    ("generation_kwargs", {}),
)


@strict
class DreamConfig(PublishedConfig, DiffusionConfig, Qwen2Config):
    """Configuration of Dream: fields as in [`~tide_hf.models.configuration_tide.DiffusionConfig`] and
    [`~transformers.Qwen2Config`].

    There are no blocks (`diffusion_type="full"` alone): the first token of a block would be predicted from the block
    before it.
    """

    model_type = "Dream"
    modeling = "modeling_dream.DreamModel"
    DIFFUSION_TYPES = ("full",)
    default_theta = 1_000_000.0
    # mask id: HKUNLP's config.json
    teacher_family = TeacherFamily(TeacherView("none", shifted=True), mask_token_id=151_666)


class DreamModel(MaskedDiffusionMixin, Qwen2ForCausalLM):
    """Dream with its head, trained and generating like a student; the class name is the one its checkpoints carry.

    As in the published code, the logits that `forward` returns at position i are those of position i + 1.
    """

    config_class = DreamConfig
    config: DreamConfig

    # the arguments stay visible: a Trainer drops the columns that forward does not name
    @wraps(MaskedDiffusionMixin.forward, assigned=())
    def forward(self, *args, labels=None, head_fn=None, **kwargs):
        """As in [`MaskedDiffusionMixin`], args and kwargs included; says once where the logits of a [MASK] stand.

        Args:
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*), head_fn (`Callable`, *optional*): with one of
                them the loss looks in the right place by itself.
        """
        if labels is None and head_fn is None and not torch.compiler.is_compiling():
            logger.warning_once(
                "The logits that this DreamModel returns at a position are those of the next position, as in its "
                "published code: those of a [MASK] stand one column to the left of it, where a fill-mask pipeline "
                "does not look. generate, infill and forward(labels=…) do."
            )
        return super().forward(*args, labels=labels, head_fn=head_fn, **kwargs)

    def translated_settings(self, said: dict) -> dict:
        """The names of the published `diffusion_generate` in what generation_config.json has `said`.

        What has no counterpart here keeps its name, and is refused by it.
        """
        said = {name: value for name, value in said.items() if (name, value) not in DEFAULTS}
        order = ORDERS.get(said.get("alg"))
        if order is not None:
            said = {"decoding": "dream", **order, **said}
            del said["alg"]
        if "steps" in said:
            said["steps_per_block"] = said.pop("steps")
        return said


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's byte-level BPE under the name that Dream's tokenizer_config.json asks its own code for."""
