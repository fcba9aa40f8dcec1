"""Adapters: the chain from training to a merged checkpoint, plain PEFT, resume, and what is refused."""

import json
from importlib import metadata

import pytest
import torch
from huggingface_hub import ModelCard
from packaging import version
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from published import write_checkpoint
from tiny import tiny_model, tiny_trainer
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import is_bitsandbytes_available

from tide_hf import TIDEGenerationConfig
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.training import adapter

ATTENTION = ["q_proj", "v_proj"]
KINDS = {
    "named": {"target_modules": ATTENTION},
    "all-linear": {"target_modules": "all-linear"},
    "default": {},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "embeddings": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "mask_token": {"target_modules": ATTENTION, "trainable_token_indices": [build_tokenizer().mask_token_id]},
}


def lora(kind: str = "named", **overrides) -> LoraConfig:
    return LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **KINDS[kind], **overrides})


@pytest.fixture
def base(tmp_path):
    """A saved student with tied embeddings, in float64, so that equal means equal."""
    folder = tmp_path / "base"
    tiny_model(0, tie_word_embeddings=True).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def said(monkeypatch):
    """What the adapter's logger says."""
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(adapter.logger, level, lines.append)
    return lines


def prompt() -> torch.Tensor:
    return torch.tensor([build_tokenizer().encode("<user>739152<assistant>")])


def trained(base, output_dir, config, **overrides):
    """A run of four large steps, saved; returns the trainer, its model in eval mode."""
    overrides = {"learning_rate": 5e-2, **overrides}
    trainer = tiny_trainer(output_dir, model=str(base), trainer_kwargs={"peft_config": config}, **overrides)
    trainer.train()
    trainer.save_model()
    trainer.model.eval()
    return trainer


