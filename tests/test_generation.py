"""`generate` against a naive sampler without cache, batching, streaming, settings, and the block cache."""

import json

import pytest
import torch
from naive_sampler import EOS, PAD, naive_generate, prompt, tiny
from tiny import BLOCK, MASK, VOCAB
from transformers import AutoModelForCausalLM, GenerationConfig, TextDiffusionStreamer

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.diffusion import LayoutSpec, block_layout
from tide_hf.models import TIDEGenerationConfig, block_visibility
from tide_hf.models import decoding_tide as decoding
from tide_hf.models.caches_tide import BlockCacheLayer
from tide_hf.models.modeling_tide import CACHE_NAME

SETTINGS = [
    {},
    {"steps_per_block": 1},
    {"steps_per_block": 2},
    {"steps_per_block": 3},
    {"steps_per_block": 4},
    {"confidence_threshold": 0.3},
    {"confidence_threshold": 1.0},
]


def as_batch(prompts, side, num_extra=2):
    """Prompts of different lengths, padded with ids that also occur as real tokens."""
    width = max(row.shape[1] for row in prompts) + num_extra
    ids, mask = torch.full((len(prompts), width), 7), torch.zeros(len(prompts), width, dtype=torch.long)
    for index, row in enumerate(prompts):
        columns = slice(width - row.shape[1], None) if side == "left" else slice(None, row.shape[1])
        ids[index, columns], mask[index, columns] = row[0], 1
    return ids, mask


def padded(rows):
    width = max(len(row) for row in rows)
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


# ---- the same logits as in training ----


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("length", [3, 8, 10])
def test_generation_sees_what_the_denoiser_saw_in_training(length, pack, monkeypatch):
    """Catches a train/test mismatch: other positions, another mask or a stale cache at decoding."""
    model, calls = tiny(), []
    run = model.run_decoder

    def spy(**kwargs):
        out = run(**kwargs)
        # final columns that the cache lacked may run along in front of the active block
        active = slice(-BLOCK, None)
        ids, position = kwargs["input_ids"][:, active], kwargs["position_ids"][:, active]
        calls.append((ids.clone(), position.clone(), out.last_hidden_state[:, active]))
        return out

    monkeypatch.setattr(model, "run_decoder", spy)
    final = model.generate(prompt(length), max_new_tokens=12 - length % BLOCK)
    monkeypatch.undo()
    compared = 0
    for ids, position, hidden in calls:
        start, in_block = int(position[0, 0]), ids[0] == MASK
        if not in_block.any():
            continue
        clean, mask = final[:, : start + BLOCK], torch.zeros(1, start + BLOCK, dtype=torch.bool)
        mask[0, start:] = in_block
        # masks of other blocks' noised copies are invisible
        mask[0, :start] = torch.rand(start, generator=torch.Generator().manual_seed(start)) < 0.5
        layout = block_layout(clean, torch.ones_like(mask), [mask], LayoutSpec(MASK, BLOCK), pack)
        visible = block_visibility(layout.stream, layout.block, layout.stream, layout.block)
        out = model(layout.input_ids, attention_mask=visible, position_ids=layout.position_ids, use_cache=False)
        asked = out.logits.flatten(0, 1)[layout.asked][layout.asked_position >= start]
        torch.testing.assert_close(model.lm_head(hidden[0][in_block]), asked, rtol=0, atol=1e-10)
        compared += len(asked)
    assert compared >= 12


# ---- against the naive sampler ----


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("length", [1, 3, 4, 6, 8])
def test_greedy_generation_matches_the_naive_sampler(length, settings):
    """Catches a wrong block grid, a stale cache, another reveal order, or a step that reveals too much."""
    model = tiny(seed=length)
    for max_new_tokens in (3, 8, 10):
        expected, _ = naive_generate(model, prompt(length)[0].tolist(), max_new_tokens, **settings)
        out = model.generate(prompt(length), max_new_tokens=max_new_tokens, **settings)
        assert torch.equal(out[:, :length], prompt(length))
        assert out[0, length:].tolist() == expected


