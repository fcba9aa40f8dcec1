"""The settings that a uniform-state model's `generate` reads, and the reasons why it reads no others."""

import pytest
import torch
from naive_sampler import seeded, with_setting
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline
from uniform_run import tiny_uniform

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.models.settings_tide import FOR_UNIFORM, OWN_FIELDS, READ, REFUSED, REFUSED_FOR_UNIFORM

PROMPT = torch.tensor([[11, 3, 1, 12]])


def answer(model, ids=PROMPT, **settings):
    return model.generate(ids, num_steps=3, generator=seeded(), **settings)


@pytest.fixture
def model():
    return tiny_uniform().eval()


def test_every_setting_is_in_one_list():
    """Catches a setting that block diffusion reads and the uniform-state model silently ignores."""
    assert set(REFUSED_FOR_UNIFORM) == (set(READ) | set(REFUSED)) - set(FOR_UNIFORM)


@pytest.mark.parametrize("name", REFUSED_FOR_UNIFORM)
def test_what_is_not_read_is_refused_wherever_it_comes_from(name, model):
    """Catches temperature, top_k or a number of beams that a uniform-state model accepts and ignores."""
    value = 5 if name != "do_sample" else False
    with pytest.raises(ValueError, match=f"generate does not read {name}=.*Leave it out"):
        answer(model, **{name: value})
    if (name in OWN_FIELDS or hasattr(GenerationConfig(), name)) and not name.endswith("s_token_id"):
        config = with_setting(name, value)
        if name == "mask_token_id":  # a loaded config may have it
            return
        with pytest.raises(ValueError, match=rf"does not read {name}=.*Set generation_config\.{name}"):
            answer(model, generation_config=config)
        model.generation_config = config
        with pytest.raises(ValueError, match=rf"does not read {name}=.*Set model\.generation_config\.{name}"):
            answer(model)


def test_what_is_read_is_read_wherever_it_comes_from(model):
    """Catches a saved length, EOS or padding that a uniform-state model does not look at."""
    free = answer(model, max_new_tokens=8, eos_token_id=None)
    assert free.shape == (1, 12) and answer(model).shape == (1, 4 + 32)
    eos = int(free[0, 6])
    for name, value, expected in (
        ("max_new_tokens", 5, 9),
        ("max_length", 10, 10),
        ("eos_token_id", eos, None),
        ("pad_token_id", 2, None),
    ):
        settings = {} if "max" in name else {"max_new_tokens": 8, "eos_token_id": eos}
        settings.pop(name, None)
        given = answer(model, **settings, **{name: value})
        assert expected is None or given.shape[1] == expected
        assert torch.equal(answer(model, **settings, generation_config=with_setting(name, value)), given)
        other = tiny_uniform().eval()
        setattr(other.generation_config, name, value)
        assert torch.equal(answer(other, **settings), given)
        assert not torch.equal(given, answer(model, **settings))
    assert torch.equal(answer(model, max_new_tokens=8, do_sample=True), answer(model, max_new_tokens=8))
    with pytest.raises(ValueError, match=r"do_sample=False: .*draws in each step"):
        answer(model, do_sample=False)
    with pytest.raises(ValueError, match="max_length=4 counts the prompt"):
        answer(model, max_length=4)


def test_values_that_ask_for_nothing_pass(model, tmp_path):
    """Catches a checkpoint that is refused because its config spells out what is done anyway."""
    expected = answer(model, max_new_tokens=6)
    off = {"num_beams": 1, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "temperature": 1.0, "use_cache": True}
    assert torch.equal(answer(model, max_new_tokens=6, **off), expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(answer(loaded, max_new_tokens=6), expected)


def test_prompts_and_masks_are_checked(model):
    """Catches padding read as text, a mask of another shape, and ids the embedding has no row for."""
    pad = 2
    expected = answer(model, max_new_tokens=6, pad_token_id=pad)
    padded, mask = torch.nn.functional.pad(PROMPT, (2, 0), value=pad), torch.tensor([[0, 0, 1, 1, 1, 1]])
    masked = answer(model, padded, attention_mask=mask, max_new_tokens=6, pad_token_id=pad)
    assert torch.equal(masked[:, 6:], expected[:, 4:]) and torch.equal(masked[:, :6], padded)
    assert torch.equal(answer(model, padded, max_new_tokens=6, pad_token_id=pad), masked)
    hidden = answer(
        model, padded.masked_fill(mask == 0, -100), attention_mask=mask, max_new_tokens=6, pad_token_id=pad
    )
    assert torch.equal(hidden[:, 6:], masked[:, 6:])
    for arguments, message in (
        ({"attention_mask": mask}, r"must have the shape of input_ids, \(1, 4\), got \(1, 6\)"),
        ({"ids": PROMPT + 1000}, "holds the token id 1001"),
        ({"ids": PROMPT[0]}, r"got \(4,\)"),
        ({"ids": PROMPT.double()}, "must be integer token ids"),
    ):
        with pytest.raises(ValueError, match=message):
            answer(model, max_new_tokens=6, **arguments)


def test_a_pipeline_is_told_what_it_passes(model):
    """Catches a text-generation pipeline whose temperature has no effect."""
    write = pipeline("text-generation", model=model, tokenizer=build_tokenizer(), device="cpu")
    with pytest.raises(ValueError, match=r"temperature=0\.7: the whole answer is drawn from the reverse process"):
        write("31025", max_new_tokens=4)
    assert write("31025", max_new_tokens=4, temperature=1.0)[0]["generated_text"].startswith("31025")
