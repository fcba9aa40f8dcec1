"""Reports of steps that are not finite, the file with their batches, and how to run these again."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule

from ...diffusion import Record
from .checks import NAMED, gradient_norms, some

TEXT_LENGTH = 80  # characters of a row that a message quotes


@dataclass
class Step:
    """What a process has seen of an optimizer step.

    Args:
        number (`int`): counted from 1.
        batches (`list[Record]`): noised micro-batches, on the host.
        losses (`list[torch.Tensor]`): one of each micro-batch, scalars.
        names (`list[str]`), norms (`torch.Tensor`, *optional*): of the gradients.
    """

    number: int = 0
    batches: list[Record] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    norms: torch.Tensor | None = None


@torch.no_grad()
def find_causes(step: Step, trainer, terms_of) -> tuple[list[str], list[str]]:
    """Finds what is not finite on this process; called on all processes together.

    Args:
        step ([`Step`]): what the process has seen.
        trainer ([`~transformers.Trainer`]): of the run.
        terms_of (`Callable`): as in [`StepGuard`].

    Returns:
        clauses that name terms of the loss with their rows, and clauses that name gradients.
    """
    process, found = f"process {trainer.accelerator.process_index}", []
    with at_step(trainer, step.number - 1):
        for index, (batch, loss) in enumerate(zip(step.batches, step.losses, strict=True)):
            where, before = f"micro-batch {index} of {process}", len(found)
            for name, term_B in terms_of(batch).items():
                rows = (~term_B.isfinite()).nonzero().flatten().tolist()
                if rows:
                    quoted = [_row_name(batch, row, trainer.processing_class) for row in rows[:NAMED]]
                    more = [f"{len(rows) - NAMED} more"] if len(rows) > NAMED else []
                    found.append(f"{name} is {float(term_B[rows[0]])} in {', '.join(quoted + more)} ({where})")
            if len(found) == before and not bool(loss.isfinite()):
                found.append(f"the loss of {where} was {float(loss)}, but finite when computed again")
    _reshard(trainer.model_wrapped, getattr(trainer, "fake", None))
    bad = [] if step.norms is None else (~step.norms.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return found, []
    names = some([step.names[index] for index in bad])
    return found, [f"{len(bad)} of {len(step.names)} gradients are not finite on {process} ({names})"]


def _reshard(*networks) -> None:
    """Reshards weights that a forward without a backward leaves gathered, out of the optimizer's reach."""
    for network in networks:
        for module in [] if network is None else network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def write_step(step: Step, trainer, network: str, found: list[str]) -> str:
    """Writes a file for [`replay`] into the output folder.

    Args:
        step ([`Step`]): what this process has seen.
        trainer ([`~transformers.Trainer`]): of the run.
        network (`str`): `"student"` or `"fake"`.
        found (`list[str]`): clauses about what is not finite.

    Returns:
        `str`: the path.
    """
    args, accelerator = trainer.args, trainer.accelerator
    of_network = "" if network == "student" else f"-{network}"
    stem, number = f"nonfinite-step{step.number}{of_network}-rank{accelerator.process_index}", 1
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    while (path := folder / f"{stem}{f'-{number}' if number > 1 else ''}.pt").exists():
        number += 1
    content = {
        "network": network,
        "step": step.number,
        "max_steps": trainer.state.max_steps,
        "seed": args.seed,
        "rank": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "found": found,
        "losses": [float(loss) for loss in step.losses],
        "kind": type(step.batches[0]).__name__,
        "batches": [batch.to("cpu").to_dict() for batch in step.batches],
    }
    torch.save(content, path)
    return str(path)


def replay(trainer, path: str | Path) -> tuple[list[float], dict[str, float]]:
    """Runs the micro-batches of a non-finite step again, with the weights that the trainer has.

    The weights of that step are in the interrupted trainer, or result from training up to the step before. Dropout is
    drawn again.

    Args:
        trainer ([`TIDETrainer`] or [`IDLMTrainer`]): with the settings and networks of the run.
        path (`str` or `Path`): a `nonfinite-step….pt` of the run.

    Returns:
        the loss of each micro-batch, and the norm of each trained parameter's gradient over all of them.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    kind = _kinds()[saved["kind"]]
    of_fake = saved["network"] == "fake"
    network, losses = trainer.fake if of_fake else trainer.model, []
    network.zero_grad()
    with at_step(trainer, saved["step"] - 1, saved["max_steps"]):
        for batch in map(kind.from_dict, saved["batches"]):
            if of_fake:
                loss = trainer._fake_loss(trainer.model_wrapped, batch)
            else:
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model_wrapped, trainer._prepare_inputs(batch))
            loss.backward()
            losses.append(float(loss.detach()))
    found = gradient_norms(dict(network.named_parameters()))
    network.zero_grad()
    return losses, found


def _kinds(cls: type = Record) -> dict[str, type]:
    """Every kind of noised batch by its name."""
    found = {cls.__name__: cls}
    for each in cls.__subclasses__():
        found |= _kinds(each)
    return found


@contextmanager
def at_step(trainer, global_step: int, max_steps: int | None = None):
    """Inside, the trainer's state is that of another step, on which λ(s) depends.

    Args:
        trainer ([`~transformers.Trainer`]): whose state is changed and restored.
        global_step (`int`): number of steps that are done.
        max_steps (`int`, *optional*): number of all steps; by default unchanged.
    """
    state = trainer.state
    kept = state.global_step, state.max_steps
    state.global_step = global_step
    state.max_steps = kept[1] if max_steps is None else max_steps
    try:
        yield
    finally:
        state.global_step, state.max_steps = kept


def _row_name(batch: Record, row: int, tokenizer) -> str:
    """Its number, key and text."""
    ids = batch.row_ids(row)
    text = tokenizer.decode(ids) if len(ids) else ""
    if len(text) > TEXT_LENGTH:
        text = text[:TEXT_LENGTH] + "…"
    return f"row {row} (row_key {int(batch.row_key[row])}) {text!r}"
