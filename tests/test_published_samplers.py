"""The field's samplers, named by `decoding` and its settings, give what the published loops give, token for token."""

import collections
import itertools

import pytest
import torch
from naive_sampler import PAD, holes, naive_generate, prompt, seeded, tiny
from published_samplers import dream, dream_times, fast_dllm, largest, llada, llada21, logits_of, sdar
from tiny import BLOCK, MASK
from transformers import AutoModelForCausalLM

from tide_hf.models import MaskedPositions, RevealRule, TIDEGenerationConfig, sampling_tide
from tide_hf.models.reveal_rules_tide import SPLITS

LENGTHS = (1, 4, 6, 9)  # inside and at the end of a block of 4 and 8


def spread(seed, diffusion_type="block", **changes):
    """A tiny model whose probabilities lie between 0.1 and 1."""
    model = tiny(seed=seed, diffusion_type=diffusion_type, **changes)
    model.lm_head.weight.data *= 2
    return model


def cut(answer, eos):
    return answer[: answer.index(eos) + 1] if eos in answer else answer


def padded(prompts, side):
    width = max(len(row) for row in prompts) + 1
    ids, mask = torch.full((len(prompts), width), 7), torch.zeros(len(prompts), width, dtype=torch.long)
    for index, row in enumerate(prompts):
        columns = slice(width - len(row), None) if side == "left" else slice(None, len(row))
        ids[index, columns], mask[index, columns] = torch.tensor(row), 1
    return {"inputs": ids, "attention_mask": mask}


