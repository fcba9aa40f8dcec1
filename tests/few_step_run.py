"""A tiny inverse distillation in however many processes torchrun started; saves what the test compares.

torchrun --nproc_per_node 2 tests/few_step_run.py OUTPUT WORLD_SIZE ACCUMULATION RESUMES KIND
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate.utils import DistributedType
from peft import LoraConfig
from tiny import FSDP2, shard_on_cpus, tiny_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tide_hf import IDLMConfig, IDLMTrainer
from tide_hf.demo.sorting import build_tokenizer, sorting_rows


def tiny_few_step(output_dir, model=None, rows=None, eval_dataset=None, peft_config=None, callbacks=None, **overrides):
    """A trainer on sixteen sorting rows, eight rows per optimizer step."""
    values = {
        "output_dir": str(output_dir),
        "max_length": 16,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "num_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }
    args = IDLMConfig(**values)
    shard_on_cpus(args)
    return IDLMTrainer(
        model=tiny_model() if model is None else model,
        args=args,
        train_dataset=sorting_rows(16, seed=3, wrong=0.3) if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=build_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def main() -> None:
    output, world_size, accumulation, resumes = sys.argv[1], *map(int, sys.argv[2:5])
    kind = sys.argv[5]
    torch.set_num_threads(1)
    options = {
        "per_device_train_batch_size": 8 // (world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 0.5,
        "fake_max_grad_norm": 0.7,
        "fake_steps_per_student_step": 2,
        "ema_decay": 0.5,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        # five rows do not divide by two processes: the repeated row must not count
        "eval_dataset": sorting_rows(5, seed=9),
        "peft_config": LoraConfig(r=2, task_type="CAUSAL_LM") if kind == "lora" else None,
    }
    sharded = kind == "fsdp" and world_size > 1
    if sharded:
        options |= FSDP2
    trainer = tiny_few_step(output, **options)
    assert trainer.accelerator.num_processes == world_size, trainer.accelerator.num_processes
    assert (trainer.accelerator.distributed_type == DistributedType.FSDP) == sharded
    trainer.train()
    if sharded:
        of_fake = [value for group in trainer.fake_training.optimizer.param_groups for value in group["params"]]
        assert all(isinstance(value, DTensor) for value in (*of_fake, *trainer.ema.weights.values()))
    if resumes:
        trainer = tiny_few_step(output, **options)
        trainer.train(resume_from_checkpoint=f"{output}/checkpoint-2")
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer._save_optimizer_and_scheduler(output)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        state = torch.load(output + "/few_step_state.pt", weights_only=True)
        losses = [entry for entry in trainer.state.log_history if "fake_loss" in entry and "loss" in entry]
        saved = {} if kind == "lora" else AutoModelForCausalLM.from_pretrained(output, dtype="auto").state_dict()
        parts = {name: state[name] for name in ("student", "fake", "ema")}
        torch.save({**parts, "saved": saved, "losses": losses, "metrics": metrics}, output + "/result.pt")
    # gloo's threads can abort or hang a process on its way out: leave without the interpreter's own tear-down
    trainer.accelerator.wait_for_everyone()
    os._exit(0)


if __name__ == "__main__":
    main()
