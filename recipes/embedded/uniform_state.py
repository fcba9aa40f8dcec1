"""A small uniform-state diffusion LM, trained and distilled to few steps here: repeat one digit four times.

The answer to the one prompt is any digit, four times. A network that is asked once cannot know which digit its other
positions take, so answers that agree with themselves need steps, or a student that has learned to do with few.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.few_step import IDLMConfig, UniformIDLMTrainer
from tide_hf.models import TIDEUniformQwen3Config, TIDEUniformQwen3ForDiffusion

NUM_REPEATS, PROMPT = 4, [{"role": "user", "content": "0"}]
QUIET = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True}


def repeated_digits(num_rows: int) -> Dataset:
    """Conversations with one prompt, and each digit equally often as the answer."""
    answers = [{"role": "assistant", "content": str(index % 10) * NUM_REPEATS} for index in range(num_rows)]
    return Dataset.from_list([{"messages": [*PROMPT, answer]} for answer in answers])


def train_teacher(tokenizer: PreTrainedTokenizerBase, output_dir: Path, seed: int, num_updates: int = 1200):
    """A two-layer network trained from random weights by `transformers.Trainer` on the NELBO of its own forward."""
    torch.manual_seed(seed)
    config = TIDEUniformQwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = tokenizer.apply_chat_template(
        list(repeated_digits(1000)["messages"]), return_dict=True, return_assistant_tokens_mask=True
    )
    labels = [
        [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
        for ids, mask in zip(rows["input_ids"], rows["assistant_masks"], strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=num_updates,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        max_grad_norm=1.0,
        seed=seed,
        **QUIET,
    )
    dataset = Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels})
    trainer = Trainer(TIDEUniformQwen3ForDiffusion(config), arguments, train_dataset=dataset)
    trainer.train()
    return trainer.model


def train_student(teacher, tokenizer, output_dir: Path, seed: int, num_steps: int, num_updates: int = 200):
    """IDLM from the teacher's weights, which it changes; returns what is saved, the student's moving average."""
    arguments = IDLMConfig(
        output_dir=str(output_dir),
        max_length=16,
        max_steps=num_updates,
        per_device_train_batch_size=64,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        ema_decay=0.99,
        num_steps=num_steps,
        seed=seed,
        **QUIET,
    )
    trainer = UniformIDLMTrainer(teacher, arguments, repeated_digits(1000), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return TIDEUniformQwen3ForDiffusion.from_pretrained(output_dir)


def measure(model, tokenizer, steps: Sequence[int], num_samples: int = 1000) -> list[tuple[float, float]]:
    """For each number of steps the share of answers that repeat one digit, and how many digits those spread over.

    The second is the exponential of the entropy of the digits, 10 where all are equally likely.
    """
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompts, found = prompt["input_ids"].repeat(num_samples, 1), []
    model.eval()
    for num_steps in steps:
        output = model.generate(
            prompts,
            max_new_tokens=NUM_REPEATS + 1,
            num_steps=num_steps,
            generator=torch.Generator().manual_seed(0),
        )
        answers = tokenizer.batch_decode(output[:, prompts.shape[1] :])
        valid = [answer[0] for answer in answers if answer == answer[0] * NUM_REPEATS + tokenizer.eos_token]
        counts = [count / len(valid) for count in Counter(valid).values()]
        found.append((len(valid) / num_samples, math.exp(-sum(p * math.log(p) for p in counts)) if counts else 0.0))
    return found


def compare(output_dir: Path, seeds: Sequence[int], num_steps: int, steps: Sequence[int]) -> dict[str, list]:
    """Teacher and student of each seed -> [`measure`] of each, `(seed, steps, 2)`."""
    tokenizer, found = build_tokenizer(), {"teacher": [], "student": []}
    for seed in seeds:
        network = train_teacher(tokenizer, output_dir / f"teacher-{seed}", seed)
        found["teacher"].append(measure(network, tokenizer, steps))
        network = train_student(network, tokenizer, output_dir / f"student-{seed}", seed, num_steps)
        found["student"].append(measure(network, tokenizer, steps))
    return found
