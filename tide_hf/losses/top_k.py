"""Distributions of which only the likeliest tokens are known: the others are one outcome, with their total mass.

A divergence between two such distributions is a lower bound of the one between the whole distributions (data
processing), and equals it where the likeliest tokens are all tokens.

Shapes: N positions, V vocabulary, S ids that mean the same on both sides, k tokens kept, J outcomes: k + 1, or k where
all S are kept.
"""

import torch

from .denoising import as_full_precision
from .divergence import Divergence, values_of
from .tidal import tidal_logits


def top_k_log_probs(
    logits_NV: torch.Tensor, ids_Nk: torch.Tensor, *, temperature: float = 1.0, shared_vocab_size: int | None = None
) -> torch.Tensor:
    """`log softmax(z / T)` at some ids, and the log of the mass of all others; shape `(N, J)`, float32 at least.

    Args:
        logits_NV (`torch.Tensor` of shape `(N, V)`): of any float dtype.
        ids_Nk (`torch.LongTensor` of shape `(N, k)`): different ids below S.
        temperature (`float`): T > 0.
        shared_vocab_size (`int`, *optional*): S: logits are cut to the first S ids before the softmax; V by default.
    """
    scaled_NS = as_full_precision(logits_NV[..., :shared_vocab_size]) / temperature
    outcomes = scaled_NS.gather(-1, ids_Nk)
    if ids_Nk.shape[-1] < scaled_NS.shape[-1]:
        # the sum over the others itself: 1 − Σ p would be 0 where the likeliest hold all of float32's digits
        others_NS = scaled_NS.scatter(-1, ids_Nk, -torch.inf)
        outcomes = torch.cat([outcomes, others_NS.logsumexp(-1, keepdim=True)], -1)
    return outcomes - scaled_NS.logsumexp(-1, keepdim=True)


def top_k_divergence(
    divergence: Divergence,
    student_logits_NV: torch.Tensor,
    ids_Nk: torch.Tensor,
    log_target_NJ: torch.Tensor,
    *,
    temperature: float = 1.0,
    shared_vocab_size: int | None = None,
    lambda_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """`T² · D(student, target)` over the k ids of each position and all other ids as one outcome.

    With TIDAL the target is the mixture at the k ids, and has the student's own shape among the other ones, normalised
    again. Equal to [`token_divergence`] where k = S.

    Args:
        divergence ([`Divergence`]): D, with `pairs = "token"`.
        student_logits_NV (`torch.Tensor` of shape `(N, V)`): student logits.
        ids_Nk (`torch.LongTensor` of shape `(N, k)`): the teacher's likeliest ids.
        log_target_NJ (`torch.Tensor` of shape `(N, J)`): the teacher's log-probabilities of these outcomes at this
            temperature; what rounding left is normalised.
        temperature (`float`), shared_vocab_size (`int`, *optional*): as in [`top_k_log_probs`].
        lambda_N (`torch.Tensor` of shape `(N,)`, *optional*): TIDAL: λ of each position, see [`tidal_logits`].

    Returns:
        `torch.Tensor` of shape `(N,)`, nats, float32 (float64 for float64 logits).
    """
    log_student = top_k_log_probs(
        student_logits_NV, ids_Nk, temperature=temperature, shared_vocab_size=shared_vocab_size
    )
    log_target = as_full_precision(log_target_NJ).detach().log_softmax(-1)
    if lambda_N is not None:
        log_target = tidal_logits(log_student, log_target, lambda_N).log_softmax(-1)
    return temperature**2 * values_of(divergence, log_student, log_target)
