"""Configurations of the students: a transformers configuration plus what makes it a diffusion LM.

This file travels with checkpoints: it imports its siblings and transformers alone.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.dynamic_module_utils import get_relative_import_files

from .masked_diffusion import named_schedule
from .older_readers import WritesForOlderReaders

AUTO_MODELS = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM")


@dataclass(frozen=True)
class TeacherView:
    """How a network is fed when it teaches.

    Args:
        blocks (`str`): `"none"` (one bidirectional sequence, no clean copy), `"own"` (as its configuration says:
            blocks of its `block_size`, or none if its `diffusion_type` is `"full"`) or `"student"` (the student's
            blocks).
        shifted (`bool`): whether the logits at position i − 1 are those of position i.
        causal (`bool`): whether a block is causal inside, its unmasked tokens first.
    """

    blocks: str
    shifted: bool = False
    causal: bool = False


@dataclass(frozen=True)
class TeacherFamily:
    """What the trainer needs to know of a kind of checkpoint that can teach: its class's `teacher_family`.

    Args:
        native ([`TeacherView`]): how it was trained.
        paper ([`TeacherView`], *optional*): how the published TIDE (2604.26951) feeds it; as `native` by default.
        mask_token_id (`int`, *optional*): used where neither its config nor its tokenizer gives one.
    """

    native: TeacherView
    paper: TeacherView | None = None
    mask_token_id: int | None = None

    def view(self, context: str) -> TeacherView:
        """How to feed it in a `context`, `"paper"` or `"native"` (the `teacher_context` of a run)."""
        return self.paper if context == "paper" and self.paper is not None else self.native


class CarriesItsCode(WritesForOlderReaders):
    """A configuration that is saved with the code that loads it; stands before a transformers configuration."""

    # file and class of the language model, as auto_map names it
    modeling: ClassVar[str]

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Writes config.json and, next to it, the code that loads the checkpoint where tide_hf is not installed.

        transformers' `register_for_auto_class` would name one Auto class, and copy the file of the instance's class,
        which FSDP2 replaces by a class of its own; here `auto_map` names all four.

        Args:
            save_directory (`str` or `Path`): the folder to write to.
            args, kwargs: as in transformers.
        """
        own_class = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        self.auto_map = {"AutoConfig": own_class, **dict.fromkeys(AUTO_MODELS, self.modeling)}
        super().save_pretrained(save_directory, *args, **kwargs)
        model_file = Path(__file__).with_name(f"{self.modeling.partition('.')[0]}.py")
        if model_file.is_file():  # a configuration fetched on its own comes without the model's file
            for file in (model_file, *get_relative_import_files(model_file)):
                shutil.copy(file, save_directory)


def refuse_sliding_windows(config) -> None:
    """Raises ValueError for sliding-window layers of a `config`: the masks of a diffusion LM have no window."""
    window = getattr(config, "sliding_window", None)
    everywhere = window is not None and getattr(config, "use_sliding_window", False)
    layer_types = getattr(config, "layer_types", None)
    # older configurations have no layer_types
    if everywhere if layer_types is None else "sliding_attention" in layer_types:
        raise ValueError(
            f"Some layers of this {config.model_type} attend to a sliding window (use_sliding_window="
            f"{config.use_sliding_window}, sliding_window={window}), and a diffusion LM's masks "
            "have no window: set use_sliding_window=false, or every entry of layer_types to 'full_attention', if that "
            "is what the model was trained with."
        )


