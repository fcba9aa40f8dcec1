"""Prompts, texts with holes and their masks: what is padding, what is left out, and what is refused."""

import pytest
import torch
from naive_sampler import EOS, PAD, holes, prompt, tiny
from tiny import MASK, VOCAB


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
    model = tiny(seed=3, diffusion_type="full" if method == "infill" else "block")
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
    """Catches padding that cannot be told from EOS silently being read as text."""
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
    for diffusion_type in ("block", "full"):
        model, ids = tiny(seed=3, diffusion_type=diffusion_type), prompt(8)
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
