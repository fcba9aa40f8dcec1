"""Trains the tiny student on what it writes, in however many processes torchrun started, and saves what is compared.

torchrun --nproc_per_node 2 tests/on_policy_run.py OUTPUT WORLD_SIZE ACCUMULATION SHARDS ADAPTER [ar]
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from peft import LoraConfig
from test_autoregressive_teachers import causal_model
from tiny import FSDP2, tiny_model, tiny_trainer


def main() -> None:
    output, world_size, accumulation, sharding, adapter, *kind = sys.argv[1:]
    teaching = {"teacher": tiny_model(seed=1), "preset": "kl"}
    if kind:
        teaching = {"teacher": causal_model(vocab_size=14), "preset": "ar-kl", "rollout_order": "left_to_right"}
    torch.set_num_threads(1)
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    trainer = tiny_trainer(
        output,
        model=tiny_model(initializer_range=0.5),
        **teaching,
        temperature=1.0,
        on_policy_fraction=0.5,
        rollout_reuse=2,
        per_device_train_batch_size=8 // (int(world_size) * int(accumulation)),
        gradient_accumulation_steps=int(accumulation),
        trainer_kwargs={"peft_config": lora} if int(adapter) else {},
        **(FSDP2 if sharding == "fsdp2" else {}),
    )
    assert trainer.accelerator.num_processes == int(world_size)
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        losses = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"weights": weights, "losses": losses}, output + "/result.pt")
    # gloo's threads can abort or hang a process on its way out: leave without the interpreter's own tear-down
    trainer.accelerator.wait_for_everyone()
    os._exit(0)


if __name__ == "__main__":
    main()
