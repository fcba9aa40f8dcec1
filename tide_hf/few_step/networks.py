"""Three copies of one diffusion LM, and the moving average of one of them."""

import copy
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, set_seed

from ..training.adapter import prepare_adapter
from ..training.base import trained_parameters as trained


def three_networks(
    model: PreTrainedModel, peft_config: PeftConfig | None, revision: str | None, seed: int
) -> tuple[PreTrainedModel | PeftModel, PreTrainedModel | PeftModel, PreTrainedModel]:
    """Student, fake and frozen teacher, all three computing what `model` does.

    With an adapter the three share the tensors of one frozen base, which is the teacher: together they take about
    as much memory as one network. Without an adapter they are three whole networks.

    Args:
        model (`PreTrainedModel`): the initial weights; it becomes the student.
        peft_config (`PeftConfig`, *optional*): see [`~tide_hf.training.prepare_adapter`]; student and fake each get
            such an adapter.
        revision (`str`, *optional*): of the base on the Hub, for the adapter's configuration.
        seed (`int`): of the adapters' initial weights, half of which LoRA draws at random.

    Raises:
        ValueError: for a model that already carries an adapter, or an adapter that also trains modules of the base.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "Inverse distillation makes teacher, fake and student from one plain model, but this one carries an "
            "adapter: merge it first (model.merge_and_unload()); to train new ones give peft_config."
        )
    if peft_config is None:
        teacher, fake = copy.deepcopy(model), copy.deepcopy(model)
        return model, fake, teacher.eval().requires_grad_(False)
    if peft_config.modules_to_save:
        raise ValueError(
            f"modules_to_save={list(peft_config.modules_to_save)} would train whole modules of the base, which the "
            "teacher shares: leave it out, or train whole networks without peft_config."
        )
    teacher = _sharing(model).eval().requires_grad_(False)
    networks = []
    for part in (model, _sharing(model)):
        set_seed(seed + len(networks))
        networks.append(prepare_adapter(part, copy.deepcopy(peft_config), revision))
    return *networks, teacher


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def total_weight(model: torch.nn.Module) -> float:
    """Σ|w| over all parameters of `model`, in float64: the same for equal networks, and almost never for others."""
    norms = [torch.linalg.vector_norm(value.detach(), 1, dtype=torch.float64) for value in model.parameters()]
    return float(torch.stack(norms).sum())


class WeightAverage:
    """Exponential moving average of a network's trained weights, in float32 or higher, sharded as they are.

    Args:
        model (`torch.nn.Module`): whose weights are averaged; the average starts at their current values.
        decay (`float`): in [0, 1]: after each step average ← decay · average + (1 − decay) · weights.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay, self.model, self.weights = decay, model, trained(model)
        self.average = {name: _full_precision(value) for name, value in self.weights.items()}

    @torch.no_grad()
    def update(self, left_out: torch.Tensor | bool = False) -> None:
        """Adds the weights after one step, unless it was `left_out`: a flag, or a boolean `()` on their device."""
        taken = 1 - torch.as_tensor(left_out, dtype=torch.float64)
        for name, average in self.average.items():
            share = ((1 - self.decay) * taken).to(average.device, average.dtype)
            average.lerp_(self.weights[name].to(average.dtype), share)

    @contextmanager
    @torch.no_grad()
    def applied(self):
        """Inside, the network holds the average; afterwards, its own weights again."""
        kept = {name: value.clone() for name, value in self.weights.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.weights[name].copy_(value)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without a backward leaves gathered copies, which are old now


def _full_precision(value: torch.Tensor) -> torch.Tensor:
    """A detached copy, half precisions raised: a decay near 1 would not move them."""
    value = value.detach()
    return value.clone() if value.dtype == torch.float64 else value.float().clone()


# -- tensors of a checkpoint, whole on the host -----------------------------------------------------------------------


def whole(value):
    """A `value`, tensor or nested tensors, unsharded on the host. All processes must call it together."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list | tuple) else value


@torch.no_grad()
def restore(targets: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], what: str) -> None:
    """Writes whole tensors into (sharded) ones of the same names.

    Args:
        targets (`dict[str, torch.Tensor]`): tensors to overwrite, by name.
        saved (`dict[str, torch.Tensor]`): whole tensors of the same names and shapes.
        what (`str`): which part of the checkpoint they are, for the message.

    Raises:
        ValueError: if the names differ.
    """
    if targets.keys() != saved.keys():
        odd = sorted(targets.keys() ^ saved.keys())
        raise ValueError(
            f"The checkpoint's {what} belongs to another network: {len(odd)} tensors are on one side only, {odd[0]} "
            "first. Resume with the model and the adapter settings of the interrupted run."
        )
    for name, target in targets.items():
        target.copy_(like(saved[name], target))


def like(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A whole tensor `value` on the device of `target`, and sharded like it."""
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements) if isinstance(target, DTensor) else value
