"""Which of a block's masked positions keep their proposed token in a pass: one object per rule.

A new rule is a subclass of [`RevealRule`], given to `generate` or `infill` as `reveal_rule`.

This file travels with checkpoints: it imports torch alone.

Shapes: B rows, K columns being denoised.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

DREAM_EPSILON = 1e-3  # where Dream's time ends


@dataclass
class MaskedPositions:
    """What a pass knows of the positions that may be revealed. Statistics that no rule asked for are None.

    Args:
        masked (`torch.BoolTensor` of shape `(B, K)`): still [MASK]. All else is undefined elsewhere.
        quota (`torch.LongTensor` of shape `(B,)`): the rule's own number for this pass.
        generator (`torch.Generator`, *optional*): source of all random draws.
        confidence (`torch.Tensor` of shape `(B, K)`, *optional*): probability of the proposed token.
        entropy (`torch.Tensor` of shape `(B, K)`, *optional*): of the distribution, in nats.
        margin (`torch.Tensor` of shape `(B, K)`, *optional*): the largest probability less the second largest.
    """

    masked: torch.BoolTensor
    quota: torch.LongTensor
    generator: torch.Generator | None = None
    confidence: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    margin: torch.Tensor | None = None

    def rank(self, order: str) -> torch.LongTensor:
        """Rank of each masked position in its row, from 0, `(B, K)`; among equals, left before right.

        Args:
            order (`str`): `"confidence"` or `"margin"`, the largest first; `"entropy"`, the smallest first;
                `"left_to_right"`; `"random"`.
        """
        if order == "left_to_right":
            return self.masked.cumsum(-1) - 1
        if order == "random":
            device = self.masked.device
            score = torch.rand(self.masked.shape, device=device, generator=self.generator)
        else:
            score = -self.entropy if order == "entropy" else getattr(self, order)
        return rank_descending(score.masked_fill(~self.masked, -torch.inf))


class RevealRule:
    """Decides which masked positions of a block a pass reveals.

    Attributes:
        statistics (`tuple[str, ...]`): what [`MaskedPositions`] must hold: `"confidence"`, `"entropy"`, `"margin"`.
            Decoding is fastest where nothing besides the confidence is asked for.
        is_exact (`bool`): whether every pass reveals as many positions of a row as its quota, so that the host never
            waits for the device to learn how many are left.
    """

    statistics: tuple[str, ...] = ("confidence",)
    is_exact: bool = False

    def quotas(self, num_masked: int, block_size: int, generator: torch.Generator | None) -> tuple[int, ...]:
        """A number for each pass over a row's block, 0 in passes after the last; one per pass by default.

        Args:
            num_masked (`int`): masked positions of the row's block.
            block_size (`int`): tokens of the row's block, given ones included.
            generator (`torch.Generator`, *optional*): source of all random draws.
        """
        return (1,) * num_masked

    def reveal(self, now: MaskedPositions) -> torch.BoolTensor:
        """The positions to reveal, `(B, K)`, at least one of the batch; what is not masked is left alone.

        Args:
            now ([`MaskedPositions`]): of this pass.
        """
        raise NotImplementedError


class RevealQuota(RevealRule):
    """The first positions of each row, as many as the pass's quota.

    Args:
        order (`str`): as in [`MaskedPositions.rank`].
        split (`str`): a name of [`SPLITS`].
        steps (`int`, *optional*): passes per block; as many as the block has tokens by default.
    """

    is_exact = True

    def __init__(self, order: str = "confidence", split: str = "even", steps: int | None = None):
        self.order, self.split, self.steps = order, split, steps
        self.statistics = (order,) if order in ("confidence", "entropy", "margin") else ()

    def quotas(self, num_masked: int, block_size: int, generator: torch.Generator | None) -> tuple[int, ...]:
        """As the split says, without passes that would reveal nothing.

        Args:
            num_masked (`int`), block_size (`int`), generator (`torch.Generator`, *optional*): as in [`RevealRule`].
        """
        counts = SPLITS[self.split](num_masked, self.steps or block_size, block_size, generator)
        return tuple(count for count in counts if count)

    def reveal(self, now: MaskedPositions) -> torch.BoolTensor:
        """The first of each row.

        Args:
            now ([`MaskedPositions`]): of this pass.
        """
        return now.rank(self.order) < now.quota[:, None]


class RevealConfident(RevealQuota):
    """All positions whose confidence reaches a threshold, and the pass's quota at least.

    Args:
        threshold (`float`): probability.
        inclusive (`bool`): whether a confidence that equals the threshold reaches it.
        order (`str`), split (`str`), steps (`int`, *optional*): of the quota, as in [`RevealQuota`].
    """

    is_exact = False

    def __init__(self, threshold: float, inclusive: bool = True, order="confidence", split="even", steps=None):
        super().__init__(order, split, steps)
        self.threshold, self.inclusive = threshold, inclusive
        self.statistics = tuple({"confidence", *self.statistics})

    def reveal(self, now: MaskedPositions) -> torch.BoolTensor:
        """The confident ones and the first of each row.

        Args:
            now ([`MaskedPositions`]): of this pass.
        """
        reaches = now.confidence >= self.threshold if self.inclusive else now.confidence > self.threshold
        return super().reveal(now) | reaches


class RevealWithinEntropy(RevealRule):
    """As many positions as an entropy bound allows: [`within_entropy_bound`].

    Args:
        bound (`float`): nats, ≥ 0.
    """

    statistics = ("entropy",)

    def __init__(self, bound: float):
        self.bound = bound

    def reveal(self, now: MaskedPositions) -> torch.BoolTensor:
        """Those within the bound.

        Args:
            now ([`MaskedPositions`]): of this pass.
        """
        return within_entropy_bound(now.entropy.masked_fill(~now.masked, torch.inf), self.bound)


def rule_of(settings) -> RevealRule:
    """The rule that generation settings choose.

    Args:
        settings ([`TIDEGenerationConfig`]): with every default filled in.
    """
    if settings.entropy_bound is not None:
        return RevealWithinEntropy(settings.entropy_bound)
    quota = settings.remasking, settings.step_quota, settings.steps_per_block
    if settings.confidence_threshold is not None:
        return RevealConfident(settings.confidence_threshold, settings.threshold_inclusive, *quota)
    return RevealQuota(*quota)


def rank_descending(score_BK: torch.Tensor) -> torch.Tensor:
    """Rank of each column in its row's descending order of `score_BK`, from 0; among equals, left before right."""
    # the second argsort inverts the permutation that the first one gives; the first is stable so that ties are decided
    # in the same way on every device and in every batch
    return score_BK.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def within_entropy_bound(entropy_BK: torch.Tensor, bound: float) -> torch.Tensor:
    """The columns to reveal under an entropy bound.

    In ascending order of entropy (among equals the left one first) the longest prefix U with
    Σ_{i∈U} H_i − max_{i∈U} H_i ≤ bound. That bounds what the revealed tokens say about one another, since the joint
    entropy is at least the largest and at most the sum. The first is always revealed; bound 0 reveals one token per
    step, and those that are certain.

    Args:
        entropy_BK (`torch.Tensor` of shape `(B, K)`): nats; infinite where nothing is to be revealed.
        bound (`float`): nats, ≥ 0.

    Returns:
        `torch.BoolTensor` of shape `(B, K)`.

    Source: EB-Sampler, arXiv 2505.24857 §3.
    """
    ascending, column = entropy_BK.sort(dim=-1, stable=True)
    # in this order the largest of a prefix is its last: the sum without it is the sum of those before
    before = torch.cat([torch.zeros_like(ascending[:, :1]), ascending[:, :-1].cumsum(-1)], -1)
    revealed = (before <= bound) & ascending.isfinite()
    return torch.zeros_like(revealed).scatter(-1, column, revealed)