def test_the_settings_of_the_comparison_differ():
    """Catches a comparison that says nothing: a model whose answer does not depend on how it is decoded."""
    answers = {str(s): naive_generate(tiny(seed=1), prompt(6)[0].tolist(), 14, **s)[0] for s in SETTINGS}
    assert len({tuple(answer) for answer in answers.values()}) >= 3
    assert len(set(answers["{}"])) >= 4, "one token repeated"


def test_ties_are_revealed_from_the_left():
    """Catches an unstable order: among equally sure positions a run would depend on the sort's implementation."""
    model = tiny()
    model.lm_head.weight.data.zero_()
    drafts = Recorder()
    model.generate(prompt(4), max_new_tokens=4, streamer=drafts)
    num_masks = [[token == MASK for token in ids] for kind, ids in drafts.events if kind == "draft"]
    assert num_masks == [[False] * revealed + [True] * (4 - revealed) for revealed in (1, 2, 3, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"steps_per_block": 2}, {"confidence_threshold": 0.3}], ids=str)
def test_eos_ends_a_row(settings):
    """Catches text after the end of the answer, and an EOS of the prompt taken for the answer's."""
    model, lengths = tiny(seed=3), []
    for eos in range(20):
        with_eos = prompt(6)
        with_eos[0, [2, 5]] = eos  # in a finished block, and in the active block's prompt tail
        for eos_token_id in (eos, [eos, 20]):
            expected, _ = naive_generate(model, with_eos[0].tolist(), 14, eos=eos_token_id, **settings)
            out = model.generate(with_eos, max_new_tokens=14, eos_token_id=eos_token_id, **settings)
            assert out[0, 6:].tolist() == expected
            lengths.append(len(expected))
    assert len(set(lengths)) >= 3 and 14 in lengths, "answers did not end at different places"


@pytest.mark.parametrize("diffusion_type", ["block", "full"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", [{}, {"steps_per_block": 2}, {"confidence_threshold": 0.3}], ids=str)
def test_batch_equals_row_by_row(settings, side, diffusion_type):
    """Catches padding that is attended, a grid shifted by it, and a row that stops or goes on with its neighbour."""
    model = tiny(seed=3, diffusion_type=diffusion_type)
    prompts = [prompt(length) for length in (1, 4, 7, 10, 8)]
    ids, mask = as_batch(prompts, side)
    free = [naive_generate(model, row[0].tolist(), 9, **settings)[0] for row in prompts]
    eos = next(token for token in free[2] if sum(token in row for row in free) < len(free))
    for eos_token_id in (None, eos):
        alone = [naive_generate(model, row[0].tolist(), 9, eos=eos_token_id, **settings)[0] for row in prompts]
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=9,
            eos_token_id=eos_token_id,
            return_dict_in_generate=True,
            **settings,
        )
        assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
        assert torch.equal(out.sequences[:, ids.shape[1] :], padded(alone))
        mean = sum(map(len, alone)) / len(alone)
        assert out.tokens_per_forward == pytest.approx(mean / out.forward_passes)
    assert len({len(row) for row in alone}) > 1, "all rows ended together"


@pytest.mark.slow
def test_finished_rows_cost_no_forward_passes():
    """Catches rows that are still denoised after their EOS and hold up the batch: slower, and a wrong speed."""
    model, saved = tiny(seed=3), 0
    prompts = [prompt(length) for length in (4, 5, 6, 7)]
    ids, mask = as_batch(prompts, "left")
    settings = {"max_new_tokens": 17, "confidence_threshold": 0.3}
    free = [naive_generate(model, row[0].tolist(), 17, confidence_threshold=0.3)[1] for row in prompts]
    for eos in range(0, 20, 2):
        rows = [naive_generate(model, row[0].tolist(), 17, eos=eos, confidence_threshold=0.3)[1] for row in prompts]
        num_blocks = max(map(len, rows))
        denoising = sum(max(row[block] for row in rows if block < len(row)) for block in range(num_blocks))
        out = model.generate(ids, attention_mask=mask, eos_token_id=eos, return_dict_in_generate=True, **settings)
        assert out.forward_passes == denoising  # prompt and cache updates run along
        saved += denoising < sum(max(row[block] for row in free if block < len(row)) for block in range(num_blocks))
    assert saved, "no row that ended would have held up the others"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_full_sequence_matches_a_bidirectional_loop(settings):
    """Catches a full-sequence model decoded block by block, or one that sees padding after its answer."""
    model = tiny(seed=2, diffusion_type="full")
    for length, max_new_tokens in ((1, 5), (6, 9), (8, 8)):
        expected, num_steps = naive_generate(model, prompt(length)[0].tolist(), max_new_tokens, **settings)
        out = model.generate(prompt(length), max_new_tokens=max_new_tokens, return_dict_in_generate=True, **settings)
        assert out.sequences[0, length:].tolist() == expected
        assert [out.forward_passes] == num_steps


def test_mask_token_is_never_generated():
    """Catches a model that answers [MASK] to [MASK], which would end up in the text and in the cache."""
    model = tiny(tie_word_embeddings=False)
    noised = torch.cat([prompt(3), torch.full((1, 1), MASK)], 1)
    with torch.no_grad():
        model.lm_head.weight[MASK] = model.model(noised).last_hidden_state[0, 3]
        assert model(noised).logits[0, 3].argmax() == MASK, "the model does not want to answer [MASK]"
    for settings in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1}, {"temperature": 2.0, "top_p": 0.5}):
        out = model.generate(prompt(3), max_new_tokens=13, generator=torch.Generator().manual_seed(0), **settings)
        assert out.shape == (1, 16) and MASK not in out


