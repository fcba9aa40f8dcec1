"""What a divergence is, and how it is computed from two networks' logits or chunk likelihoods.

A divergence is one class in one file of `divergences/`: its values from log-probabilities, its parameters, and what
it compares. Everything else follows from it: fields of `TIDEConfig`, `--help`, the checks, and the slices in which
training computes it.

Shapes: N positions that are masked and aligned, V student vocabulary, U teacher vocabulary, S ids that mean the same
on both sides, C chunks.
"""

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch

from .chunks import chunk_log_probability
from .denoising import as_full_precision
from .tidal import tidal_log_probabilities, tidal_logits


def parameter(default: float, text: str, low: float = 0.0, high: float = float("inf")):
    """A parameter of a divergence: a float in the open interval `(low, high)`, with a default and a help text.

    Args:
        default (`float`): its value if none is given.
        text (`str`): what it is, for `--help`.
        low, high (`float`): the ends of the interval, which are not allowed themselves.
    """
    return field(default=default, metadata={"help": text, "range": (low, high)})


@dataclass(frozen=True)
class Divergence:
    """How far a student's distribution is from its target; subclasses are frozen dataclasses whose fields are floats.

    Class attributes:

    - `name` (`str`): in configurations, logs and cards; the class's own name by default.
    - `pairs`: `"token"`: `values` compares whole distributions over the shared vocabulary. `"chunk"`: it compares the
      probabilities of the true tokens of chunks, which also works across tokenizers.
    - `direction`: `"forward"` weighs by the target, `"reverse"` by the student, `"symmetric"` by both. TIDAL goes with
      forward divergences.

    Raises:
        ValueError: for a parameter out of range.
    """

    name: ClassVar[str] = "divergence"
    pairs: ClassVar[Literal["token", "chunk"]] = "token"
    direction: ClassVar[Literal["forward", "reverse", "symmetric"]] = "symmetric"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("name", cls.__name__)

    def __post_init__(self):
        for knob in fields(self):
            value, (low, high) = getattr(self, knob.name), knob.metadata.get("range", (-torch.inf, torch.inf))
            if not low < value < high:
                raise ValueError(f"{self.name}: {knob.name}={value} must lie in ({low:g}, {high:g}).")

    def values(self, log_student: torch.Tensor, log_target: torch.Tensor) -> torch.Tensor:
        """The divergence at each position or chunk, in nats, differentiable in `log_student`.

        Args:
            log_student, log_target (`torch.Tensor`): log-probabilities, of shape `(N, S)` where `pairs` is `"token"`;
                where it is `"chunk"`, of shape `(C,)`: of each chunk's true tokens. The target has no gradient.

        Returns:
            `torch.Tensor` of shape `(N,)` or `(C,)`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define values(log_student, log_target).")

    def to_dict(self) -> dict[str, float]:
        """Parameters under the names of their fields in a configuration: `{name}_{parameter}`."""
        return {f"{self.name}_{knob.name}": getattr(self, knob.name) for knob in fields(self)}


def token_divergence(
    divergence: Divergence,
    student_logits_NV: torch.Tensor,
    teacher_logits_NU: torch.Tensor,
    *,
    temperature: float = 1.0,
    shared_vocab_size: int | None = None,
    lambda_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """`T² · D(softmax(z_S / T), target)` at each position; the target is `softmax(z_T / T)`, or TIDAL's mixture.

    Args:
        divergence ([`Divergence`]): D, with `pairs = "token"`.
        student_logits_NV (`torch.Tensor` of shape `(N, V)`): student logits.
        teacher_logits_NU (`torch.Tensor` of shape `(N, U)`): teacher logits at the aligned positions; no gradient.
        temperature (`float`): T > 0.
        shared_vocab_size (`int`, *optional*): S: both logits are cut to the first S ids, which mean the same on both
            sides, before the softmax. None uses all (V must equal U then).
        lambda_N (`torch.Tensor` of shape `(N,)`, *optional*): TIDAL: λ of each position, see [`tidal_logits`].

    Returns:
        `torch.Tensor` of shape `(N,)`, nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: if the vocabularies differ and `shared_vocab_size` is None.

    Source: TIDE 2604.26951 §2.1; the factor T² is that of Hinton et al. 1503.02531 §2.1.
    """
    if shared_vocab_size is None and student_logits_NV.shape[-1] != teacher_logits_NU.shape[-1]:
        raise ValueError(
            f"The student has {student_logits_NV.shape[-1]} logits and the teacher {teacher_logits_NU.shape[-1]}: "
            "pass shared_vocab_size, the number of first ids that mean the same on both sides."
        )
    student_NS = as_full_precision(student_logits_NV[..., :shared_vocab_size])
    target_NS = as_full_precision(teacher_logits_NU[..., :shared_vocab_size]).detach()
    if lambda_N is not None:
        target_NS = tidal_logits(student_NS, target_NS, lambda_N)
    log_student, log_target = (student_NS / temperature).log_softmax(-1), (target_NS / temperature).log_softmax(-1)
    return temperature**2 * values_of(divergence, log_student, log_target)


def chunk_divergence(
    divergence: Divergence,
    student_log_likelihood_C: torch.Tensor,
    teacher_log_likelihood_C: torch.Tensor,
    *,
    temperature: float = 1.0,
    lambda_C: torch.Tensor | None = None,
) -> torch.Tensor:
    """D of the tempered, clamped probabilities of each chunk's true tokens. There is no T² factor.

    Args:
        divergence ([`Divergence`]): D, with `pairs = "chunk"`.
        student_log_likelihood_C, teacher_log_likelihood_C (`torch.Tensor` of shape `(C,)`): ℓ of the active chunks,
            see [`chunk_log_likelihood`]; the teacher's gets no gradient.
        temperature (`float`): T of both sides, see [`chunk_log_probability`].
        lambda_C (`torch.Tensor` of shape `(C,)`, *optional*): chunk TIDAL: λ of each chunk's row, see
            [`tidal_log_probabilities`].

    Returns:
        `torch.Tensor` of shape `(C,)`, nats, float32 at least.

    Source: TIDE 2604.26951 §2.3.
    """
    student = chunk_log_probability(student_log_likelihood_C, temperature)
    target = chunk_log_probability(teacher_log_likelihood_C, temperature).detach()
    if lambda_C is not None:
        target = tidal_log_probabilities(student, target, lambda_C)
    return values_of(divergence, student, target)


def values_of(divergence: Divergence, log_student: torch.Tensor, log_target: torch.Tensor) -> torch.Tensor:
    """One value per position or chunk, of a divergence that may be a user's own.

    Args:
        divergence ([`Divergence`]): D.
        log_student, log_target (`torch.Tensor`): see [`Divergence.values`].

    Raises:
        ValueError: if it returns anything else.
    """
    values = divergence.values(log_student, log_target)
    if values.shape != log_student.shape[:1]:
        raise ValueError(
            f"The divergence {divergence.name!r} was given log-probabilities of shape {tuple(log_student.shape)} and "
            f"returned {tuple(values.shape)}: values must return one number per entry of the first dimension."
        )
    return values


def kl_divergence(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor) -> torch.Tensor:
    """`Σ_v p (log p − log q)` of each row, nats, shape `(N,)`; entries with p = 0 count as 0.

    Args:
        log_p_NV, log_q_NV (`torch.Tensor` of shape `(N, V)`): log-probabilities; −∞ is allowed in both.
    """
    p_NV = log_p_NV.exp()
    # only zeros are replaced: a NaN has to stay one
    return torch.where(p_NV == 0, 0.0, p_NV * (log_p_NV - log_q_NV)).sum(-1)
