"""Prefix and dual cache of full-sequence students: the published algorithms, and what is run and refused."""

import pytest
import torch
from naive_sampler import PAD, prompt, published_split, tiny
from tiny import MASK, SHAPE
from transformers import AutoModelForCausalLM, DynamicCache

from tide_hf.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM, TIDEGenerationConfig

KINDS = ["prefix", "dual"]
IDS = {"mask_token_id": MASK, "eos_token_id": None, "pad_token_id": PAD}
FAMILIES = {"LLaDA": (LLaDAConfig, LLaDAModelLM), "Dream": (DreamConfig, DreamModel)}


def full(family="Qwen3", seed=3):
    """A tiny full-sequence model; Dream's logits are those of the next position."""
    if family == "Qwen3":
        return tiny(seed=seed, diffusion_type="full")
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    return model_class(config_class(**SHAPE | IDS, diffusion_type="full")).double().eval()


def run_columns(model, row, columns, kept):
    """Logits of some columns of one row, every column seeing these and the `kept` keys and values; and the cache."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kept or ()):
        cache.update(keys, values, layer)
    num_seen = len(columns) + (kept[0][0].shape[2] if kept else 0)
    out = model(
        torch.tensor([[row[column] for column in columns]]),
        attention_mask=torch.ones(1, 1, len(columns), num_seen, dtype=torch.bool),
        position_ids=torch.tensor([columns]),
        cache=cache,
        use_cache=True,
    )
    return dict(zip(columns, out.logits[0], strict=True)), cache


@torch.no_grad()
def naive(model, rows, windows, kind, steps=None, threshold=None, scale=1.0, eos=None):
    """Both published algorithms for one text: keys and values are kept by hand, and cut to the columns not run.

    Args:
        rows: tokens of the text, [MASK] where it is denoised; with guidance also the negative prompt's, which shares
            the last columns from `windows[0][0]` on.
        windows: column ranges of the first row.
        kind: None runs everything in every pass.

    Returns the first row, and the columns that each pass ran, counted in the first row.
    """
    rows, shifted, counts = [list(row) for row in rows], isinstance(model, DreamModel), []
    behind = [len(row) - len(rows[0]) for row in rows]
    for start, end in windows:
        todo = [column for column in range(start, end) if rows[0][column] == MASK]
        quota, kept = published_split(len(todo), steps or max(len(todo), 1)), [None] * len(rows)
        for step in range(len(todo)):
            if not todo:
                break
            scores = []
            for index, row in enumerate(rows):
                first, last = max(start + behind[index] - shifted, 0), end + behind[index]
                columns = list(range(len(row)))
                if kept[index] is not None:
                    columns = list(range(first, last if kind == "dual" else len(row)))
                logits, cache = run_columns(model, row, columns, kept[index])
                if kind is not None and kept[index] is None:
                    outside = [c for c in range(len(row)) if c < first or (kind == "dual" and c >= last)]
                    kept[index] = [(layer.keys[:, :, outside], layer.values[:, :, outside]) for layer in cache.layers]
                scores.append(torch.stack([logits[max(c + behind[index] - shifted, 0)] for c in todo]).float())
                if not index:
                    counts.append(len(columns))
            guided = scores[0] if len(scores) == 1 else scores[1] + scale * (scores[0] - scores[1])
            guided[:, MASK] = -torch.inf
            probability, token = guided.softmax(-1).max(-1)
            ranked = sorted(range(len(todo)), key=lambda n: -float(probability[n]))
            chosen = ranked[: quota[step]] if threshold is None else ranked[:1]
            if threshold is not None:
                chosen += [n for n in ranked[1:] if float(probability[n]) >= threshold]
            for n in chosen:
                for index, row in enumerate(rows):
                    row[todo[n] + behind[index]] = int(token[n])
            todo = [column for n, column in enumerate(todo) if n not in chosen]
        if eos in rows[0][windows[0][0] : end]:
            break
    return rows[0], counts


def answer_windows(length, num_new, size):
    return [(start, min(start + size, length + num_new)) for start in range(length, length + num_new, size)]


def naive_answer(model, ids, num_new, size, kind, negative=None, **settings):
    given = [ids] if negative is None else [ids, negative]
    rows = [row[0].tolist() + [MASK] * num_new for row in given]
    return naive(model, rows, answer_windows(ids.shape[1], num_new, size), kind, **settings)


def padded(rows, side, width, filling=PAD):
    """Rows of different lengths as one batch, and its mask."""
    ids, mask = torch.full((len(rows), width), filling), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        columns = slice(width - row.shape[1], None) if side == "left" else slice(None, row.shape[1])
        ids[index, columns], mask[index, columns] = row[0], 1
    return ids, mask


def with_holes(length, columns, seed=1):
    ids = prompt(length, seed)
    ids[0, columns] = MASK
    return ids


def spy_on(model, monkeypatch):
    """The arguments of each network call, as they come."""
    calls, run = [], model.run_decoder
    monkeypatch.setattr(model, "run_decoder", lambda **kwargs: calls.append(kwargs) or run(**kwargs))
    return calls


# ---- the published algorithms ----


@pytest.mark.parametrize("family", ["Qwen3", "LLaDA", "Dream"])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("seed", [1, 2])
def test_answers_are_those_of_the_published_algorithm(family, kind, seed, monkeypatch):
    """Catches keys kept past their block, of other columns or positions, and hidden states of another column."""
    model = full(family, seed)
    calls = spy_on(model, monkeypatch)
    for length, num_new, size, settings in (
        (6, 12, 4, {}),
        (1, 10, 5, {"steps": 2}),
        (9, 11, 4, {"steps": 3}),
        (5, 12, 6, {"threshold": 0.3}),
        (4, 9, 3, {"threshold": 0.7}),
        (7, 8, 8, {"steps": 4}),
    ):
        expected, counts = naive_answer(model, prompt(length), num_new, size, kind, **settings)
        calls.clear()
        out = model.generate(
            prompt(length),
            max_new_tokens=num_new,
            block_size=size,
            approximate_cache=kind,
            steps_per_block=settings.get("steps"),
            confidence_threshold=settings.get("threshold"),
        )
        assert out[0].tolist() == expected, settings
        assert [call["input_ids"].shape[1] for call in calls] == counts


@pytest.mark.parametrize("family", ["Qwen3", "Dream"])
def test_the_caches_are_approximate(family):
    """Catches a cache that is renewed in every pass, and one kind that does the other's work."""
    found = {kind: [] for kind in (None, *KINDS)}
    for seed in range(4):
        for kind, answers in found.items():
            answers += (
                full(family, seed)
                .generate(prompt(6), max_new_tokens=16, block_size=8, approximate_cache=kind)
                .tolist()
            )
    assert found[None] != found["prefix"] and found[None] != found["dual"] and found["prefix"] != found["dual"]


