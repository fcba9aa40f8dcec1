"""Every objective of the library as a function of tensors and floats (torch only).

Method, equation, file under tide_hf/, test under tests/. "Golden" names a recorded result of the published
implementation (`pytest -k golden`; `TIDE_GOLDEN_DIR` names another folder of cases), whose known defects are not
reproduced.

- Denoising loss of MDLM and BD3LM: Σ w(t)·(−log p(x0)) / N, w = −α′/(1−α).
  losses/denoising.py; test_losses.py, golden weighted_ce
- Forward KL, reverse KL, JSD: T² Σ D / masked and aligned positions.
  losses/divergences/, losses/divergence.py; test_losses.py, golden kl
- TIDAL: the target softmax(((1−λ)z_S + λz_T)/T), detached, λ(s,t) = λ(s)(1−t), of any forward divergence.
  losses/tidal.py; test_losses.py, golden tidal_logit
- Of a teacher that was run before: D over its k likeliest tokens and all others as one outcome, ≤ the whole D.
  losses/top_k.py, diffusion/cached.py; test_teacher_cache.py
- CALM, Reverse CALM, chunk TIDAL: Bernoulli cross-entropy of chunk likelihoods.
  losses/divergences/, losses/chunks.py; test_losses.py, golden chunk_likelihood, tidal_chunk
- Each of these from hidden states, a slice of positions at a time.
  losses/slices.py; test_slices.py, test_step_losses.py
- IDLM, masked: L(f*, q) − L(f, q), where L(f, q) = Σ w(t)·(−⟨q, log f⟩).
  losses/inverse.py, few_step/; test_losses_inverse.py, test_few_step.py, test_two_modes.py
- IDLM, uniform-state (Duo): the divergence of the discrete posteriors, through soft inputs.
  models/uniform_diffusion.py, few_step/uniform.py; test_uniform.py
- CompDemo: the teacher at M_B with M_A revealed, and the reverse.
  diffusion/corruption.py, teachers/; test_diffusion.py, golden step_wiring
- Block diffusion: who sees whom in [xt ; x0].
  models/masked_diffusion.py; test_diffusion.py, golden block_mask
- Chunks of two tokenizations: cut wherever both have a boundary.
  alignment/; test_alignment.py, golden chunk_align, position_align
- Entropy bound, guidance, block grids: see `TIDEGenerationConfig`.
  models/decoding_tide.py; test_decoding.py, against a naive sampler
- Which tokens a pass reveals; the field's samplers by name.
  models/reveal_rules_tide.py, models/presets_tide.py; test_published_samplers.py, test_reveal_rules.py
- Cards, pushes, faults: one state, one commit; a push that fails is reported.
  hub/; test_hub_*.py, against a Hub on loopback
- The whole step: both halves in full, loops over rows.
  training/trainer.py; test_trainer.py, test_trainer_chunks.py
"""

from .chunks import (
    PROBABILITY_CEILING,
    PROBABILITY_FLOOR,
    binary_cross_entropy,
    chunk_log_likelihood,
    chunk_log_probability,
    log1mexp,
    true_token_log_probs,
)
from .denoising import denoising_loss
from .divergence import Divergence, chunk_divergence, kl_divergence, parameter, token_divergence
from .divergences import DIVERGENCES
from .inverse import (
    clean_token_probabilities,
    inverse_distillation_loss,
    sample_tokens,
    soft_denoising_loss,
    without_mask_token,
)
from .slices import Segment, default_slice_rows, sliced_log_probs, sliced_loss
from .tidal import expected_tidal_strength, lambda_schedule, tidal_lambda, timestep_weight
from .top_k import top_k_divergence, top_k_log_probs

__all__ = [
    "DIVERGENCES",
    "PROBABILITY_CEILING",
    "PROBABILITY_FLOOR",
    "Divergence",
    "Segment",
    "binary_cross_entropy",
    "chunk_divergence",
    "chunk_log_likelihood",
    "chunk_log_probability",
    "clean_token_probabilities",
    "default_slice_rows",
    "denoising_loss",
    "expected_tidal_strength",
    "inverse_distillation_loss",
    "kl_divergence",
    "lambda_schedule",
    "log1mexp",
    "parameter",
    "sample_tokens",
    "sliced_log_probs",
    "sliced_loss",
    "soft_denoising_loss",
    "tidal_lambda",
    "timestep_weight",
    "token_divergence",
    "top_k_divergence",
    "top_k_log_probs",
    "true_token_log_probs",
    "without_mask_token",
]
