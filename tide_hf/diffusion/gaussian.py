"""The discrete schedule that belongs to Gaussian noise on one-hots (Duo 2506.10892 §3).

`x_t = α̃ x + σ̃ ξ` with x a one-hot of V tokens, ξ standard normal, α̃² = sigmoid(−γ), σ̃² = sigmoid(γ): its largest entry
is x's token as often as after uniform-state diffusion with some α, and any other token equally often.
"""

import math
from functools import lru_cache

import torch

NUM_POINTS = 2049  # of the table in γ
NUM_NODES = 4001  # of the integral


class GaussianToDiscrete:
    """α(γ), tabulated for one vocabulary size, and its inverse.

    `P(argmax x_t is x's token) = ∫ φ(u − α̃/σ̃) Φ(u)^(V−1) du`, and `α = (V P − 1) / (V − 1)`.

    Args:
        num_tokens (`int`): V, at least 2.
        epsilon (`float`): ε in (0, ½); the table covers α in [ε, 1 − ε].

    Raises:
        ValueError: for less than 2 tokens, or an ε outside that range.

    Source: Duo 2506.10892 §3.
    """

    def __init__(self, num_tokens: int, epsilon: float = 1e-3):
        if num_tokens < 2 or not 0 < epsilon < 0.5:
            raise ValueError(f"A schedule needs at least 2 tokens and ε in (0, ½), got {num_tokens} and {epsilon}.")
        ends = [_crossing(lambda gamma, a=alpha: _kept(gamma, num_tokens) - a) for alpha in (1 - epsilon, epsilon)]
        self._gamma = torch.linspace(*ends, NUM_POINTS, dtype=torch.float64)
        self._alpha = torch.tensor([_kept(value, num_tokens) for value in self._gamma.tolist()], dtype=torch.float64)

    def alpha(self, gamma: torch.Tensor) -> torch.Tensor:
        """α of `gamma`, of any shape, clamped to the table's range; float64 on the host."""
        return _interpolate(self._gamma, self._alpha, gamma)

    def gamma(self, alpha: torch.Tensor) -> torch.Tensor:
        """γ of `alpha`, of any shape, clamped to the table's range; float64 on the host."""
        return _interpolate(self._alpha.flip(0), self._gamma.flip(0), alpha)


@lru_cache
def gaussian_schedule(num_tokens: int) -> GaussianToDiscrete:
    """The table for a vocabulary of `num_tokens`; made once, which takes about a second."""
    return GaussianToDiscrete(num_tokens)


def _kept(gamma: float, num_tokens: int) -> float:
    """α at one γ: the trapezoidal rule over ±9 standard deviations of the true token's entry."""
    mean = math.exp(-gamma / 2)  # α̃ / σ̃
    u = torch.linspace(-9, 9, NUM_NODES, dtype=torch.float64)
    others_smaller = torch.exp((num_tokens - 1) * torch.special.log_ndtr(u + mean))
    density = torch.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
    largest = torch.trapezoid(density * others_smaller, u).item()
    return (num_tokens * largest - 1) / (num_tokens - 1)


def _crossing(function, low: float = -12.0, high: float = 24.0) -> float:
    """Where a decreasing function is 0, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def _interpolate(x: torch.Tensor, y: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The value at `at` of the table's piecewise linear function; x is increasing."""
    at = at.double().clamp(x[0], x[-1])
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    return torch.lerp(y[right - 1], y[right], (at - x[right - 1]) / (x[right] - x[right - 1]))
