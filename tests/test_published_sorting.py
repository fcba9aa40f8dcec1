"""LoRA on small networks of published layouts: a base sorts digits upwards, its adapter downwards."""

import pytest
import torch
from datasets import Dataset
from embedded.decoding import decode_and_match
from embedded.networks import Network, shape_of, train, training_arguments
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM

from tide_hf import TIDETrainer
from tide_hf.demo.sorting import build_tokenizer, held_out_rows, sorting_rows
from tide_hf.models import MODELS, DreamConfig, LLaDAConfig

BASE = Network(hidden=96, layers=2, heads=4, steps=800)
ADAPTER = Network(hidden=96, layers=2, heads=4, steps=700, learning_rate=4e-3)
# an answer is as long in training as it is when it is generated
FIELDS = {"preset": "ce", "max_length": 16, "eos_fill": "none"}


def downwards(rows: Dataset) -> Dataset:
    return rows.map(lambda row: {"messages": [row["messages"][0], turned(row["messages"][1])]})


def turned(message: dict) -> dict:
    return message | {"content": message["content"][::-1]}


@pytest.mark.slow
@pytest.mark.parametrize("config_class", [LLaDAConfig, DreamConfig], ids=lambda config_class: config_class.__name__)
def test_an_adapter_turns_the_order_round(config_class, tmp_path):
    """Catches an adapter that learns beside what generates: held-out answers, decoded by the saved networks."""
    tokenizer, held_out = build_tokenizer(), held_out_rows(400)
    torch.manual_seed(0)
    model = MODELS[config_class](config_class(**shape_of(BASE, tokenizer), mask_token_id=tokenizer.mask_token_id))
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    rows = sorting_rows(BASE.steps * BASE.batch_size, seed=0)
    train(TIDETrainer, model, training_arguments(BASE, base, 0, **FIELDS), rows, tokenizer)
    rows = downwards(sorting_rows(ADAPTER.steps * ADAPTER.batch_size, seed=1))
    lora = LoraConfig(r=16, lora_alpha=32)
    train(TIDETrainer, base, training_arguments(ADAPTER, adapter, 0, **FIELDS), rows, tokenizer, peft_config=lora)
    before, after = AutoModelForCausalLM.from_pretrained(base), AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert decode_and_match(before, tokenizer, held_out)[0] > 0.95
    assert decode_and_match(before, tokenizer, downwards(held_out))[0] < 0.05
    share = decode_and_match(after, tokenizer, downwards(held_out))[0]
    assert share > 0.95
    assert decode_and_match(after.merge_and_unload(), tokenizer, downwards(held_out))[0] == pytest.approx(
        share, abs=0.01
    )
