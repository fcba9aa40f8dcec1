"""Changing tokens that are already revealed, while their block is being denoised (LLaDA2.1).

This file travels with checkpoints: it imports torch alone.

Shapes: B rows, K columns being denoised.
"""

import torch


class TokenEdits:
    """Says which tokens of a block may change in a pass, and which do.

    A row without masks takes further passes until one changes nothing, at most `max_steps`.

    Args:
        masked (`torch.BoolTensor` of shape `(B, K)`): [MASK] before the block's first pass; only these may change.
        threshold (`float`): a token is replaced by another whose probability is larger than this.
        max_steps (`int`): passes after the one that revealed a row's last mask.
    """

    def __init__(self, masked: torch.BoolTensor, threshold: float, max_steps: int):
        self.may_change, self.threshold = masked.clone(), threshold
        self._left = torch.full_like(masked[:, 0], max_steps, dtype=torch.long)

    def active(self, masked: torch.BoolTensor) -> torch.BoolTensor:
        """Positions whose token is proposed anew, `(B, K)`: those of rows that are not done.

        Args:
            masked (`torch.BoolTensor` of shape `(B, K)`): still [MASK].
        """
        return self.may_change & (masked.any(-1) | (self._left > 0))[:, None]

    def changed(self, masked, ids, tokens, confidence) -> torch.BoolTensor:
        """The positions to overwrite, `(B, K)`; counts the pass.

        Args:
            masked (`torch.BoolTensor` of shape `(B, K)`): still [MASK] before this pass.
            ids (`torch.LongTensor` of shape `(B, K)`): what stands there.
            tokens (`torch.LongTensor` of shape `(B, K)`): what is proposed where [`active`].
            confidence (`torch.Tensor` of shape `(B, K)`): its probability.
        """
        edits = self.active(masked) & ~masked & (tokens != ids) & (confidence > self.threshold)
        goes_on = masked.any(-1) | edits.any(-1)
        self._left = torch.where(goes_on, self._left - (~masked.any(-1)).long(), 0)
        return edits
