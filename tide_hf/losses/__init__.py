"""Every objective of the library as a function of tensors and floats (torch only)."""

from .calm import (
    PROBABILITY_CEILING,
    PROBABILITY_FLOOR,
    bernoulli_reverse_kl_loss,
    calm_loss,
    chunk_log_likelihood,
    chunk_log_probability,
    log1mexp,
    reverse_calm_loss,
    tidal_chunk_loss,
    true_token_log_probs,
)
from .denoising import denoising_loss
from .divergence import forward_kl_loss, jsd_loss, reverse_kl_loss
from .inverse import (
    chunked_head_loss,
    clean_token_probabilities,
    inverse_distillation_loss,
    sample_tokens,
    soft_denoising_loss,
    without_mask_token,
)
from .tidal import expected_tidal_strength, lambda_schedule, tidal_lambda, tidal_loss, timestep_weight

__all__ = [
    "PROBABILITY_CEILING",
    "PROBABILITY_FLOOR",
    "bernoulli_reverse_kl_loss",
    "calm_loss",
    "chunk_log_likelihood",
    "chunk_log_probability",
    "chunked_head_loss",
    "clean_token_probabilities",
    "denoising_loss",
    "expected_tidal_strength",
    "forward_kl_loss",
    "inverse_distillation_loss",
    "jsd_loss",
    "lambda_schedule",
    "log1mexp",
    "reverse_calm_loss",
    "reverse_kl_loss",
    "sample_tokens",
    "soft_denoising_loss",
    "tidal_chunk_loss",
    "tidal_lambda",
    "tidal_loss",
    "timestep_weight",
    "true_token_log_probs",
    "without_mask_token",
]
