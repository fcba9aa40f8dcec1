"""Metrics of generated samples: perplexity under a scorer, entropy, distance to references, exact match."""

from .perplexity import generative_perplexity, negative_log_likelihoods
from .samples import exact_match, mauve_score, unigram_entropy, until_eos

__all__ = [
    "exact_match",
    "generative_perplexity",
    "mauve_score",
    "negative_log_likelihoods",
    "unigram_entropy",
    "until_eos",
]
