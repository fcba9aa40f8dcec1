"""convert_to_diffusion: the network carried over exactly, and a mask token that costs as little as possible."""

import copy

import pytest
import torch
from published import write_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tide_hf import (
    TIDELlamaForBlockDiffusion,
    TIDEQwen2ForBlockDiffusion,
    TIDEQwen3ForBlockDiffusion,
    convert_to_diffusion,
)

SHAPE = dict(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=12,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (config, model, settings whose loss would change the logits, student)
SOURCES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "attention_bias": True}, TIDEQwen3ForBlockDiffusion),
    "qwen2": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        TIDEQwen2ForBlockDiffusion,
    ),
    "llama": (
        LlamaConfig,
        LlamaForCausalLM,
        {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
        TIDELlamaForBlockDiffusion,
    ),
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8] * 3])


def source(name: str, **changes):
    """A random AR model with biases away from zero, where its family has them."""
    config_class, model_class, settings, _ = SOURCES[name]
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE | settings | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def build_tokenizer(*further: str, **special) -> PreTrainedTokenizerFast:
    """Digits, <pad>, <user>, <eos>, then further special tokens; a chat template, and no mask token."""
    vocab = {token: index for index, token in enumerate((*"0123456789", "<pad>", "<user>", "<eos>"))}
    core = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", *further]})
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", list(SOURCES))
def test_under_a_causal_mask_the_student_is_the_source(name, tied, tmp_path):
    """Catches a bias, rotation or head left behind, and a source that trains along through shared tensors."""
    model = source(name, tie_word_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    student, tokenizer = convert_to_diffusion(model, build_tokenizer())
    assert type(student) is SOURCES[name][3] and not student.training
    assert tokenizer.mask_token_id == student.config.mask_token_id == 13
    causal = torch.ones(36, 36, dtype=torch.bool).tril()[None, None]
    expected = model(IDS).logits
    ordinary = [index for index in range(24) if index != 13]
    actual = student(IDS, attention_mask=causal).logits
    torch.testing.assert_close(actual[..., ordinary], expected[..., ordinary], rtol=0, atol=1e-5)
    assert (student(IDS).logits - actual).abs().max() > 1e-2, "it is still causal"
    assert (student.lm_head.weight is student.model.embed_tokens.weight) is tied
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())

    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(student) and not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(IDS).logits, student(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_mask_takes_a_padded_row_and_the_mean_of_the_trained_ones(tied):
    """Catches a vocabulary that grows needlessly, and a mask row, or a mean, made of rows no text ever read."""
    model = source("qwen3", tie_word_embeddings=tied)
    with torch.no_grad():
        model.get_input_embeddings().weight[13:] = 1000.0
        model.get_output_embeddings().weight[13:] = 1000.0
    student, _ = convert_to_diffusion(model, build_tokenizer())
    assert student.config.vocab_size == 24 and student.get_input_embeddings().weight.shape[0] == 24
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(model, get)().weight, getattr(student, get)().weight
        torch.testing.assert_close(new[13], old[:13].mean(0))
        assert torch.equal(new[:13], old[:13]) and torch.equal(new[14:], old[14:])


def test_full_vocabulary_grows_by_one_row():
    """Catches a mask id outside the embeddings, a row left at random, and a head that was untied by the growth."""
    model = source("qwen3", vocab_size=13, tie_word_embeddings=True)
    student, tokenizer = convert_to_diffusion(model, build_tokenizer())
    assert tokenizer.mask_token_id == 13 and student.config.vocab_size == 14
    assert student.lm_head.weight is student.model.embed_tokens.weight and student.lm_head.out_features == 14
    torch.testing.assert_close(student.lm_head.weight[13], model.lm_head.weight.mean(0))
    noised = torch.where(torch.arange(36) % 3 == 0, 13, IDS)
    assert torch.isfinite(student(noised).logits).all() and student.generate(IDS, max_new_tokens=4).shape[1] > 36


def test_reserved_token_spares_a_full_vocabulary_the_growth():
    """Catches a Llama 3, whose matrix is full and holds reserved tokens, made one row larger for nothing."""
    reserved = ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
    model = source("llama", vocab_size=15)
    student, tokenizer = convert_to_diffusion(model, build_tokenizer(*reserved))
    assert (tokenizer.mask_token, tokenizer.mask_token_id, student.config.vocab_size) == (reserved[0], 13, 15)
    others = [row for row in range(15) if row != 13]
    torch.testing.assert_close(student.lm_head.weight[13], model.lm_head.weight[others].mean(0))
    # with room in the matrix they are left alone
    assert convert_to_diffusion(source("llama"), build_tokenizer(*reserved))[1].mask_token == "<|mask|>"


@pytest.mark.parametrize("how", ["its mask token", "a known token"])
def test_an_existing_token_is_reused(how):
    """Catches a second mask token beside the one the tokenizer already has."""
    given = build_tokenizer("<M>", **({"mask_token": "<M>"} if how == "its mask token" else {}))
    options = {} if how == "its mask token" else {"mask_token": "<M>"}
    student, tokenizer = convert_to_diffusion(source("qwen2"), given, **options)
    assert tokenizer.mask_token == "<M>" and len(tokenizer) == len(given)
    assert student.config.mask_token_id == tokenizer.convert_tokens_to_ids("<M>")


def test_tokenizer_template_and_decoding_settings():
    """Catches a lost chat template, decoding that never ends or pads with None, and the user's tokenizer changed."""
    model, given = source("qwen3"), build_tokenizer()
    model.generation_config.eos_token_id = [5, 12]
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
    student, tokenizer = convert_to_diffusion(model, given, diffusion_type="full", block_size=8)
    assert given.mask_token is None and len(given) == 13
    chat = [{"role": "user", "content": "12"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == given.apply_chat_template(chat, tokenize=False)
    assert (student.config.diffusion_type, student.config.block_size) == ("full", 8)
    settings = student.generation_config
    assert (settings.eos_token_id, settings.pad_token_id, settings.mask_token_id) == ([5, 12], 10, 13)
    assert settings.block_size is None, "it would decode block by block"
    with_blocks, _ = convert_to_diffusion(source("qwen3"), build_tokenizer(), block_size=8)
    assert with_blocks.generation_config.block_size == 8
    assert torch.equal(student.generate(IDS, max_new_tokens=4), student.generate(IDS, max_new_tokens=4)), "it samples"


def test_from_a_folder(tmp_path):
    """Catches options that do not reach the loading, and a name whose tokenizer is not found."""
    source("qwen2").save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    student, tokenizer = convert_to_diffusion(str(tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert student.dtype == torch.bfloat16 and student.config._attn_implementation == "eager"
    # AutoTokenizer makes a Qwen2Tokenizer of it, which brings a token of its own
    assert tokenizer.mask_token_id == student.config.mask_token_id == len(AutoTokenizer.from_pretrained(tmp_path))
    tokenizer.save_pretrained(tmp_path / "student")
    student.save_pretrained(tmp_path / "student")
    assert AutoTokenizer.from_pretrained(tmp_path / "student").mask_token_id == tokenizer.mask_token_id
    assert student.name_or_path == str(tmp_path), "the model card's base model"


@pytest.mark.parametrize("family", ["a2d-qwen3", "a2d-qwen2", "a2d-llama"])
def test_community_student_becomes_one_of_ours(family, tmp_path):
    """Catches a trained mask row that is overwritten, and a diffusion LM that changes by being renamed."""
    write_checkpoint(tmp_path, family)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path, diffusion_type="full")
    student, tokenizer = convert_to_diffusion(model, build_tokenizer())
    assert student.config.model_type == family.replace("a2d-", "tide_") and student.config.diffusion_type == "full"
    noised = torch.where(torch.arange(36) % 3 == 0, tokenizer.mask_token_id, IDS)
    assert torch.equal(student(noised).logits, model(noised).logits)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in student.state_dict().items())
    model.config.mask_token_id = 20
    with pytest.raises(ValueError, match=r"mask_token_id=20.*is 13"):
        convert_to_diffusion(model, build_tokenizer())


def test_what_cannot_be_a_student_is_refused(tmp_path):
    """Catches an architecture, a window or packed weights that would convert into something else."""
    GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'gpt2' cannot be made a student.*qwen3, qwen2, llama"):
        convert_to_diffusion(str(tmp_path))  # no weights are there to be fetched
    window = source("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="a window of 4 tokens"):
        convert_to_diffusion(window, build_tokenizer())
    quantised = source("qwen3")
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantised"):
        convert_to_diffusion(quantised, build_tokenizer())
    with pytest.raises(ValueError, match="dtype: these are for loading"):
        convert_to_diffusion(source("qwen3"), build_tokenizer(), dtype="bfloat16")