# ---- sampling ----


def test_sampling_is_reproducible_with_a_generator():
    """Catches draws from the global state, which a second run of the same seed would not repeat."""
    model = tiny()
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(outs))
        generator = torch.Generator().manual_seed(seed)
        state = torch.random.get_rng_state()
        outs.append(model.generate(prompt(5), max_new_tokens=11, temperature=1.5, generator=generator))
        assert torch.equal(torch.random.get_rng_state(), state), "the global state was used"
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("restriction", [{"top_k": 1}, {"top_p": 1e-6}])
def test_narrowest_sampling_is_greedy(restriction):
    """Catches top_k or top_p that is accepted and not applied."""
    model, greedy = tiny(), tiny().generate(prompt(5), max_new_tokens=11)
    generator = torch.Generator().manual_seed(0)
    free = model.generate(prompt(5), max_new_tokens=11, temperature=2.0, generator=generator)
    assert not torch.equal(free, greedy)
    out = model.generate(prompt(5), max_new_tokens=11, temperature=2.0, generator=generator, **restriction)
    assert torch.equal(out, greedy)


def test_sampling_follows_the_tempered_distribution():
    """Catches a temperature applied twice, or to the wrong side."""
    model = tiny()
    ids = prompt(4).repeat(4000, 1)
    out = model.generate(
        ids, max_new_tokens=1, steps_per_block=1, temperature=0.5, generator=torch.Generator().manual_seed(0)
    )
    noised = torch.cat([prompt(4), torch.full((1, BLOCK), MASK)], 1)
    number = torch.arange(8) // BLOCK
    logits = model(noised, attention_mask=(number[:, None] >= number[None, :])[None, None]).logits[0, 4]
    logits[MASK] = -torch.inf
    expected = (logits / 0.5).softmax(-1)
    frequency = torch.bincount(out[:, 4], minlength=VOCAB) / 4000
    assert expected.max() < 0.9, "the comparison would say nothing"
    torch.testing.assert_close(frequency.double(), expected, rtol=0, atol=0.04)


@pytest.mark.parametrize("settings", [{}, {"steps_per_block": 2}, {"confidence_threshold": 0.6}], ids=str)
def test_random_remasking_matches_the_naive_sampler(settings):
    """Catches remasking='random' that still reveals the surest position first."""
    model = tiny(seed=3)
    differs = 0
    for seed in range(4):
        draws, ours = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        expected, _ = naive_generate(
            model,
            prompt(6)[0].tolist(),
            10,
            order=lambda size, draws=draws: torch.rand(1, size, generator=draws)[0],
            **settings,
        )
        out = model.generate(prompt(6), max_new_tokens=10, remasking="random", generator=ours, **settings)
        assert out[0, 6:].tolist() == expected
        differs += out.tolist() != model.generate(prompt(6), max_new_tokens=10, **settings).tolist()
    assert differs, "the order never mattered"


