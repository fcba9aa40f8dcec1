"""Every student family: one network under every attention implementation, padding, checkpointing and Auto class."""

import json

import pytest
import torch
from published import write_checkpoint
from tiny import BLOCK, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.models import MODELS, TIDELlamaConfig, TIDEQwen2Config, TIDEQwen3Config

FAMILIES = (TIDEQwen3Config, TIDEQwen2Config, TIDELlamaConfig)
DIFFUSION_TYPES = ("block", "full")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]])
# rotary tables are float32, and eager takes its softmax in float32
ATOL = 1e-4


def family_id(config_class):
    return config_class.model_type


families = pytest.mark.parametrize("config_class", FAMILIES, ids=family_id)


def padded(side: str, width: int = 3):
    """IDS with padding columns, their mask, labels on the last six real tokens, and where the real tokens are."""
    rows, length = IDS.shape
    padding, ones, zeros = (
        torch.full((rows, width), 10),
        torch.ones(rows, length).long(),
        torch.zeros(rows, width).long(),
    )
    labels, ignored = IDS.clone(), torch.full((rows, width), -100)
    labels[:, :4] = -100
    order = (lambda pad, real: [pad, real]) if side == "left" else (lambda pad, real: [real, pad])
    join = [torch.cat(order(*pair), 1) for pair in ((padding, IDS), (zeros, ones), (ignored, labels))]
    return *join, slice(width, None) if side == "left" else slice(0, length)


# ---- attention ----


@families
def test_the_family_is_bidirectional_and_applies_a_mask(config_class):
    """Catches a family left causal, and one whose boolean mask is read as full attention."""
    block = torch.arange(IDS.shape[1]) // BLOCK
    visible = (block[:, None] >= block[None, :])[None, None].repeat(2, 1, 1, 1)
    logits = {}
    for implementation in ("sdpa", "eager"):
        model = tiny_model(config_class=config_class, attn_implementation=implementation).eval()
        changed = IDS.clone()
        changed[:, -1] = (IDS[:, -1] + 1) % 10
        full, masked = (model(changed, attention_mask=mask).logits for mask in (None, visible))
        assert ((full - model(IDS).logits)[:, 0].abs().amax(-1) > 1e-6).all()
        assert torch.equal(masked[:, :BLOCK], model(IDS, attention_mask=visible).logits[:, :BLOCK])
        assert (masked - full).abs().max() > 1e-2
        logits[implementation] = torch.cat([full, masked])
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["dict", "float", "three axes", "with labels"])
def test_a_mask_in_a_doubtful_form_never_becomes_full_attention(form, implementation):
    """Catches masks that slip past the conversion: eager adds True as 1, and a 3-D mask is silently dropped."""
    model = tiny_model(attn_implementation=implementation).eval()
    visible = torch.ones(10, 10).tril().bool()[None, None].repeat(2, 1, 1, 1)
    if form == "dict":
        expected = model(IDS, attention_mask=visible).logits
        actual = model(IDS, attention_mask={"full_attention": visible}).logits
        assert torch.equal(actual, expected) and (expected - model(IDS).logits).abs().max() > 1e-2
        return
    mask = {"float": visible.double(), "three axes": visible[:, 0], "with labels": visible}[form]
    with pytest.raises(ValueError, match=r"boolean|\(B, L\) padding mask"):
        model(IDS, attention_mask=mask, labels=IDS if form == "with labels" else None)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@families
def test_padding_changes_neither_logits_nor_loss(config_class, implementation, side):
    """Catches padding that is attended, or that moves the block grid: a row would depend on its neighbours."""
    ids, mask, labels, real = padded(side)
    for diffusion_type in DIFFUSION_TYPES:
        model = tiny_model(
            config_class=config_class, attn_implementation=implementation, diffusion_type=diffusion_type
        ).eval()
        logits = model(ids, attention_mask=mask).logits[:, real]
        torch.testing.assert_close(logits, model(IDS).logits, rtol=0, atol=ATOL)
        assert (model(ids).logits[:, real] - model(IDS).logits).abs().max() > 1e-2, "the comparison would say nothing"
        scribbled = torch.where(mask.bool(), ids, 7)
        losses = [model(row_ids, attention_mask=mask, labels=labels).loss for row_ids in (ids, scribbled)]
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)
        alone = model(IDS, labels=labels[:, real]).loss
        torch.testing.assert_close(losses[0], alone, rtol=0, atol=1e-5)
        assert alone > 0


