"""Every setting of transformers' GenerationConfig is read by `generate` and `infill`, or refused by name."""

import inspect
import json

import pytest
import torch
from naive_sampler import EOS, PAD, naive_generate, prompt, tiny
from real_tokenizers import sentencepiece
from tiny import BLOCK, MASK, VOCAB, tiny_model
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, GenerationMixin, pipeline
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.utils import logging

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.models import BlockDiffusionOutput, TIDEGenerationConfig, sampling_tide
from tide_hf.models.generation_tide import BlockDiffusionGenerationMixin
from tide_hf.models.settings_tide import FOR_ANSWERS, FOR_INFILL, NO_SETTINGS, OWN_FIELDS, READ, REFUSED

ARGUMENTS = set(inspect.signature(BlockDiffusionGenerationMixin.generate).parameters)
# values that ask for something, where 3 does not
ASKING = {
    **dict.fromkeys(("early_stopping", "use_mtp", "is_assistant", "low_memory", "token_healing", "synced_gpus"), True),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), True),
    "cache_implementation": "static",
    "compile_config": CompileConfig(),
    "watermarking_config": {"bias": 2.5},
    "num_assistant_tokens_schedule": "heuristic",
    "dola_layers": "low",
    "constraints": [object()],
    "force_words_ids": [[3]],
}
IS_SETTING = [name for name in REFUSED if hasattr(GenerationConfig(), name)]


def with_setting(name, value, config_class=GenerationConfig):
    """A config as a file with this value gives it, without the checks of its constructor."""
    config = config_class()
    setattr(config, name, value)
    return config


def seeded():
    return torch.Generator().manual_seed(0)


def holes(length=7, columns=(2, 5)):
    ids = prompt(length)
    ids[0, list(columns)] = MASK
    return ids


# ---- the table ----


def test_every_setting_of_the_installed_transformers_is_in_one_list():
    """Catches a setting of a newer transformers that is accepted and ignored."""
    public = {name for name, value in vars(GenerationConfig).items() if not callable(value)} - set(dir(object))
    public = {name for name in public if not isinstance(vars(GenerationConfig)[name], classmethod | staticmethod)}
    names = {name for name in GenerationConfig().to_dict().keys() | public if not name.startswith("_")}
    for name in names:
        assert [name in group for group in (READ, REFUSED, NO_SETTINGS)].count(True) == 1, name
    assert set(READ) - names == set(OWN_FIELDS), "a setting that this transformers does not build"


def test_every_argument_of_transformers_generate_is_taken_or_refused():
    """Catches an argument of a newer `generate` that would be refused as if it were a typo, or not at all."""
    for name in inspect.signature(GenerationMixin.generate).parameters:
        assert name in ARGUMENTS or name in REFUSED, name
    assert not ARGUMENTS & set(REFUSED)