# ---- outputs and streaming ----


@pytest.mark.parametrize(
    ("length", "settings", "forward_passes"),
    [
        (
            8,
            {"steps_per_block": 2},
            2 + 2,
        ),  # prompt and first block run along with the next block
        (8, {}, 4 + 4),
        (3, {"steps_per_block": 1}, 1 + 1 + 1),  # 1 + 4 + 3 tokens
    ],
)
def test_output_counts_real_network_calls(length, settings, forward_passes, monkeypatch):
    """Catches a speed that leaves out network calls, and calls for the prompt or the cache alone."""
    model, calls = tiny(), []
    run = model.run_decoder
    monkeypatch.setattr(model, "run_decoder", lambda **kwargs: calls.append(1) or run(**kwargs))
    out = model.generate(prompt(length), max_new_tokens=8, return_dict_in_generate=True, **settings)
    assert out.forward_passes == len(calls) == forward_passes
    assert out.tokens_per_forward == pytest.approx(8 / forward_passes)
    assert torch.equal(out.sequences, model.generate(prompt(length), max_new_tokens=8, **settings))


class Recorder:
    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value.flatten().tolist()))

    def put_draft(self, value):
        self.events.append(("draft", value.flatten().tolist()))

    def end(self):
        self.events.append(("end", None))


def test_streamer_order():
    """Catches a block streamed before it is final, or a draft after its block."""
    model, streamer = tiny(), Recorder()
    out = model.generate(prompt(6), max_new_tokens=10, steps_per_block=2, streamer=streamer)
    kinds = [kind for kind, _ in streamer.events]
    assert kinds == ["put", *(["draft", "draft", "put"] * 3), "end"]
    blocks = [ids for kind, ids in streamer.events if kind == "put"]
    assert blocks == [out[0, :6].tolist(), out[0, 6:8].tolist(), out[0, 8:12].tolist(), out[0, 12:].tolist()]
    drafts = [ids for kind, ids in streamer.events if kind == "draft"]
    assert [ids.count(MASK) for ids in drafts] == [1, 0, 2, 0, 2, 0]


def test_streamer_without_drafts():
    """Catches a plain text streamer that is asked for drafts it does not have."""

    class Plain:
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            pass

    streamer = Plain()
    assert tiny().generate(prompt(5), max_new_tokens=7, streamer=streamer)[0].tolist() == streamer.ids


@pytest.mark.parametrize("ending", ["max_new_tokens", "eos"])
def test_streamed_tokens_are_the_returned_ones(ending):
    """Catches text shown after the answer's end: what follows EOS or max_new_tokens in a block is not an answer."""
    model, streamer = tiny(seed=3), Recorder()
    free = model.generate(prompt(4), max_new_tokens=8)[0, 4:].tolist()
    eos = next(token for index, token in enumerate(free) if free.index(token) == index and index % BLOCK != BLOCK - 1)
    settings = {"max_new_tokens": 6} if ending == "max_new_tokens" else {"max_new_tokens": 8, "eos_token_id": eos}
    out = model.generate(prompt(4), streamer=streamer, **settings)
    assert [token for kind, ids in streamer.events if kind == "put" for token in ids] == out[0].tolist()


def test_text_diffusion_streamer(capsys):
    """Catches shapes transformers' own streamer does not take: pipelines would crash while they decode."""
    tokenizer = build_tokenizer()
    special = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny(vocab_size=len(tokenizer), **special)
    ids = tokenizer("312045", return_tensors="pt").input_ids
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True)
    out = model.generate(ids, max_new_tokens=6, streamer=streamer)
    printed = capsys.readouterr().out
    # drafts stand between save-cursor and restore-and-clear
    final = "".join(part.split("\0338\033[J")[-1] for part in ("\0338\033[J" + printed).split("\0337"))
    assert printed.count("\0337") == 6 and tokenizer.mask_token in printed
    assert final.strip() == tokenizer.decode(out[0, 6:])


# ---- settings ----