@pytest.mark.parametrize("family", ["Qwen3", "Dream"])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_equals_each_row_alone(family, kind, side, attention):
    """Catches padding that is attended, a row's first token predicted from padding, and masks of another width."""
    model, rows = full(family), [prompt(length) for length in (7, 3, 1, 5)]
    model.set_attn_implementation(attention)
    ids, mask = padded(rows, side, 8)
    for settings in ({}, {"steps": 2}, {"threshold": 0.4}):
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=10,
            block_size=4,
            approximate_cache=kind,
            steps_per_block=settings.get("steps"),
            confidence_threshold=settings.get("threshold"),
        )
        for given, row in zip(rows, out.tolist(), strict=True):
            expected, _ = naive_answer(model, given, 10, 4, kind, **settings)
            assert row[8:] == expected[given.shape[1] :]


@pytest.mark.slow
def test_flex_attention_masks_as_many_columns_as_a_pass_sees():
    """Catches a mask that the network makes itself, where none is passed, for the columns that ran alone."""
    model, settings = full().float(), {"max_new_tokens": 8, "block_size": 4, "approximate_cache": "dual"}
    expected = model.generate(prompt(6), **settings)
    model.set_attn_implementation("flex_attention")
    assert torch.equal(model.generate(prompt(6), **settings), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_end_early_leave_the_others_alone(kind):
    """Catches a cache of one row's window that another row's end moves on."""
    model, rows, lengths = full(seed=5), [prompt(length) for length in (6, 4, 5, 3)], set()
    ids, mask = padded(rows, "left", 6)
    for eos in range(0, 20, 3):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, block_size=4, approximate_cache=kind, eos_token_id=eos
        )
        for given, row in zip(rows, out[:, 6:].tolist(), strict=True):
            expected = naive_answer(model, given, 12, 4, kind, eos=eos)[0][given.shape[1] :]
            expected = expected[: expected.index(eos) + 1] if eos in expected else expected
            assert row == expected + [PAD] * (len(row) - len(expected))
            lengths.add(len(expected))
    assert len(lengths) > 3


