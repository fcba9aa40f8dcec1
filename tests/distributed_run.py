"""Trains the tiny run in however many processes torchrun started, and saves what the test compares.

torchrun --nproc_per_node 2 tests/distributed_run.py OUTPUT WORLD_SIZE ACCUMULATION TEACHER TIED ADAPTER SHARDS

TEACHER is 0 (none), 1 (the preset) or 2 (a divergence of the user's own).
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from peft import LoraConfig
from tiny import FSDP2, ZERO3, Hellinger, tiny_model, tiny_trainer
from torch.distributed.tensor import DTensor

from tide_hf.demo.sorting import sorting_rows


def main() -> None:
    output, world_size, accumulation, with_teacher, tied, adapter = sys.argv[1], *map(int, sys.argv[2:7])
    sharding = {"none": {}, "fsdp2": FSDP2, "zero3": ZERO3}[sys.argv[7]]
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    dtype = torch.float32 if "deepspeed" in sharding else torch.float64
    torch.set_num_threads(1)
    trainer = tiny_trainer(
        output,
        model=tiny_model(tie_word_embeddings=bool(tied), dtype=dtype),
        teacher=tiny_model(seed=1, dtype=dtype) if with_teacher else None,
        per_device_train_batch_size=8 // (world_size * accumulation),
        gradient_accumulation_steps=accumulation,
        eval_noise_levels=[0.5],
        trainer_kwargs={
            **({"peft_config": lora} if adapter else {}),
            **({"objective": Hellinger()} if with_teacher == 2 else {}),
        },
        **sharding,
    )
    assert trainer.accelerator.num_processes == world_size, trainer.accelerator.num_processes
    trainer.train()
    # five rows do not divide by two processes: the repeated rows must not count
    metrics = trainer.evaluate(sorting_rows(5, seed=9))
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    held = [value for group in trainer.optimizer.param_groups for value in group["params"]]
    assert all(isinstance(value, DTensor) == ("fsdp" in sharding) for value in held)
    if trainer.accelerator.is_main_process:
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"weights": weights, "losses": losses, "metrics": metrics}, output + "/result.pt")
    # gloo's threads can abort or hang a process on its way out: leave without the interpreter's own tear-down
    trainer.accelerator.wait_for_everyone()
    os._exit(0)


if __name__ == "__main__":
    main()
