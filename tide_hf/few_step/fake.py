"""The training of the fake network, which transformers.Trainer does not know about."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, Trainer, get_scheduler

from .config import IDLMConfig
from .networks import like, restore, trained, whole


class FakeTraining:
    """Optimizer, schedule, clipping, logged numbers and checkpoint of the fake network.

    Args:
        network (`PreTrainedModel`): the fake.
        args ([`IDLMConfig`]): settings, see [`IDLMConfig.for_fake`].

    Attributes:
        wrapped (`torch.nn.Module`): the network as accelerate prepared it; before that the network itself.
        optimizer, scheduler: from `prepare` on.
        guard ([`~tide_hf.training.nonfinite.StepGuard`]): checks its updates; set by the trainer before the first one.
    """

    def __init__(self, network: PreTrainedModel, args: IDLMConfig):
        self.network = self.wrapped = network
        self.args = args
        self.accelerator = self.optimizer = self.scheduler = self.guard = None
        self._reset_sums()

    def prepare(self, accelerator: Accelerator, max_steps: int, decayed: set[str]) -> None:
        """Makes optimizer and schedule; a second call makes only a new schedule.

        Args:
            accelerator (`Accelerator`): the trainer's; wraps the network and its optimizer.
            max_steps (`int`): steps of the student.
            decayed (`set[str]`): names of the parameters that weight decay applies to.
        """
        args = self.args
        if self.optimizer is None:
            self.accelerator = accelerator
            self.wrapped, self.optimizer = accelerator.prepare(self.network, self._create_optimizer(decayed))
        num_updates = max_steps * args.fake_steps_per_student_step
        warmup = args.for_fake("warmup_steps")
        self.scheduler = get_scheduler(
            args.for_fake("lr_scheduler_type"),
            optimizer=self.optimizer,
            num_warmup_steps=int(warmup) if warmup >= 1 else round(warmup * num_updates),
            num_training_steps=num_updates,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs or {},
        )

    def _create_optimizer(self, decayed: set[str]) -> torch.optim.Optimizer:
        """As Trainer makes the student's, with the fake's settings."""
        args = self.args
        settings = copy.copy(args)
        settings.optim, settings.learning_rate = args.for_fake("optim"), args.for_fake("learning_rate")
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(settings, self.network)
        groups = [
            {
                "params": [value for name, value in trained(self.network).items() if (name in decayed) == decays],
                "weight_decay": args.for_fake("weight_decay") if decays else 0.0,
            }
            for decays in (True, False)
        ]
        return optimizer_class(groups, **kwargs)

    def update(self, batches: list[dict], loss_of: Callable[[dict], torch.Tensor]) -> None:
        """One optimizer step over all micro-batches.

        Args:
            batches (`list`): noised micro-batches, as `loss_of` takes them.
            loss_of (`Callable`): a micro-batch -> its share of the loss, already divided by global counts.
        """
        accelerator = self.accelerator
        self.wrapped.train()
        was_syncing = accelerator.sync_gradients
        accelerator.gradient_state._set_sync_gradients(True)
        syncs_each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with nullcontext() if is_last or syncs_each else accelerator.no_sync(self.wrapped):
                loss = loss_of(batch)
                # DDP and FSDP average gradients over processes
                accelerator.backward(loss * accelerator.num_processes)
            self._loss += self.guard.saw(batch, loss, is_last)
        limit = self.args.for_fake("max_grad_norm")
        # accelerate's own finds its way by comparing the parameters of the networks it knows, which fails with two
        norm = torch.nn.utils.clip_grad_norm_(trained(self.wrapped).values(), limit if limit > 0 else float("inf"))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self._norm += torch.where(self.guard.bad, 0.0, norm)
        self.optimizer.step()
        self._learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        self.optimizer.zero_grad()
        accelerator.gradient_state._set_sync_gradients(was_syncing)

    def pop_logs(self) -> dict[str, float]:
        """Loss and gradient norm, means over the updates taken since the last call; the learning rate; and how many
        updates of the run were left out. Empty without an update. All processes must call it together."""
        num_updates, num_skipped = self.guard.pop_counts() if self.guard is not None else (0, 0)
        if not num_updates:
            return {}
        num_taken = num_updates - num_skipped or math.nan
        loss = self.accelerator.reduce(torch.as_tensor(self._loss, device=self.accelerator.device), reduction="sum")
        logs = {
            "fake_loss": loss.item() / num_taken,
            "fake_grad_norm": float(self._norm) / num_taken,
            "fake_learning_rate": self._learning_rate,
        }
        if self.guard.num_skipped:
            logs["fake_nonfinite_steps"] = self.guard.num_skipped
        self._reset_sums()
        return logs

    def _reset_sums(self) -> None:
        self._loss, self._norm = 0.0, 0.0

    def state_dict(self) -> dict:
        """Everything needed to resume, unsharded on the host. All processes must call it together."""
        return {
            "fake": whole(trained(self.accelerator.unwrap_model(self.wrapped))),
            "fake_optimizer": whole(self.optimizer.state_dict()),
            "fake_scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, saved: dict) -> None:
        """Resumes from what `state_dict` returned.

        Args:
            saved (`dict`): that state.

        Raises:
            ValueError: if it belongs to another network.
        """
        restore(trained(self.accelerator.unwrap_model(self.wrapped)), saved["fake"], "fake")
        state = saved["fake_optimizer"]
        parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        for index, moments in state["state"].items():
            target = parameters[index]
            state["state"][index] = {
                name: like(value, target) if torch.is_tensor(value) and value.shape == target.shape else value
                for name, value in moments.items()
            }
        self.optimizer.load_state_dict(state)
        self.scheduler.load_state_dict(saved["fake_scheduler"])
