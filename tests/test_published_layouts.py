"""Published checkpoints of every family: loading their own key layouts, the formulas, saving, refusals."""

import json
import logging

import pytest
import torch
from published import EXPERTS, naive_logits, write_checkpoint
from published import FAMILIES as PUBLISHED
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tide_hf.models import (
    LLaDA2MoeConfig,
    LLaDA2MoeModelLM,
    LLaDAConfig,
    LLaDAMoEConfig,
    published,
)
from tide_hf.teachers import (
    check_rotary_frequencies,
    load_teacher,
    loading,
)

AUTO_MODELS = (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM)
IDS = torch.arange(11) * 7 % 20
# float32 weights, and rotary tables that are float32 in any case
ATOL = 1e-4


def changed_config(path, **changes):
    """Writes changes into a folder's config.json; None removes nothing, it is written as null."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


# ---- the published layouts ----


@pytest.mark.parametrize("auto_class", AUTO_MODELS)
@pytest.mark.parametrize("family", list(PUBLISHED))
def test_published_folder_loads_as_its_native_class(family, auto_class, tmp_path):
    """Catches tensors that are re-drawn or dropped, a null that breaks the config, and remote code being run."""
    config, _ = write_checkpoint(tmp_path, family)
    model, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__name__ == config["architectures"][0] and type(model).__module__.startswith("tide_hf.models")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model.config) is type(AutoConfig.from_pretrained(tmp_path))
    assert model.config._attn_implementation == "sdpa"
    check_rotary_frequencies(model)


@pytest.mark.parametrize("family", list(PUBLISHED))
def test_logits_are_those_of_the_formulas(family, tmp_path):
    """Catches a renamed tensor in the wrong place, a router, norm, rotation or bias that is another one."""
    config, weights = write_checkpoint(tmp_path, family)
    model = load_teacher(str(tmp_path))
    square = torch.ones(len(IDS), len(IDS), dtype=torch.bool)
    positions = torch.tensor([0, 1, 2, 5, 3, 4, 0, 1, 2, 6, 9])
    for visible, position in ((square, None), (square.tril(), None), (square.triu(), positions)):
        expected = naive_logits(family, config, weights, IDS, visible, position)
        position = position if position is None else position[None]
        actual = model(IDS[None], attention_mask=visible[None, None], position_ids=position).logits[0]
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=ATOL)
        assert expected.abs().max() > 1
    default = square.tril() if family.startswith("wedlm") else square
    expected = naive_logits(family, config, weights, IDS, default)
    torch.testing.assert_close(model(IDS[None]).logits[0].double(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "changes",
    [
        {"topk_group": 4},
        {"n_group": 2, "topk_group": 1},
        {"routed_scaling_factor": 1.0},
        {"partial_rotary_factor": 1.0},
        {"rope_theta": 10000},
    ],
)
def test_the_formulas_tell_llada2_settings_apart(changes, tmp_path):
    """Catches a comparison on weights so tame that groups, scaling or rotation never decide anything."""
    config, weights = write_checkpoint(tmp_path, "llada2")
    published = naive_logits("llada2", config, weights, IDS)
    assert (naive_logits("llada2", config | changes, weights, IDS) - published).abs().max() > 100 * ATOL
    unbiased = {name: torch.zeros_like(tensor) if "bias" in name else tensor for name, tensor in weights.items()}
    assert (naive_logits("llada2", config, unbiased, IDS) - published).abs().max() > 100 * ATOL


@pytest.mark.parametrize("family", list(PUBLISHED))
def test_saving_gives_the_published_layout_back(family, tmp_path):
    """Catches a save that nobody else, or not even the library, can load."""
    _, weights = write_checkpoint(tmp_path / "published", family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())
    again = load_teacher(str(tmp_path / "saved"))
    assert type(again) is type(model)
    assert torch.equal(again(IDS[None]).logits, model(IDS[None]).logits)


@pytest.mark.parametrize("family", list(PUBLISHED))
def test_saved_config_keeps_the_published_fields(family, tmp_path):
    """Catches a config.json in which other readers of the family miss a field, or find one that they refuse."""
    config, _ = write_checkpoint(tmp_path / "published", family)
    loaded = AutoConfig.from_pretrained(tmp_path / "published")
    loaded.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    # the code is this library's, and the release is the installed one
    meant = {name: value for name, value in config.items() if name not in ("auto_map", "transformers_version")}
    meant = {name: value for name, value in meant.items() if value is not None and name != "attn_implementation"}
    if family == "llada-moe":  # without it, its published class builds a shared expert
        meant["shared_expert_intermediate_size"] = None
    assert {name: saved.get(name, "absent") for name in meant} == meant
    if family == "llada-8b":  # properties of its published configuration class
        assert not {"hidden_size", "num_attention_heads", "num_hidden_layers"} & saved.keys()
    again = AutoConfig.from_pretrained(tmp_path / "saved")
    assert again.to_dict() | {"_name_or_path": ""} == loaded.to_dict() | {"_name_or_path": ""}
    loaded.num_hidden_layers = 7
    assert loaded.to_dict()["num_hidden_layers"] == 7
    assert loaded.to_dict().get("n_layers", 7) == 7


# family -> field: what its published class takes where config.json says nothing, and what this library computes
OTHER_DEFAULTS = {
    "llada-8b": {
        "block_type": ("sequential", "llama"),
        "activation_type": ("swiglu", "silu"),
        "layer_norm_type": ("default", "rms"),
        "rope": (False, True),
        "rope_theta": (10_000.0, 500_000.0),
        "weight_tying": (True, False),
        "include_bias": (False, False),
        "embedding_dropout": (0.1, 0.0),
        "residual_dropout": (0.1, 0.0),
        "attention_dropout": (0.1, 0.0),
        "use_cache": (False, False),  # it refuses True
    },
    "llada-moe": {
        "qk_layernorm": (None, True),
        "partial_rotary_factor": (-1, 1),
        "rope_theta": (-1, 50_000.0),
        "moe_layer_freq": ([], [1, 1]),
        "shared_expert_intermediate_size": (-1, None),
        "moe_router_enable_expert_bias": (None, None),
        "clip_qkv": (None, None),
        "num_experts": (-1, EXPERTS),
    },
    "llada2": {
        "use_bias": (True, False),
        "use_qkv_bias": (False, False),
        "use_qk_norm": (False, True),
        "partial_rotary_factor": (0.5, 0.5),
        "rope_theta": (10_000.0, 600_000.0),
        "embedding_dropout": (0.1, 0.0),
        "attention_dropout": (0.1, 0.0),
        "output_dropout": (0.1, 0.0),
        "num_experts": (16, EXPERTS),
    },
    "sdar": {"rope_theta": (10_000.0, 1_000_000.0), "fuse_cross_entropy": ("an AttributeError", True)},
    "dream": {"rope_theta": (10_000.0, 1_000_000.0)},
    "wedlm-8b": {"rope_theta": (10_000.0, 1_000_000.0), "qk_norm": (False, True), "attention_bias": (True, False)},
}


@pytest.mark.parametrize("family", list(OTHER_DEFAULTS))
def test_a_config_made_here_leaves_nothing_to_the_defaults_of_others(family, tmp_path):
    """Catches a student made without a published file whose config.json the published class reads as another net."""
    write_checkpoint(tmp_path / "published", family)
    loaded = AutoConfig.from_pretrained(tmp_path / "published")
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes += ("num_experts", "n_routed_experts")
    made = type(loaded)(**{name: getattr(loaded, name) for name in sizes if hasattr(loaded, name)})
    made.save_pretrained(tmp_path / "made")
    saved = json.loads((tmp_path / "made" / "config.json").read_text())
    read = {name: saved.get(name, default) for name, (default, _) in OTHER_DEFAULTS[family].items()}
    assert read == {name: meant for name, (_, meant) in OTHER_DEFAULTS[family].items()}


def merged(weights: dict) -> dict:
    """The same experts in one tensor per layer and projection, as training code of others keeps them."""
    kept = {name: tensor for name, tensor in weights.items() if ".mlp.experts." not in name}
    for part in ("gate", "up", "down"):
        experts = [weights[f"model.layers.1.mlp.experts.{index}.{part}_proj.weight"] for index in range(EXPERTS)]
        kept[f"model.layers.1.mlp.experts.{part}_proj"] = torch.stack(experts)
    return kept


@pytest.mark.parametrize("model_type", ["llada2_moe_veomni", "llada2_moe"])
def test_merged_experts_load_and_are_saved_as_published(model_type, tmp_path):
    """Catches an alias that loads everything but the layout it stands for, and a save that only we can read."""
    config, weights = write_checkpoint(tmp_path, "llada2", model_type=model_type)
    save_file(merged(weights), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_teacher(str(tmp_path))
    expected = naive_logits("llada2", config, weights, IDS)
    torch.testing.assert_close(model(IDS[None]).logits[0].double(), expected, rtol=0, atol=ATOL)
    built = LLaDA2MoeModelLM(model.config)
    built.load_state_dict(model.state_dict())
    for number, each in enumerate((model, built)):
        each.save_pretrained(tmp_path / str(number))
        saved = load_file(tmp_path / str(number) / "model.safetensors")
        assert saved.keys() == weights.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())
        assert json.loads((tmp_path / str(number) / "config.json").read_text())["model_type"] == "llada2_moe"


@pytest.mark.parametrize(
    ("alias", "family", "config_class"),
    [
        ("llada21_moe", "llada2", LLaDA2MoeConfig),
        ("llada2_moe_veomni", "llada2", LLaDA2MoeConfig),
        ("lladamoe", "llada-moe", LLaDAMoEConfig),
    ],
)
def test_names_of_others_for_the_same_checkpoint(alias, family, config_class, tmp_path):
    """Catches a local copy of a checkpoint that is refused only because a training framework renamed it."""
    config, weights = write_checkpoint(tmp_path, family, model_type=alias)
    model = load_teacher(str(tmp_path))
    assert type(model.config) is config_class and model.config.to_dict()["model_type"] == config_class.model_type
    expected = naive_logits(family, config, weights, IDS)
    torch.testing.assert_close(model(IDS[None]).logits[0].double(), expected, rtol=0, atol=ATOL)


def test_the_two_lladas_are_told_apart(tmp_path):
    """Catches a LLaDA-MoE read as a dense LLaDA: they share their model_type."""
    for family, config_class in (("llada-8b", LLaDAConfig), ("llada-moe", LLaDAMoEConfig)):
        write_checkpoint(tmp_path / family, family)
        assert type(AutoConfig.from_pretrained(tmp_path / family)) is config_class
        changed_config(tmp_path / family, architectures=None)
        assert type(AutoConfig.from_pretrained(tmp_path / family)) is config_class


def test_sdar_config_without_its_diffusion_fields(tmp_path):
    """Catches the shipped variant without block_size, and the attention implementation of somebody's machine."""
    write_checkpoint(tmp_path, "sdar", without=("block_size",))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.block_size == 4 and config.mask_token_id is None
    model = load_teacher(str(tmp_path), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_llada2_without_the_fields_its_authors_leave_out(tmp_path):
    """Catches query and key norms that are dropped, or a rotation of the whole head, where config.json is silent."""
    config, weights = write_checkpoint(tmp_path, "llada2", without=("partial_rotary_factor", "head_dim"))
    model = load_teacher(str(tmp_path))
    assert model.config.use_qk_norm and model.config.rope_parameters["partial_rotary_factor"] == 0.5
    expected = naive_logits("llada2", config | {"partial_rotary_factor": 0.5}, weights, IDS)
    torch.testing.assert_close(model(IDS[None]).logits[0].double(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", [name for name in PUBLISHED if not name.startswith("a2d")])
def test_theta_of_a_silent_config_is_the_familys(family, tmp_path):
    """Catches transformers' default theta in a model that was trained with a larger one."""
    config, weights = write_checkpoint(tmp_path, family, without=("rope_theta",))
    expected = naive_logits(family, PUBLISHED[family][2] | config, weights, IDS, torch.ones(11, 11).bool().tril())
    visible = torch.ones(1, 1, 11, 11, dtype=torch.bool).tril()
    actual = load_teacher(str(tmp_path))(IDS[None], attention_mask=visible).logits[0]
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=ATOL)


def test_llada_moe_never_renormalises(tmp_path):
    """Catches a field that the published code ignores and the base class follows."""
    config, weights = write_checkpoint(tmp_path, "llada-moe", norm_topk_prob=True)
    expected = naive_logits("llada-moe", config | {"norm_topk_prob": False}, weights, IDS)
    actual = load_teacher(str(tmp_path))(IDS[None]).logits[0]
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("family", ["llada2", "llada-moe", "sdar-moe"])
def test_experts_run_grouped(family, tmp_path):
    """Catches the slow loop over experts that transformers gives to classes it does not know."""
    write_checkpoint(tmp_path, family)
    grouped = load_teacher(str(tmp_path))
    looped = load_teacher(str(tmp_path), experts_implementation="eager")
    assert grouped.config._experts_implementation == "grouped_mm"
    assert looped.config._experts_implementation == "eager"
    torch.testing.assert_close(grouped(IDS[None]).logits, looped(IDS[None]).logits, rtol=0, atol=ATOL)


def test_router_bias_stays_in_float32(tmp_path):
    """Catches a bias rounded to bfloat16, which sends tokens to other experts."""
    _, weights = write_checkpoint(tmp_path, "llada2")
    layer = load_teacher(str(tmp_path), dtype="bfloat16").model.layers[1]
    assert layer.self_attn.o_proj.weight.dtype == torch.bfloat16
    assert torch.equal(layer.mlp.gate.e_score_correction_bias, weights["model.layers.1.mlp.gate.expert_bias"])


# ---- refusals ----


def test_diffusion_gemma_is_refused_before_its_weights(tmp_path):
    """Catches 50 GB fetched for a model whose noise has no masked positions."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "diffusion_gemma"}))
    with pytest.raises(ValueError, match=r"uniformly random.*no mask token"):
        load_teacher(str(tmp_path))


def test_unknown_family_is_refused_before_its_weights(tmp_path):
    """Catches a model that nobody knows taken for a teacher after a long download."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "somebodys"}))
    with pytest.raises(ValueError, match="'somebodys' is not a known teacher") as error:
        load_teacher(str(tmp_path))
    for known in ("llada2_moe", "Dream", "sdar", "wedlm", "llada", "model class with AutoModelForCausalLM"):
        assert known in str(error.value)


@pytest.mark.parametrize("family", list(PUBLISHED))
@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_keys_that_do_not_fit_are_refused(family, what, tmp_path):
    """Catches random weights instead of missing ones, and parts of a checkpoint that are silently dropped."""
    _, weights = write_checkpoint(tmp_path, family)
    if what == "missing":
        outputs = ("attn_out.weight", "dense.weight", "o_proj.weight")
        weights.pop(next(name for name in weights if name.endswith(outputs)))
    else:
        # layers 46 and 92 are what the base of LLaDA2 ignores
        weights["model.layers.46.mlp.shared_experts.extra.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 {what}"):
        load_teacher(str(tmp_path))


def test_wedlm_of_the_wrong_kind_is_refused(tmp_path):
    """Catches a 7B WeDLM read as an 8B one: norms of its own making, biases lost."""
    write_checkpoint(tmp_path, "wedlm-7b")
    changed_config(tmp_path, qk_norm=True, attention_bias=False)
    with pytest.raises(ValueError, match=r"missing.*q_norm|missing.*k_norm"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llada2", {"score_function": "softmax"}),
        ("llada2", {"use_qkv_bias": True}),
        ("llada2", {"norm_head": True}),
        ("llada2", {"norm_topk_prob": False}),
        ("llada2", {"num_experts_per_tok": 1}),
        ("llada2", {"use_qk_norm": False}),
        ("llada2", {"use_rmsnorm": False}),
        ("llada2", {"use_bias": True}),
        ("llada2", {"attention_bias": True}),
        ("llada2", {"moe_router_enable_expert_bias": False}),
        ("llada2", {"router_dtype": "bf16"}),
        ("llada2", {"rope_interleave": True}),
        ("llada2", {"embedding_dropout": 0.1}),
        ("llada2", {"output_dropout": 0.1}),
        ("llada2", {"num_nextn_predict_layers": 1}),
        ("llada2", {"moe_shared_expert_intermediate_size": 8}),
        ("llada2", {"use_sliding_window": True}),
        ("llada-8b", {"alibi": True}),
        ("llada-8b", {"rope": False}),
        ("llada-8b", {"rope_full_precision": False}),
        ("llada-8b", {"activation_type": "swiglu"}),
        ("llada-8b", {"multi_query_attention": True}),
        ("llada-8b", {"attention_layer_norm": True}),
        ("llada-8b", {"input_emb_norm": True}),
        ("llada-8b", {"scale_logits": True}),
        ("llada-8b", {"clip_qkv": 8.0}),
        ("llada-8b", {"include_bias": True}),
        ("llada-8b", {"include_qkv_bias": True}),
        ("llada-8b", {"bias_for_layer_norm": True}),
        ("llada-8b", {"layer_norm_with_affine": False}),
        ("llada-8b", {"block_group_size": 2}),
        ("llada-moe", {"clip_qkv": 8.0}),
        ("llada-moe", {"qk_layernorm": False}),
        ("llada-moe", {"moe_router_enable_expert_bias": True}),
        ("llada-moe", {"routed_scaling_factor": 2.5}),
        ("llada-moe", {"n_group": 4}),
        ("llada-moe", {"topk_group": 2}),
        ("llada-moe", {"num_shared_experts": 1}),
        ("llada-moe", {"use_bias": True}),
        ("llada-moe", {"use_qkv_bias": True}),
        ("llada-moe", {"moe_layer_freq": [0, 1]}),
        ("sdar-moe", {"shared_expert_intermediate_size": 16}),
        ("sdar-moe", {"partial_rotary_factor": 0.5}),
        ("a2d-llama", {"use_sliding_window": True}),
        ("llada-8b", {"block_type": "sequential"}),
        ("llada-8b", {"layer_norm_type": "default"}),
        ("llada-moe", {"shared_expert_intermediate_size": 16}),
        ("llada-moe", {"moe_router_score_function": "sigmoid"}),
        ("llada-moe", {"partial_rotary_factor": 0.5}),
    ],
)
def test_settings_no_published_model_has_are_refused(family, changes, tmp_path):
    """Catches an option that the native class ignores: it would silently load and compute something else."""
    write_checkpoint(tmp_path, family, **changes)
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["dream", "sdar", "sdar-moe", "wedlm-8b", "llada-moe", "a2d-qwen3", "a2d-qwen2"])
def test_sliding_windows_are_refused(family, tmp_path):
    """Catches layers of a window, which every mask of diffusion replaces by all that it shows."""
    write_checkpoint(tmp_path, family, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match=r"use_sliding_window=True, sliding_window=4.*layer_types"):
        AutoConfig.from_pretrained(tmp_path)
    # the switch alone, with every layer below max_window_layers, changes nothing
    if not family.endswith("moe"):
        changed_config(tmp_path, max_window_layers=2)
        assert set(AutoConfig.from_pretrained(tmp_path).layer_types) == {"full_attention"}


