"""Checks loss and gradients of each step before the optimizer takes it.

This costs one norm per gradient and, with several processes, an all-reduce of one number. On a GPU the host does not
wait for it: the optimizer's kernel reads the flag and does nothing (`found_inf`, as under a `GradScaler`), and the
host reads the flag before the next step or log. For optimizers without this (all but torch's fused ones) and on other
devices the host reads the flag before every step.
"""

from collections.abc import Callable, Mapping

import torch
from accelerate.utils import DistributedType, gather_object
from transformers.utils import logging

from ...diffusion import Record
from .checks import NonFiniteError, local, norms, not_finite, some
from .report import Step, find_causes, write_step

logger = logging.get_logger(__name__)
MAX_IN_A_ROW = 10  # consecutive skipped steps; that many are not due to a single bad batch
MAX_FILES = 10  # per process and network


class _Flag:
    """A flag on its way from a device to the host; reading it does not wait for later work of the device."""

    def __init__(self, flag: torch.Tensor):
        self.value, self.event = flag, None
        if flag.device.type == "cuda":
            self.value = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def __bool__(self) -> bool:
        if self.event is not None:
            self.event.synchronize()
        return bool(self.value)


class StepGuard:
    """Keeps a network's optimizer from taking steps whose loss or gradients are not finite.

    Args:
        trainer ([`~transformers.Trainer`]): with `args.nonfinite`; its state, accelerator and tokenizer are used.
        network (`str`): `"student"` or `"fake"`.
        parameters (`Mapping[str, Parameter]`): the trained ones, as the optimizer has them.
        optimizer (`torch.optim.Optimizer`): of the network, wrapped by accelerate or not.
        terms_of (`Callable`): takes a batch on the host and returns each term of the loss by row,
            `dict[str, Tensor (B,)]`; called only after a failure, on all processes together.

    Attributes:
        bad (`torch.Tensor`): whether the latest step is skipped, on the device.
        num_skipped (`int`): skipped steps since training began or resumed, as far as the host knows.

    Raises:
        ValueError: for an optimizer or engine that steps before gradients can be checked.
    """

    def __init__(self, trainer, network: str, parameters: Mapping, optimizer, terms_of: Callable[[Record], dict]):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.network, self.parameters, self.terms_of = network, parameters, terms_of
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.scaler = getattr(self.accelerator, "scaler", None)
        self.is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        _refuse_early_steps(self.args, self.is_deepspeed)
        self.num_skipped = self._in_a_row = self._num_files = 0
        self._since_log = [0, 0]  # steps, and how many of them were skipped
        self.bad = self._pending = self._shown = None
        self._seen = Step()

    @property
    def reads_late(self) -> bool:
        """Whether the device itself skips a bad step, and the host learns of it afterwards."""
        supported = self.scaler is not None or getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return supported and self.accelerator.device.type == "cuda"

    def saw(self, batch: Record, loss: torch.Tensor, is_last: bool) -> torch.Tensor:
        """Records a micro-batch after its backward pass; with the last one of a step, decides on the step.

        Args:
            batch (`Record`): as it was noised, on the host.
            loss (`torch.Tensor`): of the micro-batch, a scalar.
            is_last (`bool`): whether it is the last micro-batch of the step.

        Returns:
            `torch.Tensor`: what the micro-batch adds to the logged loss; over a skipped step it sums to 0.

        Raises:
            NonFiniteError: on all processes, if a loss or gradient on any is not finite and `args.nonfinite` is
                `"stop"`, or `MAX_IN_A_ROW` consecutive steps were skipped, or the weights are not finite.
        """
        loss = loss.detach()
        self._seen.batches.append(batch)
        self._seen.losses.append(loss)
        shown = torch.where(loss.isfinite(), loss, 0.0)
        if not is_last:
            self._shown = shown if self._shown is None else self._shown + shown
            return shown
        self.bad = self._decide()
        before, self._shown = self._shown, None
        return torch.where(self.bad, 0.0 if before is None else -before, shown)

    def before_backward(self, batch: Record, loss: torch.Tensor) -> None:
        """Checks only the loss, under DeepSpeed, where the backward pass takes the step; otherwise does nothing.

        Args:
            batch (`Record`), loss (`torch.Tensor`): as in `saw`.

        Raises:
            NonFiniteError: as in `saw`.
        """
        if self.is_deepspeed and bool(self._anywhere(~loss.detach().isfinite())):
            self._seen.batches.append(batch)
            self._seen.losses.append(loss.detach())
            self._report(self._close())

    def settle(self) -> int:
        """Reads what the device has decided; called on all processes together.

        Returns:
            `int`: steps skipped since the last call of `pop_counts`.
        """
        if self._pending is not None:
            (step, flag), self._pending = self._pending, None
            self._conclude(step, bool(flag))
        return self._since_log[1]

    def pop_counts(self) -> tuple[int, int]:
        """Number of steps since the last call, and how many of them were skipped."""
        self.settle()
        counts, self._since_log = tuple(self._since_log), [0, 0]
        return counts

    def anywhere(self, here: bool) -> bool:
        """Whether something that is so `here` or not is so on any process; called on all together."""
        return bool(self._anywhere(torch.tensor(here, device=self.accelerator.device)))

    def _decide(self) -> torch.Tensor:
        """Whether the step is bad on any process, in which case it is prevented."""
        self.settle()
        step = self._close()
        named = {name: local(value.grad) for name, value in self.parameters.items() if value.grad is not None}
        step.names, step.norms = list(named), norms(named.values(), 2, step.losses[0].device)
        bad = self._anywhere(~torch.stack(step.losses).sum().isfinite() | self._gradients_are_bad(step.norms))
        self._since_log[0] += 1
        if not self.reads_late:
            self._conclude(step, bool(bad))
            return bad
        if self.scaler is None:
            self.optimizer.found_inf = bad.float()
        elif named:  # the scaler finds the NaN and skips the step
            torch._foreach_mul_(list(named.values()), torch.where(bad, torch.nan, 1.0))
        self._pending = step, _Flag(bad)
        return bad

    def _gradients_are_bad(self, gradient_norms: torch.Tensor) -> torch.Tensor:
        bad = ~torch.linalg.vector_norm(gradient_norms).isfinite()
        if self.scaler is not None:
            # a scaler tries too large scales on purpose; at 1 or below, its scale is not the cause
            return bad & (self.scaler._get_scale_async() <= 1)
        if self.is_deepspeed and not self.args.fp16:
            norm = self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
            # DeepSpeed reports a norm that is not finite as −1
            return bad | (norm is not None and not 0 <= norm < float("inf"))
        return bad

    def _close(self) -> Step:
        step, self._seen = self._seen, Step()
        step.number = self.trainer.state.global_step + 1
        return step

    def _anywhere(self, here: torch.Tensor) -> torch.Tensor:
        """Whether it is so on any process, since they continue or stop together."""
        if self.accelerator.num_processes == 1:
            return here
        return self.accelerator.reduce(here.float(), reduction="sum") > 0

    def _conclude(self, step: Step, bad: bool) -> None:
        """Counts the step and, if it is bad, skips it or raises."""
        if not bad:
            self._in_a_row = 0
            return
        self._report(step)
        if not self.reads_late:
            for parameter in self.parameters.values():
                parameter.grad = None  # without a gradient neither weights nor moments change

    def _report(self, step: Step) -> None:
        """Names what is not finite, writes the batches to a file, and raises unless the step may be skipped."""
        self.num_skipped += 1
        self._in_a_row += 1
        self._since_log[1] += 1
        terms, gradients = find_causes(step, self.trainer, self.terms_of)
        paths = []
        if self._num_files < MAX_FILES:
            paths.append(write_step(step, self.trainer, self.network, terms + gradients))
            self._num_files += 1
        reports = [(not_finite(self.parameters), terms, gradients, paths)]
        if self.accelerator.num_processes > 1:
            reports = gather_object(reports)
        broken, terms, gradients, paths = (
            list(dict.fromkeys(item for part in parts for item in part)) for parts in zip(*reports, strict=True)
        )
        found = terms or gradients  # a non-finite term makes all gradients non-finite
        if broken:
            found.insert(0, f"the weights of the {self.network} themselves are not finite ({some(broken)})")
        number = f"Step {step.number}" + ("" if self.network == "student" else f", update of the {self.network}")
        done = "DeepSpeed may have taken it" if self.is_deepspeed else "The optimizer did not take it"
        message = f"{number}: {'; '.join(found) or 'the gradient norm is not finite'}. {done}"
        if paths:
            message += f"; its batches are in {', '.join(paths)}, for tide_hf.training.nonfinite.replay"
        if broken:
            raise NonFiniteError(f"{message}. Continue from an earlier checkpoint.")
        if self.args.nonfinite == "stop":
            raise NonFiniteError(f"{message}. To skip such steps, set --nonfinite skip.")
        if self._in_a_row >= MAX_IN_A_ROW:
            raise NonFiniteError(f"{message}. It is number {self._in_a_row} in a row, so not a single bad batch.")
        logger.warning(f"{message}. It is skipped, as set by --nonfinite skip.")


def _refuse_early_steps(args, is_deepspeed: bool) -> None:
    """Refuses optimizers and engines that step before gradients can be checked."""
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in ("lomo", "adalomo") or optim.endswith("_layerwise"):
        raise ValueError(
            f"optim={optim!r} steps inside the backward pass, before a gradient that is not finite can be caught: "
            "choose another optimizer, for example adamw_torch_fused."
        )
    if is_deepspeed and args.nonfinite == "skip":
        raise ValueError(
            "nonfinite='skip' cannot skip a step under DeepSpeed, whose engine steps inside the backward pass: "
            "use nonfinite='stop', or FSDP (fsdp_version: 2)."
        )