@pytest.mark.parametrize("method", ["generate", "infill"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_wherever_it_comes_from(name, method):
    """Catches a setting that is refused as a keyword and changes nothing in a config object or a checkpoint."""
    model, ids, value = tiny(), prompt(4) if method == "generate" else holes(), ASKING.get(name, 3)
    run = getattr(model, method)
    with pytest.raises(ValueError, match=rf"^{method} does not read {name}=.*: .*\. Leave it out\."):
        run(ids, **{name: value})
    run(ids, **{name: None}, **({"max_new_tokens": 2} if method == "generate" else {}))
    if name not in IS_SETTING:
        return
    with pytest.raises(ValueError, match=rf"does not read {name}=.*Set generation_config\.{name} = "):
        run(ids, generation_config=with_setting(name, value))
    for config_class in (GenerationConfig, TIDEGenerationConfig):
        model.generation_config = with_setting(name, value, config_class)
        with pytest.raises(
            ValueError, match=rf"does not read {name}=.*Set model\.generation_config\.{name} = "
        ) as said:
            run(ids)
    exec(str(said.value).rpartition("Set ")[2].rstrip("."), {"model": model})
    model.generation_config.max_new_tokens = 2
    run(ids)


def test_transformers_defaults_ask_for_nothing():
    """Catches a config that spells out transformers' defaults being refused, or taken for a request to sample."""
    model, defaults = tiny(), GenerationConfig._get_default_generation_params()
    expected = model.generate(prompt(6), max_new_tokens=9)
    del defaults["max_length"]
    given = GenerationConfig(**defaults, max_new_tokens=9)
    assert torch.equal(model.generate(prompt(6), generation_config=given), expected)
    model.generation_config = GenerationConfig(**defaults, max_length=20, max_new_tokens=9)
    assert torch.equal(model.generate(prompt(6)), expected)
    model.generation_config = GenerationConfig(top_k=50)
    assert torch.equal(model.generate(prompt(6), max_new_tokens=9), expected)


@pytest.mark.parametrize("where", ["given", "own"])
def test_a_misspelt_field_of_a_config_is_refused(where):
    """Catches a typo in a config object, which transformers keeps as an attribute and nothing reads."""
    model, config = tiny(), GenerationConfig(max_new_token=9)
    if where == "own":
        model.generation_config, config = config, None
    for method in (model.generate, model.infill):
        with pytest.raises(
            ValueError, match=r"does not read max_new_token=9.*generation_config\.max_new_token = None"
        ):
            method(prompt(4), generation_config=config)
    with pytest.raises(ValueError, match="must be a GenerationConfig, got a dict"):
        model.generate(prompt(4), generation_config={"max_new_tokens": 4})


def test_a_checkpoint_with_settings_that_are_not_read_loads_and_says_so(tmp_path):
    """Catches a published checkpoint that cannot be loaded, or decodes as if its settings were not there."""
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    written = json.loads(file.read_text()) | {"num_beams": 4, "repetition_penalty": 1.7, "max_length": 15}
    file.write_text(json.dumps(written))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_beams=4: .*Set model\.generation_config\.num_beams = 1"):
        model.generate(prompt(6))
    assert model.generate(prompt(6), num_beams=1).shape == (1, 15)
    model.save_pretrained(tmp_path / "again")
    model.generation_config.num_beams = 1
    expected = tiny().generate(prompt(6), max_new_tokens=9, repetition_penalty=1.7)
    assert torch.equal(model.generate(prompt(6)), expected)
    file.write_text(json.dumps(written | {"num_beams": 1, "max_length": 20, "repetition_penalty": 1.0}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generate(prompt(6)).shape == (1, 6 + 256)


# ---- each setting that is read ----

# value, and what makes it show
READING = {
    "max_new_tokens": (5, {"max_new_tokens": None}),
    "max_length": (11, {"max_new_tokens": None}),
    "bos_token_id": (3, {"inputs": None}),
    "eos_token_id": (2, {}),
    "pad_token_id": (3, {"eos_token_id": 2, "inputs": torch.cat([prompt(6), prompt(6, seed=2)])}),
    "mask_token_id": (2, {}),
    "block_size": (8, {}),
    "block_grid": ("prompt_aligned", {}),
    "steps_per_block": (1, {}),
    "confidence_threshold": (0.1, {}),
    "entropy_bound": (9.0, {}),
    "remasking": ("random", {}),
    "temperature": (2.0, {}),
    "do_sample": (True, {}),
    "num_return_sequences": (2, {"temperature": 1.0}),
    "guidance_scale": (2.0, {"negative_prompt_ids": prompt(3)}),
    "return_dict_in_generate": (True, {}),
    "repetition_penalty": (5.0, {}),
    "no_repeat_ngram_size": (1, {}),
    "bad_words_ids": ([[18], [4]], {}),
    "sequence_bias": ([[[4], 9.0]], {}),
    "suppress_tokens": ([18, 4], {}),
    "begin_suppress_tokens": (list(range(10, 20)), {}),
    "forced_eos_token_id": (7, {}),
    "min_length": (12, {"eos_token_id": 2}),
    "min_new_tokens": (7, {"eos_token_id": 2}),
    "exponential_decay_length_penalty": ((1, 5.0), {"eos_token_id": 21}),
    "encoder_repetition_penalty": (9.0, {}),
    "encoder_no_repeat_ngram_size": (1, {}),
    "max_time": (1e-9, {}),
    "top_h": (0.01, {"temperature": 3.0}),
    "top_k": (1, {"temperature": 3.0}),
    "top_p": (0.01, {"temperature": 3.0}),
    "min_p": (0.9, {"temperature": 3.0}),
    "typical_p": (0.01, {"temperature": 3.0}),
    "epsilon_cutoff": (0.3, {"temperature": 3.0}),
    "eta_cutoff": (0.9, {"temperature": 3.0}),
}
# without an effect on the tokens (each has its own test), or of another kind
SHOWN_ELSEWHERE = {"use_cache", "disable_compile", "remove_invalid_values", "renormalize_logits", "stop_strings"}


def outcome(model, inputs, **settings):
    """Tokens and cost of a seeded call, or what was refused."""
    try:
        out = model.generate(inputs, generator=seeded(), **settings)
    except ValueError as error:
        return str(error)
    return (out.sequences.tolist(), out.forward_passes) if isinstance(out, BlockDiffusionOutput) else out.tolist()


def test_each_setting_that_is_read_is_shown_to_be():
    """Catches a name in the list of settings that are read which no test holds to it."""
    assert set(READING) | SHOWN_ELSEWHERE == set(READ)


@pytest.mark.parametrize("name", READING)
def test_what_is_read_changes_the_outcome_wherever_it_comes_from(name):
    """Catches a setting that is read from a keyword alone, or accepted and ignored."""
    value, context = READING[name]
    context = {"inputs": prompt(6), "max_new_tokens": 9} | context
    free = outcome(tiny(seed=3), **context)
    if name in context:
        context.pop(name)
    expected = outcome(tiny(seed=3), **context | {name: value})
    assert expected != free and "does not read" not in str(expected)
    # transformers' own constructor has rules of its own for several answers
    config = with_setting(name, value) if name == "num_return_sequences" else TIDEGenerationConfig(**{name: value})
    assert outcome(tiny(seed=3), **context, generation_config=config) == expected
    model = tiny(seed=3)
    setattr(model.generation_config, name, value)
    assert outcome(model, **context) == expected


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"repetition_penalty": 1.7}, lambda p, e: RepetitionPenaltyLogitsProcessor(1.7)),
        ({"no_repeat_ngram_size": 2}, lambda p, e: NoRepeatNGramLogitsProcessor(2)),
        ({"bad_words_ids": [[4, 5], [6]]}, lambda p, e: NoBadWordsLogitsProcessor([[4, 5], [6]], e)),
        ({"sequence_bias": [[[8], -9.0]]}, lambda p, e: SequenceBiasLogitsProcessor([[[8], -9.0]])),
        ({"suppress_tokens": [8, 21]}, lambda p, e: SuppressTokensLogitsProcessor([8, 21])),
        ({"begin_suppress_tokens": [8, 21]}, lambda p, e: SuppressTokensAtBeginLogitsProcessor([8, 21], p.shape[1])),
        ({"forced_eos_token_id": 7}, lambda p, e: ForcedEOSTokenLogitsProcessor(p.shape[1] + 10, 7)),
        ({"min_length": 12}, lambda p, e: MinLengthLogitsProcessor(12, e)),
        ({"min_new_tokens": 5}, lambda p, e: MinNewTokensLengthLogitsProcessor(p.shape[1], 5, e)),
        (
            {"exponential_decay_length_penalty": (1, 1.3)},
            lambda p, e: ExponentialDecayLengthPenalty((1, 1.3), e, p.shape[1]),
        ),
        ({"encoder_repetition_penalty": 3.0}, lambda p, e: EncoderRepetitionPenaltyLogitsProcessor(3.0, p)),
        ({"encoder_no_repeat_ngram_size": 1}, lambda p, e: EncoderNoRepeatNGramLogitsProcessor(1, p)),
        ({"remove_invalid_values": True}, lambda p, e: InfNanRemoveLogitsProcessor()),
        ({"renormalize_logits": True}, lambda p, e: LogitNormalization()),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("length", [1, 6])
def test_processors_are_transformers_own(settings, make, length, monkeypatch):
    """Catches a processor with other arguments than transformers', or one that the decoder does not apply."""
    model, ids, eos = tiny(seed=3), torch.cat([prompt(length), prompt(length, seed=5)]), 21
    shared = {"max_new_tokens": 10, "eos_token_id": eos, "temperature": 0.5}
    expected = model.generate(ids, logits_processor=[make(ids, eos)], generator=seeded(), **shared)
    applied, kind = [], type(make(ids, eos))
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *args: applied.append(1) or call(self, *args))
    assert torch.equal(model.generate(ids, generator=seeded(), **shared, **settings), expected)
    assert applied


def test_padding_is_no_repeated_token():
    """Catches a repetition penalty on the token that fills prompts up, or n-grams across right padding."""
    model, alone = tiny(seed=3), prompt(5)
    for settings in ({"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"encoder_no_repeat_ngram_size": 1}):
        expected = model.generate(alone, max_new_tokens=10, **settings)[0, 5:]
        for left, right in ((3, 0), (0, 3)):
            if "encoder_no_repeat_ngram_size" in settings and left + right:
                filler = int(alone[0, 0])  # transformers counts padding there
            else:
                filler = int(expected[0])
            ids = torch.nn.functional.pad(alone, (left, right), value=filler)
            mask = torch.nn.functional.pad(torch.ones_like(alone), (left, right))
            if "no_repeat_ngram_size" in settings and left:
                continue  # transformers counts padding there
            out = model.generate(ids, attention_mask=mask, max_new_tokens=10, **settings)
            assert torch.equal(out[0, 8:], expected)


def test_a_callers_processor_stands_beside_those_of_settings():
    """Catches a setting that switches the caller's own processors off."""
    model, rule = tiny(), SuppressTokensLogitsProcessor(list(range(10)))
    out = model.generate(prompt(6), max_new_tokens=9, logits_processor=[rule], no_repeat_ngram_size=1, block_size=1)
    new = out[0, 6:].tolist()
    assert min(new) >= 10 and len(set(new)) == 9


def test_no_eos_before_min_new_tokens_in_any_order():
    """Catches EOS revealed early at the end of a block, before the minimum is known to be reached."""
    model = tiny(seed=3)
    for eos in range(20):
        for minimum in (0, 3, 8):
            out = model.generate(prompt(6), max_new_tokens=10, eos_token_id=eos, min_new_tokens=minimum)
            assert out.shape[1] - 6 >= min(minimum + 1, 10)
            assert eos not in out[0, 6 : 6 + minimum]
    with pytest.raises(ValueError, match="min_new_tokens=11 is more than the 10 tokens"):
        model.generate(prompt(6), max_new_tokens=10, min_new_tokens=11)


def stopping():
    """A student over a tokenizer of characters, its prompt, what it answers freely, and a character of that."""
    tokenizer, mask = sentencepiece(), len(sentencepiece())
    model = tiny(seed=4, vocab_size=mask + 1, mask_token_id=mask, pad_token_id=None)
    ids = tokenizer(["the answer", "hello worl"], return_tensors="pt").input_ids
    free = model.generate(ids, max_new_tokens=12, suppress_tokens=list(range(260)))[:, ids.shape[1] :].tolist()
    return model, tokenizer, ids, free


def test_stop_strings_end_a_row_in_the_middle_of_a_block():
    """Catches a stop string that is passed over, needs a tokenizer nobody asks for, or ends its neighbour."""
    model, tokenizer, ids, free = stopping()
    settings, ends = {"max_new_tokens": 12, "suppress_tokens": list(range(260)), "pad_token_id": 1}, set()
    for stop in {tokenizer.convert_ids_to_tokens(token) for token in free[0]}:
        if len(stop) > 1 or stop == "▁":
            continue
        out = model.generate(ids, stop_strings=stop, tokenizer=tokenizer, **settings)[:, ids.shape[1] :]
        for row, expected in zip(out.tolist(), free, strict=True):
            hits = [i for i, token in enumerate(expected) if stop in tokenizer.convert_ids_to_tokens(token)]
            end = hits[0] + 1 if hits else 12
            assert row == (expected[:end] + [1] * 12)[: out.shape[1]]
            ends.add(end)
    assert len(ends) > 2 and min(ends) < 12
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(ids, stop_strings="x", **settings)


def test_max_time_finishes_the_block_and_stops():
    """Catches a time limit that is never asked for, or throws away all but one token of the block just finished."""
    model = tiny()
    out = model.generate(prompt(6), max_new_tokens=20, max_time=1e-9, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(prompt(6), max_new_tokens=2)) and out.forward_passes == 2
    assert model.generate(prompt(6), max_new_tokens=20, max_time=60.0).shape == (1, 26)
    full = tiny(objective="full")
    with pytest.raises(ValueError, match=r"max_time=1\.0 .*set block_size"):
        full.generate(prompt(6), max_new_tokens=20, max_time=1.0)
    assert full.generate(prompt(6), max_new_tokens=20, max_time=1e-9, block_size=5).shape == (1, 11)


@pytest.mark.parametrize("grid", ["absolute", "prompt_aligned"])
def test_without_a_cache_the_tokens_are_the_same(grid, monkeypatch):
    """Catches use_cache=False that is accepted and ignored, or sees blocks that are still to come."""
    model, columns = tiny(seed=3), []
    expected = model.generate(prompt(6), max_new_tokens=14, block_grid=grid)
    run = model.run_decoder
    monkeypatch.setattr(
        model, "run_decoder", lambda **k: columns.append((k["input_ids"].shape[1], k["use_cache"])) or run(**k)
    )
    assert torch.equal(
        model.generate(prompt(6), max_new_tokens=14, block_grid=grid, use_cache=False, disable_compile=True), expected
    )
    widths, cached = zip(*columns, strict=True)
    assert not any(cached) and list(widths) == sorted(widths) and widths[-1] >= 20


def test_use_cache_of_config_json_is_no_generation_setting(tmp_path):
    """Catches a student that decodes without a cache because it was trained with gradient checkpointing."""
    model = tiny(use_cache=False)
    assert model.config.use_cache is False
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        seen, run = [], loaded.run_decoder
        loaded.run_decoder = lambda run=run, seen=seen, **kwargs: seen.append(kwargs["use_cache"]) or run(**kwargs)
        loaded.generate(prompt(6), max_new_tokens=4)
        assert set(seen) == {True}


# ---- length ----


def test_max_length_counts_the_prompt():
    """Catches max_length that is ignored (256 tokens), or counts the answer alone."""
    model = tiny()
    assert torch.equal(model.generate(prompt(6), max_length=15), model.generate(prompt(6), max_new_tokens=9))
    assert model.generate(prompt(6), max_length=20).shape == (1, 20)
    assert model.generate(prompt(6), generation_config=GenerationConfig(max_length=20)).shape == (1, 20)
    ids = torch.nn.functional.pad(prompt(6), (4, 0), value=PAD)  # as in transformers padding counts
    assert model.generate(ids, max_length=15).shape == (1, 15)
    for total in (6, 3):
        with pytest.raises(ValueError, match=rf"max_length={total} counts the prompt, whose 6 columns"):
            model.generate(prompt(6), max_length=total)


def test_the_nearer_length_is_taken(monkeypatch):
    """Catches a caller's max_length that loses to the checkpoint's max_new_tokens, or the reverse."""
    model, said = tiny(), []
    monkeypatch.setattr("tide_hf.models.settings_tide.logger.warning", said.append)
    model.generation_config = TIDEGenerationConfig(max_new_tokens=5, mask_token_id=MASK)
    assert model.generate(prompt(6)).shape[1] == 11
    assert model.generate(prompt(6), max_length=9).shape[1] == 9
    assert model.generate(prompt(6), max_length=9, max_new_tokens=7).shape[1] == 13 and len(said) == 1
    assert "max_new_tokens=7 and max_length=9" in said[0]
    assert model.generate(prompt(6), max_new_tokens=None).shape[1] == 6 + 256
    assert model.generate(prompt(6), max_new_tokens=None, max_length=9).shape[1] == 9
    given = GenerationConfig(max_length=9)
    assert model.generate(prompt(6), generation_config=given).shape[1] == 9
    assert model.generate(prompt(6), generation_config=given, max_new_tokens=2).shape[1] == 8


@pytest.mark.parametrize("name", ["mask_token_id", "block_size", "block_grid", "remasking", "temperature"])
def test_a_keyword_none_leaves_the_default(name):
    """Catches None that crashes far inside, or makes one block of a whole answer."""
    model = tiny(seed=3)
    expected = model.generate(prompt(6), max_new_tokens=9)
    assert torch.equal(model.generate(prompt(6), max_new_tokens=9, **{name: None}), expected)


@pytest.mark.parametrize("objective", ["block", "full"])
@pytest.mark.parametrize("num_new", [1, 3, 6, 11, 32, 38])
def test_passes_do_not_exceed_the_tokens_asked_for(num_new, objective):
    """Catches a block of 32 that is denoised whole for the 6 tokens of it that are returned."""
    model = tiny(block_size=32, objective=objective)
    for length in (2, 29, 32):
        for settings in ({}, {"confidence_threshold": 1.0}, {"steps_per_block": 4}):
            out = model.generate(prompt(length), max_new_tokens=num_new, return_dict_in_generate=True, **settings)
            assert out.sequences.shape[1] == length + num_new and MASK not in out.sequences
            assert out.forward_passes <= num_new
            if "steps_per_block" in settings:
                continue
            expected, steps = naive_generate(model, prompt(length)[0].tolist(), num_new, **settings)
            assert out.sequences[0, length:].tolist() == expected
            assert out.forward_passes == sum(steps) <= num_new


def test_what_is_not_returned_is_not_shown():
    """Catches a stream whose drafts hold the rest of the last block, which stays masked."""

    class Streamer(list):
        def put(self, value):
            self.append(value.flatten().tolist())

        def put_draft(self, value):
            self.append(value.flatten().tolist())

        def end(self):
            pass

    streamer = Streamer()
    out = tiny().generate(prompt(4), max_new_tokens=3, streamer=streamer)
    assert [len(ids) for ids in streamer] == [4, 3, 3, 3, 3] and streamer[-1] == out[0, 4:].tolist()


# ---- drawing ----


def test_do_sample_draws_at_temperature_one():
    """Catches do_sample=True that stays greedy because no temperature is given."""
    model = tiny(seed=3)
    drawn = model.generate(prompt(6), max_new_tokens=14, temperature=1.0, generator=seeded())
    assert not torch.equal(drawn, model.generate(prompt(6), max_new_tokens=14))
    for settings in ({"do_sample": True}, {"generation_config": GenerationConfig(do_sample=True)}):
        assert torch.equal(model.generate(prompt(6), max_new_tokens=14, generator=seeded(), **settings), drawn)
    narrow = model.generate(prompt(6), max_new_tokens=14, do_sample=True, top_k=1, generator=seeded())
    assert torch.equal(narrow, model.generate(prompt(6), max_new_tokens=14)), "top_k was not read"
    model.generation_config = TIDEGenerationConfig(temperature=0.0, mask_token_id=MASK, block_size=BLOCK)
    assert torch.equal(model.generate(prompt(6), max_new_tokens=14, do_sample=True, generator=seeded()), drawn)


@pytest.mark.parametrize("warper", ["top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"])
def test_narrowing_where_nothing_is_drawn_is_refused(warper):
    """Catches top_p=0.9 that silently gives greedy answers."""
    if not hasattr(GenerationConfig(), warper):
        pytest.skip("not in this transformers")
    model, value = tiny(), 3 if warper == "top_k" else 0.4
    refused = pytest.raises(ValueError, match=rf"{warper}={value} .*pass do_sample=True or a temperature")
    for settings in ({}, {"temperature": 0.0}, {"do_sample": False}, {"temperature": None}):
        with refused:
            model.generate(prompt(4), max_new_tokens=2, **{warper: value}, **settings)
        with refused:
            config = GenerationConfig(**{warper: value}, **settings)
            model.generate(prompt(4), max_new_tokens=2, generation_config=config)
        with refused:
            model.infill(holes(), **{warper: value}, **settings)
    model.generation_config = with_setting(warper, value)
    with pytest.raises(ValueError, match=rf"model\.generation_config\.{warper}={value} "):
        model.generate(prompt(4), max_new_tokens=2)
    # a keyword takes back what the checkpoint says
    model.generate(prompt(4), max_new_tokens=2, do_sample=False)
    model.generate(prompt(4), max_new_tokens=2, temperature=0.0)
    model.generate(prompt(4), max_new_tokens=2, do_sample=True)


def test_values_that_switch_off_are_off():
    """Catches top_k=0, transformers' way to switch it off, being an error."""
    model, off = tiny(), {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0}
    assert torch.equal(model.generate(prompt(6), max_new_tokens=9, **off), model.generate(prompt(6), max_new_tokens=9))
    drawn = [model.generate(prompt(6), max_new_tokens=9, temperature=1.0, generator=seeded(), **s) for s in ({}, off)]
    assert torch.equal(*drawn)
    assert TIDEGenerationConfig(top_k=0).top_k == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"do_sample": False, "temperature": 0.7},
            "do_sample=False takes the most probable token and temperature=0.7",
        ),
        (
            {"do_sample": False, "temperature": 1.0},
            "do_sample=False takes the most probable token and temperature=1.0",
        ),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=True draws tokens and temperature=0.0"),
        ({"steps_per_block": 2, "confidence_threshold": 0.9}, "steps_per_block=2 would be ignored"),
        ({"steps_per_block": 2, "entropy_bound": 0.9}, "steps_per_block=2 would be ignored"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 would give equal answers"),
        ({"exponential_decay_length_penalty": (1, 2.0)}, "pass eos_token_id"),
        ({"top_p": 1.5, "temperature": 1.0}, r"top_p must lie in \[0, 1\], got 1.5"),
        ({"typical_p": 1.5, "temperature": 1.0}, r"typical_p must lie in \[0, 1\], got 1.5"),
        ({"top_k": -1, "temperature": 1.0}, "top_k must be at least 0, got -1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0, got -1"),
        ({"max_time": -1.0}, "max_time must be a positive number"),
        ({"max_new_tokens": 4.0}, "max_new_tokens must be a whole number, got 4.0"),
        ({"max_new_tokens": "4"}, "max_new_tokens must be a whole number, got '4'"),
        ({"mask_token_id": VOCAB}, f"mask_token_id holds the token id {VOCAB}"),
        ({"pad_token_id": VOCAB}, f"pad_token_id holds the token id {VOCAB}"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_contradictions_and_senseless_values_are_refused(settings, message):
    """Catches one of two settings that is silently overridden by the other, and values that switch something off."""
    with pytest.raises(ValueError, match=message):
        tiny().generate(prompt(4), **{"max_new_tokens": 4} | settings)


def test_the_nearer_of_flag_and_temperature_decides():
    """Catches a few-step student that cannot be asked for greedy answers, or a temperature beaten by a checkpoint."""
    model = tiny(seed=3)

    def answer(**settings):
        return model.generate(prompt(6), max_new_tokens=14, generator=seeded(), **settings)

    greedy, one, two = answer(), answer(temperature=1.0), answer(temperature=2.0)
    saved = TIDEGenerationConfig(do_sample=True, temperature=1.0, mask_token_id=MASK, block_size=BLOCK)
    model.generation_config = saved
    assert torch.equal(answer(), one) and torch.equal(answer(do_sample=True), one)
    assert torch.equal(answer(temperature=2.0), two) and torch.equal(answer(temperature=0), greedy)
    assert torch.equal(answer(do_sample=False), greedy)
    assert torch.equal(answer(temperature=None), one) and torch.equal(answer(do_sample=None, temperature=None), greedy)
    model.generation_config = GenerationConfig(do_sample=False, temperature=1.0, top_k=50)
    assert torch.equal(answer(), greedy) and torch.equal(answer(temperature=2.0, top_k=0), two)
    assert torch.equal(answer(do_sample=True, top_k=None), one)


def test_steps_of_a_few_step_student_give_way_to_a_callers_threshold():
    """Catches a saved number of steps that refuses, or overrides, what the caller asks for."""
    model = tiny(seed=3)
    expected = model.generate(prompt(6), max_new_tokens=14, confidence_threshold=0.3)
    model.generation_config.steps_per_block = 2
    assert torch.equal(model.generate(prompt(6), max_new_tokens=14, confidence_threshold=0.3), expected)
    model.generation_config = TIDEGenerationConfig(confidence_threshold=0.3)
    with pytest.raises(ValueError, match=r"model\.generation_config\.confidence_threshold=0.3 decides"):
        model.generate(prompt(6), max_new_tokens=14, steps_per_block=2)
    model.generate(prompt(6), max_new_tokens=14, steps_per_block=2, confidence_threshold=None)


def test_several_answers_for_each_prompt():
    """Catches answers that are equal, in another order than transformers', or beside another prompt's padding."""
    model, ids, mask = tiny(seed=3), torch.cat([prompt(7), prompt(7, seed=2)]), torch.ones(2, 7, dtype=torch.long)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 10, "temperature": 1.5}
    out = model.generate(ids, attention_mask=mask, num_return_sequences=3, generator=seeded(), **settings)
    repeated, masks = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    assert torch.equal(out, model.generate(repeated, attention_mask=masks, generator=seeded(), **settings))
    assert torch.equal(out[:, :7], repeated) and len({tuple(row) for row in out.tolist()}) == 6
    guided = {"negative_prompt_ids": torch.cat([prompt(3), prompt(3, seed=2)]), "guidance_scale": 2.0}
    out = model.generate(ids, num_return_sequences=2, generator=seeded(), **settings, **guided)
    guided["negative_prompt_ids"] = guided["negative_prompt_ids"].repeat_interleave(2, 0)
    assert torch.equal(out, model.generate(ids.repeat_interleave(2, 0), generator=seeded(), **settings, **guided))


# ---- infilling ----


def test_infill_reads_its_settings_and_leaves_those_of_answers_alone():
    """Catches settings that a caller gives to infill in a config and nothing reads, and a model that cannot infill."""
    model, ids = tiny(seed=3), holes(12, (1, 2, 6, 9))
    free = model.infill(ids)
    answers = {
        "max_new_tokens": 5,
        "max_length": 9,
        "num_return_sequences": 2,
        "block_grid": "prompt_aligned",
        "min_new_tokens": 2,
        "min_length": 2,
        "begin_suppress_tokens": [3],
        "forced_eos_token_id": 3,
        "exponential_decay_length_penalty": (1, 2.0),
        "encoder_repetition_penalty": 2.0,
        "encoder_no_repeat_ngram_size": 2,
        "max_time": 1.0,
        "stop_strings": "a",
        "bos_token_id": 3,
        "eos_token_id": 3,
    }
    assert set(answers) == set(FOR_ANSWERS) and not set(FOR_ANSWERS) & set(FOR_INFILL)
    for name, value in answers.items():
        with pytest.raises(ValueError, match=f"infill does not read {name}="):
            model.infill(ids, **{name: value})
        config = with_setting(name, value)
        if not name.endswith("s_token_id"):  # every loaded config has those
            with pytest.raises(ValueError, match=rf"infill does not read {name}=.*Set generation_config\.{name}"):
                model.infill(ids, generation_config=config)
        model.generation_config = config
        assert torch.equal(model.infill(ids), free)
    model.generation_config = GenerationConfig(guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"guidance_scale=2.0: .*Set model\.generation_config\.guidance_scale = 1"):
        model.infill(ids)


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": [9]},
        {"bad_words_ids": [[9]]},
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"sequence_bias": [[[4], 9.0]]},
        {"temperature": 3.0},
        {"do_sample": True},
        {"remasking": "random"},
        {"steps_per_block": 1},
    ],
    ids=str,
)
def test_infill_applies_what_it_reads(settings, recwarn):
    """Catches a setting that infill accepts and does not apply, and a warning about a prompt it does not have."""
    model, ids = tiny(seed=3), holes(14, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    out = model.infill(ids, generator=seeded(), **settings)
    assert not torch.equal(out, model.infill(ids)) and torch.equal(out[ids != MASK], ids[ids != MASK])
    assert torch.equal(model.infill(ids, generator=seeded(), generation_config=TIDEGenerationConfig(**settings)), out)
    assert not [str(warning.message) for warning in recwarn if "inputs_embeds" in str(warning.message)]


def test_a_hole_may_not_be_filled_with_a_suppressed_eos():
    """Catches transformers' exception for EOS, which ends nothing in a text with holes."""
    model, ids = tiny(seed=3), holes(14, (1, 2, 4, 5, 6, 7, 9, 10))
    eos = int(model.infill(ids)[0, 1])
    model.generation_config.eos_token_id = eos
    assert eos not in model.infill(ids, bad_words_ids=[[eos]])[ids == MASK]


# ---- transformers' own callers ----


def test_pipeline_settings_are_read(monkeypatch):
    """Catches a text-generation pipeline whose own defaults (do_sample, temperature) are refused or ignored."""
    tokenizer, model = build_tokenizer(), tiny_model(dtype=torch.float32).eval()
    write, seen = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu"), []
    made = sampling_tide.propose_tokens
    monkeypatch.setattr(
        "tide_hf.models.decoding_tide.propose_tokens", lambda *args: seen.append(args[1]) or made(*args)
    )
    text = write("31025", max_new_tokens=6)[0]["generated_text"]
    assert text.startswith("31025") and set(seen) == {0.7}
    several = write("31025", max_new_tokens=6, num_return_sequences=3, temperature=3.0, return_full_text=False)
    assert len(several) == 3
    ids = tokenizer("31025", return_tensors="pt", add_special_tokens=False).input_ids
    expected = model.generate(ids, max_length=ids.shape[1] + 4)[0, ids.shape[1] :]
    greedy = write("31025", max_length=ids.shape[1] + 4, do_sample=False, return_tensors=True)
    assert greedy[0]["generated_token_ids"][ids.shape[1] :] == expected.tolist()
    batch = write(["31025", "7"], batch_size=2, max_new_tokens=6, do_sample=False)
    assert [row[0]["generated_text"] for row in batch] == [
        write(given, max_new_tokens=6, do_sample=False)[0]["generated_text"] for given in ("31025", "7")
    ]
    with pytest.raises(ValueError, match="does not read num_beams=2"):
        write("31025", num_beams=2)


def test_a_pipelines_stop_sequence_is_read():
    """Catches a stop sequence that a pipeline hands on and nothing reads."""
    model, tokenizer, _, free = stopping()
    stop = next(t for t in map(tokenizer.convert_ids_to_tokens, free[0][1:]) if len(t) == 1 and t != "▁")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    settings = {"max_new_tokens": 12, "suppress_tokens": list(range(260)), "do_sample": False, "return_tensors": True}
    stopped = write("the answer", stop_sequence=stop, **settings)[0]["generated_token_ids"]
    whole = write("the answer", **settings)[0]["generated_token_ids"]
    assert len(stopped) < len(whole) and whole[: len(stopped)] == stopped
    assert stop in tokenizer.convert_ids_to_tokens(stopped[-1])


# ---- prompts and masks ----


def side_by_side(side, filler, lengths=(4, 7)):
    rows, width = [prompt(length) for length in lengths], max(lengths)
    pads = [(width - n, 0) if side == "left" else (0, width - n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(r, p, value=filler) for r, p in zip(rows, pads, strict=True)])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), p) for r, p in zip(rows, pads, strict=True)])
    return ids, mask


