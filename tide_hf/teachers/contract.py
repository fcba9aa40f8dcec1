"""Which models can teach, and how each is fed.

What a family is stands on its configuration class (`teacher_family`); this file turns it into a layout.
"""

from ..diffusion import LayoutSpec
from ..models import MODELS
from ..models.configuration_tide import TeacherFamily
from .autoregressive import AUTOREGRESSIVE, is_autoregressive, reason_to_refuse

CONTEXTS = ("paper", "native")
# model_types of the families known here, for messages
FAMILIES = tuple(dict.fromkeys(config.model_type for config in MODELS if hasattr(config, "teacher_family")))
# model_type -> why it cannot teach
REFUSED = {
    "diffusion_gemma": (
        "DiffusionGemma is not a masked diffusion LM: it replaces tokens by uniformly random ones and has no mask "
        "token, so there are no masked positions at which to compare a teacher's and a student's distributions."
    ),
}


def family_of(config) -> TeacherFamily | None:
    """The family of a model, from the class of its `config`; None for an unknown one."""
    return getattr(type(config), "teacher_family", None)


def contract_for(config, mask_token_id: int | None, context: str, student_block_size: int) -> LayoutSpec:
    """The contract of a teacher: of a known family, or autoregressive.

    Args:
        config (`PretrainedConfig`): the teacher's.
        mask_token_id (`int`, *optional*): its resolved [MASK]; an autoregressive one has none.
        context (`str`): `teacher_context`: `"paper"`, as the published TIDE (2604.26951) feeds it, or `"native"`, as
            it was trained. They differ for LLaDA2 (the noised sequence alone; blocks with a clean prefix) and WeDLM
            (bidirectional blocks of the student's size; its reordered causal stream). An autoregressive teacher reads
            the clean row in either.
        student_block_size (`int`): tokens per block of the student.

    Returns:
        [`~tide_hf.diffusion.LayoutSpec`]

    Raises:
        ValueError: for an unknown family, a model that is not a masked diffusion LM, or an unknown context.
    """
    refuse_unknown(config)
    if context not in CONTEXTS:
        raise ValueError(
            f"teacher_context={context!r} is not available for {config.model_type}; it has {', '.join(CONTEXTS)}."
        )
    if is_autoregressive(config):
        return AUTOREGRESSIVE
    view = family_of(config).view(context)
    block_size = None
    if view.blocks == "student":
        block_size = student_block_size
    elif view.blocks == "own" and getattr(config, "diffusion_type", "block") != "full":
        block_size = config.block_size
    return LayoutSpec(mask_token_id, block_size, block_size is not None, view.shifted, view.causal)


def refuse_unknown(config) -> None:
    """Refuses a model that cannot teach.

    Args:
        config (`PretrainedConfig`): the teacher's.

    Raises:
        ValueError: with the known families and how to add one, or with the reason.
    """
    if config.model_type in REFUSED:
        raise ValueError(f"model_type={config.model_type!r} cannot be a teacher. {REFUSED[config.model_type]}")
    if is_autoregressive(config):
        if (reason := reason_to_refuse(config)) is not None:
            raise ValueError(f"model_type={config.model_type!r} cannot be a teacher. {reason}")
    elif family_of(config) is None:
        raise ValueError(
            f"model_type={config.model_type!r} is not a known teacher: neither an autoregressive LM of transformers "
            f"nor a diffusion LM of a known family ({', '.join(FAMILIES)}). To add one, give its configuration class "
            "a teacher_family (tide_hf.teachers.TeacherFamily) and register its model class with "
            "AutoModelForCausalLM."
        )
