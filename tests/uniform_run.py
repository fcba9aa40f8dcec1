"""A tiny inverse distillation of a uniform-state model in however many processes torchrun started.

torchrun --nproc_per_node 2 tests/uniform_run.py OUTPUT WORLD_SIZE
"""

import os
import sys

import torch

from tide_hf import IDLMConfig, TIDEUniformQwen3Config, UniformIDLMTrainer
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.models import TIDEUniformQwen3ForDiffusion


def tiny_uniform(seed=0, dtype=torch.float64, **overrides):
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = TIDEUniformQwen3Config(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.3,
            **overrides,
        }
    )
    return TIDEUniformQwen3ForDiffusion(config).to(dtype)


def tiny_trainer(output_dir, model=None, peft_config=None, eval_dataset=None, **overrides):
    values = {
        "output_dir": str(output_dir),
        "max_length": 16,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "num_steps": 2,
        "input_temperature": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **overrides,
    }
    return UniformIDLMTrainer(
        model=tiny_uniform() if model is None else model,
        args=IDLMConfig(**values),
        train_dataset=sorting_rows(16, seed=3),
        eval_dataset=eval_dataset,
        processing_class=build_tokenizer(),
        peft_config=peft_config,
    )


def weights(trainer, name="model"):
    return torch.cat([value.detach().flatten() for value in getattr(trainer, name).parameters()])


def main() -> None:
    output, world_size = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    trainer = tiny_trainer(
        output,
        per_device_train_batch_size=8 // world_size,
        max_grad_norm=0.5,
        # five rows do not divide by two processes: the repeated row must not count
        eval_dataset=sorting_rows(5, seed=9),
    )
    assert trainer.accelerator.num_processes == world_size, trainer.accelerator.num_processes
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        losses = torch.tensor([metrics["eval_loss"], metrics["eval_fake_loss"]])
        result = {"model": weights(trainer), "fake": weights(trainer, "fake"), "losses": losses}
        torch.save(result, output + "/result.pt")
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # gloo's threads can hang a process on its way out


if __name__ == "__main__":
    main()
