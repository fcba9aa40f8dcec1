"""Dream 7B as transformers' Qwen2, without remote code; the published keys are Qwen2's.

Full-sequence diffusion with logits for the NEXT position: those of [MASK] at position i stand at i − 1. Source:
HKUNLP/Dream.
"""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from .configuration_tide import DiffusionConfig, TeacherFamily, TeacherView
from .modeling_tide import MaskedDiffusionMixin
from .published import PublishedConfig


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


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's byte-level BPE under the name that Dream's tokenizer_config.json asks its own code for."""