def test_generation_config_round_trip(tmp_path):
    """Catches settings that vanish between push and load: the model would decode in another way than its card says."""
    model = tiny(eos_token_id=EOS)
    model.generation_config = TIDEGenerationConfig(
        max_new_tokens=12,
        mask_token_id=MASK,
        block_size=BLOCK,
        steps_per_block=2,
        remasking="random",
        eos_token_id=EOS,
    )
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["steps_per_block"] == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.generation_config) is TIDEGenerationConfig
    expected = model.generation_config.to_dict()
    assert {name: loaded.generation_config.to_dict()[name] for name in expected} | {"pad_token_id": None} == expected
    ours, theirs = (
        m.generate(prompt(6), generator=torch.Generator().manual_seed(0), return_dict_in_generate=True)
        for m in (model, loaded)
    )
    assert ours.sequences.shape[1] <= 6 + 12
    assert torch.equal(ours.sequences, theirs.sequences) and ours.forward_passes == theirs.forward_passes


def test_saved_default_generation_config_loads(tmp_path):
    """Catches a model that generates before it is saved and not afterwards."""
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(prompt(6), max_new_tokens=9), model.generate(prompt(6), max_new_tokens=9))


@pytest.mark.parametrize("config_class", [TIDEGenerationConfig, GenerationConfig])
def test_a_given_generation_config_leaves_the_rest_alone(config_class):
    """Catches fields nobody set wiping out the model's own mask token and block size."""
    model = tiny()
    expected = model.generate(prompt(6), max_new_tokens=9)
    assert torch.equal(model.generate(prompt(6), generation_config=config_class(max_new_tokens=9)), expected)


def test_a_saved_partial_generation_config_leaves_the_rest_alone(tmp_path):
    """Catches a checkpoint whose generation_config.json sets the steps and thereby loses mask token and block size."""
    model = tiny()
    expected = model.generate(prompt(6), max_new_tokens=9, steps_per_block=2)
    model.generation_config = TIDEGenerationConfig(max_new_tokens=9, steps_per_block=2)
    assert torch.equal(model.generate(prompt(6)), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).generate(prompt(6)), expected)


def test_keyword_arguments_override_the_given_config():
    """Catches an order of precedence turned around: an experiment's setting would be ignored."""
    model = tiny()
    given = TIDEGenerationConfig(max_new_tokens=5, steps_per_block=1, mask_token_id=MASK, block_size=BLOCK)
    out = model.generate(
        prompt(8), generation_config=given, max_new_tokens=8, steps_per_block=4, return_dict_in_generate=True
    )
    assert out.sequences.shape[1] == 16 and out.forward_passes == 4 + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_token": 5}, "does not read max_new_token"),
        ({"confidence_threshold": 0.0}, "confidence_threshold must lie in"),
        ({"confidence_threshold": 1.5}, "confidence_threshold must lie in"),
        ({"steps_per_block": 0}, "steps_per_block must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"remasking": "low_confidence"}, "confidence, .*, random, got 'low_confidence'"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    """Catches a typo that would silently decode with the default."""
    with pytest.raises(ValueError, match=message):
        tiny().generate(prompt(4), **arguments)


def test_do_sample_false_is_greedy():
    """Catches do_sample=False that is taken and ignored: with a checkpoint's temperature the answers are random."""
    model = tiny()
    expected = model.generate(prompt(6), max_new_tokens=14)
    generator = torch.Generator().manual_seed(0)
    model.generation_config = TIDEGenerationConfig(
        do_sample=True, temperature=2.0, mask_token_id=MASK, block_size=BLOCK, pad_token_id=PAD
    )
    sampled = model.generate(prompt(6), max_new_tokens=14, generator=generator)
    assert not torch.equal(sampled, expected)
    greedy = model.generate(prompt(6), max_new_tokens=14, do_sample=False, generator=generator)
    assert torch.equal(greedy, expected)


def test_a_model_without_mask_token_is_refused():
    """Catches a canvas filled with an arbitrary token; the argument alone is enough to go on."""
    model = tiny(mask_token_id=None)
    with pytest.raises(ValueError, match="mask_token_id"):
        model.generate(prompt(4), max_new_tokens=4)
    expected = tiny().generate(prompt(4), max_new_tokens=4)
    assert torch.equal(model.generate(prompt(4), max_new_tokens=4, mask_token_id=MASK), expected)


def test_a_streamer_with_two_rows_is_refused():
    """Catches a stream that shows the first row and hides the second."""
    with pytest.raises(ValueError, match="one row, got 2"):
        tiny().generate(prompt(4).repeat(2, 1), max_new_tokens=4, streamer=Recorder())


# ---- state ----


@pytest.mark.parametrize("training", [True, False])
def test_generate_runs_in_eval_mode_without_gradients_and_puts_the_mode_back(training, monkeypatch):
    """Catches a run that goes on in eval mode after a sample, or samples with dropout."""
    model = tiny(attention_dropout=0.5).train(training)
    model.gradient_checkpointing_enable()
    run, seen = model.run_decoder, []

    def spy(**kwargs):
        out = run(**kwargs)
        seen.append((model.training, out.last_hidden_state.requires_grad))
        return out

    monkeypatch.setattr(model, "run_decoder", spy)
    first = model.generate(prompt(5), max_new_tokens=6)
    assert set(seen) == {(False, False)}
    assert torch.equal(model.generate(prompt(5), max_new_tokens=6), first), "dropout was active"
    assert all(module.training is training for module in model.modules()) and torch.is_grad_enabled()
    assert not first.requires_grad and all(weight.grad is None for weight in model.parameters())


def test_mode_is_put_back_after_an_error():
    """Catches a training that silently goes on without dropout after an interrupted sample."""

    class Broken(Recorder):
        def put_draft(self, value):
            raise KeyboardInterrupt

    model = tiny().train()
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt(5), max_new_tokens=6, streamer=Broken())
    assert model.training


