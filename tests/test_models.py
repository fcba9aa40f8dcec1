"""Students and WeDLM as transformers classes: loading, attention, the loss of `forward(labels=…)`, configs."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BLOCK, MASK, SHAPE, VOCAB
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

import tide_hf  # noqa: F401 - registers the models
from tide_hf.demo.sorting import build_tokenizer, held_out_rows, sorting_rows
from tide_hf.models import (
    A2DQwen3Config,
    A2DQwen3LMHeadModel,
    TIDEQwen3Config,
    TIDEQwen3ForBlockDiffusion,
    WeDLMConfig,
    WeDLMForCausalLM,
    attention_mask_for,
    row_noise,
)

AUTO_MODELS = (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM)
IMPLEMENTATIONS = ("sdpa", "eager")


def tiny(**changes) -> TIDEQwen3ForBlockDiffusion:
    values = {**SHAPE, "mask_token_id": MASK, "block_size": BLOCK, "tie_word_embeddings": True, **changes}
    torch.manual_seed(0)
    return TIDEQwen3ForBlockDiffusion(TIDEQwen3Config(**values)).eval()


def tokens(*shape, seed=1, high=VOCAB - 3):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


# ---- loading ----


@pytest.mark.parametrize("auto_class", AUTO_MODELS)
def test_auto_classes_give_the_student_with_its_head(auto_class, tmp_path):
    """Catches an Auto class that falls back to a headless or causal model: loads fine, another network."""
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is TIDEQwen3ForBlockDiffusion
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(loaded(tokens(2, 7)).logits, model(tokens(2, 7)).logits, rtol=0, atol=0)


def test_auto_config_keeps_the_diffusion_fields(tmp_path):
    """Catches fields lost between config.json and the class: training would fall back to another diffusion type."""
    values = {"block_size": 5, "diffusion_type": "full", "noise_schedule": "cosine", "mask_token_id": MASK}
    TIDEQwen3Config(**SHAPE, **values).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is TIDEQwen3Config
    assert {name: getattr(config, name) for name in values} == values
    assert config.is_causal is False


@pytest.mark.parametrize("tied", [True, False])
def test_weights_round_trip(tied, tmp_path):
    """Catches a head that is re-drawn at load, or silently untied: the tied file holds no lm_head.weight."""
    model = tiny(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded, info = TIDEQwen3ForBlockDiffusion.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def published_folder(path, model_type, architecture, tied, **fields):
    """A folder as its authors published it, written by hand, and the stock Qwen3 whose weights it holds."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    stock = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=tied, rope_parameters=rope)).eval()
    config = {
        **SHAPE,
        "architectures": [architecture],
        "auto_map": {
            "AutoConfig": f"modeling_remote.{architecture}Config",
            "AutoModel": f"modeling_remote.{architecture}",
            "AutoModelForMaskedLM": f"modeling_remote.{architecture}",
            "AutoModelForCausalLM": f"modeling_remote.{architecture}",
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 20,
        "hidden_act": "silu",
        "max_window_layers": 2,
        "model_type": model_type,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "transformers_version": "4.57.0",
        "use_cache": False,
        "use_sliding_window": False,
        **fields,
    }
    weights = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    if tied:
        weights.pop("lm_head.weight")
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_remote.py").write_text("raise RuntimeError('remote code was run')\n")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return stock


@pytest.mark.parametrize("auto_class", AUTO_MODELS)
def test_published_a2d_folder_loads_unchanged(auto_class, tmp_path):
    """Catches remote code being run, a re-drawn tied head, rope_theta lost, or the causal mask of the base class."""
    stock = published_folder(tmp_path, "a2d-qwen3", "A2DQwen3LMHeadModel", tied=True)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is A2DQwen3LMHeadModel and type(loaded.config) is A2DQwen3Config
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.mask_token_id is None and loaded.config.block_size == 32
    ids = tokens(2, 9)
    expected = stock(ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool)).logits
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)
    assert (stock(ids).logits - expected).abs().max() > 1e-2, "the comparison would say nothing"


