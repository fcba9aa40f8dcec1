"""The field's samplers, named by `decoding` and its settings, give what the published loops give, token for token."""

import collections
import itertools

import pytest
import torch
from naive_sampler import holes, prompt, seeded
from published_samplers import (
    LENGTHS,
    answer,
    assert_equals,
    dream,
    dream_times,
    fast_dllm,
    largest,
    llada,
    llada21,
    logits_of,
    padded,
    sdar,
    spread,
)
from tiny import MASK

from tide_hf.models import sampling_tide
from tide_hf.models.reveal_rules_tide import SPLITS

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_an_edit_needs_more_than_the_threshold():
    """Catches ≥ for > where the confidence of an edit equals the threshold."""
    model, settings = spread(1, block_size=8), {"temperature": 0.5, "top_k": 1, "confidence_from": "sampling"}
    free = answer(model, **settings)
    assert answer(model, editing_threshold=1.0, **settings) == free != answer(model, editing_threshold=0.9, **settings)


@pytest.mark.parametrize("diffusion_type", ["block", "full"])
@pytest.mark.parametrize("split", [name for name in SPLITS if name != "binomial"])
def test_infill_divides_a_row_as_if_it_were_alone(split, diffusion_type):
    """Catches shares, or a default number of steps, that follow from the longest row of a batch."""
    model, rows = spread(1, diffusion_type), [holes(13, (1, 2, 3, 6, 9, 10)), holes(7, (0, 1, 4, 5, 6))]
    batch = padded([row[0].tolist() for row in rows], "right")
    for steps in (None, 2, 3):
        out = model.infill(batch["inputs"], batch["attention_mask"], step_quota=split, steps_per_block=steps)
        for index, ids in enumerate(rows):
            alone = model.infill(ids, step_quota=split, steps_per_block=steps)
            assert torch.equal(out[index, : ids.shape[1]], alone[0])


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


@pytest.mark.slow
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


def test_counts_of_dream():
    """Catches shares that are rounded to the nearest, or of all masks instead of those left."""
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