def assert_equals(model, published, num_new, **settings):
    """`generate` gives what `published(prompt)` gives: row by row, as a batch padded on either side, ended by EOS."""
    prompts = [prompt(length)[0].tolist() for length in LENGTHS]
    answers = [published(row) for row in prompts]
    settings |= {"max_new_tokens": num_new}
    for row, expected in zip(prompts, answers, strict=True):
        assert model.generate(torch.tensor([row]), **settings)[0, len(row) :].tolist() == expected
    for eos, side in ((None, "left"), (answers[0][num_new // 2], "right"), (answers[-1][0], "left")):
        rows = [cut(answer, eos) for answer in answers]
        width = max(map(len, rows))
        rows = [row + [PAD] * (width - len(row)) for row in rows]
        batch = padded(prompts, side)
        out = model.generate(**batch, eos_token_id=eos, pad_token_id=PAD, **settings)
        assert out[:, batch["inputs"].shape[1] :].tolist() == rows
    return answers


# ---- LLaDA and Fast-dLLM ----


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("steps", [1, 3, 5, 11])
def test_llada(seed, steps):
    """Catches a remainder that does not go to the first steps, and another order or grid than LLaDA's."""
    model = spread(seed, "full")
    given = {"decoding": "llada", "steps_per_block": steps}
    for size in (8, 16):
        assert_equals(model, lambda ids: llada(model, ids, 16, size, steps), 16, block_size=size, **given)  # noqa: B023


def test_where_the_remainder_goes_matters():
    """Catches a comparison that cannot tell 2 + 2 + 2 + 1 + 1 from 2 + 2 + 1 + 2 + 1 and 1 + 1 + 1 + 2 + 3 tokens."""
    differs = collections.Counter()
    for seed in range(4):
        settings = {"max_new_tokens": 16, "block_size": 8, "steps_per_block": 5}
        answers = {
            split: spread(seed, "full").generate(prompt(4), step_quota=split, **settings).tolist()
            for split in ("even", "remainder_first", "remainder_last")
        }
        differs |= {pair: 1 for pair in itertools.combinations(answers, 2) if answers[pair[0]] != answers[pair[1]]}
    assert len(differs) == 3


def test_lladas_ends_of_text():
    """Catches EOS that orders positions although it takes no part in the confidence, or is taken out of the answer."""
    differs = collections.Counter()
    for seed in (0, 1, 2):
        model = spread(seed, "full")
        free = llada(model, prompt(4)[0].tolist(), 16, 8, 4)
        ends = [token for token, _ in collections.Counter(free).most_common(2)]
        settings = {"decoding": "llada", "steps_per_block": 4, "block_size": 8}
        for name, argument in (("suppress_confidence_tokens", "confidence_ids"), ("suppress_tokens", "logits_ids")):
            answers = assert_equals(
                model,
                lambda ids: llada(model, ids, 16, 8, 4, **{argument: ends}),  # noqa: B023
                16,
                **settings,
                **{name: ends},
            )
            differs[name] += answers[2] != free
            differs["proposed"] += name == "suppress_confidence_tokens" and bool({*ends} & {*answers[2]})
    assert min(differs.values()) > 0 and len(differs) == 3


def test_llada_in_random_order():
    """Catches a remainder that is not the first steps' where the order is random."""
    model, noise = spread(1, "full"), torch.Generator().manual_seed(5)
    draws = [torch.rand(1, 7, generator=noise) for _ in range(3)]
    ids = [*prompt(5)[0].tolist(), *[MASK] * 7]
    for draw, number in zip(draws, (3, 2, 2), strict=True):
        token = logits_of(model, ids).argmax(-1)
        for p in largest({p: float(draw[0, p - 5]) for p in range(5, 12) if ids[p] == MASK}, number):
            ids[p] = int(token[p])
    settings = {"decoding": "llada", "remasking": "random", "steps_per_block": 3, "max_new_tokens": 7}
    out = model.generate(prompt(5), generator=torch.Generator().manual_seed(5), **settings)
    assert out[0].tolist() == ids


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
def test_fast_dllm(seed, threshold):
    """Catches a pass that reveals nothing, or not all that are sure enough."""
    model = spread(seed, "full")
    for size in (8, 16):
        published = lambda ids: fast_dllm(model, ids, 16, size, threshold)  # noqa: B023, E731
        settings = {"decoding": "fast-dllm", "confidence_threshold": threshold, "block_size": size}
        assert_equals(model, published, 16, **settings)
    default = model.generate(prompt(6), max_new_tokens=16, decoding="fast-dllm", block_size=8)
    assert default[0, 6:].tolist() == fast_dllm(model, prompt(6)[0].tolist(), 16, 8, 0.9)


# ---- SDAR and LLaDA2 ----


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("steps", [1, 3, 5, 9])
def test_sdar(seed, steps):
    """Catches shares of the masks instead of the block, and a last block that is not denoised whole."""
    model = spread(seed, block_size=8)
    given = {"decoding": "sdar", "steps_per_block": steps}
    for strategy, settings in {
        "sequential": {"remasking": "left_to_right", "confidence_threshold": None},
        "low_confidence_static": {"confidence_threshold": None},
        "low_confidence_dynamic": {},
    }.items():
        published = lambda ids: sdar(model, ids, 11, steps, strategy)  # noqa: B023, E731
        assert_equals(model, published, 11, **given, **settings)
    published = lambda ids: sdar(model, ids, 14, steps, threshold=0.4)  # noqa: E731
    assert_equals(model, published, 14, confidence_threshold=0.4, **given)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_sdar_with_one_token_to_sample_from(steps):
    """Catches a confidence at temperature 1 where SDAR's is that of what is sampled: with top_k=1 always 1."""
    model = spread(3, block_size=8)
    for strategy, changes in {
        "low_confidence_dynamic": {},
        "low_confidence_static": {"confidence_threshold": None},
    }.items():
        settings = {"decoding": "sdar", "steps_per_block": steps, "temperature": 0.7, "top_k": 1, **changes}
        assert_equals(model, lambda ids: sdar(model, ids, 11, steps, strategy, top_k=1), 11, **settings)  # noqa: B023


def test_what_is_dropped_after_the_answer_matters():
    """Catches a comparison that cannot tell whole blocks from the tokens asked for, or shares of blocks."""
    differs = collections.Counter()
    for seed in range(4):
        model = spread(seed, block_size=8)
        expected = model.generate(prompt(6), max_new_tokens=13, decoding="sdar", steps_per_block=3)
        for name, value in {"denoise_whole_blocks": False, "step_quota": "even", "confidence_threshold": 0.5}.items():
            other = model.generate(prompt(6), max_new_tokens=13, decoding="sdar", steps_per_block=3, **{name: value})
            differs[name] += not torch.equal(other, expected)
    assert len(+differs) == 3


@pytest.mark.parametrize("grid", ["absolute", "prompt_aligned"])
def test_whole_blocks_are_denoised_whole(grid):
    """Catches columns after the answer that stay [MASK], or are returned."""
    model = spread(2, block_size=8)
    out = model.generate(
        prompt(6), max_new_tokens=3, block_grid=grid, denoise_whole_blocks=True, return_dict_in_generate=True
    )
    # on the absolute grid 2 tokens end the prompt's block and 8 follow; on the other one block follows
    assert out.sequences.shape == (1, 9) and out.forward_passes == (10 if grid == "absolute" else 8)
    assert MASK not in out.sequences


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_llada2(seed, steps):
    """Catches another threshold than LLaDA2's, or one that the confidence must only reach."""
    model = spread(seed, block_size=8)
    published = lambda ids: sdar(model, ids, 11, steps, threshold=0.95)  # noqa: E731
    assert_equals(model, published, 11, decoding="llada2", steps_per_block=steps)
    published = lambda ids: sdar(model, ids, 11, steps, threshold=0.5, minimum=3)  # noqa: E731
    steps = min(steps, 11 // 3)
    assert_equals(model, published, 11, decoding="llada2", steps_per_block=steps, confidence_threshold=0.5)


def test_a_threshold_may_be_exclusive():
    """Catches ≥ for >, or the reverse, where a confidence equals the threshold."""
    model = spread(0, block_size=8)
    settings = {"max_new_tokens": 8, "temperature": 0.5, "top_k": 1, "confidence_from": "sampling"}
    settings |= {"confidence_threshold": 1.0, "return_dict_in_generate": True}
    passes = {
        flag: model.generate(prompt(8), threshold_inclusive=flag, **settings).forward_passes for flag in (True, False)
    }
    assert passes == {True: 1, False: 8}


# ---- LLaDA2.1 ----


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("threshold", [0.3, 0.95])
@pytest.mark.parametrize("editing_threshold", [0.0, 0.5, 0.9])
def test_llada21(seed, threshold, editing_threshold):
    """Catches edits of the prompt, edits that wait for the last mask, and passes that go on, or end, too early."""
    model = spread(seed, block_size=8)
    for most in (1, 16):
        published = lambda ids: llada21(model, ids, 11, threshold, editing_threshold, most)[0]  # noqa: B023, E731
        settings = {"editing_threshold": editing_threshold, "confidence_threshold": threshold}
        assert_equals(model, published, 11, decoding="llada2.1", max_editing_steps=most, **settings)
    default = model.generate(prompt(6), max_new_tokens=14, decoding="llada2.1")
    assert default[0, 6:].tolist() == llada21(model, prompt(6)[0].tolist(), 14)[0]


def test_tokens_are_edited_and_rows_converge(monkeypatch):
    """Catches a comparison in which nothing is edited, everything runs to the limit, or done rows are run on."""
    model, edits, passes = spread(0, block_size=8), [], {}
    for length in LENGTHS:
        row = prompt(length)[0].tolist()
        edits.append(llada21(model, row, 11, 0.7, 0.5)[1])
        for most in (0, 16, 40):
            settings = {"decoding": "llada2.1", "confidence_threshold": 0.7, "editing_threshold": 0.5}
            out = model.generate(
                prompt(length), max_new_tokens=11, max_editing_steps=most, return_dict_in_generate=True, **settings
            )
            passes[length, most] = out.forward_passes
    assert max(edits) > 0
    assert any(passes[length, 0] < passes[length, 16] for length in LENGTHS)
    assert any(passes[length, 16] == passes[length, 40] for length in LENGTHS), "no row ever converged"


def test_edits_leave_given_text_alone():
    """Catches an edit of a token that stands between holes, and rows that change with the batch they are in."""
    for diffusion_type in ("block", "full"):
        model, changed = spread(1, diffusion_type, block_size=8), 0
        settings = {"decoding": "llada2.1", "confidence_threshold": 0.4, "editing_threshold": 0.1}
        rows = [holes(14, (1, 2, 3, 4, 6, 9, 10)), holes(9, (0, 5, 7))]
        for ids in rows:
            out = model.infill(ids, **settings)
            assert torch.equal(out[ids != MASK], ids[ids != MASK]) and MASK not in out
            changed += not torch.equal(out, model.infill(ids, decoding="llada2", confidence_threshold=0.4))
        assert changed
        batch = padded([row[0].tolist() for row in rows], "right")
        out = model.infill(batch["inputs"], attention_mask=batch["attention_mask"], **settings)
        for index, ids in enumerate(rows):
            assert torch.equal(out[index, : ids.shape[1]], model.infill(ids, **settings)[0])


# ---- Dream ----

ALGORITHMS = {"entropy": "entropy", "maskgit_plus": "confidence", "topk_margin": "margin"}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("steps", [3, 14, 30])
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_dream(seed, steps, alg):
    """Catches shares that are rounded to the nearest, a remainder in the first steps, and another order."""
    model = spread(seed, "full")
    settings = {"decoding": "dream", "steps_per_block": steps, "remasking": ALGORITHMS[alg]}
    assert_equals(model, lambda ids: dream(model, ids, 14, steps, alg), 14, **settings)


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_dream_orders_by_what_it_samples_from(alg, monkeypatch):
    """Catches an order by the model's own distribution where Dream's is that after temperature and top-k."""
    draw = lambda probability, number, generator: probability.argmax(-1, keepdim=True)  # noqa: E731
    monkeypatch.setattr(sampling_tide.torch, "multinomial", draw)
    differs = 0
    for seed in range(3):
        model = spread(seed, "full")
        settings = {"decoding": "dream", "steps_per_block": 6, "remasking": ALGORITHMS[alg], "temperature": 3.0}
        answers = assert_equals(model, lambda ids: dream(model, ids, 14, 6, alg, 3.0, 3), 14, top_k=3, **settings)  # noqa: B023
        assert_equals(model, lambda ids: dream(model, ids, 14, 6, alg, 3.0, 1), 14, top_k=1, **settings)  # noqa: B023
        settings |= {"top_k": 3, "max_new_tokens": 14, "confidence_from": "model"}
        differs += model.generate(prompt(6), **settings)[0, 6:].tolist() != answers[3]
    assert differs


def test_counts_of_dream_in_the_original_precision():
    """Catches a product in float64, which rounds down to another number than float32."""
    for num_masked in range(40):
        for steps in (1, 2, 3, 5, 8, 16, 33, 64):
            time, left, expected = torch.linspace(1, 1e-3, steps + 1), torch.tensor(num_masked).float(), []
            for i in range(steps):
                expected.append(int(left * (1 - time[i + 1] / time[i])) if i < steps - 1 else int(left))
                left = left - expected[-1]
            assert list(SPLITS["remainder_last"](num_masked, steps, 64, None)) == expected


def test_dreams_origin(monkeypatch):
    """Catches positions that do not go on their own: forced draws must give the tokens of Dream's own draws."""
    model, steps, num_new = spread(1, "full"), 5, 14
    made = torch.rand(num_new, generator=torch.Generator().manual_seed(3))  # when each position goes
    time = dream_times(steps)
    goes = [next(i for i in range(steps) if i == steps - 1 or float(u) >= time[i + 1]) for u in made]
    expected = dream(model, prompt(6)[0].tolist(), num_new, steps, "origin", drawn=lambda i, p: float(goes[p] != i))
    draws = iter([made])

    def rand(*size, **kwargs):
        # first when each goes; then, in each pass, what puts those in front
        given = next(draws, None)
        if given is not None:
            return given
        here = sorted(set(goes))[rand.passes]
        rand.passes += 1
        return torch.tensor([[float(step == here) for step in goes]])

    rand.passes = 0
    monkeypatch.setattr(torch, "rand", rand)
    settings = {"decoding": "dream", "steps_per_block": steps, "step_quota": "binomial", "remasking": "random"}
    out = model.generate(prompt(6), max_new_tokens=num_new, **settings)
    assert out[0, 6:].tolist() == expected and rand.passes == len(set(goes))


def test_dreams_origin_in_distribution():
    """Catches counts with another law than that of positions revealed independently with probability 1 − s/t."""
    steps, num_masked, runs = 4, 6, 4000
    time, noise, counts = dream_times(steps), seeded(), torch.zeros(2, steps, num_masked + 1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(runs):
        left = num_masked
        for i in range(steps):
            share = 1 - float(time[i + 1] / time[i])
            gone = left if i == steps - 1 else int((torch.rand(left, generator=noise) < share).sum())
            counts[0, i, gone] += 1 / runs
            left -= gone
        for i, count in enumerate(SPLITS["binomial"](num_masked, steps, 99, generator)):
            counts[1, i, count] += 1 / runs
    # the largest of 28 differences of shares, each with a standard deviation below 0.011
    assert (counts[0] - counts[1]).abs().max() < 0.04
    torch.testing.assert_close(counts[1] @ torch.arange(7.0), torch.full((4,), 1.5), rtol=0, atol=0.07)


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


def answer(model, **settings):
    return model.generate(prompt(6), max_new_tokens=13, **settings).tolist()


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
        ({"decoding": "mdlm"}, "decoding must be one of llada, dream, sdar, llada2, llada2.1, fast-dllm, got 'mdlm'"),
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
