"""Runs on tables and streams of the same rows in however many processes torchrun started.

torchrun --nproc_per_node 2 tests/stream_run.py OUTPUT WORLD_SIZE ACCUMULATION
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from datasets import Dataset, IterableDataset
from few_step_run import tiny_few_step
from tiny import tiny_model, tiny_trainer

from tide_hf.demo.sorting import sorting_rows

EMPTY = {"messages": [{"role": "user", "content": "1"}]}  # no answer: dropped
# name -> shards (0: a table), workers, whether it goes on from step 1, whether it is an inverse distillation
CASES = {
    "table": (0, 0, False, False),
    "table, resumed": (0, 0, True, False),
    "one shard": (1, 0, False, False),
    "two shards, resumed": (2, 0, True, False),
    "three shards, workers": (3, 2, False, False),
    "idlm table": (0, 0, False, True),
    "idlm stream": (2, 0, False, True),
}


def rows_with_gaps(num_kept: int, seed: int = 3) -> list[dict]:
    """Sorting rows, a row that cannot train behind every third."""
    rows = []
    for index, row in enumerate(sorting_rows(num_kept, seed=seed, wrong=0.3)):
        rows += [row, EMPTY] if index % 3 == 2 else [row]
    return rows


def as_stream(rows: list[dict], num_shards: int = 1) -> IterableDataset:
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=num_shards)


def run(name: str, output: str, world_size: int, accumulation: int) -> dict:
    """Two passes over rows that do not fill the last step, and an evaluation of rows that do not divide."""
    num_shards, num_workers, resumes, inverse = CASES[name]
    make = (lambda rows: as_stream(rows, num_shards)) if num_shards else Dataset.from_list
    options = {
        "rows": make(rows_with_gaps(10)),
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 8 // (world_size * accumulation),
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": num_workers,
        "save_strategy": "steps" if resumes else "no",
        "save_steps": 1,
    }
    held_out = make(rows_with_gaps(5, seed=9))

    def make_trainer():
        if inverse:
            return tiny_few_step(output, eval_dataset=held_out, **options)
        kwargs = {"trainer_kwargs": {"eval_dataset": held_out}, "teacher": tiny_model(1), "eval_noise_levels": [0.5]}
        return tiny_trainer(output, **kwargs, **options)

    trainer = make_trainer()
    assert trainer.accelerator.num_processes == world_size, trainer.accelerator.num_processes
    trainer.train()
    if resumes:
        trainer = make_trainer()
        trainer.train(resume_from_checkpoint=f"{output}/checkpoint-1")
    metrics = {key: value for key, value in trainer.evaluate().items() if key != "epoch"}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {key for entry in logs for key in entry} - {"epoch"}
    return {
        "weights": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
        "logs": [{key: entry[key] for key in names if key in entry} for entry in logs],
        "metrics": {key: value for key, value in metrics.items() if "runtime" not in key and "second" not in key},
    }


def main() -> None:
    output, world_size, accumulation = sys.argv[1], *map(int, sys.argv[2:4])
    torch.set_num_threads(1)
    results = {name: run(name, f"{output}/{name}", world_size, accumulation) for name in CASES}
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(results, output + "/result.pt")
    os._exit(0)  # gloo's threads can abort or hang a process on its way out


if __name__ == "__main__":
    main()
