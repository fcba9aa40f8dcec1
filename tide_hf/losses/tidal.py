"""TIDAL: distillation strength over training progress and diffusion time (TIDE 2604.26951 §2.1).

It transforms the target of any forward divergence: see `token_divergence`, `chunk_divergence`.

Shapes: B rows, N positions, S ids that mean the same on both sides, C chunks.
"""

import math
from collections.abc import Callable

import torch

from .chunks import PROBABILITY_CEILING, PROBABILITY_FLOOR

MIDRANGE_WIDTH = 0.15  # TIDE §2.1: standard deviation of the mid-range weight, in units of diffusion time


def lambda_schedule(
    global_step: int | float,
    max_steps: int | float,
    *,
    lambda_init: float = 0.1,
    lambda_max: float = 0.9,
    growth: str = "cosine",
) -> float:
    """λ(s) = λ_init + (λ_max − λ_init)·g(s) at training progress s = global_step / max_steps, clamped to [0, 1].

    Args:
        global_step (`int`): optimizer steps done.
        max_steps (`int`): optimizer steps of the whole run.
        lambda_init, lambda_max (`float`): λ at the start and at the end.
        growth (`str`): `"cosine"`, g = ½(1 − cos πs), or `"linear"`, g = s.

    Raises:
        ValueError: if `max_steps` is not positive or `growth` is unknown.

    Source: TIDE 2604.26951 eq. 3; TAID 2501.16937.
    """
    if max_steps <= 0:
        raise ValueError(f"lambda_schedule needs max_steps > 0, got {max_steps}: progress needs an end.")
    progress = min(max(global_step / max_steps, 0.0), 1.0)
    if growth == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    elif growth != "linear":
        raise ValueError(f"growth must be 'cosine' or 'linear', got {growth!r}.")
    return lambda_init + (lambda_max - lambda_init) * progress


def tidal_lambda(lambda_progress: float, lambda_max: float, t: torch.Tensor, axes: str = "both") -> torch.Tensor:
    """λ of each row at diffusion time t: `"both"` λ(s)(1−t), `"progress"` λ(s), `"time"` λ_max(1−t).

    Args:
        lambda_progress (`float`): λ(s) of [`lambda_schedule`].
        lambda_max (`float`): used by `"time"` instead of λ(s).
        t (`torch.Tensor` of shape `(B,)`): diffusion time in [0, 1].
        axes (`str`): which of the two axes λ depends on.

    Returns:
        `torch.Tensor` with the shape of `t`. Source: TIDE §2.1.
    """
    if axes == "both":
        return lambda_progress * (1 - t)
    if axes == "progress":
        return torch.full_like(t, lambda_progress)
    if axes == "time":
        return lambda_max * (1 - t)
    raise ValueError(f"axes must be 'both', 'progress' or 'time', got {axes!r}.")


def timestep_weight(t: torch.Tensor, kind: str = "midrange") -> torch.Tensor:
    """ω(t), with the shape of `t`: 1 if `kind` is `"uniform"`, `exp(−(t−½)² / (2·0.15²))` if it is `"midrange"`.

    Source: TIDE 2604.26951 §2.1.
    """
    if kind == "uniform":
        return torch.ones_like(t)
    if kind == "midrange":
        return torch.exp(-((t - 0.5) ** 2) / (2 * MIDRANGE_WIDTH**2))
    raise ValueError(f"timestep_weight must be 'uniform' or 'midrange', got {kind!r}.")


def tidal_logits(
    student_logits_NS: torch.Tensor, teacher_logits_NS: torch.Tensor, lambda_N: torch.Tensor
) -> torch.Tensor:
    """TIDAL's target: logits `(1−λ) z_S + λ z_T`, detached, of shape `(N, S)`.

    Args:
        student_logits_NS, teacher_logits_NS (`torch.Tensor` of shape `(N, S)`): over the same ids.
        lambda_N (`torch.Tensor` of shape `(N,)`): λ of each position, see [`tidal_lambda`]; with 0 the student is its
            own target, with 1 the teacher is.

    Source: TIDE 2604.26951 §2.1.
    """
    dtype = torch.promote_types(student_logits_NS.dtype, teacher_logits_NS.dtype)
    student, teacher = student_logits_NS.detach().to(dtype), teacher_logits_NS.detach().to(dtype)
    return torch.lerp(student, teacher, lambda_N.to(dtype)[:, None])


def tidal_log_probabilities(
    student_log_p_C: torch.Tensor, teacher_log_p_C: torch.Tensor, lambda_C: torch.Tensor
) -> torch.Tensor:
    """Chunk TIDAL's target: `log((1−λ) p_S + λ p_T)`, detached and clamped, of shape `(C,)`.

    Args:
        student_log_p_C, teacher_log_p_C (`torch.Tensor` of shape `(C,)`): log-probabilities of the chunks.
        lambda_C (`torch.Tensor` of shape `(C,)`): λ of each chunk's row, see [`tidal_lambda`].

    Source: TIDE 2604.26951 §2.1, §2.3.
    """
    lambda_C = lambda_C.to(student_log_p_C.dtype)
    mixed_C = ((1 - lambda_C) * student_log_p_C.exp() + lambda_C * teacher_log_p_C.exp()).detach()
    return mixed_C.clamp(PROBABILITY_FLOOR, PROBABILITY_CEILING).log()


def expected_tidal_strength(
    masked_probability: Callable[[torch.Tensor], torch.Tensor],
    *,
    lambda_init: float = 0.1,
    lambda_max: float = 0.9,
    growth: str = "cosine",
    axes: str = "both",
    weight: str = "midrange",
    time_epsilon: float = 1e-3,
    num_points: int = 4001,
) -> float:
    """Ratio of TIDAL's gradient to that of plain KL, to first order, averaged over progress and masked positions.

    `∫ λ(s, t) ω(t) (1 − α(t)) dt ds / ∫ (1 − α(t)) dt` over s in [0, 1], t in [time_epsilon, 1]; 0.0856 with the
    defaults and the linear schedule. After division by it, a distillation weight of 1 means the same as for KL.

    Args:
        masked_probability (`Callable`): 1 − α(t), the probability that a trained-on position is masked.
        lambda_init, lambda_max (`float`), growth (`str`): of [`lambda_schedule`].
        axes (`str`): of [`tidal_lambda`].
        weight (`str`): kind of [`timestep_weight`].
        time_epsilon (`float`): smallest diffusion time.
        num_points (`int`): points of the trapezoidal rule on each axis.
    """
    s = torch.linspace(0, 1, num_points, dtype=torch.float64)
    lambda_s = torch.tensor(
        [lambda_schedule(x, 1.0, lambda_init=lambda_init, lambda_max=lambda_max, growth=growth) for x in s.tolist()],
        dtype=torch.float64,
    )
    t = torch.linspace(time_epsilon, 1, num_points, dtype=torch.float64)
    mean_lambda_t = tidal_lambda(torch.trapezoid(lambda_s, s).item(), lambda_max, t, axes)
    masked_t = masked_probability(t)
    numerator = torch.trapezoid(mean_lambda_t * timestep_weight(t, weight) * masked_t, t)
    return (numerator / torch.trapezoid(masked_t, t)).item()
