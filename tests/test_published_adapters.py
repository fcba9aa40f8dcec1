"""Adapters on published families, and what is saved of them: the published tensors under their published names."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from published import write_checkpoint
from published_students import BLOCKS, families
from safetensors.torch import load_file
from tiny import tiny_trainer
from transformers import AutoModelForCausalLM

from tide_hf.demo.sorting import build_tokenizer

TOKENIZER = build_tokenizer()
IDS = torch.tensor([TOKENIZER.encode("<user>739152<assistant>739")])
EXPERTS = ".mlp.experts."  # the routed ones, which are packed while they train
# what a checkpoint's reader computes with, under the names that config.json had
COMPUTED_WITH = ("rope_theta", "rms_norm_eps", "vocab_size", "block_size", "mask_token_id", "partial_rotary_factor")


def write_base(path, family: str) -> tuple[dict, dict]:
    """A published folder whose special tokens are those of the sorting tokenizer."""
    special = {name: getattr(TOKENIZER, name) for name in ("mask_token_id", "pad_token_id", "eos_token_id")}
    written = write_checkpoint(path, family, **special, **BLOCKS)
    TOKENIZER.save_pretrained(path)
    return written


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def check_published(path, config: dict, weights: dict) -> dict:
    """Keys, shapes and fields of a saved folder are the published ones; returns its tensors."""
    saved = load_file(path / "model.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {
        name: value.shape for name, value in weights.items()
    }
    written = json.loads((path / "config.json").read_text())
    for name in (*COMPUTED_WITH, "model_type", "architectures"):
        assert name not in config or config[name] is None or written[name] == config[name], name
    return saved


@families
def test_full_fine_tuning_is_saved_as_published(family, tmp_path):
    """Catches a trained student that other readers of the family cannot open, or that is not what was trained."""
    config, weights = write_base(tmp_path / "base", family)
    trainer = tiny_trainer(tmp_path / "out", model=str(tmp_path / "base"), max_steps=2, learning_rate=1e-3)
    trainer.train()
    trainer.save_model()
    saved = check_published(tmp_path / "out", config, weights)
    still = {name for name, value in saved.items() if torch.equal(value, weights[name])}
    # the router's bias only selects; an expert may have got no token, but not all of them
    assert all("expert_bias" in name or EXPERTS in name for name in still)
    assert sum(EXPERTS in name for name in still) <= sum(EXPERTS in name for name in saved) / 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(trainer.model)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(logits_of(again), logits_of(trainer.model))


@pytest.mark.slow
@families
def test_an_adapter_is_trained_saved_loaded_and_merged(family, tmp_path):
    """Catches an adapter that names layers the family does not have, a base that moves, and a merge that is saved
    under other keys than the published ones."""
    config, weights = write_base(tmp_path / "base", family)
    untrained = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    trainer = tiny_trainer(
        tmp_path / "adapter",
        model=str(tmp_path / "base"),
        trainer_kwargs={"peft_config": LoraConfig(r=2)},
        max_steps=2,
        learning_rate=5e-2,
    )
    trainer.train()
    trainer.save_model()
    trained = logits_of(trainer.model)
    assert (trained - untrained).abs().max() > 0.1, "the adapter does nothing"
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), trained)
    with loaded.disable_adapter():
        assert torch.equal(logits_of(loaded), untrained)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), trained, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    saved = check_published(tmp_path / "merged", config, weights)
    changed = {name for name, value in saved.items() if not torch.equal(value, weights[name])}
    assert changed and not any("norm" in name or EXPERTS in name or "embed" in name for name in changed)
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), trained, rtol=0, atol=1e-4
    )