@torch.no_grad()
def outcome(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one prompt and the ids generated from it."""
    model.eval()
    return model(prompt()).logits, model.generate(input_ids=prompt(), max_new_tokens=8)


def assert_same(got, expected, atol: float = 0.0):
    assert_close(got[0], expected[0], rtol=0, atol=atol)
    assert torch.equal(got[1], expected[1])


# -- the chain --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_from_training_to_a_merged_checkpoint(tmp_path, base, kind):
    """Catches a step of train, save, load, generate, switch off, merge, save, reload that is not exact."""
    untrained = outcome(AutoModelForCausalLM.from_pretrained(base))
    trainer = trained(base, tmp_path / "adapter", lora(kind))
    expected = outcome(trainer.model)
    assert (expected[0] - untrained[0]).abs().max() > 0.1, "the adapter does nothing"

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    onto_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    for model in (loaded, onto_base):
        assert_same(outcome(model), expected)
    with loaded.disable_adapter():
        assert_same(outcome(loaded), untrained)

    merged = onto_base.merge_and_unload()
    assert_same(outcome(merged), expected, atol=1e-9)
    merged.save_pretrained(tmp_path / "merged")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(outcome(again), outcome(merged))
    assert again.config.tie_word_embeddings and again.lm_head.weight is again.model.embed_tokens.weight
    configs = [AutoModelForCausalLM.from_pretrained(folder).config.to_dict() for folder in (tmp_path / "merged", base)]
    assert [config.pop("_name_or_path") for config in configs] and configs[0] == configs[1]


@pytest.mark.skipif(
    version.parse(metadata.version("peft")) < version.parse(MIN_PEFT_VERSION),
    reason=f"this transformers loads adapters with peft >= {MIN_PEFT_VERSION} alone",
)
@pytest.mark.parametrize(
    "kind",
    [
        *[kind for kind in KINDS if kind != "dora"],
        pytest.param("dora", marks=pytest.mark.xfail(strict=True, reason="transformers 5.23 drops DoRA's magnitudes")),
    ],
)
def test_transformers_own_adapter_loading(tmp_path, base, kind):
    """Catches adapters that work through PEFT alone: from_pretrained(adapter folder), load_adapter and switching."""
    expected = outcome(trained(base, tmp_path / "adapter", lora(kind)).model)
    assert_same(outcome(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    model = AutoModelForCausalLM.from_pretrained(base)
    untrained = outcome(model)
    model.load_adapter(str(tmp_path / "adapter"))
    assert_same(outcome(model), expected)
    if kind not in ("embeddings", "head", "mask_token"):  # transformers switches tuner layers alone
        model.disable_adapters()
        assert_same(outcome(model), untrained)
        model.enable_adapters()
        assert_same(outcome(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_merged_student(tmp_path, base, kind):
    """Catches an adapter whose share the loss, which reads the head's weight directly, does not see."""
    held_out = {"eval_dataset": sorting_rows(6, seed=5)}
    trainer = tiny_trainer(
        tmp_path, model=str(base), trainer_kwargs={"peft_config": lora(kind), **held_out}, learning_rate=5e-2
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert abs(after - before) > 1e-2
    merged = tiny_trainer(tmp_path, model=trainer.model.merge_and_unload(), trainer_kwargs=held_out)
    assert merged.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-6)


def test_the_folder_says_what_is_needed_to_use_it(tmp_path, base):
    """Catches an adapter without its base's name, its tokenizer, its generation settings or its card."""
    folder = tmp_path / "adapter"
    trained(base, folder, lora(), max_steps=1)
    config = PeftConfig.from_pretrained(folder)
    assert (config.base_model_name_or_path, config.task_type) == (str(base), "CAUSAL_LM")
    assert AutoTokenizer.from_pretrained(folder).chat_template == build_tokenizer().chat_template
    settings = TIDEGenerationConfig.from_pretrained(folder)
    assert (settings.block_size, settings.mask_token_id) == (4, build_tokenizer().mask_token_id)
    card = ModelCard.load(folder / "README.md").data
    # a folder of this machine is the adapter's own business and none of a card's readers
    assert (card.base_model, card.library_name) == (None, "peft")
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    # a config.json would make transformers look for a whole model here
    assert not {"config.json", "model.safetensors"} & names


def test_mask_token_of_the_run_goes_with_the_adapter(tmp_path):
    """Catches an adapter on a published student, which says no mask token, that nobody can generate with."""
    tiny_model(0, mask_token_id=None).save_pretrained(tmp_path / "base")
    expected = outcome(trained(tmp_path / "base", tmp_path / "adapter", lora()).model)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"mask_token_id=tokenizer.mask_token_id"):
        loaded.generate(input_ids=prompt(), max_new_tokens=8)
    settings = TIDEGenerationConfig.from_pretrained(tmp_path / "adapter")
    ids = loaded.generate(input_ids=prompt(), max_new_tokens=8, generation_config=settings)
    assert torch.equal(ids, expected[1])


# -- training ---------------------------------------------------------------------------------------------------------


def adapter_weights(trainer) -> dict:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


@pytest.mark.slow
def test_resume_goes_on_exactly(tmp_path, base):
    """Catches an adapter, its optimizer state or its noise that starts anew after an interruption."""
    options = {"max_steps": 6, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 3}
    whole = trained(base, tmp_path / "whole", lora(lora_dropout=0.1), **options)
    resumed = tiny_trainer(tmp_path / "resumed", model=str(base), learning_rate=5e-2, seed=42,
                           trainer_kwargs={"peft_config": lora(lora_dropout=0.1)}, **options)  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_close(adapter_weights(resumed), adapter_weights(whole), rtol=0, atol=0)
    logged = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (resumed, whole)]
    assert logged[0][3:] == logged[1][3:] and len(logged[0]) == 6


