"""One step of the tiny run with every parameter sharded by torch's own FSDP2, and the gradients that came out.

torchrun --nproc_per_node 2 tests/sharded_run.py OUTPUT TIED
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from tiny import tiny_model, tiny_trainer
from torch.distributed.fsdp import fully_shard


def main() -> None:
    output, tied = sys.argv[1], bool(int(sys.argv[2]))
    torch.set_num_threads(1)
    trainer = tiny_trainer(
        output,
        model=tiny_model(0, tie_word_embeddings=tied),
        teacher=tiny_model(seed=1),
        max_steps=10,
    )
    world_size, rank, model = trainer.accelerator.num_processes, trainer.accelerator.process_index, trainer.model
    if world_size > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    trainer.state.max_steps, trainer.state.global_step = 10, 3
    share = 8 // world_size
    rows = [trainer.train_dataset[index] for index in range(rank * share, (rank + 1) * share)]
    (batch,), _ = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    gradients = {
        name: value.grad.full_tensor() if world_size > 1 else value.grad for name, value in model.named_parameters()
    }
    loss = trainer.accelerator.reduce(loss.detach(), reduction="mean")
    if rank == 0:
        torch.save({"gradients": gradients, "loss": loss}, f"{output}/result.pt")
    # gloo's threads can abort or hang a process on its way out: leave without the interpreter's own tear-down
    trainer.accelerator.wait_for_everyone()
    os._exit(0)


if __name__ == "__main__":
    main()
