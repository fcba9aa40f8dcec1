"""Every registered class, one by one: what trains it, what is refused, and how it writes."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from published_students import plain_logits
from test_fine_tuning import SETTINGS
from tiny import SHAPE
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.models import (
    MODELS,
    DreamConfig,
    LLaDA2MoeConfig,
    LLaDAMoEConfig,
    SDARMoeConfig,
    TIDEUniformQwen3Config,
    WeDLMConfig,
    modeling_tide,
    modeling_uniform,
    row_noise,
    uniform_divergence,
)

MASK, BLOCK = build_tokenizer().mask_token_id, 4
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
FIELDS = {
    LLaDA2MoeConfig: EXPERTS | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1},
    LLaDAMoEConfig: EXPERTS | {"num_experts": 4},
    SDARMoeConfig: EXPERTS | {"num_experts": 4},
}
PECULIAR = {DreamConfig: "shifted", WeDLMConfig: "causal"}
IDS = torch.randint(0, 10, (3, 10), generator=torch.Generator().manual_seed(1))
every_family = pytest.mark.parametrize("config_class", list(MODELS), ids=lambda config_class: config_class.__name__)


def tiny(config_class):
    fields = {} if config_class is TIDEUniformQwen3Config else {"mask_token_id": MASK, "block_size": BLOCK}
    torch.manual_seed(0)
    return MODELS[config_class](config_class(**SHAPE, **fields, **FIELDS.get(config_class, {})))


def plain_trainer(model, tmp_path) -> Trainer:
    rows = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in IDS.tolist()]
    args = TrainingArguments(str(tmp_path), **SETTINGS, max_steps=1, logging_steps=1)
    return Trainer(model, args, train_dataset=rows)


def without_fresh_noise(monkeypatch) -> None:
    """Training forwards take the noise that belongs to each row."""
    for module in (modeling_tide, modeling_uniform):
        monkeypatch.setattr(module, "fresh_keys", lambda keys: keys)


def draws_of(ids) -> tuple:
    """Key, time and uniform numbers of one row, whose first two tokens are given."""
    labels = torch.cat([torch.full((2,), -100), ids[2:]])
    key = row_noise.row_keys(ids[None], labels[None], torch.ones(1, len(ids), dtype=torch.bool))
    positions = torch.arange(1, len(ids) + 1)[None]
    time = float(row_noise.stratified_times(key, 0, 0, 1))
    return key, positions, time, row_noise.uniforms(key, 0, positions)[0]


def naive_masked_nats(model, ids) -> torch.Tensor:
    """Σ −log p(x0) / t over the masked positions of one row, from a forward per block."""
    config_class = type(model.config)
    size = None if model.config.diffusion_type == "full" else BLOCK
    *_, time, uniform = draws_of(ids)
    t = 1e-3 + (1 - 1e-3) * time
    masked = (uniform < t) & (torch.arange(len(ids)) > 1)
    logits = plain_logits(size, PECULIAR.get(config_class, ""))(model, torch.where(masked, MASK, ids), ids)
    return F.cross_entropy(logits[masked], ids[masked], reduction="sum") / t


def naive_uniform_nats(model, ids) -> torch.Tensor:
    """The same of the uniform-state NELBO, whose noise are random tokens."""
    key, positions, time, uniform = draws_of(ids)
    level, trained = 1e-3 + (1 - 2e-3) * time, torch.arange(len(ids)) > 1
    random = row_noise.random_tokens(key, 1, positions, model.config.vocab_size)[0]
    noised = torch.where((uniform < level) & trained, random, ids)
    predicted = model(noised[None], noise_level=level * trained[None]).logits[0, trained].softmax(-1)
    clean = F.one_hot(ids[trained], model.config.vocab_size).float()
    alpha = torch.full((int(trained.sum()),), 1 - level)
    return uniform_divergence(clean, predicted, noised[trained], alpha, 1.0).sum()


@every_family
def test_a_plain_trainer_minimises_the_familys_own_loss(config_class, tmp_path, monkeypatch):
    """Catches a class that inherits the shifted next-token loss without a word, or that is noised and scored in
    another layout than its own."""
    model = tiny(config_class)
    without_fresh_noise(monkeypatch)
    nats_of = naive_uniform_nats if config_class is TIDEUniformQwen3Config else naive_masked_nats
    with torch.no_grad():
        expected = float(sum(nats_of(model, ids) for ids in IDS)) / (3 * 8)
        if config_class is not TIDEUniformQwen3Config:
            next_token = F.cross_entropy(model.eval()(IDS).logits[:, 1:-1].flatten(0, 1), IDS[:, 2:].flatten())
            assert abs(next_token - expected) > 1e-2
    trainer = plain_trainer(model, tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@every_family
def test_trls_trainers_are_refused(config_class, tmp_path):
    """Catches a class under which SFTTrainer's own next-token loss, or a trainer of policies, runs unnoticed."""
    model = tiny(config_class)
    rows = Dataset.from_list([{"input_ids": ids} for ids in IDS.tolist()])
    args = SFTConfig(str(tmp_path), max_length=16, bf16=False, **SETTINGS, max_steps=1)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=build_tokenizer())
    with pytest.raises(ValueError, match="scores the next token"):
        trainer.train()
    with pytest.raises(ValueError, match="TRL's dpo trainer"):
        model.add_model_tags(["trl", "dpo"])


@every_family
def test_new_tokens_are_denoised_together(config_class):
    """Catches the next-token generate that a class inherits without a word: it runs the network on what is written,
    one token longer each time, where a block of noise belongs."""
    model, shown = tiny(config_class), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: shown.append(args[0].clone()))
    prompt = IDS[:1, :BLOCK]
    steps = {"num_steps": 2} if config_class is TIDEUniformQwen3Config else {"steps_per_block": 2}
    out = model.generate(prompt, max_new_tokens=BLOCK, eos_token_id=None, **steps)
    assert out.shape == (1, 2 * BLOCK) and torch.equal(out[:, :BLOCK], prompt)
    assert len(shown) == 2, "two passes for four tokens"
    if config_class is not TIDEUniformQwen3Config:
        assert MASK not in out
        assert [(ids == MASK).sum().item() for ids in shown] == [BLOCK, BLOCK // 2]
