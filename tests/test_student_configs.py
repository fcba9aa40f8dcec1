"""Configurations of the students: what is refused, and what older files say under another name."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import SHAPE
from transformers import AutoConfig

from tide_hf.models import A2DQwen3Config, LLaDA2MoeConfig, TIDEQwen3Config, TIDEUniformQwen3Config, published


@pytest.mark.parametrize("config_class", [TIDEQwen3Config, A2DQwen3Config])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_size", 0, "block_size must be at least 1 token, got 0"),
        ("diffusion_type", "blocks", "'block' or 'full', got 'blocks'"),
        ("noise_schedule", "cos", "linear, cosine, got 'cos'"),
        ("is_causal", True, "leave is_causal at False"),
    ],
)
def test_bad_config_values_are_refused(config_class, field, value, message, tmp_path):
    """Catches a typo in a config that would otherwise train with another diffusion type or schedule."""
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        config_class(**SHAPE, **{field: value})
    config_class(**SHAPE).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, field: value}))
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("config_class", [TIDEQwen3Config, A2DQwen3Config, LLaDA2MoeConfig, TIDEUniformQwen3Config])
def test_checkpoints_with_the_older_name_keep_their_diffusion_type(config_class, tmp_path, monkeypatch):
    """Catches a whole-sequence checkpoint from before the field was renamed that is decoded in blocks."""
    warned = []
    monkeypatch.setattr(published.logger, "warning_once", warned.append)
    *_, kind = config_class.DIFFUSION_TYPES
    config_class(**SHAPE, diffusion_type=kind).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert written.pop("diffusion_type") == kind and "objective" not in written
    path.write_text(json.dumps(written | {"objective": kind}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.diffusion_type == kind and not warned
    assert config_class.from_json_file(path).diffusion_type == kind
    assert not hasattr(config, "objective") and "objective" not in config.to_dict()
    other = {"full": "block", "uniform": "full"}[kind]
    path.write_text(json.dumps(written | {"objective": kind, "diffusion_type": other}))
    with pytest.raises((ValueError, StrictDataclassError), match=f"'{other}' contradicts objective='{kind}'"):
        AutoConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps(written | {"objective": "blocks"}))
    with pytest.raises((ValueError, StrictDataclassError), match=r"must be '.*', got 'blocks'"):
        AutoConfig.from_pretrained(tmp_path)


def test_config_types_are_checked():
    """Catches a mask id or block size read from a file as text."""
    with pytest.raises(StrictDataclassError, match="block_size"):
        TIDEQwen3Config(**SHAPE, block_size="32")
