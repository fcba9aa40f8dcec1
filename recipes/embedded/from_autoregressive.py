"""The embedded start from an autoregressive model: trained here, converted, taught to denoise; nothing downloaded."""

import time
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from tide_hf.demo.sorting import build_tokenizer, held_out_rows, sorting_rows
from tide_hf.models import convert_to_diffusion
from tide_hf.training.config import TIDEConfig
from tide_hf.training.trainer import TIDETrainer

from .decoding import decode_and_match

HIDDEN, LAYERS, HEADS = 64, 2, 4
BATCH_SIZE, LEARNING_RATE = 32, 3e-3


def run_from_autoregressive(
    output_dir: str | Path,
    ar_steps: int = 400,
    sft_steps: int = 100,
    num_held_out: int = 400,
    diffusion_type: str = "block",
    seed: int = 0,
) -> dict[str, float]:
    """Sorting six digits: an autoregressive model, the same converted, and converted and trained to denoise.

    A fourth network takes the same denoising steps from random weights: what the autoregressive start is worth.

    Args:
        output_dir (`str`): the trained student goes here, the autoregressive model into `autoregressive/`.
        ar_steps, sft_steps (`int`): optimizer steps of 32 rows, of the autoregressive training and of each denoising.
        num_held_out (`int`): prompts of the evaluation.
        diffusion_type (`str`): `"block"` or `"full"`.
        seed (`int`): of weights, rows and noise.

    Returns:
        `dict[str, float]`: exact match on the held-out prompts of each of the four.
    """
    disable_progress_bars()
    output_dir, tokenizer, held_out = Path(output_dir), build_tokenizer(), held_out_rows(num_held_out)
    rows = sorting_rows(max(ar_steps, sft_steps) * BATCH_SIZE, seed=seed)
    arguments = {
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }
    ar_folder = output_dir / "autoregressive"
    ar_model = _train_autoregressive(rows, tokenizer, {**arguments, "output_dir": ar_folder, "max_steps": ar_steps})
    ar_model.save_pretrained(ar_folder)
    tokenizer.save_pretrained(ar_folder)
    convert = partial(convert_to_diffusion, tokenizer=tokenizer, diffusion_type=diffusion_type, block_size=4)
    results = {"autoregressive": _exact_match_left_to_right(ar_model, tokenizer, held_out)}
    results["converted"] = decode_and_match(convert(ar_model)[0], tokenizer, held_out)[0]
    for name, start in (("from random weights", _network(tokenizer, seed)), ("converted and trained", ar_model)):
        args = TIDEConfig(
            **{**arguments, "output_dir": str(output_dir), "max_steps": sft_steps}, preset="ce", max_length=16
        )
        trainer = TIDETrainer(convert(start)[0], args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        results[name] = decode_and_match(trainer.model, tokenizer, held_out)[0]
    trainer.save_model()
    return results


def show_from_autoregressive(output_dir: str) -> None:
    """Runs [`run_from_autoregressive`] and prints what it measured."""
    started = time.time()
    results = run_from_autoregressive(output_dir)
    print("Exact match on 400 held-out prompts (sort six digits), one seed:\n")
    for name, share in results.items():
        print(f"{name:>22}  {share:6.1%}")
    print(f"\n{time.time() - started:.0f} s in all. The student is in {output_dir}.")


def _network(tokenizer, seed: int) -> Qwen3ForCausalLM:
    """A small Qwen3 with random weights drawn from the seed."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=HIDDEN // HEADS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _train_autoregressive(rows: Dataset, tokenizer, arguments: dict) -> Qwen3ForCausalLM:
    """Next-token prediction of the answers, by transformers' own Trainer."""

    def encode(row):
        encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        answer = encoded["assistant_masks"]
        labels = [token if inside else -100 for token, inside in zip(encoded["input_ids"], answer, strict=True)]
        return {"input_ids": encoded["input_ids"], "labels": labels}

    trainer = Trainer(
        _network(tokenizer, arguments["seed"]),
        TrainingArguments(**arguments),
        train_dataset=rows.map(encode, remove_columns=rows.column_names),
        data_collator=default_data_collator,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def _exact_match_left_to_right(model, tokenizer, rows: Dataset) -> float:
    """Share of answers an autoregressive model writes exactly, greedily."""
    prompts = tokenizer.apply_chat_template(
        [messages[:-1] for messages in rows["messages"]],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    model.eval()
    output = model.generate(
        prompts["input_ids"], attention_mask=prompts["attention_mask"], max_new_tokens=8, do_sample=False
    )
    answers = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    expected = [messages[-1]["content"] for messages in rows["messages"]]
    return sum(answer == reference for answer, reference in zip(answers, expected, strict=True)) / len(expected)
