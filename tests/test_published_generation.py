"""Published families decode as the plainest sampler does on their published tensors: `generate` and `infill`."""

import json
from dataclasses import replace

import pytest
import torch
from naive_sampler import published_split
from published import naive_logits, write_checkpoint
from published_students import (
    BLOCK,
    BLOCKS,
    MASK,
    PAD,
    STUDENTS,
    block_size_of,
    families,
    naive_denoiser,
    published_student,
)
from transformers import AutoModelForCausalLM

FULL = [family for family, (size, _) in STUDENTS.items() if size is None]


def prompt_of(length: int) -> torch.Tensor:
    return torch.randint(0, 20, (length,), generator=torch.Generator().manual_seed(length))


def naive_reveal(network, ids: torch.Tensor, positions: list[int], steps: int | None) -> None:
    """Replaces the [MASK]s at `positions` in place, the most probable first, by a whole forward in every step."""
    masked = list(positions)
    for count in published_split(len(masked), steps or len(masked)):
        logits = naive_denoiser(*network, ids, ids == MASK, MASK)
        logits[:, MASK] = -torch.inf
        probability, token = logits.softmax(-1).max(-1)
        for position in sorted(masked, key=lambda p: -float(probability[p]))[:count]:
            ids[position] = token[position]
            masked.remove(position)


def naive_generate(network, prompt, num_new: int, steps=None, eos=None) -> list[int]:
    """New tokens of one row, cut after EOS: blocks from position 0, the last one masked to its end."""
    family, config, _ = network
    length = len(prompt)
    size = block_size_of(family, config, length + num_new)
    ids = prompt
    for block in range(length // size, -(-(length + num_new) // size)):
        end = (block + 1) * size
        ids = torch.cat([ids, torch.full((end - len(ids),), MASK)])
        naive_reveal(network, ids, range(max(block * size, length), min(end, length + num_new)), steps)
        if eos is not None and eos in ids[length : length + num_new]:
            break
    new = ids[length : length + num_new].tolist()
    return new[: new.index(eos) + 1] if eos in new else new


def naive_infill(network, ids, steps=None) -> list[int]:
    """One row: the blocks that hold a [MASK] in order, what stands after it in its block in view."""
    family, config, _ = network
    size, ids = block_size_of(family, config, len(ids)), ids.clone()
    for start in range(0, len(ids), size):
        block = ids[: start + size]
        naive_reveal(network, block, [p for p in range(start, len(block)) if block[p] == MASK], steps)
    return ids.tolist()


def padded(rows, side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, rows)) + 1
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        columns = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[number, columns], mask[number, columns] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@families
def test_generate_is_the_plain_sampler(family, tmp_path):
    """Catches a shift, an order or a block grid that decoding has other than training, for prompts that end inside a
    block, at its end and before it, and a row that depends on its neighbours or on its padding."""
    config, weights, model = published_student(tmp_path, family)
    network, prompts = (family, config, weights), [prompt_of(length) for length in (1, 4, 6)]
    for steps in (None, 2):
        expected = [naive_generate(network, prompt, 7, steps) for prompt in prompts]
        assert len({tuple(new) for new in expected}) == 3
        settings = {"max_new_tokens": 7, "steps_per_block": steps}
        for prompt, new in zip(prompts, expected, strict=True):
            assert model.generate(prompt[None], **settings)[0, len(prompt) :].tolist() == new
        for side in ("left", "right"):
            assert model.generate(**padded(prompts, side), **settings)[:, -7:].tolist() == expected


def naive_wedlm(network, prompt, num_new: int, size: int, threshold: float | None) -> list[int]:
    """WeDLM's `generate_wedlm` for one row: a block of masks after what there is, everything unmasked before it."""
    ids = prompt
    for start in range(0, num_new, size):
        ids = torch.cat([ids, torch.full((min(size, num_new - start),), MASK)])
        while (ids == MASK).any():
            masked = ids == MASK
            order = torch.cat([(~masked).nonzero()[:, 0], masked.nonzero()[:, 0]])
            visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            logits = naive_logits(*network, ids[order], visible, order)[order.argsort()]
            logits[:, MASK] = -torch.inf
            probability, token = logits.softmax(-1).max(-1)
            best = probability.masked_fill(~masked, -1).argmax()
            reaches = masked & (probability >= (2 if threshold is None else threshold))
            reaches[best] = True
            ids = torch.where(reaches, token, ids)
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize("threshold", [None, 0.4])
@pytest.mark.parametrize("family", ["wedlm-8b", "wedlm-7b"])
def test_wedlm_decodes_as_published(family, threshold, tmp_path):
    """Catches another grid or order than that of the published sampler, whose blocks begin where the prompt ends."""
    config, weights, model = published_student(tmp_path, family)
    prompts = [prompt_of(length) for length in (1, 4, 6)]
    expected = [naive_wedlm((family, config, weights), prompt, 7, 3, threshold) for prompt in prompts]
    settings = {"max_new_tokens": 7, "block_size": 3, "decoding": "wedlm", "confidence_threshold": threshold}
    assert model.generate(**padded(prompts, "left"), **settings)[:, -7:].tolist() == expected
    assert model.generate(**padded(prompts, "left"), max_new_tokens=7, block_size=3)[:, -7:].tolist() != expected


