"""Rules of the caller's, named samplers, and where the settings that choose a rule come from."""

import pytest
import torch
from naive_sampler import holes, naive_generate, prompt, tiny
from published_samplers import LENGTHS, answer, assert_equals, logits_of, spread
from tiny import BLOCK, MASK
from transformers import AutoModelForCausalLM

from tide_hf.models import MaskedPositions, RevealRule, TIDEGenerationConfig
from tide_hf.models.reveal_rules_tide import SPLITS

# ---- a rule of the caller's ----


class MarginRule(RevealRule):
    """Positions whose margin is above 0.4, or the leftmost."""

    statistics = ("margin",)

    def reveal(self, now: MaskedPositions):
        return (now.margin > 0.4) | (now.rank("left_to_right") == 0)


def test_a_callers_rule_decides():
    """Catches a rule that is asked for the wrong positions, or whose answer is not what is revealed."""
    for diffusion_type in ("block", "full"):
        model = spread(1, diffusion_type)

        def by_hand(ids, start, end, size):
            first_block = start // size * size if diffusion_type == "block" else start  # noqa: B023
            for edge in range(first_block, end, size):
                while masked := [p for p in range(max(edge, start), min(edge + size, end)) if ids[p] == MASK]:
                    stop = min(edge + size, len(ids)) if diffusion_type == "block" else None  # noqa: B023
                    probability = logits_of(model, ids, stop).softmax(-1)  # noqa: B023
                    first, second = probability.topk(2).values.unbind(-1)
                    for p in masked:
                        if p == masked[0] or first[p] - second[p] > 0.4:
                            ids[p] = int(probability[p].argmax())
            return ids[start:end]

        size = BLOCK if diffusion_type == "block" else 11

        def published(ids):
            whole = -(-(len(ids) + 11) // BLOCK) * BLOCK if diffusion_type == "block" else len(ids) + 11  # noqa: B023
            return by_hand([*ids, *[MASK] * (whole - len(ids))], len(ids), len(ids) + 11, size)  # noqa: B023

        assert_equals(model, published, 11, reveal_rule=MarginRule())
        out = model.infill(holes(11, (1, 2, 5, 6, 9)), reveal_rule=MarginRule())
        assert not torch.equal(out, model.infill(holes(11, (1, 2, 5, 6, 9)))) and MASK not in out


class FromTheRight(RevealRule):
    """Two positions per pass, the rightmost first."""

    statistics, is_exact = (), True

    def quotas(self, num_masked, block_size, generator):
        return (2,) * (num_masked // 2) + (1,) * (num_masked % 2)

    def reveal(self, now: MaskedPositions):
        to_the_right = now.masked.flip(-1).cumsum(-1).flip(-1)
        return to_the_right <= now.quota[:, None]


def test_a_callers_exact_rule():
    """Catches quotas of a caller's rule that are not what its passes get, or rows that share them."""
    model = spread(1, "full")

    def published(ids):
        ids = [*ids, *[MASK] * 11]
        while masked := [p for p, token in enumerate(ids) if token == MASK]:
            token = logits_of(model, ids).argmax(-1)
            for p in masked[-2:]:
                ids[p] = int(token[p])
        return ids[-11:]

    assert_equals(model, published, 11, reveal_rule=FromTheRight())
    out = model.generate(prompt(4), max_new_tokens=11, reveal_rule=FromTheRight(), return_dict_in_generate=True)
    assert out.forward_passes == 6


def test_a_callers_rule_stands_alone():
    """Catches settings that a caller's rule silently overrides, an object that is none, and a rule that never ends."""
    model, rule = spread(1), MarginRule()
    model.generation_config.steps_per_block = 1  # farther away: the rule replaces it
    expected = model.generate(prompt(6), max_new_tokens=9, reveal_rule=rule)
    model.generation_config = TIDEGenerationConfig(decoding="dream", mask_token_id=MASK)
    assert torch.equal(model.generate(prompt(6), max_new_tokens=9, reveal_rule=rule), expected)
    for settings in ({"steps_per_block": 2}, {"remasking": "random"}, {"decoding": "llada"}, {"entropy_bound": 0.5}):
        with pytest.raises(ValueError, match=rf"reveal_rule=MarginRule\(…\) decides .*{next(iter(settings))}="):
            model.generate(prompt(6), max_new_tokens=9, reveal_rule=rule, **settings)
    with pytest.raises(ValueError, match="must be a RevealRule, got a str"):
        model.generate(prompt(6), reveal_rule="confidence")

    class Never(RevealRule):
        def reveal(self, now):
            return ~now.masked  # what is not masked is not the rule's to change

    with pytest.raises(ValueError, match=r"Never\.reveal chose none"):
        model.generate(prompt(6), max_new_tokens=9, reveal_rule=Never())


# ---- names of samplers, and where settings come from ----


def test_a_nearer_preset_wins_and_explicit_settings_of_its_place_stay():
    """Catches a saved sampler that a caller cannot replace, and one that overrides what is said beside it."""
    model = spread(1, block_size=8)
    plain, sdar_like = answer(model, steps_per_block=3), answer(model, decoding="sdar", steps_per_block=3)
    assert plain != sdar_like
    own = TIDEGenerationConfig(decoding="sdar", steps_per_block=3, mask_token_id=MASK, block_size=8)
    model.generation_config = own
    assert answer(model) == sdar_like
    assert answer(model, decoding=None) == plain, "a keyword None takes a preset back"
    looser = answer(model, confidence_threshold=0.3, step_quota="of_block", steps_per_block=3)
    assert looser == answer(model, decoding="sdar", confidence_threshold=0.3, steps_per_block=3) != sdar_like
    given = TIDEGenerationConfig(decoding="sdar", confidence_threshold=0.3)
    assert answer(model, generation_config=given) == looser
    # farther explicit settings that a nearer preset fills
    model.generation_config = TIDEGenerationConfig(
        remasking="random", confidence_threshold=0.1, editing_threshold=0.1, mask_token_id=MASK, block_size=8
    )
    assert answer(model, decoding="sdar", steps_per_block=3) == sdar_like
    model.generation_config = TIDEGenerationConfig(entropy_bound=0.5, mask_token_id=MASK, block_size=8)
    assert answer(model, decoding="sdar", steps_per_block=3) == sdar_like
    # saved steps are what a sampler with a word on steps divides a block into; Fast-dLLM's threshold replaces them
    model.generation_config = TIDEGenerationConfig(steps_per_block=3, mask_token_id=MASK, block_size=8)
    assert answer(model, decoding="sdar") == sdar_like
    unsaved = answer(spread(1, block_size=8), decoding="fast-dllm")
    assert answer(model, decoding="fast-dllm") == unsaved != answer(model, decoding="fast-dllm", steps_per_block=3)


def test_a_nearer_bound_replaces_a_saved_sampler():
    """Catches a checkpoint with a named sampler on which no entropy bound can be tried."""
    model = spread(1, block_size=8)
    expected = answer(model, entropy_bound=0.5)
    for saved in ({"decoding": "llada", "steps_per_block": 2}, {"decoding": "fast-dllm"}, {"remasking": "random"}):
        model.generation_config = TIDEGenerationConfig(mask_token_id=MASK, block_size=8, **saved)
        assert answer(model, entropy_bound=0.5) == expected


def test_infill_takes_of_a_sampler_what_it_reads():
    """Catches a checkpoint with SDAR's sampler that cannot infill, and a sampler that infill ignores."""
    model, ids = spread(1, block_size=8), holes(14, (1, 2, 3, 4, 6, 9, 10))
    expected = model.infill(ids, step_quota="of_block", steps_per_block=3, remasking="entropy")
    assert not torch.equal(expected, model.infill(ids, steps_per_block=3))
    model.generation_config.decoding = "sdar"
    settings = {"steps_per_block": 3, "confidence_threshold": None, "remasking": "entropy"}
    assert torch.equal(model.infill(ids, **settings), expected)


def test_a_sampler_is_saved_under_its_name(tmp_path):
    """Catches a named sampler that generation_config.json loses: the pushed model would decode in another way."""
    model = spread(1, block_size=8)
    model.generation_config.decoding, model.generation_config.steps_per_block = "llada2.1", 4
    model.generation_config.suppress_confidence_tokens = [3]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.decoding == "llada2.1"
    assert answer(loaded) == answer(model) != answer(spread(1, block_size=8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoding": "mdlm"}, "decoding must be one of llada, .*fast-dllm, wedlm, got 'mdlm'"),
        ({"step_quota": "half"}, "step_quota must be one of even, remainder_first, .*binomial, got 'half'"),
        ({"confidence_from": "top_k"}, "confidence_from must be one of model, sampling, got 'top_k'"),
        ({"threshold_inclusive": False}, "threshold_inclusive=False says nothing without confidence_threshold"),
        ({"threshold_inclusive": 1, "confidence_threshold": 0.5}, "threshold_inclusive must be one of True, False"),
        ({"max_editing_steps": 3}, "max_editing_steps=3 says nothing without editing_threshold"),
        ({"max_editing_steps": -1, "editing_threshold": 0.5}, "max_editing_steps must be at least 0, got -1"),
        ({"editing_threshold": 1.5}, r"editing_threshold must lie in \[0, 1\], got 1.5"),
        ({"entropy_bound": 0.5, "step_quota": "of_block"}, "step_quota='of_block' would be ignored"),
        ({"entropy_bound": 0.5, "decoding": "sdar"}, r"step_quota='of_block' \(of decoding='sdar'\) would be ignored"),
        ({"suppress_confidence_tokens": [99]}, "suppress_confidence_tokens holds the token id 99"),
    ],
    ids=str,
)
def test_senseless_settings_are_refused(settings, message):
    """Catches a setting that is accepted and changes nothing, or one that another silently overrides."""
    model = tiny()
    with pytest.raises(ValueError, match=message):
        model.generate(prompt(4), max_new_tokens=4, **settings)
    if "says nothing" in message:
        with pytest.raises(ValueError, match="generation_config." + message):
            model.generate(prompt(4), max_new_tokens=4, generation_config=TIDEGenerationConfig(**settings))


def test_whole_blocks_of_a_full_sequence_student_are_refused():
    """Catches SDAR's sampler on a student without blocks, which would run it in another way than SDAR does."""
    model = tiny(diffusion_type="full")
    with pytest.raises(ValueError, match=r"denoise_whole_blocks=True .*set it to False"):
        model.generate(prompt(4), max_new_tokens=4, decoding="sdar")
    model.generate(prompt(4), max_new_tokens=4, decoding="sdar", denoise_whole_blocks=False)


def test_fixed_quotas_never_wait_for_the_device(monkeypatch):
    """Catches a rule with known quotas that asks the device how many masks are left, once per pass."""
    asked, made = [], torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: asked.append(1) or made(self))
    numbers = {}
    for split in SPLITS:
        for steps in (2, 8):
            asked.clear()
            spread(1).generate(prompt(4), max_new_tokens=8, block_size=8, step_quota=split, steps_per_block=steps)
            numbers[split, steps] = len(asked)
    assert all(numbers[split, 2] == numbers[split, 8] for split in SPLITS), numbers


def test_default_settings_still_decode_as_dllm():
    """Catches a default that follows one of the new samplers instead of the one that students are scored with."""
    for length in LENGTHS:
        model = spread(length)
        expected, _ = naive_generate(model, prompt(length)[0].tolist(), 10, steps_per_block=3)
        assert model.generate(prompt(length), max_new_tokens=10, steps_per_block=3)[0, length:].tolist() == expected
