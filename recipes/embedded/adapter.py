"""The embedded fine-tuning: a student that sorts digits learns, through an adapter, to sort them downwards."""

from functools import partial
from pathlib import Path

from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM

from tide_hf.demo.sorting import build_tokenizer, held_out_rows, sorting_rows
from tide_hf.training.trainer import TIDETrainer

from .command import refuse_other_flags
from .decoding import decode_and_match
from .harness import Job, Result, run_jobs
from .networks import Network, build_network, train, training_arguments
from .report import cell, format_table, summarize

BLOCK_SIZE, MAX_LENGTH, BATCH_SIZE = 4, 16, 32
BASE = Network(hidden=64, layers=2, heads=4, steps=600, batch_size=BATCH_SIZE)
ADAPTER = Network(hidden=64, layers=2, heads=4, steps=300, batch_size=BATCH_SIZE, learning_rate=1e-2)
RANK, NUM_HELD_OUT = 8, 400
ORDERS = ("ascending", "descending")


def run_adapter_demo(
    output_dir: str | Path,
    seed: int = 0,
    base: Network = BASE,
    adapter: Network = ADAPTER,
    num_held_out: int = NUM_HELD_OUT,
) -> list[Result]:
    """Trains a base on ascending and an adapter on descending order, merges, and measures each saved network.

    Args:
        output_dir (`str` or `Path`): gets the folders `base`, `adapter` and `merged`.
        seed (`int`): of weights, data and noise.
        base, adapter ([`Network`]): training of both, and the size of the base.
        num_held_out (`int`): prompts that exact match is measured on.

    Returns:
        `list[Result]` of the networks base, adapter and merged; their metrics are ascending and descending: the share
        of held-out prompts that are sorted in that order, as a fraction.
    """
    folders = {name: str(Path(output_dir) / name) for name in ("base", "adapter", "merged")}
    tokenizer, fields = build_tokenizer(), {"preset": "ce", "max_length": MAX_LENGTH}
    rows = sorting_rows(base.steps * base.batch_size, seed=2 * seed)
    args = training_arguments(base, folders["base"], seed, **fields)
    train(TIDETrainer, build_network(base, tokenizer, BLOCK_SIZE, seed), args, rows, tokenizer)
    rows = _descending(sorting_rows(adapter.steps * adapter.batch_size, seed=2 * seed + 1))
    args = training_arguments(adapter, folders["adapter"], seed, **fields)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM")
    train(TIDETrainer, folders["base"], args, rows, tokenizer, peft_config=lora)
    merged = AutoPeftModelForCausalLM.from_pretrained(folders["adapter"]).merge_and_unload()
    merged.save_pretrained(folders["merged"])
    tokenizer.save_pretrained(folders["merged"])

    held_out = held_out_rows(num_held_out)
    answers = dict(zip(ORDERS, (held_out, _descending(held_out)), strict=True))
    results = []
    for name, folder in folders.items():
        model = (AutoPeftModelForCausalLM if name == "adapter" else AutoModelForCausalLM).from_pretrained(folder)
        metrics = {order: decode_and_match(model, tokenizer, rows)[0] for order, rows in answers.items()}
        results.append(Result("sorting", name, seed, metrics, folder))
    return results


def adapter_table(results: list[Result]) -> str:
    """Exact match, one line per network.

    Args:
        results (`list[Result]`): of [`run_adapter_demo`], of all seeds.
    """
    columns = {order: partial(_percent, order=order) for order in ORDERS}
    return format_table(summarize(results), columns)


def show_adapter(arguments) -> None:
    """Runs the example for every seed and prints what was measured.

    Args:
        arguments ([`~tide_hf.commands.distill.Arguments`]): of the recipe.
    """
    refuse_other_flags(arguments, {"output_dir", "seeds"})
    output_dir, num_seeds = arguments.training.output_dir, arguments.script.seeds or 1
    jobs = [
        Job(partial(run_adapter_demo, f"{output_dir}/seed{seed}", seed), BASE.steps + ADAPTER.steps)
        for seed in range(num_seeds)
    ]
    results = run_jobs(f"base and adapter x {num_seeds}", jobs)
    print(f"\nExact match on {NUM_HELD_OUT} held-out prompts, {num_seeds} seed(s):\n\n{adapter_table(results)}\n")
    print(f"Base, adapter and merged student are in {output_dir}/seed0.")


def _percent(entry: dict, order: str) -> str:
    return cell(entry[order], "{:.1f}", 100, " %")


def _descending(rows: Dataset) -> Dataset:
    """The same prompts, answered in descending order."""
    turned = [
        {"messages": [question, {**answer, "content": answer["content"][::-1]}]}
        for question, answer in rows["messages"]
    ]
    return Dataset.from_list(turned)