def test_published_a2d_folder_generates_when_told_the_mask(tmp_path):
    """Catches a checkpoint that says no mask id and so never generates, whichever way the user says it."""
    published_folder(tmp_path, "a2d-qwen3", "A2DQwen3LMHeadModel", tied=True)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    expected = loaded.generate(tokens(1, 3), max_new_tokens=4, mask_token_id=MASK)
    assert expected.shape[1] > 3
    loaded.config.mask_token_id = MASK  # what forward(labels=…) tells the user to do
    assert torch.equal(loaded.generate(tokens(1, 3), max_new_tokens=4), expected)


@pytest.mark.parametrize("auto_class", AUTO_MODELS)
def test_published_wedlm_8b_folder_loads_unchanged(auto_class, tmp_path):
    """Catches a WeDLM-8B that loads with re-drawn norms or head, or through its broken remote code."""
    stock = published_folder(tmp_path, "wedlm", "WeDLMForCausalLM", tied=False, qk_norm=True, mask_token_id=None)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is WeDLMForCausalLM and type(loaded.config) is WeDLMConfig
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.mask_token_id is None
    torch.testing.assert_close(loaded(tokens(2, 9)).logits, stock(tokens(2, 9)).logits, rtol=0, atol=1e-5)


# ---- attention ----


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_a_mask_attention_is_bidirectional(implementation):
    """Catches the causal mask of the base class: a student that cannot see past its [MASK]."""
    model = tiny(attn_implementation=implementation).double()
    ids = tokens(2, 7)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 20
    logits = model(ids).logits
    assert ((model(changed).logits - logits)[:, 0].abs().amax(-1) > 1e-6).all()
    everything = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    for mask in (everything, torch.ones(2, 7, dtype=torch.long)):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, implementation):
    """Catches padding that is attended, which makes a row's loss depend on its neighbours in the batch."""
    model = tiny(attn_implementation=implementation).double()
    ids, padding = tokens(2, 6), torch.full((2, 3), 21)
    valid, invalid = torch.ones(2, 6, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    left = side == "left"
    mask = torch.cat([invalid, valid] if left else [valid, invalid], 1)
    padded = torch.cat([padding, ids] if left else [ids, padding], 1)
    real = slice(3, None) if left else slice(None, 6)
    # rotary tables are float32, so that a shift of all positions leaves rounding errors, as does eager's softmax
    atol = 1e-5 if left or implementation == "eager" else 1e-10
    expected = model(ids).logits
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, real], expected, rtol=0, atol=atol)
    attended = model(padded).logits[:, real]
    assert (attended - expected).abs().max() > 1e-2, "the comparison would say nothing"


def test_eager_applies_a_boolean_mask():
    """Catches eager attention adding True as 1, which is full attention: training would leak the answer."""
    block = torch.arange(8) // BLOCK
    visible = (block[:, None] >= block[None, :])[None, None].repeat(2, 1, 1, 1)
    visible[1, 0, 5, :2] = False
    ids = tokens(2, 8)
    logits = {}
    for implementation in IMPLEMENTATIONS:
        model = tiny(attn_implementation=implementation).double()
        assert model.config._attn_implementation == implementation
        logits[implementation] = model(ids, attention_mask=visible).logits
        assert (model(ids).logits - logits[implementation]).abs().max() > 1e-2, "the mask was ignored"
        narrower = visible.clone()
        narrower[:, :, 7, 4] = False
        changed = (model(ids, attention_mask=narrower).logits - logits[implementation]).abs().amax(-1)
        assert (changed[:, 7] > 1e-6).all() and (changed[:, :4] == 0).all()
    # eager takes its softmax in float32
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn"])
def test_flash_attention_is_refused(implementation):
    """Catches a kernel that silently drops the mask."""
    with pytest.raises(ValueError, match=f"{implementation}.*cannot express"):
        attention_mask_for(torch.ones(1, 1, 2, 2, dtype=torch.bool), implementation, torch.float32)


def test_logits_to_keep():
    """Catches an off-by-one in the kept positions: losses would be read at the neighbour's logits."""
    model, ids = tiny().double(), tokens(2, 7)
    logits = model(ids).logits
    index = torch.tensor([0, 3, 4])
    for keep, expected in (
        (0, logits),
        (3, logits[:, -3:]),
        (index, logits[:, index]),
        (torch.tensor([0]), logits[:, :1]),
    ):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected, rtol=0, atol=1e-12)


