"""Block grids, entropy bound, guidance, logits processors, stopping criteria, and what a decoding step runs."""

import pytest
import torch
from naive_sampler import PAD, naive_generate, prompt, published_split, tiny
from tiny import BLOCK, MASK
from transformers import AutoModelForCausalLM
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from tide_hf.models import TIDEGenerationConfig, decoding_tide
from tide_hf.models.reveal_rules_tide import reveal_counts, within_entropy_bound
from tide_hf.models.sampling_tide import most_probable


@torch.no_grad()
def naive_windows(logits_of, ids, answer_start, num_new, size, steps=None, bound=None):
    """Reveals windows of `size` tokens from `answer_start` on, by `logits_of(ids)` of one row, greedily."""
    ids = [*ids, *[MASK] * num_new]
    for start in range(answer_start, answer_start + num_new, size):
        masked = list(range(start, min(start + size, answer_start + num_new)))
        split = published_split(len(masked), steps or len(masked))
        while masked:
            logits = logits_of(ids, masked[-1] + 1 if bound is None else None).float()
            logits[:, MASK] = -torch.inf
            probability, token = logits.softmax(-1).max(-1)
            if bound is None:
                chosen = sorted(masked, key=lambda p: -float(probability[p]))[: split.pop(0)]
            else:
                entropy = {p: float(torch.distributions.Categorical(logits=logits[p]).entropy()) for p in masked}
                order, chosen = sorted(masked, key=entropy.get), []
                for p in order:
                    together = [entropy[q] for q in [*chosen, p]]
                    if sum(together) - max(together) > bound:
                        break
                    chosen.append(p)
            for p in chosen:
                ids[p] = int(token[p])
                masked.remove(p)
    return ids[answer_start:]


