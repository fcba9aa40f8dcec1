"""Students under trainers that know nothing of diffusion: transformers.Trainer, PEFT, TRL's SFTTrainer."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tide_hf.demo.sorting import build_tokenizer, held_out_rows, sorting_rows
from tide_hf.models import TIDELlamaConfig, TIDEQwen2Config

LORA = {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
SETTINGS = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 1024,
    "learning_rate": 3e-3,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 0,
}


class DiffusionSFTTrainer(SFTTrainer):
    """What the README and the refusal tell the users of TRL to write."""

    compute_loss = Trainer.compute_loss


def student(**changes):
    return tiny_model(dtype=torch.float32, initializer_range=0.05, **changes)


def stack(rows):
    """A batch, rows padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 10, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([[*row[name], *[fill[name]] * (width - len(row[name]))] for row in rows]) for name in fill
    }


def random_rows(num_rows: int, seed: int, shortest: int = 12) -> list[dict]:
    """Rows of uniformly random digits, 12 tokens or `shortest` to 12."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        length = int(torch.randint(shortest, 13, (), generator=draw))
        ids = torch.randint(0, 10, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * length})
    return rows


def plain_trainer(model, rows, tmp_path, **settings) -> Trainer:
    args = TrainingArguments(output_dir=str(tmp_path), **{**SETTINGS, **settings})
    return Trainer(model, args, train_dataset=rows, data_collator=stack)


@pytest.mark.slow
@pytest.mark.parametrize("diffusion_type", ["block", "full"])
@pytest.mark.parametrize("kind", ["tide_qwen2", "tide_llama", "lora"])
def test_random_tokens_stay_at_their_entropy(kind, diffusion_type, tmp_path):
    """Catches a family, or an adapter around a student, whose loss shows it the answer: it would fall below log V."""
    config_class = {"tide_qwen2": TIDEQwen2Config, "tide_llama": TIDELlamaConfig}.get(kind)
    model = student(diffusion_type=diffusion_type, **({"config_class": config_class} if config_class else {}))
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    trainer = plain_trainer(model, random_rows(1000, seed=5), tmp_path, max_steps=60, learning_rate=1e-2)
    trainer.train()
    loss = trainer.evaluate(random_rows(1024, seed=6))["eval_loss"]
    assert abs(loss / math.log(10) - 1) < 0.15, loss


def test_accumulation_divides_by_the_tokens_of_the_whole_step(tmp_path):
    """Catches micro-batches that each take their own mean: short rows would weigh more, and the loss be summed."""
    model, seen = student(), []
    forward = model.forward

    def recorded(*args, labels, num_items_in_batch, **kwargs):
        state = torch.get_rng_state()
        with torch.no_grad():
            own_mean = forward(*args, labels=labels, **kwargs).loss.item()
        torch.set_rng_state(state)
        outputs = forward(*args, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
        num_tokens = (labels != -100).sum().item()
        seen.append((num_tokens, int(num_items_in_batch), own_mean * num_tokens))
        return outputs

    model.forward = recorded
    rows = random_rows(48, seed=7, shortest=3)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "logging_steps": 1}
    settings["remove_unused_columns"] = False  # the recording forward names no column
    trainer = plain_trainer(model, rows, tmp_path, max_steps=4, **settings)
    trainer.model_accepts_loss_kwargs = True
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(seen) == 12 and len({tokens for tokens, _, _ in seen}) > 3
    for step, loss in enumerate(logged):
        micro = seen[3 * step : 3 * step + 3]
        assert {divisor for _, divisor, _ in micro} == {sum(tokens for tokens, _, _ in micro)}
        assert loss == pytest.approx(sum(part for _, _, part in micro) / micro[0][1], rel=1e-5)


def test_a_plain_trainer_recognises_the_loss(tmp_path):
    """Catches a forward whose signature hides num_items_in_batch: Trainer would divide the loss a second time."""
    assert plain_trainer(student(), random_rows(4, seed=1), tmp_path).model_accepts_loss_kwargs
    adapted = get_peft_model(student(), LoraConfig(task_type="CAUSAL_LM", **LORA))
    assert plain_trainer(adapted, random_rows(4, seed=1), tmp_path).model_accepts_loss_kwargs


# ---- TRL ----


def sft(trainer_class, tmp_path, rows, peft_config=None, **settings):
    args = SFTConfig(output_dir=str(tmp_path), max_length=16, bf16=False, **{**SETTINGS, **settings})
    return trainer_class(
        student(), args, train_dataset=rows, processing_class=build_tokenizer(), peft_config=peft_config
    )


@pytest.mark.parametrize("adapter", [False, True])
def test_trls_own_loss_is_refused(adapter, tmp_path):
    """Catches the worst silent failure: SFTTrainer runs the body under a next-token loss of its own, which a
    bidirectional model minimises by copying its input."""
    peft_config = LoraConfig(task_type="CAUSAL_LM", **LORA) if adapter else None
    trainer = sft(SFTTrainer, tmp_path, sorting_rows(32, seed=1), peft_config, max_steps=1)
    with pytest.raises(ValueError, match=r"scores the next token.*compute_loss = Trainer\.compute_loss"):
        trainer.train()


def test_the_guard_leaves_other_users_of_the_body_alone():
    """Catches a refusal of honest work: the body as an encoder, or a forward wrapped by accelerate."""
    model = student().train()
    ids = torch.tensor([[1, 2, 3]])
    assert model.model(ids).last_hidden_state.requires_grad
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert torch.isfinite(model(ids, labels=ids).loss)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["messages", "prompt-completion"])
def test_trl_with_the_models_loss_trains_the_answers(rows, tmp_path):
    """Catches prompts that are trained on, and a student that learns nothing from TRL's batches."""
    data, held_out, settings = sorting_rows(2000, seed=1), held_out_rows(400), {"assistant_only_loss": True}
    if rows == "prompt-completion":
        pair = lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}  # noqa: E731
        data, held_out = (part.map(pair, remove_columns="messages") for part in (data, held_out))
        settings = {"completion_only_loss": True}
    trainer = sft(DiffusionSFTTrainer, tmp_path, data, max_steps=150, gradient_accumulation_steps=2, **settings)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert labels.shape == (16, 15) and (labels[:, :8] == -100).all() and (labels[:, 8:] != -100).all()
    trainer.train()
    encoded = sft(DiffusionSFTTrainer, tmp_path, held_out, **settings).train_dataset
    loss = trainer.evaluate(encoded)["eval_loss"]
    # uniform digits, and the end of text known: 6/7 · log 10 = 1.97; knowing each place's digits alone gives 1.5
    assert loss < 1.4, loss


@pytest.mark.slow
def test_trl_with_the_models_loss_stays_at_the_entropy(tmp_path):
    """Catches a leak on TRL's own batches."""
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in random_rows(1000, seed=5)])
    trainer = sft(DiffusionSFTTrainer, tmp_path, rows, max_steps=60)
    trainer.train()
    loss = trainer.evaluate(Dataset.from_list(random_rows(1024, seed=6)))["eval_loss"]
    assert abs(loss / math.log(10) - 1) < 0.15, loss


def test_packed_rows_are_refused(tmp_path):
    """Catches documents packed into one row that would attend to each other."""
    trainer = sft(DiffusionSFTTrainer, tmp_path, sorting_rows(32, seed=1), max_steps=1, packing=True)
    with pytest.raises(ValueError, match="packed with several documents"):
        trainer.train()