@dataclass(init=False, repr=False, eq=False)
class TypedDiffusionConfig(CarriesItsCode):
    """Says which kind of diffusion LM a network is; stands before a transformers configuration in the bases.

    Checkpoints written before the field had this name call it `objective`, and are read as if they said
    `diffusion_type`.

    Args:
        diffusion_type (`str`, *optional*): one of the class's `DIFFUSION_TYPES`, the first of them by default.

    Raises:
        ValueError: for any other diffusion type, or an `objective` that contradicts it.
    """

    DIFFUSION_TYPES: ClassVar[tuple[str, ...]]

    # None until __post_init__: a default of its own could not be told from the same value beside an older `objective`
    diffusion_type: str | None = None

    def __post_init__(self, **kwargs):
        objective = kwargs.pop("objective", None)
        if None not in (self.diffusion_type, objective) and self.diffusion_type != objective:
            raise ValueError(
                f"diffusion_type={self.diffusion_type!r} contradicts objective={objective!r}, the older name of the "
                "same setting: remove objective."
            )
        self.diffusion_type = self.diffusion_type or objective or self.DIFFUSION_TYPES[0]
        if self.diffusion_type not in self.DIFFUSION_TYPES:
            choices = " or ".join(map(repr, self.DIFFUSION_TYPES))
            raise ValueError(f"diffusion_type must be {choices}, got {self.diffusion_type!r}.")
        super().__post_init__(**kwargs)


@dataclass(init=False, repr=False, eq=False)
class DiffusionConfig(TypedDiffusionConfig):
    """What every masked student's configuration has; stands before a transformers configuration in the bases.

    Args:
        is_causal (`bool`): False: without a 4-D mask every position sees every other; True in families that are
            causal inside a block.
        mask_token_id (`int`, *optional*): id of [MASK]; None where a published checkpoint leaves it to the tokenizer.
        block_size (`int`): tokens per diffusion block, counted from absolute position 0.
        diffusion_type (`str`, *optional*): `"block"` (blocks in order, clean prefix) or `"full"` (one bidirectional
            sequence); by default the first of the class's `DIFFUSION_TYPES`, which for a published family is how it
            was trained.
        noise_schedule (`str`): α(t) the model was trained with, a name in [`~tide_hf.models.SCHEDULES`].

    Raises:
        ValueError: for an impossible block size, diffusion type or schedule, causal attention or sliding windows.
    """

    DIFFUSION_TYPES = ("block", "full")
    teacher_family = TeacherFamily(TeacherView("own"))

    is_causal: bool = False
    mask_token_id: int | None = None
    block_size: int = 32
    noise_schedule: str = "linear"

    @property
    def shifted_logits(self) -> bool:
        """Whether the logits at position i − 1 are those of position i, as a network pretrained on next tokens has."""
        return self.teacher_family.native.shifted

    @property
    def causal_blocks(self) -> bool:
        """Whether a block is causal inside, its unmasked tokens first and each at its own position."""
        return self.teacher_family.native.causal

    @property
    def known_mask_token_id(self) -> int | None:
        """`mask_token_id` or, where config.json gives none, that of the family, if the vocabulary has it."""
        if self.mask_token_id is not None:
            return self.mask_token_id
        family = self.teacher_family.mask_token_id
        return family if family is not None and family < self.vocab_size else None

    def __post_init__(self, **kwargs):
        if self.is_causal != self.causal_blocks:
            why = "its blocks are causal" if self.causal_blocks else "it sees both sides of a [MASK]"
            raise ValueError(f"is_causal={self.is_causal}: leave is_causal at {self.causal_blocks}, since {why}.")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {self.block_size}.")
        named_schedule(self.noise_schedule, "noise_schedule")
        super().__post_init__(**kwargs)
        refuse_sliding_windows(self)


@strict
class TIDEQwen3Config(DiffusionConfig, Qwen3Config):
    """[`~transformers.Qwen3Config`] of a Qwen3 diffusion LM; its further fields are [`DiffusionConfig`]'s."""

    model_type = "tide_qwen3"
    modeling = "modeling_tide.TIDEQwen3ForBlockDiffusion"


@strict
class TIDEQwen2Config(DiffusionConfig, Qwen2Config):
    """[`~transformers.Qwen2Config`] of a Qwen2 or Qwen2.5 diffusion LM; further fields: [`DiffusionConfig`]'s."""

    model_type = "tide_qwen2"
    modeling = "modeling_tide.TIDEQwen2ForBlockDiffusion"


@strict
class TIDELlamaConfig(DiffusionConfig, LlamaConfig):
    """[`~transformers.LlamaConfig`] of a Llama diffusion LM; its further fields are [`DiffusionConfig`]'s."""

    model_type = "tide_llama"
    modeling = "modeling_tide.TIDELlamaForBlockDiffusion"