@families
def test_an_answer_ends_at_eos(family, tmp_path):
    """Catches an end that is not looked for, or that is found at the wrong position."""
    config, weights, model = published_student(tmp_path, family)
    network = family, config, weights
    prompt, whole = next(
        (prompt, whole)
        for prompt in map(prompt_of, range(5, 20))
        for whole in [naive_generate(network, prompt, 7)]
        if whole[0] not in whole[1:3]
    )
    expected = naive_generate(network, prompt, 7, eos=whole[1])
    assert 1 < len(expected) < 7
    out = model.generate(prompt[None], max_new_tokens=7, eos_token_id=whole[1])
    assert out[0, len(prompt) :].tolist() == expected


@families
def test_infill_is_the_plain_sampler(family, tmp_path):
    """Catches holes that are filled without what their family can see after them, or from the wrong position."""
    config, weights, model = published_student(tmp_path, family)
    rows = [prompt_of(10), prompt_of(7), prompt_of(9)]
    for row, holes in zip(rows, ([1, 2, 6], [0, 5], [3, 4, 8]), strict=True):
        row[holes] = MASK
    for steps in (None, 1):
        expected = [naive_infill((family, config, weights), row, steps) for row in rows]
        for row, filled in zip(rows, expected, strict=True):
            assert model.infill(row[None], steps_per_block=steps)[0].tolist() == filled
        for side in ("left", "right"):
            batch = padded(rows, side)
            out = model.infill(**batch, steps_per_block=steps)
            found = [ids[mask.bool()].tolist() for ids, mask in zip(out, batch["attention_mask"], strict=True)]
            assert found == expected


@families
def test_a_hole_sees_the_text_after_it(family, tmp_path):
    """Catches a causal or a full-sequence family whose holes are filled from the left alone, and a block that sees
    the next one."""
    model = published_student(tmp_path, family)[-1]
    seen = {}
    for place in (2, 6):  # in the hole's own block of four, and in the next one
        filled = set()
        for token in range(20):
            ids = prompt_of(8)
            ids[1], ids[place] = MASK, token
            filled.add(model.infill(ids[None])[0, 1].item())
        seen[place] = len(filled) > 1
    assert seen == {2: True, 6: family in FULL}


@pytest.mark.parametrize("alg", ["origin", "entropy", "topk_margin", "maskgit_plus"])
def test_dreams_own_settings_are_read(alg, tmp_path):
    """Catches a Dream refused for the generation_config.json that its published class writes, and one that decodes in
    another order than that file says."""
    _, _, model = published_student(tmp_path, "dream")
    file = {"alg": alg, "alg_temp": None, "eps": 0.001, "steps": 3, "output_history": False, "temperature": 0.0}
    file |= {"generation_kwargs": {}, "return_dict": False, "mask_token_id": None}
    file |= {"max_length": 20, "top_k": None, "top_p": None, "transformers_version": "4.46.2", "pad_token_id": PAD}
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    loaded = type(model).from_pretrained(tmp_path)
    settings = {"remasking": {"topk_margin": "margin", "maskgit_plus": "confidence"}.get(alg, alg)}
    if alg == "origin":
        settings = {"remasking": "random", "step_quota": "binomial"}
    given, expected = (
        network.generate(prompt_of(5)[None], max_new_tokens=9, generator=torch.Generator().manual_seed(0), **further)
        for network, further in ((loaded, {}), (model, {"decoding": "dream", "steps_per_block": 3, **settings}))
    )
    assert torch.equal(given, expected)
    (tmp_path / "generation_config.json").write_text(json.dumps(file | {"alg_temp": 0.1}))
    with pytest.raises(ValueError, match=r"alg_temp=0.1.*Set model.generation_config.alg_temp = None"):
        type(model).from_pretrained(tmp_path).generate(prompt_of(5)[None])


def test_dream_says_where_its_logits_stand(tmp_path, monkeypatch):
    """Catches a fill-mask pipeline that reads Dream's logits beside the [MASK] without a word, and a word where the
    library itself looks in the right place."""
    from tide_hf.models import modeling_dream

    said = []
    monkeypatch.setattr(modeling_dream.logger, "warning_once", said.append)
    model, ids = published_student(tmp_path, "dream")[-1], prompt_of(5)[None]
    model(ids, labels=ids)
    model.generate(ids, max_new_tokens=2)
    assert not said
    model(ids)
    assert "one column to the left" in said[0]


@families
def test_mask_token_of_a_silent_config_is_the_familys(family, tmp_path, monkeypatch):
    """Catches a published checkpoint, whose [MASK] only its code names, that can neither train nor generate."""
    fields = {"mask_token_id": None, "pad_token_id": PAD, **BLOCKS}
    config, weights = write_checkpoint(tmp_path, family, **fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = prompt_of(5)
    for refused in (lambda: model(ids[None], labels=ids[None]), lambda: model.generate(ids[None], max_new_tokens=2)):
        with pytest.raises(ValueError, match="mask_token_id"):
            refused()
    known = replace(type(model.config).teacher_family, mask_token_id=MASK)
    monkeypatch.setattr(type(model.config), "teacher_family", known)
    assert model.generate(ids[None], max_new_tokens=3)[0, 5:].tolist() == naive_generate(
        (family, config, weights), ids, 3
    )
    assert model.eval()(ids[None], labels=ids[None]).loss > 0


@families
def test_half_precision_generates(family, tmp_path):
    """Catches a cache, a mask or a router that decodes in float32 alone."""
    _, _, model = published_student(tmp_path, family, torch.bfloat16)
    settings = {"max_new_tokens": 2 * BLOCK + 1, "return_dict_in_generate": True}
    prompts = [prompt_of(length) for length in (1, 6)]
    out = model.generate(**padded(prompts, "left"), **settings)
    assert MASK not in out.sequences and out.tokens_per_forward > 0
    assert torch.equal(model.generate(**padded(prompts, "left"), **settings).sequences, out.sequences)
