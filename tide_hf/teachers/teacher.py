"""The teacher's one forward, up to its head.

Shapes: M_T asked positions, R of them, K hidden, U vocabulary of the teacher, P packed columns.
"""

import torch
from transformers import PreTrainedModel

from ..diffusion import LayoutSpec, NetworkInputs
from ..models.masked_diffusion import attention_mask_for, block_visibility
from .autoregressive import transformed_logits


class Teacher:
    """A frozen LM that gives hidden states where they are asked for, and its head for them.

    It is not a submodule of the student or of the trainer's model: it is never trained or saved, and the optimizer
    does not see it.

    Args:
        model (`PreTrainedModel`): a body (`base_model`) with an output embedding as its head.
        contract ([`LayoutSpec`]): how it is fed.
    """

    def __init__(self, model: PreTrainedModel, contract: LayoutSpec):
        self.model = model.eval().requires_grad_(False)
        self.contract = contract

    @torch.no_grad()
    def hidden(self, inputs: NetworkInputs) -> torch.Tensor:
        """Hidden states before the head, at the asked positions of one noised batch.

        CompDemo's two views (TIDE 2604.26951 §2.2) are two noised copies in the same forward: they cannot see each
        other and share the clean copy, so that the states equal those of two passes.

        Args:
            inputs ([`~tide_hf.diffusion.NetworkInputs`]): the teacher's of a [`~tide_hf.diffusion.NoisedBatch`].

        Returns:
            `torch.Tensor` of shape `(M_T, K)`, in the teacher's dtype, on the inputs' device, in the order in which
            they are asked; [`logits`] takes any selection of them.
        """
        asked = inputs.asked
        device = self.device(asked.device)
        if self.contract.autoregressive:
            # rows begin in the first column of their own lines: the network's own causal mask is all they need
            network = {"input_ids": inputs.input_ids.to(device)}
            hidden = self.model.base_model(**network, use_cache=False).last_hidden_state
            return hidden.flatten(0, 1)[asked.to(hidden.device)].to(asked.device)
        input_ids, position_ids, stream, block = (
            tensor.to(device) for tensor in (inputs.input_ids, inputs.position_ids, inputs.stream, inputs.block)
        )
        visible = block_visibility(stream, block, stream, block, self.contract.causal)
        hidden = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask_for(visible, self.model.config._attn_implementation, self.model.dtype),
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        return hidden.flatten(0, 1)[asked.to(hidden.device)].to(asked.device)

    @torch.no_grad()
    def logits(self, hidden_RK: torch.Tensor) -> torch.Tensor:
        """The head: logits `(R, U)` of `hidden_RK`, `(R, K)`, on its device.

        They are computed in the teacher's own precision, even inside the student's autocast.
        """
        head = self.model.get_output_embeddings()
        device = hidden_RK.device if head.weight.is_meta else head.weight.device
        with torch.autocast(device.type, enabled=False):
            logits = head(hidden_RK.to(device))
            if self.contract.autoregressive:
                logits = transformed_logits(self.model.config, logits)
            return logits.to(hidden_RK.device)

    def device(self, default: torch.device) -> torch.device:
        """Where its input goes: the device of its first weight that is not off-loaded; `default` without any."""
        return next((weight.device for weight in self.model.parameters() if not weight.is_meta), default)