def test_seed_decides_the_adapters_start(tmp_path, base):
    """Catches an adapter drawn before the run's seed is set: other results in each run of the same command."""
    starts = []
    for seed in (1, 1, 2):
        trainer = tiny_trainer(tmp_path, model=str(base), seed=seed, trainer_kwargs={"peft_config": lora()})
        starts.append(torch.cat([value.flatten() for value in adapter_weights(trainer).values()]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, base, reentrant):
    """Catches a frozen embedding that cuts the graph below recomputed layers, so that the adapter never trains."""
    plain = trained(base, tmp_path / "plain", lora())
    recomputed = trained(
        base, tmp_path / "recomputed", lora(),
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    assert recomputed.model.is_gradient_checkpointing
    assert_close(adapter_weights(recomputed), adapter_weights(plain), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("diffusion_type", ["block", "full"])
def test_plain_peft_and_plain_trainer(tmp_path, base, diffusion_type):
    """Catches PEFT's wrapper dropping labels or counts on the way to the denoising loss, and a base that moves."""
    student = AutoModelForCausalLM.from_pretrained(base, diffusion_type=diffusion_type)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    model = get_peft_model(student, lora("all-linear"))
    tokenizer = build_tokenizer()
    rows = [
        {"input_ids": ids, "labels": [-100] * 8 + ids[8:]}
        for messages in sorting_rows(32, seed=1)["messages"]
        for ids in [tokenizer.encode(f"<user>{messages[0]['content']}<assistant>{messages[1]['content']}<eos>")]
    ]
    batch = {name: torch.tensor([row[name] for row in rows[:8]]) for name in ("input_ids", "labels")}

    def loss(network, **kwargs):
        network.eval()
        with torch.no_grad():
            return network(**batch, **kwargs).loss.item()

    start = loss(model)
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=60, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows).train()
    assert loss(model) < 0.75 * start
    assert loss(model, num_items_in_batch=10) == pytest.approx(loss(model, num_items_in_batch=5) / 2)
    after = {name.replace(".base_layer", ""): value for name, value in student.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    adapted = loss(model)
    assert loss(model.merge_and_unload()) == pytest.approx(adapted, rel=1e-9)


def test_a_student_that_carries_an_adapter_trains_on(tmp_path, base):
    """Catches an adapter given as an instance that is not the one that trains, or is saved without its settings."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    trainer = tiny_trainer(tmp_path / "out", model=model)
    trainer.train()
    trainer.save_model()
    assert_same(outcome(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")), outcome(trainer.model))
    assert (tmp_path / "out" / "generation_config.json").is_file()


# -- completed, refused -----------------------------------------------------------------------------------------------


def test_missing_fields_are_filled_in_and_said(tmp_path, base, said):
    """Catches an adapter without task type, which AutoPeftModelForCausalLM refuses only when somebody loads it."""
    trained(base, tmp_path / "adapter", LoraConfig(r=2), max_steps=1)
    assert any("task_type is None: set to CAUSAL_LM" in line for line in said)
    assert any("adapting q_proj, k_proj, v_proj" in line for line in said)
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(saved["target_modules"]) == set(adapter.LINEAR_LAYERS)


EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


@pytest.mark.parametrize("with_experts", [False, True])
def test_packed_experts_are_adapted_or_said_to_be_frozen(with_experts, tmp_path, said):
    """Catches an adapter of "all linear layers" that leaves out most of a mixture's weights without a word."""
    write_checkpoint(tmp_path / "base", "sdar-moe", mask_token_id=build_tokenizer().mask_token_id)
    build_tokenizer().save_pretrained(tmp_path / "base")
    chosen = {"target_modules": ["q_proj"], "target_parameters": EXPERTS} if with_experts else {}
    trainer = trained(tmp_path / "base", tmp_path / "adapter", LoraConfig(r=2, **chosen), max_steps=2)
    assert any(
        f"they stay frozen. To adapt them as well, set target_parameters={EXPERTS}" in line for line in said
    ) != (with_experts)
    ids = torch.arange(8)[None]
    expected = trainer.model.eval()(ids).logits
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_close(loaded(ids).logits, expected)
    assert any("experts" in name for name, _ in trainer.model.named_parameters() if "lora_" in name) == with_experts
    assert_close(loaded.merge_and_unload()(ids).logits, expected, rtol=0, atol=1e-4)


def test_revision_of_the_base_is_kept(tmp_path, base):
    """Catches an adapter that is loaded onto another revision of its base than it was trained on."""
    trained(base, tmp_path / "adapter", lora(), max_steps=1, model_init_kwargs={"revision": "v2"})
    assert PeftConfig.from_pretrained(tmp_path / "adapter").revision == "v2"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(task_type="SEQ_CLS", target_modules=ATTENTION), "task_type='SEQ_CLS'.*use task_type='CAUSAL_LM'"),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            "which the block-diffusion layout does not support",
        ),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]), "adapter targets lm_head"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]), "adapter targets embed_tokens"),
        (
            LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], ensure_weight_tying=True),
            "adapter targets lm_head",
        ),
    ],
)
def test_adapters_that_cannot_work_are_refused(tmp_path, base, config, message):
    """Catches an adapter that trains and is then not merged or loaded as what was trained."""
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, model=str(base), trainer_kwargs={"peft_config": config})


