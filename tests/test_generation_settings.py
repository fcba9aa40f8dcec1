"""Every setting of transformers' GenerationConfig is read by `generate` and `infill`, or refused by name."""

import inspect
import json

import pytest
import torch
from naive_sampler import holes, prompt, seeded, tiny, with_setting
from real_tokenizers import sentencepiece
from tiny import MASK, tiny_model
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
from tide_hf.models import BlockDiffusionOutput, TIDEGenerationConfig, prompts_tide, sampling_tide, settings_tide
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

# what is sampled is the most probable token, and its confidence in that distribution 1
ONE_TOKEN = {"temperature": 1.0, "top_k": 1, "return_dict_in_generate": True}
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
    "decoding": ("dream", {"steps_per_block": 2}),
    "step_quota": ("remainder_last", {"steps_per_block": 2}),
    "threshold_inclusive": (False, {"confidence_threshold": 1.0, "confidence_from": "sampling"} | ONE_TOKEN),
    "confidence_from": ("sampling", {"confidence_threshold": 1.0} | ONE_TOKEN),
    "suppress_confidence_tokens": ([18], {}),
    "denoise_whole_blocks": (True, {"return_dict_in_generate": True}),
    "editing_threshold": (0.1, {}),
    "max_editing_steps": (0, {"editing_threshold": 0.1}),
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
SHOWN_ELSEWHERE |= {"approximate_cache"}  # for full-sequence students alone


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


@pytest.mark.parametrize(
    ("settings", "left", "right"),
    # transformers counts padding on the left among the n-grams; that on the right it does not know
    [({"repetition_penalty": 1.7}, 3, 0), ({"repetition_penalty": 1.7}, 0, 3), ({"no_repeat_ngram_size": 2}, 0, 3)],
    ids=str,
)
def test_padding_is_no_repeated_token(settings, left, right):
    """Catches a repetition penalty on the token that fills prompts up, or n-grams across right padding."""
    model = tiny(seed=3)
    expected = model.generate(prompt(5), max_new_tokens=10, **settings)[0, 5:]
    ids = torch.nn.functional.pad(prompt(5), (left, right), value=int(expected[0]))
    mask = torch.nn.functional.pad(torch.ones(1, 5, dtype=torch.long), (left, right))
    out = model.generate(ids, attention_mask=mask, max_new_tokens=10, **settings)
    assert torch.equal(out[0, 8:], expected)


def test_a_callers_processor_stands_beside_those_of_settings():
    """Catches a setting that switches the caller's own processors off."""
    model, rule = tiny(), SuppressTokensLogitsProcessor(list(range(10)))
    out = model.generate(prompt(6), max_new_tokens=9, logits_processor=[rule], no_repeat_ngram_size=1, block_size=1)
    new = out[0, 6:].tolist()
    assert min(new) >= 10 and len(set(new)) == 9


@pytest.mark.slow
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


def test_stop_strings_need_letters():
    """Catches "substring not found" for a tokenizer of words alone, which transformers' criterion cannot measure."""
    model = tiny_model(dtype=torch.float32)
    ids = torch.tensor([build_tokenizer().encode("<user>739152<assistant>")])
    with pytest.raises(ValueError, match=r"stop_strings=.*needs a tokenizer that can write any letter"):
        model.generate(ids, stop_strings=["9"], tokenizer=build_tokenizer(), max_new_tokens=4)


def test_max_time_finishes_the_block_and_stops():
    """Catches a time limit that is never asked for, or throws away all but one token of the block just finished."""
    model = tiny()
    out = model.generate(prompt(6), max_new_tokens=20, max_time=1e-9, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(prompt(6), max_new_tokens=2)) and out.forward_passes == 2
    assert model.generate(prompt(6), max_new_tokens=20, max_time=60.0).shape == (1, 26)
    full = tiny(diffusion_type="full")
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
        "denoise_whole_blocks": True,
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
        {"remasking": "left_to_right"},
        {"decoding": "dream", "steps_per_block": 2},
        {"step_quota": "of_block", "steps_per_block": 2},
        {"editing_threshold": 0.1},
        {"suppress_confidence_tokens": [18, 4]},
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


def test_warnings_follow_transformers_verbosity():
    """Catches warnings that transformers' own switch does not reach."""
    for module in (prompts_tide, settings_tide):
        assert module.logger is logging.get_logger(module.__name__)
