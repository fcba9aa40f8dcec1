"""How much is generated and whether it is drawn: lengths, passes, sampling, and settings that contradict others."""

import pytest
import torch
from naive_sampler import PAD, holes, naive_generate, prompt, seeded, tiny, with_setting
from tiny import BLOCK, MASK, VOCAB
from transformers import GenerationConfig

from tide_hf.models import TIDEGenerationConfig

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


@pytest.mark.parametrize(
    "name", ["mask_token_id", "block_size", "block_grid", "remasking", "step_quota", "confidence_from", "temperature"]
)
def test_a_keyword_none_leaves_the_default(name):
    """Catches None that crashes far inside, or makes one block of a whole answer."""
    model = tiny(seed=3)
    expected = model.generate(prompt(6), max_new_tokens=9)
    assert torch.equal(model.generate(prompt(6), max_new_tokens=9, **{name: None}), expected)


@pytest.mark.parametrize("diffusion_type", ["block", "full"])
@pytest.mark.parametrize("num_new", [1, 3, 6, 11, 32, 38])
def test_passes_do_not_exceed_the_tokens_asked_for(num_new, diffusion_type):
    """Catches a block of 32 that is denoised whole for the 6 tokens of it that are returned."""
    model = tiny(block_size=32, diffusion_type=diffusion_type)
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
    """Catches a saved number of steps that slows a caller's threshold down, and a caller's own that do not count."""
    model = tiny(seed=3)
    expected = model.generate(prompt(6), max_new_tokens=14, confidence_threshold=0.3)
    model.generation_config.steps_per_block = 2
    assert torch.equal(model.generate(prompt(6), max_new_tokens=14, confidence_threshold=0.3), expected)
    settings = {"max_new_tokens": 14, "return_dict_in_generate": True}
    slow = model.generate(prompt(6), confidence_threshold=0.999, **settings).forward_passes
    both = model.generate(prompt(6), confidence_threshold=0.999, steps_per_block=2, **settings)
    assert both.forward_passes == 8 < slow == 14, "with both, a pass reveals at least the share of its step"
    model.generation_config = TIDEGenerationConfig(confidence_threshold=0.999, mask_token_id=MASK, block_size=BLOCK)
    nearer = model.generate(prompt(6), steps_per_block=2, **settings)
    assert torch.equal(nearer.sequences, both.sequences) and nearer.forward_passes == both.forward_passes


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
