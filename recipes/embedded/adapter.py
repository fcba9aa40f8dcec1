"""The embedded fine-tuning: a student that sorts learns, through an adapter, to sort the other way round."""

import statistics
from pathlib import Path

from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM

from tide_hf.demo.sorting import build_tokenizer, held_out_rows, sorting_rows
from tide_hf.training.config import TIDEConfig
from tide_hf.training.trainer import TIDETrainer

from .decoding import decode_and_match
from .networks import Network, build_network

BLOCK_SIZE, MAX_LENGTH, BATCH_SIZE = 4, 16, 32
BASE = Network(hidden=64, layers=2, heads=4, steps=600)
RANK, ADAPTER_STEPS, ADAPTER_LEARNING_RATE = 8, 300, 1e-2
ORDERS = ("ascending", "descending")


def run_adapter_demo(
    output_dir: str | Path,
    seed: int = 0,
    base: Network = BASE,
    adapter_steps: int = ADAPTER_STEPS,
    num_held_out: int = 400,
) -> dict[str, dict[str, float]]:
    """Trains a base on ascending and an adapter on descending order, merges, and measures each saved network.

    Args:
        output_dir (`str`): gets the folders `base`, `adapter` and `merged`.
        seed (`int`): of weights, data and noise.
        base ([`~tide_hf.demo.Network`]): size and training of the base.
        adapter_steps (`int`): optimizer steps of the adapter.
        num_held_out (`int`): prompts that exact match is measured on.

    Returns:
        `{"base" | "adapter" | "merged": {"ascending" | "descending": exact match as a fraction}}`.
    """
    folders = {name: str(Path(output_dir) / name) for name in ("base", "adapter", "merged")}
    tokenizer = build_tokenizer()
    untrained = build_network(base, tokenizer, BLOCK_SIZE, seed)
    rows = sorting_rows(base.steps * BATCH_SIZE, seed=2 * seed)
    _train(untrained, rows, folders["base"], base.steps, base.learning_rate, seed)
    rows = _descending(sorting_rows(adapter_steps * BATCH_SIZE, seed=2 * seed + 1))
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM")
    _train(folders["base"], rows, folders["adapter"], adapter_steps, ADAPTER_LEARNING_RATE, seed, lora)
    merged = AutoPeftModelForCausalLM.from_pretrained(folders["adapter"]).merge_and_unload()
    merged.save_pretrained(folders["merged"])
    tokenizer.save_pretrained(folders["merged"])

    held_out = held_out_rows(num_held_out)
    tasks = dict(zip(ORDERS, (held_out, _descending(held_out)), strict=True))
    results = {}
    for name, folder in folders.items():
        model = (AutoPeftModelForCausalLM if name == "adapter" else AutoModelForCausalLM).from_pretrained(folder)
        results[name] = {order: decode_and_match(model, tokenizer, task)[0] for order, task in tasks.items()}
    return results


def format_adapter_table(results: list[dict[str, dict[str, float]]]) -> str:
    """Exact match, one line per network, mean and sample standard deviation over the runs."""
    lines = [" " * 8 + "".join(order.rjust(18) for order in ORDERS)]
    for name in results[0]:
        cells = []
        for order in ORDERS:
            values = [100 * result[name][order] for result in results]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f} %{spread}")
        lines.append(name.rjust(8) + "".join(cell.rjust(18) for cell in cells))
    return "\n".join(lines)


def _train(model, rows: Dataset, output_dir: str, steps: int, learning_rate: float, seed: int, peft_config=None):
    """One run without teacher, saved."""
    args = TIDEConfig(
        output_dir=output_dir,
        preset="ce",
        max_length=MAX_LENGTH,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        logging_steps=max(steps // 5, 1),
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=seed,
    )
    trainer = TIDETrainer(
        model, args=args, train_dataset=rows, processing_class=build_tokenizer(), peft_config=peft_config
    )
    trainer.train()
    trainer.save_model()


def _descending(rows: Dataset) -> Dataset:
    """The same prompts, answered in descending order."""
    turned = [
        {"messages": [question, {**answer, "content": answer["content"][::-1]}]}
        for question, answer in rows["messages"]
    ]
    return Dataset.from_list(turned)
