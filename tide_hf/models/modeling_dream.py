"""Dream 7B as transformers' Qwen2, without remote code; the published keys are Qwen2's.

Full-sequence diffusion with logits for the NEXT position: those of [MASK] at position i stand at i − 1. Source:
HKUNLP/Dream.
"""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from .configuration_tide import TeacherFamily, TeacherView
from .published import PublishedConfig
from .refusals import NotYetAStudent


@strict
class DreamConfig(PublishedConfig, Qwen2Config):
    """Configuration of Dream. Other fields as in [`~transformers.Qwen2Config`].

    Args:
        is_causal (`bool`): False: without a 4-D mask every position sees every other.
        mask_token_id (`int`, *optional*): id of [MASK].
    """

    model_type = "Dream"
    default_theta = 1_000_000.0
    # mask id: HKUNLP's config.json
    teacher_family = TeacherFamily(TeacherView("none", shifted=True), mask_token_id=151_666)

    is_causal: bool = False
    mask_token_id: int | None = None


class DreamModel(NotYetAStudent, Qwen2ForCausalLM):
    """Dream with its head; bidirectional without a mask; the class name is the one its checkpoints carry."""

    config_class = DreamConfig
    config: DreamConfig


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's byte-level BPE under the name that Dream's tokenizer_config.json asks its own code for."""
