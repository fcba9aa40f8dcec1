"""Infilling: every mask is filled, nothing else changes, and what a hole sees is what the model can see."""

import pytest
import torch
from naive_sampler import prompt, published_split, tiny
from tiny import BLOCK, MASK, tiny_model

from tide_hf.demo.sorting import build_tokenizer


def with_holes(length, holes, seed=1):
    ids = prompt(length, seed)
    ids[0, holes] = MASK
    return ids


@torch.no_grad()
def naive_infill(model, ids, steps=None):
    """One row: windows in order, a full forward over the whole text at each step."""
    ids, full = ids.clone(), model.config.diffusion_type == "full"
    number = torch.arange(ids.shape[1]) // (ids.shape[1] if full else BLOCK)
    visible = (number[:, None] >= number)[None, None]
    for block in number.unique().tolist():
        masked = [p for p in (number == block).nonzero().flatten().tolist() if ids[0, p] == MASK]
        for count in published_split(len(masked), steps or len(masked)):
            logits = model(ids, attention_mask=visible).logits[0].float()
            logits[:, MASK] = -torch.inf
            probability, token = logits.softmax(-1).max(-1)
            for p in sorted(masked, key=lambda p: -float(probability[p]))[:count]:
                ids[0, p] = token[p]
                masked.remove(p)
    return ids


@pytest.mark.parametrize("diffusion_type", ["block", "full"])
@pytest.mark.parametrize("steps", [None, 1, 2])
def test_infill_matches_a_loop_over_the_whole_text(diffusion_type, steps):
    """Catches holes filled without what stands after them, blocks out of order, or a cache of masked columns."""
    model = tiny(seed=3, diffusion_type=diffusion_type)
    for length, holes in ((10, [1, 2, 6]), (7, [0]), (12, [3, 4, 5, 11]), (3, [1]), (14, [12, 13])):
        ids = with_holes(length, holes)
        out = model.infill(ids, steps_per_block=steps)
        assert torch.equal(out, naive_infill(model, ids, steps))
        given = ids != MASK
        assert torch.equal(out[given], ids[given]) and MASK not in out


@pytest.mark.parametrize("diffusion_type", ["block", "full"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_infill_batch_equals_row_by_row(diffusion_type, side):
    """Catches padding that is attended or filled, and rows without holes where others have some."""
    model, width = tiny(seed=4, diffusion_type=diffusion_type), 13
    rows = [with_holes(10, [1, 8]), with_holes(5, [4]), with_holes(12, [0, 5, 6, 11]), prompt(9)]
    ids, mask = torch.full((4, width), MASK), torch.zeros(4, width, dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(width - row.shape[1], None) if side == "left" else slice(None, row.shape[1])
        ids[index, columns], mask[index, columns] = row[0], 1
    out = model.infill(ids, attention_mask=mask, return_dict_in_generate=True)
    for index, row in enumerate(rows):
        assert torch.equal(out.sequences[index][mask[index].bool()], naive_infill(model, row)[0])
    assert (out.sequences[~mask.bool()] == MASK).all(), "padding was filled"
    assert out.tokens_per_forward == pytest.approx(7 / 4 / out.forward_passes)


def test_a_hole_sees_its_own_block_on_both_sides_and_no_later_one():
    """Catches a claim in the docstring that the network does not keep, in either direction."""
    for diffusion_type, sees_later in (("block", False), ("full", True)):
        model = tiny(seed=5, diffusion_type=diffusion_type)
        own, later = set(), set()
        for token in range(20):
            ids = with_holes(9, [5])
            ids[0, 6] = token
            own.add(int(model.infill(ids)[0, 5]))
            ids = with_holes(9, [5])
            ids[0, 8] = token
            later.add(int(model.infill(ids)[0, 5]))
        assert len(own) > 1 and (len(later) > 1) is sees_later


def test_only_what_a_hole_needs_is_run(monkeypatch):
    """Catches blocks after the last hole being run, and blocks without holes being denoised."""
    model, columns = tiny(), []
    run = model.run_decoder
    monkeypatch.setattr(
        model, "run_decoder", lambda **kwargs: columns.append(kwargs["input_ids"].shape[1]) or run(**kwargs)
    )
    model.infill(with_holes(30, [5, 17, 18]))
    assert columns == [8, 16, 4]  # blocks 0–1; the cache's update and blocks 2–4; block 4 again
    columns.clear()
    ids = prompt(8)
    assert torch.equal(model.infill(ids), ids) and not columns


@pytest.mark.parametrize("name", ["max_new_tokens", "eos_token_id", "block_grid", "guidance_scale", "max_new_token"])
def test_settings_without_meaning_are_refused(name):
    """Catches a setting of `generate` that infilling takes and ignores."""
    with pytest.raises(ValueError, match=f"infill does not read {name}"):
        tiny().infill(with_holes(6, [2]), **{name: 3})


# ---- text ----


def test_text_in_text_out():
    """Catches given characters that change on their way through the tokenizer, and holes of another length."""
    tokenizer, model = build_tokenizer(), tiny_model()
    text = "31[MASK]04[MASK:2]5"
    filled = model.infill_text(tokenizer, text)
    ids = tokenizer("31" + tokenizer.mask_token + "04" + 2 * tokenizer.mask_token + "5", return_tensors="pt").input_ids
    expected = model.infill(ids)[0]
    holes = [tokenizer.decode(expected[part], skip_special_tokens=True) for part in ([2], [5, 6])]
    assert filled == f"31{holes[0]}04{holes[1]}5"
    assert model.infill_text(tokenizer, text.replace("[MASK]", tokenizer.mask_token)) == filled
    batch = [text, "9[MASK:3]", "[MASK]7"]
    assert model.infill_text(tokenizer, batch) == [model.infill_text(tokenizer, single) for single in batch]


def test_text_without_holes_is_refused():
    """Catches a misspelt placeholder that comes back as if it had been filled."""
    with pytest.raises(ValueError, match=r"found none in '12\[mask\]'"):
        tiny_model().infill_text(build_tokenizer(), ["1[MASK]", "12[mask]"])


def test_a_tokenizer_without_mask_token_is_refused():
    """Catches holes tokenised as the letters of their placeholder."""
    tokenizer = build_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match=r"needs tokenizer.mask_token"):
        tiny_model().infill_text(tokenizer, "1[MASK]")