def test_cache_layer_writes_behind_what_is_committed():
    """Catches a cache that grows by every denoising step, or lets a draft overwrite finished blocks."""
    layer = BlockCacheLayer(10)
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 3, width, 5, generator=draw) for width in (4, 4, 4, 2)]
    keys, values = layer.update(states[0], -states[0])
    assert torch.equal(keys, states[0]) and torch.equal(values, -states[0]) and layer.get_seq_length() == 0
    layer.committed = 4
    buffers = layer.keys.data_ptr(), layer.values.data_ptr()
    for draft in states[1:]:
        keys, values = layer.update(draft, -draft)
        assert torch.equal(keys, torch.cat([states[0], draft], 2)) and torch.equal(values, -keys)
        assert layer.get_seq_length() == 4 and layer.keys.shape[2] == layer.values.shape[2] == 10
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == buffers


def test_cache_keeps_committed_columns(monkeypatch):
    """Catches finished blocks recomputed or overwritten while later blocks are denoised, and a cache of drafts."""
    model, snapshots, decoders = tiny(seed=3), [], []
    forward = decoding.Decoder._forward

    def spy(decoder, start, end):
        hidden = forward(decoder, start, end)
        layer = decoder.cache.layers[-1]
        snapshots.append((layer.committed, layer.keys[:, :, : layer.committed].clone(), layer.keys.data_ptr()))
        decoders.append(decoder)
        return hidden

    monkeypatch.setattr(decoding.Decoder, "_forward", spy)
    out = model.generate(prompt(6), max_new_tokens=14)
    layer = decoders[-1].cache.layers[-1]
    assert layer.keys.shape[2] == 20 and {pointer for *_, pointer in snapshots} == {layer.keys.data_ptr()}
    assert sorted({committed for committed, *_ in snapshots}) == [4, 8, 12, 16]
    for committed, keys, _ in snapshots:
        assert torch.equal(keys, layer.keys[:, :, :committed])
    # what was kept are the keys of the final tokens
    number = torch.arange(20) // BLOCK
    visible = (number[:, None] >= number[None, :])[None, None]
    expected = model(out, attention_mask=visible, use_cache=True)[CACHE_NAME].layers[-1].keys
    torch.testing.assert_close(layer.keys[:, :, :16], expected[:, :, :16], rtol=0, atol=1e-10)