def published_sampler(model, ids, num_new, steps=None):
    """The sampler published with BD3LM students: the prompt left-padded to whole blocks, no cache."""
    num_padding = -len(ids) % BLOCK

    def logits_of(tokens, end):
        end = num_padding + len(ids) + (-(-(end - len(ids)) // BLOCK)) * BLOCK
        end = min(end, num_padding + len(tokens))
        row = torch.tensor([[PAD] * num_padding + tokens])[:, :end]
        block = torch.where(torch.arange(end) < num_padding, -1, torch.arange(end) // BLOCK)
        visible = (block[:, None] >= block[None, :]) & (block[None, :] >= 0)
        visible = visible | torch.eye(end, dtype=torch.bool)
        position = (torch.arange(end) - num_padding).clamp(min=0)[None]
        logits = model(row, attention_mask=visible[None, None], position_ids=position).logits[0, num_padding:]
        return torch.cat([logits, torch.zeros(len(tokens) - len(logits), logits.shape[1])])

    return naive_windows(logits_of, ids, len(ids), num_new, BLOCK, steps)


# ---- the published sampler ----


def test_steps_divide_a_block_as_published():
    """Catches another division of a block's masks: other tokens, and another number of steps, than published."""
    for num_masked in range(0, 34):
        for steps in range(1, 40):
            counts = list(reveal_counts(num_masked, steps))
            assert counts == published_split(num_masked, steps) and sum(counts) == num_masked
    assert reveal_counts(32, 3) == (11, 10, 11) and reveal_counts(4, 8) == (1, 1, 1, 1)


@pytest.mark.parametrize("steps", [None, 1, 2, 3])
def test_prompt_aligned_equals_the_published_sampler(steps):
    """Catches a grid that is not the published one: scores of published students could not be reproduced."""
    differs = 0
    for length in (1, 3, 4, 6, 9):
        model = tiny(seed=length)
        for num_new in (3, 8, 10):
            expected = published_sampler(model, prompt(length)[0].tolist(), num_new, steps)
            settings = {"max_new_tokens": num_new, "steps_per_block": steps}
            out = model.generate(prompt(length), block_grid="prompt_aligned", **settings)
            assert out[0, length:].tolist() == expected
            differs += out.tolist() != model.generate(prompt(length), **settings).tolist()
    assert differs, "the grid never mattered"


def test_prompt_aligned_batch_equals_row_by_row():
    """Catches rows of a batch that see each other's padding, or start their answers at another block edge."""
    model, prompts = tiny(seed=3), [prompt(length) for length in (1, 4, 7, 10)]
    ids, mask = torch.full((4, 11), 7), torch.zeros(4, 11, dtype=torch.long)
    for row, given in enumerate(prompts):
        ids[row, -given.shape[1] :], mask[row, -given.shape[1] :] = given[0], 1
    out = model.generate(ids, attention_mask=mask, max_new_tokens=10, block_grid="prompt_aligned")
    assert out[:, 11:].tolist() == [published_sampler(model, given[0].tolist(), 10) for given in prompts]


# ---- full-sequence students ----


@pytest.mark.parametrize("steps", [None, 1, 3])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_full_sequence_blocks_match_a_bidirectional_loop(size, steps):
    """Catches blocks of a full-sequence model that do not see the masks after them, or a cache it cannot have."""
    model = tiny(seed=2, diffusion_type="full")
    expected = naive_windows(
        lambda ids, _: model(torch.tensor([ids])).logits[0], prompt(6)[0].tolist(), 6, 10, size, steps
    )
    out = model.generate(prompt(6), max_new_tokens=10, block_size=size, steps_per_block=steps)
    assert out[0, 6:].tolist() == expected


# ---- entropy bound ----


def test_entropy_bound_rule():
    """Catches a sum that counts the largest entropy too, or positions that were not to be revealed."""
    entropy = torch.tensor([[0.3, torch.inf, 0.1, 0.2], [0.5, 0.5, 0.0, 0.5], [torch.inf] * 4])
    for bound, expected in (
        (0.0, ["..x.", "x.x.", "...."]),
        (0.1, ["..xx", "x.x.", "...."]),
        (0.31, ["x.xx", "x.x.", "...."]),
        (0.5, ["x.xx", "xxx.", "...."]),
    ):
        chosen = within_entropy_bound(entropy, bound)
        assert ["".join(".x"[int(flag)] for flag in row) for row in chosen] == expected


@pytest.mark.parametrize("bound", [0.0, 0.5, 2.0, 100.0])
def test_entropy_bound_matches_the_naive_sampler(bound):
    """Catches entropies of the wrong distribution, in bits, or summed over rows."""
    model = tiny(seed=4)

    def logits_of(ids, _):
        number = torch.arange(len(ids)) // BLOCK
        return model(torch.tensor([ids]), attention_mask=(number[:, None] >= number)[None, None]).logits[0]

    expected = naive_windows(logits_of, prompt(8)[0].tolist(), 8, 12, BLOCK, bound=bound)
    out = model.generate(prompt(8).repeat(2, 1), max_new_tokens=12, entropy_bound=bound, return_dict_in_generate=True)
    assert out.sequences[:, 8:].tolist() == [expected] * 2
    if bound in (0.0, 100.0):
        assert out.forward_passes == (12 if bound == 0 else 3)


# ---- guidance ----


@torch.no_grad()
@pytest.mark.parametrize("grid", ["absolute", "prompt_aligned", "full"])
@pytest.mark.parametrize("lengths", [(6, 6), (6, 3), (3, 10)])
def test_guidance_matches_two_forwards(lengths, grid):
    """Catches guidance turned around, a negative row that sees the prompt, or answers that fall out of step."""
    full = grid == "full"
    model = tiny(seed=5, diffusion_type="full" if full else "block")
    ids, negative = prompt(lengths[0]), prompt(lengths[1], seed=9)

    def logits_with(given, tokens, size_before):
        """Logits of the answer after `given`; its blocks end where the answer's do."""
        row = torch.cat([given, torch.tensor([tokens], dtype=torch.long)], 1)
        columns = torch.arange(row.shape[1])
        number = (columns - given.shape[1] + size_before + 1000 * BLOCK) // BLOCK
        visible = None if full else (number[:, None] >= number)[None, None]
        return model(row, attention_mask=visible).logits[0, given.shape[1] :].float()

    before = lengths[0] % BLOCK if grid == "absolute" else 0
    tokens, start = [], 0
    edges = [9] if full else [*range(BLOCK - before, 9, BLOCK), 9]
    for end in edges:
        # an absolute grid's last block is denoised whole and cut
        whole = end if full or grid == "prompt_aligned" else end + -(before + end) % BLOCK
        tokens = tokens[:end] + [MASK] * (whole - len(tokens[:end]))
        for _ in range(start, end):
            plain, away = logits_with(ids, tokens, before), logits_with(negative, tokens, before)
            guided = away + 2.5 * (plain - away)
            guided[:, MASK] = -torch.inf
            probability, token = guided.softmax(-1).max(-1)
            masked = [index for index in range(start, end) if tokens[index] == MASK]
            best = max(masked, key=lambda index: float(probability[index]))
            tokens[best] = int(token[best])
        start = end
    settings = {"max_new_tokens": 9} if full else {"max_new_tokens": 9, "block_grid": grid}
    out = model.generate(ids, negative_prompt_ids=negative, guidance_scale=2.5, **settings)
    assert out[0, lengths[0] :].tolist() == tokens[:9]
    assert not torch.equal(out, model.generate(ids, **settings)), "the guidance never mattered"
    batch = model.generate(ids.repeat(2, 1), negative_prompt_ids=negative, guidance_scale=2.5, **settings)
    assert torch.equal(batch, out.repeat(2, 1))


@pytest.mark.parametrize("arguments", [{"guidance_scale": 2.0}, {"negative_prompt_ids": prompt(3)}], ids=str)
def test_half_of_a_guidance_is_refused(arguments):
    """Catches a negative prompt or a scale that is taken and ignored."""
    with pytest.raises(ValueError, match="both negative_prompt_ids and a guidance_scale"):
        tiny().generate(prompt(4), max_new_tokens=4, **arguments)


# ---- transformers' processors and criteria ----


def test_processors_get_what_a_token_by_token_decoder_gives_them():
    """Catches ids and scores in another shape: n-gram, length and repetition rules would act on the wrong tokens."""
    model, length, eos = tiny(seed=6), 5, 3
    rules = [
        RepetitionPenaltyLogitsProcessor(1.7),
        NoRepeatNGramLogitsProcessor(2),
        MinNewTokensLengthLogitsProcessor(length, 12, eos, device="cpu"),
        NoBadWordsLogitsProcessor([[4, 5], [6]], eos_token_id=eos),
    ]
    ids = prompt(length)
    while ids.shape[1] < length + 12:  # with blocks of one token, decoding is autoregressive
        row = torch.cat([ids, torch.tensor([[MASK]])], 1)
        number = torch.arange(row.shape[1])
        with torch.no_grad():
            scores = model(row, attention_mask=(number[:, None] >= number)[None, None]).logits[:, -1].float()
        scores[:, MASK] = -torch.inf
        ids = torch.cat([ids, LogitsProcessorList(rules)(ids, scores).argmax(-1, keepdim=True)], 1)
    out = model.generate(prompt(length), max_new_tokens=12, block_size=1, eos_token_id=eos, logits_processor=rules)
    assert torch.equal(out, ids)
    assert not torch.equal(out, model.generate(prompt(length), max_new_tokens=12, block_size=1))


def test_processors_act_on_their_own_rows_and_positions():
    """Catches scores scattered to the wrong row or position of a batch with prompts of different lengths."""

    class Force(LogitsProcessor):
        """Token n in row 0 and 19 − n in row 1, as n-th new token."""

        def __call__(self, input_ids, scores):
            n = input_ids.shape[1] - 7
            assert input_ids.shape == (2, 7 + n) and scores.shape[0] == 2
            assert torch.equal(input_ids[:, :7], ids)
            forced = torch.full_like(scores, -1e9)
            forced[0, n], forced[1, 19 - n] = 0, 0
            return forced

    class Same(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.clone()

    ids, mask = torch.cat([prompt(7), prompt(7, seed=2)]), torch.ones(2, 7, dtype=torch.long)
    mask[1, :4] = 0
    for settings in ({}, {"block_grid": "prompt_aligned"}, {"confidence_threshold": 0.5}, {"steps_per_block": 1}):
        out = tiny().generate(ids, attention_mask=mask, max_new_tokens=10, logits_processor=[Force()], **settings)
        assert out[:, 7:].tolist() == [list(range(10)), [19 - n for n in range(10)]]
        free = tiny().generate(ids, attention_mask=mask, max_new_tokens=10, **settings)
        same = tiny().generate(ids, attention_mask=mask, max_new_tokens=10, logits_processor=[Same()], **settings)
        assert torch.equal(same, free), "scores of other rows or positions"


def test_suppressed_tokens_do_not_occur():
    """Catches processors that are applied to the proposal and not to the sampled token."""
    model = tiny(seed=1)
    generator = torch.Generator().manual_seed(0)
    rule = [SuppressTokensLogitsProcessor(list(range(10)), device="cpu")]
    settings = {"max_new_tokens": 15, "temperature": 2.0, "generator": generator}
    assert (model.generate(prompt(6), **settings)[:, 6:] < 10).any()
    assert (model.generate(prompt(6), logits_processor=rule, **settings)[:, 6:] >= 10).all()


@pytest.mark.slow
def test_stopping_criteria_end_rows_like_token_by_token_decoding():
    """Catches criteria asked once per block: a stop string in its middle would be passed over, rows cut at random."""

    class StopAt(StoppingCriteria):
        def __init__(self, token):
            self.token = token

        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == self.token

    model, prompts = tiny(seed=3), [prompt(4), prompt(7)]
    ids, mask = torch.full((2, 7), 7), torch.zeros(2, 7, dtype=torch.long)
    for row, given in enumerate(prompts):
        ids[row, -given.shape[1] :], mask[row, -given.shape[1] :] = given[0], 1
    lengths = set()
    for token in range(20):
        ends = [naive_generate(model, given[0].tolist(), 13, eos=token)[0] for given in prompts]
        lengths |= {len(row) for row in ends}
        width = max(map(len, ends))
        expected = [row + [PAD] * (width - len(row)) for row in ends]
        out = model.generate(ids, attention_mask=mask, max_new_tokens=13, stopping_criteria=[StopAt(token)])
        assert out[:, 7:].tolist() == expected
    assert len(lengths) > 2
    criteria = StoppingCriteriaList([MaxLengthCriteria(7 + 6)])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=13, stopping_criteria=criteria, return_dict_in_generate=True
    )
    assert out.sequences.shape == (2, 7 + 6) and out.forward_passes < 13


def test_a_late_stop_keeps_what_was_final_before():
    """Catches a time limit that cuts a row at a token of an earlier block, where only its neighbour has got to."""

    class FromFifthCallOn(StoppingCriteria):
        calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            return torch.full((2,), self.calls >= 5)

    ids, mask = torch.cat([prompt(7), prompt(7, seed=2)]), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0  # after the first block row 0 has four new tokens, row 1 one
    model, settings = tiny(), {"attention_mask": mask, "max_new_tokens": 9}
    out, free = model.generate(ids, stopping_criteria=[FromFifthCallOn()], **settings), model.generate(ids, **settings)
    assert out[0, 7:].tolist() == free[0, 7:12].tolist()
    assert out[1, 7:].tolist() == [*free[1, 7:9].tolist(), PAD, PAD, PAD]


# ---- cost ----


@pytest.mark.parametrize("settings", [{}, {"steps_per_block": 2}, {"confidence_threshold": 0.4}], ids=str)
def test_only_new_columns_and_masked_positions_are_run(settings, monkeypatch):
    """Catches a prefix run again for each block, calls for the cache alone, and head rows of known tokens."""
    model, columns, head_rows, kept = tiny(seed=1), [], [], []
    run, head = model.run_decoder, model.lm_head.forward

    def spy(**kwargs):
        out = run(**kwargs)
        columns.append(kwargs["input_ids"].shape[1])
        kept.append((kwargs["input_ids"][0] == MASK).sum().item())
        return out

    monkeypatch.setattr(model, "run_decoder", spy)
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: head_rows.append(len(hidden)) or head(hidden))
    out = model.generate(prompt(10), max_new_tokens=14, return_dict_in_generate=True, **settings)
    # prompt and answer once each as final columns, but for the last block, and each denoising step its own block
    assert sum(columns) == 20 + BLOCK * out.forward_passes
    assert columns[0] == 8 + BLOCK and set(columns[1:]) == {BLOCK, 2 * BLOCK}
    assert head_rows == kept and len(columns) == out.forward_passes


# ---- settings ----


def test_new_settings_round_trip(tmp_path):
    """Catches a setting that generation_config.json loses: the pushed model would decode in another way."""
    model = tiny()
    model.generation_config = TIDEGenerationConfig(
        max_new_tokens=9, entropy_bound=0.7, block_grid="prompt_aligned", guidance_scale=1.5
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name in ("entropy_bound", "block_grid", "guidance_scale", "max_new_tokens"):
        assert getattr(loaded.generation_config, name) == getattr(model.generation_config, name)
    arguments = {"negative_prompt_ids": prompt(3)}
    assert torch.equal(loaded.generate(prompt(6), **arguments), model.generate(prompt(6), **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"entropy_bound": -0.1}, "entropy_bound must be 0 or more nats, got -0.1"),
        ({"entropy_bound": 1.0, "confidence_threshold": 0.9}, "confidence_threshold=0.9 would be ignored"),
        ({"entropy_bound": 1.0, "remasking": "random"}, "remasking='random' would be ignored"),
        ({"block_grid": "left"}, "absolute, prompt_aligned, got 'left'"),
    ],
)
def test_contradicting_settings_are_refused(arguments, message):
    """Catches a setting that another one silently overrides."""
    with pytest.raises(ValueError, match=message):
        tiny().generate(prompt(4), max_new_tokens=4, **arguments)


def test_no_prompt_is_refused():
    """Catches an error from deep inside when the prompt's keyword is misspelt."""
    with pytest.raises(ValueError, match="needs prompts"):
        tiny().generate(max_new_tokens=4)


# ---- the most probable token ----


@pytest.mark.parametrize(
    ("vocab", "sizes"), [(7, [7]), (300, [300]), (1000, [128, 500, 372]), (513, [512, 1]), (9, [5, 1, 3])]
)
def test_the_most_probable_token_in_stretches(vocab, sizes):
    """Catches a token lost at the edge of a stretch or run, another one among equals, and a sum that misses a part."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(40, vocab, generator=generator, dtype=torch.float64) * 3
    # the largest at every edge, alone and twice; [MASK] has none
    edges = [0, vocab - 1, *(e for s in range(0, vocab, 128) for e in (s, s + 1, s - 1) if 0 <= e < vocab)][:38]
    for row, column in enumerate(edges):
        logits[row, column] = logits[row].max() + 1
    logits[38] = 1.5
    logits[39, [3, vocab - 1]] = 50.0
    logits[:, 5] = -torch.inf
    expected = torch.tensor([next(i for i, z in enumerate(row) if z == max(row)) for row in logits.tolist()])
    probability = logits.exp().gather(1, expected[:, None])[:, 0] / logits.exp().sum(1)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [(start, logits[:, start : start + size].clone()) for start, size in zip(starts, sizes, strict=True)]
    tokens, found = most_probable(pieces)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(found, probability, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_in_stretches_generates_the_same(bias, monkeypatch):
    """Catches a stretch without its bias, another [MASK], or a head whose hooks and wrappers are passed over."""
    model, plain, calls = tiny(seed=5), torch.nn.Linear, []
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, 24).double())
    expected, _ = naive_generate(model, prompt(6)[0].tolist(), 12)
    for name, value in (("SHORTEST", 1), ("RUN", 5), ("NUM_LOGITS", 1)):
        monkeypatch.setattr(decoding_tide, name, value)
    assert model.generate(prompt(6), max_new_tokens=12)[0, 6:].tolist() == expected
    handle = model.lm_head.register_forward_hook(lambda module, args, out: calls.append(out.shape[-1]))
    assert model.generate(prompt(6), max_new_tokens=12)[0, 6:].tolist() == expected
    handle.remove()
    assert set(calls) == {24}
    model.lm_head = type("Adapted", (plain,), {"forward": lambda self, x: -plain.forward(self, x)})(32, 24).double()
    expected, _ = naive_generate(model, prompt(6)[0].tolist(), 12)
    assert model.generate(prompt(6), max_new_tokens=12)[0, 6:].tolist() == expected