# what a published class, Fast-dLLM's for LLaDA, adds to config.json when it saves
ADDED = {
    "llada-8b": {"alibi_bias_max": 8.0, "init_fn": "normal", "train_max_sequence_length": 1024},
    "llada-moe": {"router_num_group": -2, "router_topk_group": -2},
}


@pytest.mark.parametrize("family", list(PUBLISHED))
def test_fields_nobody_knows_are_named(family, tmp_path, monkeypatch):
    """Catches a switch of a later release that is kept and read by nobody, and noise about known ones."""
    seen = []
    monkeypatch.setattr(published.logger, "warning_once", seen.append)
    write_checkpoint(tmp_path, family, **ADDED.get(family, {}))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    AutoConfig.from_pretrained(tmp_path / "saved")
    assert seen == []
    changed_config(tmp_path, use_new_attention=True)
    AutoConfig.from_pretrained(tmp_path)
    assert len(seen) == 1 and "does not know: use_new_attention" in seen[0]


def test_wedlm_with_norms_and_biases(tmp_path, monkeypatch):
    """Catches a bias of the output projection, which no WeDLM has: it would be drawn at random."""
    monkeypatch.setitem(PUBLISHED, "wedlm", (*PUBLISHED["wedlm-8b"][:4], {"qk_norm", "bias"}))
    config, weights = write_checkpoint(tmp_path, "wedlm", attention_bias=True)
    model = load_teacher(str(tmp_path))
    expected = naive_logits("wedlm", config, weights, IDS, torch.ones(11, 11).bool().tril())
    torch.testing.assert_close(model(IDS[None]).logits[0].double(), expected, rtol=0, atol=ATOL)


