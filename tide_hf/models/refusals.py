"""Refuses to train or decode a diffusion LM as if it were autoregressive, which would fail silently.

This file travels with checkpoints: it imports nothing.
"""

FOREIGN_LOSS = (
    "{how}: this is a diffusion LM, and a loss on tokens that stand in its input (next-token, smoothed labels, policy "
    "gradients) teaches it to copy them, or to write from left to right. Train it with TIDETrainer or with "
    "transformers.Trainer, whose batches with `labels` give the denoising loss; set `model.accepts_foreign_loss = "
    "True` if this loss is made for it."
)
# a model learns which trainer takes it by the tags: TRL's trainers add them to the model at the end of their __init__.
# SFTTrainer can be made to use the model's own loss, and its own is refused when it runs
TRAINERS_WITH_A_WAY_OUT = {"sft"}


class RefusesNextTokenTrainers:
    """Refuses trainers for autoregressive models; stands first in the bases.

    TRL's are refused when they are built; one that replaces `forward`, when it runs the network's body.

    Args:
        config (`PreTrainedConfig`): of the network.
    """

    accepts_foreign_loss: bool = False

    def __init__(self, config):
        super().__init__(config)
        self._runs_body = False
        self.model.register_forward_pre_hook(self._refuse_a_loss_that_bypasses_forward)

    def run_body(self, **kwargs):
        """The network without its head, called with `kwargs` by its own forward."""
        self._runs_body = True
        try:
            return self.model(**kwargs)
        finally:
            self._runs_body = False

    def _refuse_a_loss_that_bypasses_forward(self, *_):
        """Stops a trainer that replaced `forward` and runs the body under a causal loss of its own."""
        if self.training and not self._runs_body and "forward" in vars(self):
            raise ValueError(
                "The forward of this diffusion LM was replaced by one that scores the next token, as TRL's SFTTrainer "
                "does; a bidirectional model would learn to copy its input. Train it with TIDETrainer, with "
                "transformers.Trainer, or with `class DiffusionSFTTrainer(SFTTrainer): compute_loss = "
                "Trainer.compute_loss`, which takes the model's own loss."
            )

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Adds `tags` for the Hub, as in transformers.

        Raises:
            ValueError: for the tags of a TRL trainer whose loss would teach a diffusion LM to copy its input.
        """
        names = [tags] if isinstance(tags, str) else list(tags)
        trainers = [name for name in names if name not in {"trl", *TRAINERS_WITH_A_WAY_OUT}]
        if "trl" in names and trainers and not self.accepts_foreign_loss:
            raise ValueError(FOREIGN_LOSS.format(how=f"TRL's {trainers[0]} trainer scores the tokens of its input"))
        super().add_model_tags(tags)
