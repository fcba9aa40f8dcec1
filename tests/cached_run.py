"""Trains the tiny student on kept predictions, in however many processes torchrun started, and saves what is compared.

torchrun --nproc_per_node 2 tests/cached_run.py ROWS OUTPUT WORLD_SIZE
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from datasets import load_from_disk
from tiny import tiny_model, tiny_trainer


def main() -> None:
    rows, output, world_size = sys.argv[1:]
    torch.set_num_threads(1)
    trainer = tiny_trainer(
        output,
        rows=load_from_disk(rows)["train"],
        model=tiny_model(seed=5),
        preset="kl",
        per_device_train_batch_size=8 // int(world_size),
    )
    assert trainer.accelerator.num_processes == int(world_size)
    trainer.train()
    if trainer.accelerator.is_main_process:
        torch.save(trainer.accelerator.get_state_dict(trainer.model_wrapped), output + "/result.pt")
    trainer.accelerator.wait_for_everyone()
    os._exit(0)


if __name__ == "__main__":
    main()