# ---- how many positions each of a block's steps reveals ----


@lru_cache(maxsize=1024)
def reveal_counts(num_masked: int, steps: int) -> tuple[int, ...]:
    """How many of `num_masked` positions each of at most `steps` steps reveals, without steps that reveal none.

    Step j of S goes from time t = (S−j)/S to s = (S−j−1)/S. Under the linear schedule a position stays masked with
    probability s/t, so round(left · (1 − s/t)) of those left are revealed: equal shares, whatever schedule the model
    was trained with, since the network is not told the time. The quotient is taken in float32 from 1 − (1 − s), as in
    the published sampler: that decides which way a half is rounded, and the result is the same token for token.

    Args:
        num_masked (`int`): masked positions of a row's block.
        steps (`int`): S, at least 1.

    Returns:
        `tuple[int]`: positive counts that add up to `num_masked`.

    Source: MDLM 2406.07524 eq. 7; the sampler of dllm and TIDE.
    """
    time = (torch.arange(steps, -1, -1, dtype=torch.float64) / steps).float()
    masked_probability = 1 - (1 - time)
    stays_masked = (masked_probability[1:] / masked_probability[:-1]).tolist()
    counts, left = [], num_masked
    for probability in stays_masked:
        counts.append(min(round(left * (1 - probability)), left))
        left -= counts[-1]
    return tuple(count for count in counts if count)


