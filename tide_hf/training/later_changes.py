"""Arguments that are changed after a trainer was made: honoured, or refused by name."""

from dataclasses import fields

from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from .arguments import AT_CONSTRUCTION, BY_THE_HUB, BY_THE_OPTIMIZER, changed_since, refuse_changes, snapshot

logger = logging.get_logger(__name__)
# two names for one setting, of which transformers reads the second
ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


class LaterChangesMixin:
    """Compares `trainer.args` with its earlier state when training and evaluation begin; a base before `Trainer`.

    Changed fields of `TrainingArguments` are honoured if Trainer reads them late, and refused if it has already used
    them. Of the library's own fields those in the sets below are honoured, and all others refused.
    """

    # own fields that are read while training and evaluating
    LIVE = frozenset({"dataset_num_proc"})
    # own fields that `_resolve_again` takes over
    RESOLVED = frozenset()

    def _honour_changes(self) -> None:
        """Takes over changes in `args`.

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
        """Makes the next training create its optimizer again."""
        if self.optimizer is not None and self._optimizer_is_given:
            refuse_changes(changed, self.args, self._args_before)
        self.optimizer = None

    def _resolve_again(self) -> None:
        """Decides again what follows from the fields in `RESOLVED`."""
