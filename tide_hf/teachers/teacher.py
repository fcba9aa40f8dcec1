"""What the trainer needs to know about a teacher, and the teacher's one forward."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..models.masked_diffusion import attention_mask_for, block_visibility

SUPPORTED_CONTEXTS = ("paper", "native")


@dataclass(frozen=True)
class TeacherContract:
    """How a teacher is fed.

    Args:
        mask_token_id (`int`): its [MASK].
        block_size (`int`, *optional*): tokens per block; None: the whole row is one block.
        clean_copy (`bool`): whether the clean copy of earlier blocks stands beside the noised sequence.
    """

    mask_token_id: int
    block_size: int | None
    clean_copy: bool


@dataclass(frozen=True)
class Family:
    """A model_type the library knows as a teacher.

    Args:
        contexts (`tuple[str, ...]`): values of `teacher_context` it supports.
        mask_token_id (`int`, *optional*): used where neither its config nor its tokenizer says it.
    """

    contexts: tuple[str, ...]
    mask_token_id: int | None = None


# WeDLM's mask id: the constant of Tencent's training and inference code
FAMILIES = {
    "tide_qwen3": Family(contexts=("paper", "native")),
    "a2d-qwen3": Family(contexts=("paper", "native")),
    "wedlm": Family(contexts=("paper",), mask_token_id=151665),
}


def contract_for(config, mask_token_id: int, context: str, student_block_size: int) -> TeacherContract:
    """The contract of a teacher of a known family.

    Args:
        config (`PretrainedConfig`): the teacher's.
        mask_token_id (`int`): its resolved [MASK].
        context (`str`): `teacher_context`. WeDLM in the paper's context sees blocks of the student's size.
        student_block_size (`int`): tokens per block of the student.

    Raises:
        ValueError: for an unknown family, or a context it does not support.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"model_type={config.model_type!r} is not a known teacher family; known are {', '.join(FAMILIES)}. A new "
            "one needs a transformers class registered with AutoModelForCausalLM and an entry in "
            "tide_hf.teachers.FAMILIES."
        )
    if context not in family.contexts:
        raise ValueError(
            f"teacher_context={context!r} is not available for {config.model_type}; "
            f"it has {', '.join(family.contexts)}."
        )
    if config.model_type == "wedlm":
        return TeacherContract(mask_token_id, student_block_size, clean_copy=True)
    full = config.objective == "full"
    return TeacherContract(mask_token_id, None if full else config.block_size, clean_copy=not full)


class Teacher:
    """A frozen diffusion LM that gives logits where they are asked for.

    It is no submodule of the student or of the trainer's model: it is never trained, never saved, and the optimizer
    does not know it.

    Args:
        model (`PreTrainedModel`): with `.model` (body) and `.lm_head`.
        contract ([`TeacherContract`]): how it is fed.
    """

    def __init__(self, model: PreTrainedModel, contract: TeacherContract):
        self.model = model.eval().requires_grad_(False)
        self.contract = contract

    @torch.no_grad()
    def logits(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits at the asked positions of one noised batch.

        CompDemo's two views are two noised copies in the same forward: they cannot see each other and share the clean
        copy, so the logits equal those of two passes.

        Args:
            batch (`Mapping`): the `teacher_…` tensors of [`~tide_hf.data.Noising`].

        Returns:
            `torch.Tensor` of shape `(M_T, U)`, in the teacher's dtype, in the order of `teacher_asked`.
        """
        stream, block = batch["teacher_stream"], batch["teacher_block"]
        visible = block_visibility(stream, block, stream, block)
        hidden = self.model.model(
            input_ids=batch["teacher_input_ids"],
            attention_mask=attention_mask_for(visible, self.model.config._attn_implementation, self.model.dtype),
            position_ids=batch["teacher_position_ids"],
            use_cache=False,
        ).last_hidden_state
        return self.model.lm_head(hidden.flatten(0, 1)[batch["teacher_asked"]])
