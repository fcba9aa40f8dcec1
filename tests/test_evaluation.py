"""Metrics of samples against naive float64 derivations, and what would make them silently wrong."""

import builtins
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import references
import torch
from tiny import tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.evaluation import (
    exact_match,
    generative_perplexity,
    mauve_score,
    negative_log_likelihoods,
    unigram_entropy,
    until_eos,
)

VOCAB, POSITIONS = 15, 12


def scorer(architecture="gpt2"):
    """A random autoregressive LM in float64, absolute or rotary positions, with dropout that must not act."""
    torch.manual_seed(0)
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_positions=POSITIONS, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
        )
        return GPT2LMHeadModel(config).double()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        attention_dropout=0.1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).double()


def rows(*lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCAB, length).tolist() for length in lengths]


def next_token_log_probs(model):
    """One unpadded prefix through the model in eval mode."""

    @torch.no_grad()
    def of(prefix):
        model.eval()
        return model(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)

    return of


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_one_mean_over_the_corpus(architecture, batch_size):
    """Catches padding that is seen or scored, a mean of means, logits off by one, and dropout left on."""
    model, samples = scorer(architecture).train(), rows(2, 9, 4, 1, 12, 6)
    expected = references.corpus_perplexity(next_token_log_probs(model), samples, [0] * len(samples))
    assert generative_perplexity(samples, model.train(), batch_size=batch_size) == pytest.approx(expected, rel=1e-12)
    assert model.training, "the scorer comes back in the mode it came in"


def test_contexts_are_seen_and_not_scored():
    """Catches prompts that count as generated text, and prompts that are dropped."""
    model, samples, contexts = scorer(), rows(5, 1, 3), rows(4, 2, 0, seed=1)
    joined = [context + sample for context, sample in zip(contexts, samples, strict=True)]
    expected = references.corpus_perplexity(next_token_log_probs(model), joined, [4, 2, 0])
    assert generative_perplexity(samples, model, contexts=contexts) == pytest.approx(expected, rel=1e-12)
    _, tokens = negative_log_likelihoods(samples, model, contexts=contexts)
    assert tokens.tolist() == [5, 1, 2], "without a context the first token is not scored"


@pytest.mark.parametrize(("length", "start"), [(12, 0), (13, 0), (31, 0), (40, 5), (40, 20), (40, 39)])
@pytest.mark.parametrize("stride", [1, 5, 11])
def test_long_samples_are_scored_once_in_windows(length, start, stride):
    """Catches tokens counted in two windows or in none, and windows without the promised context."""
    model, (row,) = scorer(), rows(length)
    context, sample = row[:start], row[start:]
    nll, tokens = negative_log_likelihoods([sample], model, contexts=[context], stride=stride)
    first = max(start, 1)
    assert tokens.item() == length - first
    expected = 0.0
    for i in range(first, length):  # the last position of the window in which token i is new
        end = 12 if first < 12 else first + stride
        while end <= i:
            end += stride
        begin = max(min(end, length) - 12, 0)
        assert i - begin >= min(i, 12 - stride)
        expected -= next_token_log_probs(model)(row[begin:i])[row[i]].item()
    assert nll.item() == pytest.approx(expected, rel=1e-12)


def test_nothing_behind_the_end_of_text_is_scored():
    """Catches fillings after the answer that make every sampler look good."""
    model, (sample,) = scorer(), rows(9)
    sample[4] = 14
    nll, tokens = negative_log_likelihoods([sample], model, eos_token_id=14)
    assert 14 not in sample[:4] and tokens.item() == 4
    assert nll.item() == pytest.approx(negative_log_likelihoods([sample[:5]], model)[0].item())
    assert until_eos(torch.tensor([sample]), 14) == [sample[:4]]


