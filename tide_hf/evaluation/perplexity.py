"""Perplexity of generated samples under an autoregressive scorer.

Shapes: N samples, B windows of a batch, L positions, V vocabulary.
"""

import math
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..losses.denoising import as_full_precision

Sample = str | Sequence[int] | torch.Tensor


def generative_perplexity(
    samples: Sequence[Sample],
    scorer: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs,
) -> float:
    """`exp(Σ_n Σ_i −log p(x_ni | context, x_n,<i) / Σ_n number of scored tokens)`: one mean over the whole corpus.

    A low value alone means little: a sampler that repeats itself scores well. Report it together with
    [`unigram_entropy`].

    Args:
        samples, scorer, tokenizer, kwargs: as in [`negative_log_likelihoods`].

    Raises:
        ValueError: if no token could be scored, and as in [`negative_log_likelihoods`].
    """
    nll_N, tokens_N = negative_log_likelihoods(samples, scorer, tokenizer, **kwargs)
    if not tokens_N.sum():
        raise ValueError(
            f"generative_perplexity found no token to score in {len(nll_N)} samples: a sample's first token is "
            "scored only after a context (pass contexts, for example the scorer's BOS)."
        )
    return math.exp(nll_N.sum() / tokens_N.sum())


def negative_log_likelihoods(
    samples: Sequence[Sample],
    scorer: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    contexts: Sequence[Sample] | None = None,
    eos_token_id: int | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each sample under the scorer, each token scored once.

    Args:
        samples (`Sequence`): texts, or token ids in the scorer's vocabulary (another tokenizer's ids mean something
            else there: decode them and pass texts).
        scorer (`PreTrainedModel`): an autoregressive LM; run in eval mode without gradient, its mode restored.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the scorer's, for texts; no special token is added.
        contexts (`Sequence`, *optional*): what stands before each sample (a prompt, a BOS id): seen, never scored. A
            text context is tokenised on its own. Without a context, a sample's first token is seen and not scored.
        eos_token_id (`int`, *optional*): nothing after a sample's first EOS is scored; the EOS itself is.
        max_length (`int`, *optional*): tokens the scorer sees at once; `config.max_position_embeddings` by default. A
            longer sequence goes through overlapping windows, and each token is scored in the first that holds it.
        stride (`int`, *optional*): new tokens per further window, so each has at least `max_length − stride` tokens
            of context; half of `max_length` by default.
        batch_size (`int`): windows per forward.

    Returns:
        `tuple` of two CPU tensors of shape `(N,)`: nats per sample (float64) and scored tokens (int64).

    Raises:
        ValueError: for a scorer that sees the future, texts without a tokenizer, ids outside the scorer's
            vocabulary, another number of contexts than samples, or a stride that leaves no context.
    """
    max_length, stride = _window_sizes(scorer.config, max_length, stride)
    rows = _rows(samples, contexts, tokenizer, scorer, eos_token_id)
    windows = [
        (index, *window)
        for index, (row, start) in enumerate(rows)
        for window in _windows(row, max(start, 1), max_length, stride)
    ]
    windows.sort(key=lambda window: len(window[1]))  # similar lengths in one batch, so that little is padded
    nll_N = torch.zeros(len(samples), dtype=torch.float64)
    tokens_N = torch.zeros(len(samples), dtype=torch.long)
    for batch in batches(windows, batch_size):
        logits_BLV = run_scorer(scorer, [ids for _, ids, _ in batch]).logits
        for logits_LV, (index, ids, first) in zip(logits_BLV, batch, strict=True):
            scores_SV = as_full_precision(logits_LV[first - 1 : len(ids) - 1])  # the logits at i predict token i + 1
            targets = torch.tensor(ids[first:], device=scores_SV.device)
            nll_N[index] += F.cross_entropy(scores_SV, targets, reduction="none").double().sum().cpu()
            tokens_N[index] += len(targets)
    return nll_N, tokens_N


def _window_sizes(config, max_length: int | None, stride: int | None) -> tuple[int, int]:
    """Tokens that the scorer sees at once, and new tokens per further window."""
    if not getattr(config, "is_causal", True):
        raise ValueError(
            f"The scorer (model_type={config.model_type!r}) is bidirectional and would see the tokens it predicts; "
            "pass an autoregressive LM."
        )
    if max_length is None:
        max_length = getattr(config, "max_position_embeddings", None) or sys.maxsize
    stride = max_length // 2 if stride is None else stride
    if not 0 < stride < max_length:
        raise ValueError(f"stride must be in [1, max_length), got {stride} with max_length {max_length}.")
    return max_length, stride


def batches(items: Sequence, batch_size: int) -> Iterator[Sequence]:
    """Consecutive slices of `items`, each of at most `batch_size`."""
    for start in range(0, len(items), batch_size):
        yield items[start : start + batch_size]


@torch.no_grad()
def run_scorer(scorer: PreTrainedModel, rows: Sequence[Sequence[int]], **kwargs):
    """The scorer's output in eval mode, on rows padded on the right, where a causal network never looks.

    Args:
        scorer (`PreTrainedModel`): an autoregressive LM.
        rows (`Sequence[Sequence[int]]`): token ids, of any lengths.
        kwargs: passed to its forward.
    """
    length = max(len(row) for row in rows)
    input_ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=scorer.device)
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=scorer.device)
    was_training = scorer.training
    scorer.eval()
    try:
        return scorer(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
    finally:
        scorer.train(was_training)


def _rows(samples, contexts, tokenizer, scorer, eos_token_id):
    """Of each sample: the ids of its context and of itself in one list, and where in it the sample starts."""
    if contexts is not None and len(contexts) != len(samples):
        raise ValueError(f"One context per sample is needed, got {len(contexts)} contexts, {len(samples)} samples.")
    num_embeddings = scorer.get_input_embeddings().num_embeddings
    rows = []
    for index, sample in enumerate(samples):
        context = [] if contexts is None else _token_ids(contexts[index], tokenizer)
        ids = _token_ids(sample, tokenizer)
        if eos_token_id is not None and eos_token_id in ids:
            ids = ids[: ids.index(eos_token_id) + 1]
        row = [*context, *ids]
        if row and not 0 <= min(row) <= max(row) < num_embeddings:
            raise ValueError(
                f"Sample {index} holds ids from {min(row)} to {max(row)}, the scorer knows {num_embeddings} tokens: "
                "these are another tokenizer's ids. Decode them and pass texts with the scorer's tokenizer."
            )
        rows.append((row, len(context)))
    return rows


def _token_ids(sample: Sample, tokenizer) -> list[int]:
    if isinstance(sample, str):
        if tokenizer is None:
            raise ValueError("Texts are scored through the scorer's tokenizer: pass tokenizer=.")
        return tokenizer(sample, add_special_tokens=False)["input_ids"]
    return [int(token) for token in sample]


def _windows(row: list[int], first: int, max_length: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Windows of a row in which each token from `first` on is scored once: ids, and index of the first scored one."""
    scored = first
    while scored < len(row):
        end = min(max_length if scored < max_length else scored + stride, len(row))
        begin = max(end - max_length, 0)
        yield row[begin:end], scored - begin
        scored = end