def test_gradient_checkpointing_gives_the_same_gradients():
    """Catches a mask or a position lost in the recomputation: other gradients at the same loss."""
    ids, block = tokens(2, 8), torch.arange(8) // BLOCK
    ids[:, 5] = MASK
    visible = (block[:, None] >= block[None, :]).expand(2, 1, 8, 8)
    gradients, num_calls = [], []
    for checkpointing in (False, True):
        model = tiny().double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls = []
        model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        logits = model(ids, attention_mask=visible, use_cache=False).logits
        logits.log_softmax(-1)[..., 0].sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
        num_calls.append(len(calls))
    assert num_calls == [1, 2], "checkpointing did not run"
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-10, atol=1e-12, msg=name)


# ---- the denoising loss of forward(labels=…) ----


def naive_noise(clean, labels, schedule, num_times):
    """Eval mode's draws for one row without padding: masked positions and weight w(t), time after time."""
    everything = torch.ones(1, len(clean), dtype=torch.bool)
    key = row_noise.row_keys(clean[None], labels[None], everything)
    found = []
    for number in range(num_times):
        t = 1e-3 + (1 - 1e-3) * float(row_noise.stratified_times(key, number, number, num_times))
        masking_rate, weight = (
            (t, 1 / t)
            if schedule == "linear"
            else (1 - (1 - math.cos(math.pi / 2 * (1 - t))), math.pi / 2 * math.tan(math.pi / 2 * (1 - t)))
        )
        uniform = row_noise.uniforms(key, number, torch.arange(1, len(clean) + 1)[None])[0]
        found.append(
            ([float(u) < masking_rate and int(y) != -100 for u, y in zip(uniform, labels, strict=True)], weight)
        )
    return found


