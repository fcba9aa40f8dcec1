"""config.json for readers on transformers 4: what they read beside what transformers 5 reads."""

import json
import math

import pytest
import torch
from tiny import SHAPE, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from tide_hf.models import MODELS, LLaDA2MoeConfig, TIDELlamaConfig, TIDEQwen2Config, TIDEQwen3Config

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])
STOCK = {TIDEQwen3Config: Qwen3Config, TIDEQwen2Config: Qwen2Config, TIDELlamaConfig: LlamaConfig}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn of the whole": {"rope_type": "yarn", "factor": 4.0},
    "yarn of its own": {"rope_type": "yarn", "factor": 3.0, "attention_factor": 1.3, "beta_fast": 16.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
scalings = pytest.mark.parametrize("scaling", list(SCALINGS))


def saved_student(path, scaling: str, config_class=TIDEQwen3Config):
    rope = {"rope_theta": 500_000.0, **SCALINGS[scaling]}
    model = tiny_model(
        config_class=config_class, dtype=torch.float32, rope_parameters=rope, max_position_embeddings=128
    ).eval()
    model.save_pretrained(path)
    return model


def read(path) -> dict:
    return json.loads((path / "config.json").read_text())


def frequencies_of_transformers_4(config: dict) -> tuple[torch.Tensor, float]:
    """Rotary frequencies and the scale of cos and sin, from the fields that transformers 4.57 reads, by its rules."""
    scaling, dim = config.get("rope_scaling") or {"rope_type": "default"}, config["head_dim"]
    steps = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    base, longest = config["rope_theta"], config["max_position_embeddings"]
    plain, kind = base**-steps, scaling["rope_type"]
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "dynamic":  # up to the longest position
        return plain, 1.0
    if kind == "yarn":
        original, factor = scaling.get("original_max_position_embeddings") or longest, scaling["factor"]

        def correction(rotations):
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(correction(scaling.get("beta_fast") or 32)), 0)
        high = min(math.ceil(correction(scaling.get("beta_slow") or 1)), dim - 1)
        ramp = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        scale = scaling.get("attention_factor") or 0.1 * math.log(factor) + 1
        return plain / factor * ramp + plain * (1 - ramp), scale
    if kind == "llama3":
        original = scaling["original_max_position_embeddings"]
        found = []
        for frequency in plain.tolist():
            wavelength = 2 * math.pi / frequency
            smooth = original / wavelength - scaling["low_freq_factor"]
            smooth = min(max(smooth / (scaling["high_freq_factor"] - scaling["low_freq_factor"]), 0), 1)
            found.append((1 - smooth) * frequency / scaling["factor"] + smooth * frequency)
        return torch.tensor(found, dtype=torch.float64), 1.0
    assert kind == "default"
    return plain, 1.0


@scalings
def test_transformers_4_finds_the_same_rotation(scaling, tmp_path):
    """Catches a theta of 10000, or a scaling that is lost, in every reader on transformers 4."""
    model = saved_student(tmp_path, scaling)
    config = read(tmp_path)
    frequencies, scale = frequencies_of_transformers_4(config)
    rotary = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies, rtol=1e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(scale, rel=1e-6)
    assert config["rope_theta"] == 500_000.0 and config["torch_dtype"] == config["dtype"] == "float32"
    assert ("rope_scaling" in config) is (scaling != "default")
    if scaling == "yarn of the whole":  # some releases would take the quotient, 1, for the factor
        assert "original_max_position_embeddings" not in config["rope_scaling"]
    assert (model.config.rope_parameters["rope_type"] == "default") is (scaling == "default")


@scalings
@pytest.mark.parametrize("config_class", list(STOCK), ids=lambda config_class: config_class.model_type)
def test_transformers_5_reads_what_it_wrote(config_class, scaling, tmp_path):
    """Catches doubled names that change what is loaded, here or by the stock class, or differ at the next save."""
    model = saved_student(tmp_path / "first", scaling, config_class)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(IDS).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "first")(IDS).logits)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert STOCK[config_class].from_pretrained(tmp_path / "first").rope_parameters == model.config.rope_parameters
    loaded.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / "config.json").read_text() == (tmp_path / "second" / "config.json").read_text()


@pytest.mark.parametrize("config_class", list(MODELS), ids=lambda config_class: config_class.__name__)
def test_every_family_writes_both(config_class, tmp_path):
    """Catches a family that forgets it, and a part of each head that is rotated as if it were the whole."""
    rope = {"rope_type": "linear", "rope_theta": 12_345.0, "factor": 2.0}
    part = {"partial_rotary_factor": 0.5} if config_class is LLaDA2MoeConfig else {}
    config = config_class(**SHAPE, rope_parameters=rope | part)
    config.save_pretrained(tmp_path)
    written = read(tmp_path)
    assert written["rope_theta"] == 12_345.0 and written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert written.get("partial_rotary_factor", 1) == part.get("partial_rotary_factor", 1)
    architecture = [MODELS[config_class].__name__]
    (tmp_path / "config.json").write_text(json.dumps(written | {"architectures": architecture}))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is config_class and loaded.rope_parameters == config.rope_parameters


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10_000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500_000.0, "factor": 8.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    ],
)
def test_names_that_contradict_each_other_are_refused(change, tmp_path):
    """Catches a context extended by hand in one of two places: half of the readers would not see it."""
    saved_student(tmp_path, "yarn")
    written = read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(written | change))
    with pytest.raises(ValueError, match="transformers 4 reads the first, transformers 5 the second"):
        AutoConfig.from_pretrained(tmp_path)
    for name in ("rope_theta", "rope_scaling"):
        written.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["factor"] == 4.0