@pytest.mark.parametrize("family", ["Qwen3", "Dream"])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_infill_matches_the_published_algorithm(family, kind, side):
    """Catches windows of another row that renew nothing, holes in the first column, and text after a row's end."""
    model, size = full(family), 4
    rows = [with_holes(10, [0, 1, 3, 8]), with_holes(5, [4]), with_holes(13, [0, 5, 6, 7, 11, 12]), prompt(9)]
    ids, mask = padded(rows, side, 14, MASK)
    for steps in (None, 2):
        out = model.infill(ids, attention_mask=mask, block_size=size, approximate_cache=kind, steps_per_block=steps)
        for given, row, kept in zip(rows, out, mask.bool(), strict=True):
            windows = answer_windows(0, given.shape[1], size)
            assert row[kept].tolist() == naive(model, given.tolist(), windows, kind, steps=steps)[0]


@pytest.mark.parametrize("family", ["Qwen3", "Dream"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_guidance_keeps_a_cache_of_both_prompts(family, kind):
    """Catches a negative row that reuses the keys of its row, or whose padding moves its first column."""
    model = full(family)
    for lengths in ((6, 6), (6, 2), (3, 9), (1, 4), (0, 5), (5, 0)):
        ids, negative = prompt(lengths[0]), prompt(lengths[1], seed=9)
        expected, _ = naive_answer(model, ids, 9, 4, kind, negative=negative, scale=2.5)
        settings = {"max_new_tokens": 9, "block_size": 4, "approximate_cache": kind}
        out = model.generate(ids, negative_prompt_ids=negative, guidance_scale=2.5, **settings)
        assert out[0].tolist() == expected
        assert not torch.equal(out, model.generate(ids, **settings)), "the guidance never mattered"


# ---- what is run ----


@pytest.mark.parametrize("family", ["Qwen3", "Dream"])
def test_a_cached_pass_runs_the_columns_of_its_kind(family, monkeypatch):
    """Catches a cache that saves nothing: two windows after a prompt of ten, two passes each."""
    model = full(family)
    calls, further = spy_on(model, monkeypatch), int(family == "Dream")  # a shifted network's column before the window
    for kind, columns in ((None, [18] * 4), ("prefix", [18, 8, 18, 4]), ("dual", [18, 4, 18, 4])):
        calls.clear()
        model.generate(prompt(10), max_new_tokens=8, block_size=4, steps_per_block=2, approximate_cache=kind)
        extra = [0, further, 0, further] if kind else [0] * 4
        assert [call["input_ids"].shape[1] for call in calls] == [a + b for a, b in zip(columns, extra, strict=True)]
    calls.clear()
    model.infill(with_holes(14, [0, 2, 5, 7]), block_size=4, steps_per_block=2, approximate_cache="dual")
    # before the first column there is none to run
    assert [call["input_ids"].shape[1] for call in calls] == [14, 4, 14, 4 + further]


def test_without_the_setting_nothing_is_kept(monkeypatch):
    """Catches a full-sequence student that is decoded from inexact keys and values unasked."""
    model = full()
    calls = spy_on(model, monkeypatch)
    model.generate(prompt(6), max_new_tokens=8, block_size=4)
    model.generate(prompt(6), max_new_tokens=8, block_size=4, use_cache=True)
    model.infill(with_holes(9, [2, 6]), block_size=4)
    assert len(calls) == 18 and all(call["cache"] is None and not call["use_cache"] for call in calls)


@pytest.mark.parametrize("family", ["Qwen3", "Dream"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_per_window_is_exact(family, kind):
    """Catches a window whose first pass reuses what an earlier window left."""
    model, settings = full(family), {"max_new_tokens": 20, "block_size": 4, "steps_per_block": 1}
    exact = model.generate(prompt(6), **settings)
    assert torch.equal(model.generate(prompt(6), approximate_cache=kind, **settings), exact)


def test_with_one_window_both_kinds_are_the_same():
    """Catches a dual cache that takes columns after the last window for kept ones."""
    for seed in range(3):
        model = full(seed=seed)
        outs = [model.generate(prompt(6), max_new_tokens=9, approximate_cache=kind) for kind in KINDS]
        assert torch.equal(*outs)
        assert outs[0][0].tolist() == naive_answer(model, prompt(6), 9, 9, "prefix")[0]


# ---- the setting ----


@pytest.mark.parametrize(
    ("model", "method", "settings", "message"),
    [
        (tiny(), "generate", {}, r"does not read approximate_cache='dual': the cache of a block-diffusion model's"),
        (tiny(), "infill", {}, r"does not read approximate_cache='dual': the cache of a block-diffusion model's"),
        (full(), "infill", {}, r"approximate_cache='dual': without block_size the whole text is one block"),
        (full(), "generate", {"use_cache": False}, r"approximate_cache='dual' .* use_cache=False keeps none"),
        (full(), "infill", {"use_cache": False, "block_size": 4}, r"approximate_cache='dual' .* keeps none"),
        (full(), "generate", {"approximate_cache": "both"}, r"must be one of prefix, dual, got 'both'"),
    ],
)
def test_where_it_has_no_meaning_it_is_refused(model, method, settings, message):
    """Catches a setting that is accepted and does nothing."""
    settings = {"approximate_cache": "dual"} | settings
    ids = with_holes(9, [2, 6])
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(ids, **settings)
    config = TIDEGenerationConfig()
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(ids, generation_config=config)


def test_a_checkpoint_keeps_it(tmp_path):
    """Catches a pushed setting that is lost, that cannot be undone, or that keeps a text from being filled whole."""
    model, ids, settings = full(seed=2), prompt(6), {"max_new_tokens": 16, "block_size": 8}
    exact, filled = model.generate(ids, **settings), model.infill(with_holes(9, [2, 6]))
    model.generation_config = TIDEGenerationConfig(approximate_cache="dual", **settings)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.approximate_cache == "dual"
    expected = naive_answer(model, ids, 16, 8, "dual")[0]
    assert loaded.generate(ids)[0].tolist() == expected != exact[0].tolist()
    assert torch.equal(loaded.generate(ids, approximate_cache=None), exact)
    loaded.generation_config.block_size = None
    assert torch.equal(loaded.infill(with_holes(9, [2, 6])), filled)


def test_a_block_student_says_what_to_undo():
    """Catches a message without the place that the setting came from."""
    model = tiny()
    model.generation_config = TIDEGenerationConfig(approximate_cache="prefix")
    with pytest.raises(ValueError, match=r"Set model\.generation_config\.approximate_cache = None\."):
        model.generate(prompt(4))