def naive_loss(model, ids, valid, labels, diffusion_type, schedule):
    """Row by row, time by time, block by block, without the packed layout: mean over rows of Σ w(t) · nll / tokens."""
    rows = []
    for row in range(len(ids)):
        clean, trained = ids[row][valid[row]], labels[row][valid[row]]
        width, total = BLOCK if diffusion_type == "block" else len(clean), 0.0
        for hidden, weight in naive_noise(clean, trained, schedule, model.eval_num_times):
            noised = torch.where(torch.tensor(hidden), MASK, clean)
            for start in range(0, len(clean), width):
                end = min(start + width, len(clean))
                sequence = torch.cat([clean[:start], noised[start:end]])
                block = torch.arange(end) // width
                visible = (block[:, None] >= block[None, :])[None, None]
                log_p = model(sequence[None], attention_mask=visible).logits[0].log_softmax(-1)
                for position in range(start, end):
                    if hidden[position]:
                        total = total - weight * log_p[position, clean[position]]
        rows.append(total / model.eval_num_times / (trained != -100).sum())
    return sum(rows) / len(rows)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion_type", ["block", "full"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_denoising_loss_matches_a_naive_recomputation(diffusion_type, schedule, side):
    """Catches a leak between xt and x0, a wrong weight or divisor, masked prompts, and blocks shifted by padding."""
    model = tiny(diffusion_type=diffusion_type, noise_schedule=schedule).double()
    model.eval_num_times = 3
    ids, valid = tokens(3, 11), torch.ones(3, 11, dtype=torch.bool)
    if side != "none":
        for row in range(3):
            valid[row, slice(None, row + 1) if side == "left" else slice(-row - 1, None)] = False
    labels = torch.where(valid, ids, -100)
    labels[:, 3:5] = -100
    out = model(ids, attention_mask=None if side == "none" else valid.long(), labels=labels)
    expected = naive_loss(model, ids, valid, labels, diffusion_type, schedule)
    assert out.logits.shape == (3, 11, VOCAB)
    torch.testing.assert_close(out.loss.double(), expected, rtol=2e-5, atol=0)
    parameters = [model.model.layers[0].self_attn.q_proj.weight, model.model.embed_tokens.weight]
    for ours, wanted in zip(
        torch.autograd.grad(out.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert wanted.abs().max() > 1e-4, "the comparison would say nothing"
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5)


def test_noise_is_fixed_in_eval_mode_and_drawn_in_training():
    """Catches an evaluation loss that moves by itself, and a training that sees one mask for ever."""
    model, ids = tiny(), tokens(2, 12)
    state = torch.random.get_rng_state()
    assert model(ids, labels=ids).loss == model(ids, labels=ids).loss
    assert torch.equal(torch.random.get_rng_state(), state), "evaluation moved the training's draws"
    model.train()
    torch.manual_seed(3)
    first, second = model(ids, labels=ids).loss, model(ids, labels=ids).loss
    torch.manual_seed(3)
    assert first != second and model(ids, labels=ids).loss == first


@pytest.mark.parametrize("diffusion_type", ["block", "full"])
def test_num_items_in_batch_divides(diffusion_type):
    """Catches gradient accumulation that scales the loss by the number of steps (a mean per micro-batch)."""
    model, ids = tiny(diffusion_type=diffusion_type), tokens(2, 8)
    labels = ids.clone()
    labels[:, :3] = -100
    for training in (False, True):
        model.train(training)
        losses = []
        for num_items in (None, 40, torch.tensor(40)):
            torch.manual_seed(1)
            losses.append(model(ids, labels=labels, num_items_in_batch=num_items).loss)
        torch.testing.assert_close(losses[1:], [losses[0] * 10 / 40] * 2)


def test_batch_without_trained_tokens_has_a_zero_loss_with_a_graph():
    """Catches NaN from an empty mean, which would poison every weight of the run."""
    model, ids = tiny().train(), tokens(2, 8)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0
    assert all(torch.isfinite(p.grad).all() and not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert model.lm_head.weight.grad is not None


def test_labels_without_a_mask_token_are_refused():
    """Catches a run that would mask with token None, or with an arbitrary id."""
    model, ids = tiny(mask_token_id=None), tokens(1, 4)
    with pytest.raises(ValueError, match=r"config\.mask_token_id"):
        model(ids, labels=ids)


# ---- a plain Trainer ----


def train(model, rows, tmp_path, steps, collate, learning_rate=3e-3):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=1024,
        learning_rate=learning_rate,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    return trainer


def stack(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def random_rows(num_rows, seed):
    ids = tokens(num_rows, 16, seed=seed, high=16).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.slow
@pytest.mark.parametrize("diffusion_type", ["block", "full"])
def test_random_tokens_stay_at_their_entropy(diffusion_type, tmp_path):
    """Catches any leak of the clean tokens: the loss would fall below log V, and a copying student looks perfect."""
    model = tiny(diffusion_type=diffusion_type, initializer_range=0.05)
    trainer = train(model, random_rows(2000, seed=5), tmp_path, 60, stack)
    loss = trainer.evaluate(random_rows(1024, seed=6))["eval_loss"]
    assert abs(loss / math.log(16) - 1) < 0.1, loss
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # accumulation over two micro-batches is one mean, not a sum of two
    assert 0.8 < sum(logged[-30:]) / 30 / math.log(16) < 1.25


def sorting_features(dataset):
    tokenizer = build_tokenizer()
    features = []
    for row in dataset:
        encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        trained = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        labels = [token if in_answer else -100 for token, in_answer in trained]
        features.append({"input_ids": encoded["input_ids"], "labels": labels})
    return features


@pytest.mark.slow
def test_plain_trainer_learns_to_sort(tmp_path):
    """Catches a loss without a learning signal: [MASK] read at the wrong position, or prompt and answer cut apart."""
    tokenizer = build_tokenizer()
    model = tiny(
        vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, block_size=4, initializer_range=0.05
    )
    held_out = sorting_features(held_out_rows(400))
    assert any(label != -100 for label in held_out[0]["labels"]) and held_out[0]["labels"][0] == -100
    trainer = train(model, sorting_features(sorting_rows(2000, seed=1)), tmp_path, 150, stack)
    loss = trainer.evaluate(held_out)["eval_loss"]
    # uniform digits, and the end of text known: 6/7 · log 10 = 1.97; knowing each place's digits alone gives 1.5
    assert loss < 1.3, loss