@pytest.mark.slow
@families
def test_flex_attention_agrees(config_class):
    """Catches a BlockMask that is transposed, shared between rows, or ignored."""
    ids, mask, _, real = padded("left")
    block = torch.arange(IDS.shape[1]) // BLOCK
    visible = (block[:, None] >= block[None, :])[None, None].repeat(2, 1, 1, 1)
    visible[1, 0, 9, :2] = False
    logits = {}
    for implementation in ("sdpa", "flex_attention"):
        torch._dynamo.reset()  # recompiling for another shape meets an error of inductor's CPU template
        model = tiny_model(config_class=config_class, dtype=torch.float32, attn_implementation=implementation).eval()
        with torch.no_grad():
            logits[implementation] = [model(IDS, attention_mask=visible).logits]
            torch._dynamo.reset()
            logits[implementation] += [model(ids, attention_mask=mask).logits[:, real]]
            torch._dynamo.reset()
            logits[implementation] += [model(IDS).logits]
    assert (logits["sdpa"][0] - logits["sdpa"][2]).abs().max() > 1e-2
    for ours, expected in zip(logits["flex_attention"], logits["sdpa"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=ATOL)


# ---- gradient checkpointing ----


@pytest.mark.parametrize("diffusion_type", DIFFUSION_TYPES)
@pytest.mark.parametrize("loss", ["labels", "head_fn"])
@families
def test_checkpointing_changes_neither_loss_nor_gradients(config_class, loss, diffusion_type):
    """Catches other noise, or a lost mask, in the recomputation: wrong gradients at the right loss."""
    outcomes = []
    for checkpointing in (False, True):
        model = tiny_model(config_class=config_class, diffusion_type=diffusion_type, initializer_range=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls = []
        model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        if loss == "labels":
            value = model(IDS, labels=IDS).loss
        else:
            value = model(IDS, head_fn=lambda hidden, weight: ((hidden @ weight.T).logsumexp(-1).sum(), {})).loss
        value.backward()
        assert len(calls) == 1 + checkpointing
        outcomes.append((value, {name: weight.grad for name, weight in model.named_parameters()}))
    (plain, expected), (checkpointed, gradients) = outcomes
    assert torch.equal(plain, checkpointed)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3


# ---- saved, loaded, used ----


@families
def test_every_auto_class_and_pipeline_takes_a_saved_student(config_class, tmp_path):
    """Catches a family that loads as its causal base, without its head, or not in a pipeline."""
    model, tokenizer = tiny_model(config_class=config_class, dtype=torch.float32).eval(), build_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is MODELS[config_class]
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)

    greedy = {"max_new_tokens": 4, "do_sample": False}
    chat = [{"role": "user", "content": "310254"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    for prompt, text in (("310254", "310254"), (chat, rendered)):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        expected = tokenizer.decode(model.generate(ids, **greedy)[0, ids.shape[1] :], skip_special_tokens=True)
        answer = write(prompt, **greedy)[0]["generated_text"]
        assert (answer[len(text) :] if prompt is not chat else answer[-1]["content"]) == expected

    holed = tokenizer("31<mask>254", return_tensors="pt", add_special_tokens=False)["input_ids"]
    probability = model(holed).logits[0, 2].softmax(-1)
    best = pipeline("fill-mask", model=str(tmp_path), device="cpu")("31<mask>254")[0]
    assert best["token"] == probability.argmax() and best["score"] == pytest.approx(probability.max().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["a2d-qwen3", "a2d-qwen2", "a2d-llama"])
def test_published_students_say_block_32_and_keep_their_name(family, tmp_path):
    """Catches another diffusion type than the issue's default, and a re-saved checkpoint that names code it lacks."""
    write_checkpoint(tmp_path / "published", family, without=("block_size",))
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "published")
    config = loaded.config
    assert (config.diffusion_type, config.block_size, config.mask_token_id) == ("block", 32, None)
    whole = AutoModelForMaskedLM.from_pretrained(tmp_path / "published", diffusion_type="full")
    assert whole.config.diffusion_type == "full"
    loaded.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] == family and saved["architectures"] == [type(loaded).__name__]
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"}
    for entry in saved["auto_map"].values():
        assert (tmp_path / "saved" / f"{entry.split('.')[0]}.py").is_file(), entry
