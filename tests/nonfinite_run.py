"""A run of two processes in which the second one's second step is not finite; saves what the test compares.

torchrun --nproc_per_node 2 tests/nonfinite_run.py OUTPUT ENGINE KIND CHOICE
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from few_step_run import tiny_few_step
from tiny import FSDP2, tiny_model, tiny_trainer
from transformers import TrainerCallback

from tide_hf import NonFiniteError
from tide_hf.training.nonfinite import StepGuard
from tide_hf.training.nonfinite.checks import local


class Weights(TrainerCallback):
    """This process's part of the weights after each step."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.found.append([local(value.detach()).clone() for value in model.parameters()])


def main() -> None:
    output, engine, kind, choice = sys.argv[1:5]
    torch.set_num_threads(1)
    choice, *late = choice.split()
    StepGuard.reads_late = bool(late)  # as on a GPU
    options = {"nonfinite": choice, "per_device_train_batch_size": 4, **(FSDP2 if engine == "fsdp2" else {})}
    if kind == "tide":
        teacher = tiny_model(seed=1)
        trainer = tiny_trainer(output, teacher=teacher, tidal=False, comp_demo=False, **options)
        run, owner, name = trainer.signal.hidden, trainer.signal, "hidden"
    else:
        trainer = tiny_few_step(output, **options)
        run, owner, name = trainer.inverse.student_loss, trainer.inverse, "student_loss"

    def poisoned(*args, **kwargs):
        found = run(*args, **kwargs)
        if trainer.state.global_step == 1 and trainer.accelerator.process_index == 1:
            found = found * torch.nan
        return found

    setattr(owner, name, poisoned)
    weights, message = Weights(), None
    trainer.add_callback(weights)
    try:
        trainer.train()
    except NonFiniteError as error:
        message = str(error)
    assert (message is not None) == (choice == "stop"), message
    now = [local(value.detach()) for value in trainer.model_wrapped.parameters()]
    before, after = weights.found[0], weights.found[1] if choice == "skip" else now
    result = {
        "message": message,
        "unchanged": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "finite": all(bool(value.isfinite().all()) for value in now),
    }
    torch.save(result, f"{output}/result{trainer.accelerator.process_index}.pt")
    trainer.accelerator.wait_for_everyone()
    os._exit(0)


if __name__ == "__main__":
    main()