@pytest.mark.parametrize("method", ["generate", "infill", "negative"])
@pytest.mark.parametrize("shape", [(1, 5), (1, 9), (2, 7), (7,), (1, 1, 7)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape, method):
    """Catches a narrower mask that cuts the prompt, and a wider one that crashes without a reason."""
    model, mask = tiny(), torch.ones(shape, dtype=torch.long)
    name, other = ("input_ids", "attention_mask")
    if method == "negative":
        name, other = ("negative_prompt_ids", "negative_prompt_attention_mask")
    with pytest.raises(ValueError) as said:
        if method == "generate":
            model.generate(prompt(7), attention_mask=mask, max_new_tokens=2)
        elif method == "infill":
            model.infill(holes(), attention_mask=mask)
        else:
            model.generate(prompt(3), max_new_tokens=2, guidance_scale=2.0, **{name: prompt(7), other: mask})
    assert f"{other} must have the shape of {name}, (1, 7), got {shape}" in str(said.value)


@pytest.mark.parametrize("method", ["generate", "infill", "negative"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_found_without_a_mask(side, method):
    """Catches a padded batch without a mask whose padding is read as text."""
    model = tiny(seed=3, objective="full" if method == "infill" else "block")
    ids, mask = side_by_side(side, PAD, lengths=(6, 9))

    def run(**given):
        if method == "generate":
            return model.generate(ids, max_new_tokens=9, **given)
        if method == "infill":
            holed = ids.clone()
            holed[:, 3:6] = MASK
            return model.infill(holed, **given)
        given = {f"negative_prompt_{name}": value for name, value in given.items()}
        return model.generate(
            prompt(3).repeat(2, 1), negative_prompt_ids=ids, guidance_scale=3.0, max_new_tokens=9, **given
        )

    expected = run(attention_mask=mask)
    assert torch.equal(run(), expected)
    assert torch.equal(run(attention_mask=mask.bool()), expected) and torch.equal(
        run(attention_mask=mask.double()), expected
    )
    assert not torch.equal(run(attention_mask=torch.ones_like(mask)), expected), "padding did not matter"


def test_padding_is_found_in_a_single_row_and_not_between_tokens():
    """Catches padding of one row read as text, and a token of the text taken for padding."""
    model = tiny(seed=3)
    expected = model.generate(prompt(5), max_new_tokens=9)[0, 5:]
    assert torch.equal(
        model.generate(torch.nn.functional.pad(prompt(5), (2, 0), value=PAD), max_new_tokens=9)[0, 7:], expected
    )
    ids = prompt(5)
    ids[0, 2] = PAD
    everything = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
    assert torch.equal(model.generate(ids, max_new_tokens=9), everything)


@pytest.mark.parametrize("length", [1, 4])
def test_a_beginning_that_is_padding_too_stays(length):
    """Catches BOS taken for padding where both are one token, and the padding before it taken for text."""
    bos = {"pad_token_id": 2, "bos_token_id": 2}
    model = tiny(seed=3, **bos)
    begun = torch.cat([torch.tensor([[2]]), prompt(length)], 1)
    begun[0, 1:][begun[0, 1:] == 2] = 5
    expected = model.generate(begun, attention_mask=torch.ones_like(begun), max_new_tokens=9)[0, length + 1 :]
    assert torch.equal(model.generate(begun, max_new_tokens=9)[0, length + 1 :], expected)
    other = torch.cat([torch.tensor([[2]]), prompt(length + 3)], 1)
    other[0, 1:][other[0, 1:] == 2] = 5
    batch = torch.cat([torch.nn.functional.pad(begun, (3, 0), value=2), other])
    assert torch.equal(model.generate(batch, max_new_tokens=9)[0, length + 4 :], expected)
    # without BOS in the longest row, the padding of the others is all of it
    batch[:, 3] = torch.tensor([2, 7])
    batch[1, 0] = 9
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    assert torch.equal(
        model.generate(batch, max_new_tokens=9), model.generate(batch, attention_mask=mask, max_new_tokens=9)
    )
    alone = torch.tensor([[2]])
    assert torch.equal(
        model.generate(alone, max_new_tokens=3), model.generate(alone, attention_mask=alone * 0 + 1, max_new_tokens=3)
    )


def test_padding_that_is_eos_is_said_once(monkeypatch):
    """Catches padding that cannot be told from EOS being read as text without a word."""
    said = []
    monkeypatch.setattr("tide_hf.models.prompts_tide.logger.warning_once", said.append)
    for own in ({"pad_token_id": EOS, "eos_token_id": EOS}, {"pad_token_id": None, "eos_token_id": [EOS, 20]}):
        model = tiny(seed=3, **own)
        ids, mask = side_by_side("left", EOS)
        as_text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
        model.generate(ids, attention_mask=mask, max_new_tokens=4)
        model.generate(ids[1:], max_new_tokens=4)
        assert not said
        assert torch.equal(model.generate(ids, max_new_tokens=4), as_text)
        assert len(said) == 1 and f"input_ids holds pad_token_id={EOS}" in said.pop()


def test_holes_at_the_edge_are_no_padding():
    """Catches holes that are taken for padding where [MASK] fills rows up, and so are never filled."""
    model, ids = tiny(seed=3, pad_token_id=MASK), holes(7, (0, 6))
    assert MASK not in model.infill(ids)


def test_a_token_hidden_between_others_is_left_out():
    """Catches positions that count a hidden token, so that the answer is neither with nor without it."""
    for objective in ("block", "full"):
        model, ids = tiny(seed=3, objective=objective), prompt(8)
        mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1]])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=9, no_repeat_ngram_size=2)
        expected = model.generate(ids[mask.bool()][None], max_new_tokens=9, no_repeat_ngram_size=2)
        assert torch.equal(out[0, 8:], expected[0, 5:]) and torch.equal(out[:, :8], ids)