def test_texts_go_through_the_scorers_tokenizer():
    """Catches special tokens that are added and scored."""
    model, tokenizer = scorer(), build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 13)])
    assert tokenizer("0")["input_ids"] == [13, 0]
    by_text = generative_perplexity(["0123", "99"], model, tokenizer, contexts=["7", "<user>"])
    by_ids = generative_perplexity([[0, 1, 2, 3], [9, 9]], model, contexts=[[7], [11]])
    assert by_text == by_ids
    with pytest.raises(ValueError, match="tokenizer"):
        generative_perplexity(["0123"], model)


def test_perplexity_refuses_what_would_mean_nothing():
    """Catches scores of a bidirectional LM, of another tokenizer's ids, and of nothing."""
    with pytest.raises(ValueError, match="bidirectional"):
        generative_perplexity(rows(4), tiny_model())
    with pytest.raises(ValueError, match="another tokenizer"):
        generative_perplexity([[1, VOCAB]], scorer())
    with pytest.raises(ValueError, match="no token to score"):
        generative_perplexity([[1], [2]], scorer())
    with pytest.raises(ValueError, match="One context per sample"):
        generative_perplexity(rows(4), scorer(), contexts=[])
    with pytest.raises(ValueError, match="stride"):
        generative_perplexity(rows(4), scorer(), stride=POSITIONS)


def test_entropy_is_that_of_each_sequences_own_histogram():
    """Catches the entropy of the pooled corpus, bits for nats, and ids counted as positions."""
    sequences = rows(7, 1, 30, seed=3)
    expected = np.mean([references.histogram_entropy(sequence, VOCAB) for sequence in sequences])
    assert unigram_entropy(sequences) == pytest.approx(expected, rel=1e-12)
    assert unigram_entropy(torch.tensor([[4, 4, 4], [5, 5, 5]])) == 0.0
    assert unigram_entropy([[1, 2, 3, 4]]) == pytest.approx(math.log(4))
    for nothing in ([], [[1], []]):
        with pytest.raises(ValueError):
            unigram_entropy(nothing)


def test_exact_match_counts_whole_answers():
    """Catches tokens counted as answers, and lists of different lengths compared as far as they go."""
    assert exact_match(["12", "34", "5"], ["12", "35", "5 "]) == pytest.approx(1 / 3)
    assert exact_match([torch.tensor([1, 2]), [3]], [[1, 2], [3, 4]]) == 0.5
    for predictions, answers in ((["1"], ["1", "2"]), ([], [])):
        with pytest.raises(ValueError, match="one prediction with one reference"):
            exact_match(predictions, answers)


def test_mauve_gets_each_sequences_last_hidden_state(monkeypatch):
    """Catches features of padding, of the wrong layer, and generated and reference sequences swapped."""
    given = {}

    def compute_mauve(**kwargs):
        given.update(kwargs)
        return SimpleNamespace(mauve=0.5)

    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace(compute_mauve=compute_mauve))
    model, generated, human = scorer().eval(), rows(3, 9, 1), rows(2, 5, seed=1)
    assert mauve_score(generated, human, model.train(), batch_size=2) == 0.5
    model.eval()
    for name, sequences in (("p_features", generated), ("q_features", human)):
        for feature, row in zip(given[name], sequences, strict=True):
            with torch.no_grad():
                expected = model.transformer(torch.tensor([row])).last_hidden_state[0, -1]
            np.testing.assert_allclose(feature, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_mauve_names_its_extra(monkeypatch):
    """Catches a bare import error that leaves people searching for the package's name."""
    real_import = builtins.__import__

    def without_mauve(name, *args, **kwargs):
        if name == "mauve":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_mauve)
    with pytest.raises(ImportError, match=r"tide-hf\[eval\]"):
        mauve_score(rows(3), rows(3), scorer())


def test_mauve_tells_different_texts_from_equal_ones():
    """Catches an interface of the package that changed: with it installed, equal is near 1 and different is not."""
    pytest.importorskip("mauve")
    model = scorer()
    one, other = rows(*[6] * 100), rows(*[6] * 100, seed=1)
    same, different = (mauve_score(rows, other, model, num_buckets=5) for rows in (one, [[3] * 6] * 100))
    assert same > 0.9 and different < 0.5
