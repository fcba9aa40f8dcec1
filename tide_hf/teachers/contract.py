"""What the trainer needs to know about a teacher: its family, and how it is fed."""

from dataclasses import dataclass

from ..diffusion import LayoutSpec

CONTEXTS = ("paper", "native")


@dataclass(frozen=True)
class View:
    """How a family is fed in one `teacher_context`.

    Args:
        blocks (`str`): `"none"` (one bidirectional sequence, no clean copy), `"own"` (the block size of its config),
            `"student"` (that of the student) or `"diffusion_type"` (as its config's `diffusion_type` says).
        shifted (`bool`), causal (`bool`): see [`~tide_hf.diffusion.LayoutSpec`].
    """

    blocks: str
    shifted: bool = False
    causal: bool = False


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint the library knows as a teacher.

    Args:
        paper (`View`): how the published TIDE feeds it, or would, the model being fed as it was trained.
        native (`View`): how it was trained.
        mask_token_id (`int`, *optional*): used where neither its config nor its tokenizer says it.
        block_size (`int`, *optional*): tokens per block where its config has none.
    """

    paper: View
    native: View
    mask_token_id: int | None = None
    block_size: int | None = None

    @classmethod
    def of(cls, view: View, mask_token_id: int | None = None) -> "Family":
        """A family that TIDE did not use: both contexts are what it was trained on."""
        return cls(view, view, mask_token_id)


# Sources of the mask ids: dFactory and dInfer (LLaDA2, LLaDA-MoE), Tencent's training and inference code (WeDLM),
# GSAI-ML's and JetAstra's published code (LLaDA-8B, SDAR), HKUNLP's config (Dream), added-token counts (a2d)
FAMILIES = {
    "tide_qwen3": Family.of(View("diffusion_type")),
    "tide_qwen2": Family.of(View("diffusion_type")),
    "tide_llama": Family.of(View("diffusion_type")),
    "a2d-qwen3": Family.of(View("diffusion_type"), 151669),
    "a2d-qwen2": Family.of(View("diffusion_type"), 151665),
    "a2d-llama": Family.of(View("diffusion_type")),
    "llada2_moe": Family(View("none"), View("own"), 156895),
    "wedlm": Family(View("student"), View("own", causal=True), 151665, block_size=32),
    "llada": Family.of(View("none"), 126336),
    "llada (MoE)": Family.of(View("none"), 156895),
    "Dream": Family.of(View("none", shifted=True), 151666),
    "sdar": Family.of(View("own"), 151669),
    "sdar_moe": Family.of(View("own"), 151669),
}
# model_type -> why it cannot teach
REFUSED = {
    "diffusion_gemma": (
        "DiffusionGemma is no masked diffusion LM: it replaces tokens by uniformly random ones and has no mask token, "
        "so there are no masked positions at which a teacher's and a student's distributions could be compared."
    ),
}


def family_of(config) -> Family | None:
    """The family of a configuration; None for an unknown one."""
    name = config.model_type
    if name == "llada" and hasattr(config, "num_experts"):
        name = "llada (MoE)"
    return FAMILIES.get(name)


def contract_for(config, mask_token_id: int, context: str, student_block_size: int) -> LayoutSpec:
    """The contract of a teacher of a known family.

    Args:
        config (`PretrainedConfig`): the teacher's.
        mask_token_id (`int`): its resolved [MASK].
        context (`str`): `teacher_context`, `"paper"` or `"native"` (SPEC §7). They differ for LLaDA2 (the noised
            sequence alone; blocks with a clean prefix) and WeDLM (bidirectional blocks of the student's size; its
            reordered causal stream).
        student_block_size (`int`): tokens per block of the student.

    Raises:
        ValueError: for an unknown family, a model that is no masked diffusion LM, or an unknown context.
    """
    refuse_unknown(config)
    if context not in CONTEXTS:
        raise ValueError(
            f"teacher_context={context!r} is not available for {config.model_type}; it has {', '.join(CONTEXTS)}."
        )
    family = family_of(config)
    view = family.paper if context == "paper" else family.native
    blocks = view.blocks
    if blocks == "diffusion_type":
        blocks = "none" if config.diffusion_type == "full" else "own"
    sizes = {
        "none": None,
        "own": getattr(config, "block_size", None) or family.block_size,
        "student": student_block_size,
    }
    return LayoutSpec(mask_token_id, sizes[blocks], blocks != "none", view.shifted, view.causal)


def refuse_unknown(config) -> None:
    """Refuses a model that cannot teach.

    Raises:
        ValueError: with the known families and how to add one, or with the reason.
    """
    if config.model_type in REFUSED:
        raise ValueError(f"model_type={config.model_type!r} cannot be a teacher. {REFUSED[config.model_type]}")
    if family_of(config) is None:
        raise ValueError(
            f"model_type={config.model_type!r} is not a known teacher family; known are {', '.join(FAMILIES)}. A new "
            "one needs a transformers class registered with AutoModelForCausalLM and an entry in "
            "tide_hf.teachers.FAMILIES."
        )