def test_a_row_without_tokens_is_refused():
    """Catches an inverted mask, or a row of padding, answered as if something had been asked."""
    ids = torch.cat([prompt(5), torch.full((1, 5), PAD)])
    for given in ({}, {"attention_mask": torch.tensor([[1] * 5, [0] * 5])}):
        with pytest.raises(ValueError, match="Row 1 of input_ids is all padding"):
            tiny().generate(ids, max_new_tokens=4, **given)
        with pytest.raises(ValueError, match="Row 1 of input_ids is all padding"):
            tiny().infill(ids, **given)
    empty = torch.empty(1, 0, dtype=torch.long)
    assert tiny().generate(empty, max_new_tokens=6, no_repeat_ngram_size=3).shape == (1, 6)


def test_without_a_prompt_the_beginning_is_bos():
    """Catches bos_token_id that is accepted and not read."""
    model = tiny()
    expected = model.generate(torch.tensor([[3]]), max_new_tokens=5)
    assert torch.equal(model.generate(bos_token_id=3, max_new_tokens=5), expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1, 2]), r"shape \(rows, tokens\), got \(2,\): \w+\[None\] makes one row"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"shape \(rows, tokens\), got \(1, 2, 3\)"),
        (torch.zeros(0, 3, dtype=torch.long), r"shape \(rows, tokens\), got \(0, 3\)"),
        (torch.tensor([[1.0, 2.0]]), "must be integer token ids, got torch.float32"),
        (torch.tensor([[True, False]]), "must be integer token ids, got torch.bool"),
        ([[1, 2]], "must be a tensor of token ids, rows × tokens, got a list"),
        ("text", "must be a tensor of token ids, rows × tokens, got a str"),
        (
            torch.tensor([[1, VOCAB]]),
            f"holds the token id {VOCAB}, and the model's vocabulary has {VOCAB}, 0 to {VOCAB - 1}",
        ),
        (torch.tensor([[1, -100]]), "holds the token id -100, and"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_prompts_that_are_none_are_refused(ids, message):
    """Catches "index out of range in self" and its like, deep inside the network."""
    for run in (
        lambda: tiny().generate(ids, max_new_tokens=4),
        lambda: tiny().infill(ids),
        lambda: tiny().generate(prompt(2), negative_prompt_ids=ids, guidance_scale=2.0, max_new_tokens=4),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_hidden_ids_may_be_anything_and_small_integers_do():
    """Catches ids of padding looked up in the embedding, and int32 ids that crash at the end of infilling."""
    model, ids = tiny(), torch.nn.functional.pad(prompt(5), (2, 0), value=-100)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    expected = model.generate(prompt(5), max_new_tokens=5)[0, 5:]
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5)[0, 7:], expected)
    assert torch.equal(model.infill(holes().int()), model.infill(holes()))
    assert torch.equal(model.generate(prompt(5).int(), max_new_tokens=5), model.generate(prompt(5), max_new_tokens=5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor([[0.0, -1e9, 0.0, 0.0]])}, "attention_mask must hold 1 at each token"),
        ({"attention_mask": [[1, 1, 1, 1]]}, "attention_mask must have the shape of input_ids, .* got list"),
        ({"negative_prompt_attention_mask": torch.ones(1, 4)}, "needs negative_prompt_ids"),
        (
            {"negative_prompt_ids": prompt(3).repeat(3, 1), "guidance_scale": 2.0},
            "must have one row or 1 as the prompts",
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_masks_that_are_none_are_refused(arguments, message):
    """Catches an additive mask read the wrong way round, and arguments that nothing reads."""
    with pytest.raises(ValueError, match=message):
        tiny().generate(prompt(4), max_new_tokens=4, **arguments)


def test_logging_is_transformers_own():
    """Catches warnings that transformers' verbosity does not reach."""
    from tide_hf.models import prompts_tide, settings_tide

    for module in (prompts_tide, settings_tide):
        assert module.logger is logging.get_logger(module.__name__)