def test_a_llada_may_say_its_width_by_a_ratio(tmp_path):
    """Catches the base class's default width where config.json gives a ratio."""
    write_checkpoint(tmp_path, "llada-8b", without=("mlp_hidden_size",), mlp_ratio=2)
    assert AutoConfig.from_pretrained(tmp_path).intermediate_size == 64


def test_contradicting_rotary_sizes_are_refused(tmp_path):
    """Catches a rotation of the wrong part of each head."""
    write_checkpoint(tmp_path, "llada2", rotary_dim=8)
    with pytest.raises(ValueError, match="rotary_dim=8 contradicts"):
        AutoConfig.from_pretrained(tmp_path)


def test_rotation_of_the_wrong_width_is_refused(tmp_path):
    """Catches frequencies that are right for a whole head in a model that rotates half of it."""
    write_checkpoint(tmp_path, "llada2")
    model = load_teacher(str(tmp_path))
    rotary = model.model.rotary_emb
    assert rotary.inv_freq.numel() == 2
    rotary.inv_freq = 600000.0 ** -(torch.arange(0, 8, 2) / 8)
    with pytest.raises(ValueError, match="on 4 of 8 dimensions"):
        check_rotary_frequencies(model)


# ---- options ----


def test_four_bits_say_what_stays(tmp_path, monkeypatch, caplog):
    """Catches a 16 B teacher that does not fit because its experts, nearly all of it, were never quantised."""
    write_checkpoint(tmp_path / "moe", "llada2")
    write_checkpoint(tmp_path / "dense", "llada-8b")
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **kwargs: None)
    with caplog.at_level(logging.WARNING):
        load_teacher(str(tmp_path / "dense"), load_in_4bit=True)
        assert not [record for record in caplog.records if "4bit" in record.getMessage()]
        load_teacher(str(tmp_path / "moe"), load_in_4bit=True)
    (message,) = [record.getMessage() for record in caplog.records if "4bit" in record.getMessage()]
    # 8 experts of 3 matrices of 16 x 32 in one layer
    assert "packed experts" in message and "12,288 weights" in message and "device_map" in message


