"""What happens to arguments that are changed after a trainer was made: honoured, or refused by name."""

from dataclasses import fields

from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from .arguments import AT_CONSTRUCTION, BY_THE_HUB, BY_THE_OPTIMIZER, changed_since, refuse_changes, snapshot

logger = logging.get_logger(__name__)
# of one setting of activation checkpointing, transformers reads the second name
ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


class LaterChangesMixin:
    """Looks at `trainer.args` when training and evaluation begin; stands before `transformers.Trainer`.

    Fields of `TrainingArguments` are honoured where Trainer reads them late, and refused where it has read them for
    good. Of the library's own fields the sets below are honoured; a field in none of them is refused.
    """

    # own fields that are read while training and evaluating
    LIVE = frozenset({"dataset_num_proc"})
    # own fields from which `_resolve_again` decides anew
    RESOLVED = frozenset()

    def _honour_changes(self) -> None:
        """Takes over what was changed in `args`.

        Raises:
            ValueError: naming what was changed and cannot be honoured.
        """
        args, before = self.args, self._args_before
        changed = changed_since(args, before)
        if not changed:
            return
        args.check()
        own = {field.name for field in fields(args)} - {field.name for field in fields(TrainingArguments)}
        fixed = AT_CONSTRUCTION | (own - self.LIVE - self.RESOLVED)
        if before["push_to_hub"]:
            fixed |= BY_THE_HUB
        refuse_changes(changed & fixed, args, before)
        for old, new in ALIASES.items():
            if old in changed and new not in changed and hasattr(args, new):
                setattr(args, new, getattr(args, old))
        if before["gradient_checkpointing"] and not args.gradient_checkpointing:
            refuse_changes({"gradient_checkpointing"}, args, before)
        if "per_device_train_batch_size" in changed:
            self._train_batch_size = args.train_batch_size
        if "seed" in changed:
            set_seed(args.seed)
        if changed & BY_THE_OPTIMIZER:
            self._renew_optimizer(changed & BY_THE_OPTIMIZER)
        if changed & self.RESOLVED:
            self._resolve_again()
        logger.info(f"Changed since the trainer was made: {', '.join(sorted(changed))}")
        self._args_before = snapshot(args)

    def _renew_optimizer(self, changed: set[str]) -> None:
        """The next training makes its optimizer anew."""
        if self.optimizer is not None and self._optimizer_is_given:
            refuse_changes(changed, self.args, self._args_before)
        self.optimizer = None

    def _resolve_again(self) -> None:
        """Decides anew what follows from `RESOLVED`."""
