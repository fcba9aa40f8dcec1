"""Each divergence as the sum that a step takes of it, `Σ w · D / count`; recorded results state it so."""

from functools import partial

from tide_hf.losses import DIVERGENCES, chunk_divergence, token_divergence
from tide_hf.losses.denoising import weighted_sum


def token_loss(
    name: str,
    student_logits_NV,
    teacher_logits_NU,
    *,
    num_items,
    temperature=1.0,
    weights_N=1.0,
    shared_vocab_size=None,
    lambda_N=None,
    **parameters,
):
    """Of token distributions."""
    values_N = token_divergence(
        DIVERGENCES[name](**parameters),
        student_logits_NV,
        teacher_logits_NU,
        temperature=temperature,
        shared_vocab_size=shared_vocab_size,
        lambda_N=lambda_N,
    )
    return weighted_sum(values_N * weights_N, num_items)


def chunk_loss(name: str, student_C, teacher_C, lambda_C=None, *, num_items, temperature=1.0, weights_C=1.0):
    """Of chunk likelihoods."""
    values_C = chunk_divergence(DIVERGENCES[name](), student_C, teacher_C, temperature=temperature, lambda_C=lambda_C)
    return weighted_sum(values_C * weights_C, num_items)


def tidal_loss(student_logits_NV, teacher_logits_NU, lambda_N, **kwargs):
    """TIDAL of forward KL."""
    return token_loss("forward_kl", student_logits_NV, teacher_logits_NU, lambda_N=lambda_N, **kwargs)


def tidal_chunk_loss(student_C, teacher_C, lambda_C, *, reverse=False, **kwargs):
    """Chunk TIDAL of CALM, or of Reverse CALM."""
    return chunk_loss("reverse_calm" if reverse else "calm", student_C, teacher_C, lambda_C, **kwargs)


forward_kl_loss, reverse_kl_loss, jsd_loss = (
    partial(token_loss, name) for name in ("forward_kl", "reverse_kl", "jsd")
)
calm_loss, reverse_calm_loss, bernoulli_reverse_kl_loss = (
    partial(chunk_loss, name) for name in ("calm", "reverse_calm", "bernoulli_reverse_kl")
)