def test_llada2_learns_in_every_part(tmp_path):
    """Catches experts that pass no gradient, as in the published eval-mode code: a fake network of inverse
    distillation, or a student, would train a fraction of itself."""
    write_checkpoint(tmp_path, "llada2")
    model = LLaDA2MoeModelLM.from_pretrained(tmp_path)
    model(IDS[None]).logits.square().mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize(("model_type", "name"), [("Dream", "DreamTokenizer"), ("sdar", "Qwen2Tokenizer")])
def test_published_tokenizer_loads_without_its_code(model_type, name, tmp_path):
    """Catches a family whose weights load natively and whose tokenizer asks to run somebody's code."""
    vocabulary = {character: index for index, character in enumerate(bytes_to_unicode().values())}
    vocabulary |= {"he": 256, "Ġhe": 257}
    special = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {
        "tokenizer_class": name,
        "auto_map": {"AutoTokenizer": [f"tokenization_remote.{name}", None]},
        "added_tokens_decoder": {"258": {"content": "<|end|>", **special}, "259": {"content": "<|mask|>", **special}},
        "mask_token": "<|mask|>",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "bos_token": None,
        "unk_token": None,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenization_remote.py").write_text("raise RuntimeError('remote code was run')\n")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ == name and tokenizer.is_fast
    assert tokenizer("he he<|mask|>").input_ids == [256, 257, 259] and tokenizer.mask_token_id == 259