def _remainder_first(total: int, steps: int) -> tuple[int, ...]:
    """Equal shares of a total; what does not divide goes to the first steps, one each."""
    return tuple(total // steps + (step < total % steps) for step in range(steps))


def _of_block(num_masked: int, steps: int, block_size: int) -> tuple[int, ...]:
    """Shares of the block's size, as long as masks are left."""
    counts, left = [], num_masked
    for share in _remainder_first(block_size, steps):
        counts.append(min(share, left))
        left -= counts[-1]
    return tuple(counts)


def _dream_times(steps: int) -> torch.Tensor:
    """Times between which Dream's steps go, from 1 down to ε, `(steps + 1,)`."""
    return torch.linspace(1, DREAM_EPSILON, steps + 1)


@lru_cache(maxsize=1024)
def _remainder_last(num_masked: int, steps: int) -> tuple[int, ...]:
    """The share 1 − s/t of those left, rounded down, and in the last step the rest; in float32 as published."""
    time, counts, left = _dream_times(steps), [], num_masked
    for share in (1 - time[1:-1] / time[:-2]).unbind():
        counts.append(int((left * share).item()))
        left -= counts[-1]
    return (*counts, left)


def _binomial(num_masked: int, steps: int, generator: torch.Generator | None) -> tuple[int, ...]:
    """Counts of a reverse process in which each position is revealed on its own, with the probability 1 − s/t.

    A position stays masked until time t with probability t, so it is revealed in the step in which the time falls
    below one number drawn for it from [0, 1), or in the last one.
    """
    device = "cpu" if generator is None else generator.device
    drawn = torch.rand(num_masked, generator=generator, device=device).cpu()
    step = (drawn[:, None] < _dream_times(steps)[1:-1]).sum(-1)
    return tuple(torch.bincount(step, minlength=steps).tolist())


# step_quota -> counts by number of masked positions, steps, block size, and generator
SPLITS = {
    "even": lambda num_masked, steps, block_size, generator: reveal_counts(num_masked, steps),
    "remainder_first": lambda num_masked, steps, block_size, generator: _remainder_first(num_masked, steps),
    "remainder_last": lambda num_masked, steps, block_size, generator: _remainder_last(num_masked, steps),
    "of_block": lambda num_masked, steps, block_size, generator: _of_block(num_masked, steps, block_size),
    "binomial": lambda num_masked, steps, block_size, generator: _binomial(num_masked, steps, generator),
}
