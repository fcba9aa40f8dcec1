"""Refuses to train or decode a diffusion LM as if it were autoregressive, which would fail silently.

This file travels with checkpoints: it imports nothing.
"""

FOREIGN_LOSS = (
    "{how}: this is a diffusion LM, which sees the whole input, and a loss on tokens that it can see (next-token, "
    "smoothed labels, policy gradients) teaches it to copy. Train it with TIDETrainer or with transformers.Trainer, "
    "whose batches with `labels` give the denoising loss; set `model.accepts_foreign_loss = True` if this loss is "
    "made for it."
)
# a model learns which trainer takes it by the tags: TRL's trainers add them to the model at the end of their __init__.
# SFTTrainer can be made to use the model's own loss, and its own is refused when it runs
TRAINERS_WITH_A_WAY_OUT = {"sft"}


class RefusesNextTokenTrainers:
    """Refuses TRL's trainers for autoregressive models when they are built; stands first in the bases."""

    accepts_foreign_loss: bool = False

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


class NotYetAStudent(RefusesNextTokenTrainers):
    """A family that this library uses as a teacher only; stands first in the bases."""

    def forward(self, *args, labels=None, **kwargs):
        """The base class's forward, with its arguments, but without `labels`.

        Raises:
            ValueError: for `labels`, which the base class would score as next tokens.
        """
        if labels is not None:
            raise ValueError(
                f"{type(self).__name__} is a diffusion LM that this library uses as a teacher; the loss of its base "
                "class scores the next token, which it was not trained to predict. Compute the loss from the "
                "logits, or train a student (tide_hf.models.convert_to_diffusion, TIDETrainer)."
            )
        return super().forward(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """Refused: the base class would write one next token after another.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} is a diffusion LM that this library uses as a teacher; the generate of its base "
            "class writes next tokens, which it was not trained to predict. Its authors' code decodes it."
        )
