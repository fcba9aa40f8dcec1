"""Metrics of generated sequences: unigram entropy, exact match, MAUVE.

Sequences are lists of token ids or one-dimensional tensors; what `generate` returns goes through [`until_eos`] first,
so that the padding after an answer is not counted as text.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .perplexity import batches, run_scorer

TokenIds = Sequence[int] | torch.Tensor


def until_eos(sequences: Sequence[TokenIds] | torch.Tensor, eos_token_id: int) -> list[list[int]]:
    """Each of the `sequences` up to its first `eos_token_id`, without it."""
    cut = []
    for sequence in sequences:
        ids = [int(token) for token in sequence]
        cut.append(ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids)
    return cut


def unigram_entropy(sequences: Sequence[TokenIds] | torch.Tensor) -> float:
    """Mean over sequences of the entropy of each one's own token histogram, in nats.

    `mean_n −Σ_v (c_nv / L_n) log (c_nv / L_n)`, c_nv the count of token v in sequence n of L_n tokens. It is what
    reports on few-step diffusion LMs call (sentence) entropy: at most log L_n, low when a sequence repeats itself. It
    does not measure diversity between sequences.

    Args:
        sequences (`Sequence`): token ids, each without padding.

    Raises:
        ValueError: without sequences, or for an empty one.
    """
    entropies = []
    for sequence in sequences:
        counts = Counter(int(token) for token in sequence)
        length = counts.total()
        if not length:
            raise ValueError("unigram_entropy got an empty sequence, which has no histogram: leave it out.")
        entropies.append(-sum(count / length * math.log(count / length) for count in counts.values()))
    if not entropies:
        raise ValueError("unigram_entropy needs at least one sequence, got none.")
    return math.fsum(entropies) / len(entropies)


def exact_match(predictions: Sequence[str | TokenIds], references: Sequence[str | TokenIds]) -> float:
    """Share of predictions that equal their reference, in [0, 1]: texts character by character, ids token by token.

    Args:
        predictions, references (`Sequence`): texts or token ids, as many of the one as of the other.

    Raises:
        ValueError: without predictions, or if there are more or fewer references.
    """
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"exact_match compares one prediction with one reference each, got {len(predictions)} predictions and "
            f"{len(references)} references."
        )
    return sum(_plain(a) == _plain(b) for a, b in zip(predictions, references, strict=True)) / len(references)


def mauve_score(
    generated: Sequence[TokenIds],
    references: Sequence[TokenIds],
    scorer: PreTrainedModel,
    *,
    batch_size: int = 8,
    num_buckets: int | str = "auto",
    seed: int = 25,
) -> float:
    """MAUVE between generated and reference sequences, in (0, 1]; higher is closer.

    A sequence's features are the scorer's last hidden state at its last token, as the package computes them from
    text; here the scorer is any causal LM, and nothing is downloaded.

    Args:
        generated, references (`Sequence`): token ids in the scorer's vocabulary, none empty; thousands of each for a
            meaningful number (the paper uses 5,000).
        scorer (`PreTrainedModel`): an autoregressive LM. Published numbers use GPT-2 large.
        batch_size (`int`): sequences per forward.
        num_buckets (`int` or `"auto"`): clusters of the quantisation; "auto" is a tenth of the sequences.
        seed (`int`): of the clustering.

    Raises:
        ImportError: without the package `mauve-text`.

    Source: Pillutla et al., arXiv 2102.01454.
    """
    try:
        import mauve
    except ImportError as error:
        raise ImportError("mauve_score needs mauve-text: pip install 'tide-hf[eval]'.") from error
    features = [_last_hidden_states(sequences, scorer, batch_size) for sequences in (generated, references)]
    result = mauve.compute_mauve(
        p_features=features[0], q_features=features[1], num_buckets=num_buckets, seed=seed, verbose=False
    )
    return float(result.mauve)


def _last_hidden_states(sequences, scorer, batch_size):
    """float32 numpy (N, H): the last layer at each sequence's last token."""
    rows = [[int(token) for token in sequence] for sequence in sequences]
    if not all(rows):
        raise ValueError("mauve_score got an empty sequence, which has no last token: leave it out.")
    found = []
    for batch in batches(rows, batch_size):
        hidden_BLH = run_scorer(scorer, batch, output_hidden_states=True).hidden_states[-1]
        last_B = torch.tensor([len(row) - 1 for row in batch], device=hidden_BLH.device)
        found.append(hidden_BLH[torch.arange(len(batch), device=hidden_BLH.device), last_B].float().cpu())
    return torch.cat(found).numpy()


def _plain(sequence: str | TokenIds) -> str | list[int]:
    return sequence if isinstance(sequence, str) else [int(token) for token in sequence]