def test_instances_are_checked_too(tmp_path, base):
    """Catches a refused adapter that gets in ready-made, and a second one stacked on the first."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="adapter targets lm_head"):
        tiny_trainer(tmp_path, model=model)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    with pytest.raises(ValueError, match="already has an adapter"):
        tiny_trainer(tmp_path, model=model, trainer_kwargs={"peft_config": lora()})


def test_untied_embeddings_take_an_adapter(tmp_path):
    """Catches a refusal of what merges exactly."""
    tiny_model(0, tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", tmp_path / "adapter", lora(target_modules=["embed_tokens"])).model
    expected = outcome(model)
    assert_same(outcome(model.merge_and_unload()), expected, atol=1e-9)


@pytest.mark.parametrize("given_as", ["argument", "keyword", "instance"])
def test_another_block_size_than_the_bases_is_refused(tmp_path, base, given_as):
    """Catches an adapter that everybody who loads it decodes on its base's grid, not on its own."""
    options = {
        "argument": {"block_size": 8},
        "keyword": {"model_init_kwargs": {"block_size": 8}},
        "instance": {"model": AutoModelForCausalLM.from_pretrained(base, block_size=8)},
    }[given_as]
    with pytest.raises(ValueError, match=r"trains with block_size=8, but the config.json .* has 4, and whoever loads"):
        tiny_trainer(tmp_path, **{"model": str(base), **options}, trainer_kwargs={"peft_config": lora()})


def test_another_mask_token_than_the_bases_is_refused(tmp_path, base):
    """Catches an adapter that is decoded from masks it never saw."""
    with pytest.raises(ValueError, match=r"trains with mask_token_id=0, but the config.json .* has 14"):
        tiny_trainer(tmp_path, model=str(base), mask_token_id=0, trainer_kwargs={"peft_config": lora()})


def test_a_base_that_exists_in_memory_alone_is_said(tmp_path, said):
    """Catches an adapter that names no base, noticed when the base is gone."""
    tiny_trainer(tmp_path, trainer_kwargs={"peft_config": lora()})
    assert any("will not name a base that can be loaded" in line for line in said)


# -- quantised bases --------------------------------------------------------------------------------------------------

IN_4_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.skipif(is_bitsandbytes_available(), reason="bitsandbytes is installed")
def test_four_bits_without_bitsandbytes_name_it(tmp_path, base):
    """Catches QLoRA without its library that loads the base unquantised, or fails without saying why."""
    with pytest.raises(ImportError, match="bitsandbytes"):
        tiny_trainer(tmp_path, model=str(base), model_init_kwargs={"quantization_config": IN_4_BITS},
                     trainer_kwargs={"peft_config": lora()})  # fmt: skip


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")
def test_adapter_on_a_four_bit_base(tmp_path):
    """Catches QLoRA that does not train, or moves its base."""
    tiny_model(0, hidden=64, dtype=torch.float32).save_pretrained(tmp_path / "base")
    trainer = trained(tmp_path / "base", tmp_path / "adapter", lora(),
                      model_init_kwargs={"quantization_config": IN_4_BITS})  # fmt: skip
    assert trainer.model.get_base_model().is_loaded_in_4bit
    assert any(value.abs().max() > 0 for name, value in adapter_weights(trainer).items() if "lora_B" in name)
