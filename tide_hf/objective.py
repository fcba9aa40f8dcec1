"""Presets, and the one frozen record of what a run optimises.

A preset means different divergences in the two pipelines, and only the two tokenizers tell which one it is: fields of
TIDEConfig that are None are filled here, once both tokenizers are known.

Shapes: N masked student positions, M pairs with teacher positions, C chunks, V and U vocabularies.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch

from .diffusion import chunk_loss_weight
from .losses import (
    bernoulli_reverse_kl_loss,
    calm_loss,
    chunk_log_likelihood,
    denoising_loss,
    expected_tidal_strength,
    forward_kl_loss,
    jsd_loss,
    reverse_calm_loss,
    reverse_kl_loss,
    tidal_chunk_loss,
    tidal_lambda,
    tidal_loss,
    timestep_weight,
    true_token_log_probs,
)
from .models.masked_diffusion import loss_weight, masked_probability

TOKEN_DIVERGENCES = {"forward_kl": forward_kl_loss, "reverse_kl": reverse_kl_loss, "jsd": jsd_loss}
CHUNK_DIVERGENCES = {
    "calm": calm_loss,
    "reverse_calm": reverse_calm_loss,
    "bernoulli_reverse_kl": bernoulli_reverse_kl_loss,
}
DIVERGENCES = (*TOKEN_DIVERGENCES, *CHUNK_DIVERGENCES, "none")
REVERSE_DIVERGENCES = ("reverse_kl", "reverse_calm", "bernoulli_reverse_kl")
ALIGNMENTS = ("token", "chunk")

# preset -> fields; a pair is (shared tokenizer, two tokenizers). Source: TIDE 2604.26951, tables of hyperparameters.
PRESETS = {
    "tide-shared": {"divergence": ("forward_kl", "calm"), "tidal": True, "comp_demo": True},
    "tide-cross": {"divergence": ("reverse_kl", "reverse_calm")},
    "kl": {"divergence": ("forward_kl", None)},
    "reverse-kl": {"divergence": ("reverse_kl", None)},
    "calm": {"divergence": ("calm", "calm")},
    "ce": {"divergence": ("none", "none")},
}
PRESET_DEFAULTS = {
    "tidal": False,
    "comp_demo": False,
    "ce_weight": 1.0,
    "distill_weight": 1.0,
    "temperature": 2.0,
    "lambda_init": 0.1,
    "lambda_max": 0.9,
    "lambda_growth": "cosine",
    "lambda_axes": "both",
    "timestep_weight": "midrange",
    "tidal_normalization": "none",
    "demo_ratio": 0.5,
    "jsd_beta": 0.5,
}


@dataclass(frozen=True)
class Objective:
    """What one run optimises, every field decided. Field meanings: [`TIDEConfig`].

    `tidal_scale` is what TIDAL's loss is multiplied by: 1, or one over its expected strength.
    """

    preset: str | None
    alignment: str
    divergence: str
    tidal: bool
    comp_demo: bool
    ce_weight: float
    distill_weight: float
    temperature: float
    lambda_init: float
    lambda_max: float
    lambda_growth: str
    lambda_axes: str
    timestep_weight: str
    tidal_normalization: str
    demo_ratio: float
    jsd_beta: float
    schedule: str
    ce_weighting: str
    chunk_weighting: str
    loss_normalization: str
    tidal_scale: float = 1.0

    @property
    def distills(self) -> bool:
        """Whether a teacher is needed."""
        return self.divergence != "none" and self.distill_weight != 0

    def to_dict(self) -> dict:
        """Plain values, for logs and cards."""
        return asdict(self)

    def __call__(
        self,
        student_logits_NV: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        counts: torch.Tensor,
        lambda_progress: float,
        teacher_logits: torch.Tensor | None = None,
        shared_vocab_size: int | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one micro-batch, each term its local sum over the global count.

        Args:
            student_logits_NV (`torch.Tensor` of shape `(N, V)`): at the masked positions.
            batch (`Mapping`): see [`~tide_hf.data.Noising`].
            counts (`torch.Tensor` of shape `(4,)`): trained-on tokens, pairs, active chunks and rows of the whole
                global batch.
            lambda_progress (`float`): λ(s) at this step.
            teacher_logits (`torch.Tensor` of shape `(M_T, U)`, *optional*): at the teacher's asked positions, in the
                order of `batch["teacher_asked"]`.
            shared_vocab_size (`int`, *optional*): ids that mean the same on both sides (token alignment).

        Returns:
            the scalar loss, and the detached, unweighted terms `ce` and `distill`.
        """
        ce = self._denoising(student_logits_NV, batch, counts)
        loss, terms = self.ce_weight * ce, {"ce": ce.detach()}
        if self.distills:
            distill = self._distillation(
                student_logits_NV, batch, counts, lambda_progress, teacher_logits, shared_vocab_size
            )
            loss, terms["distill"] = loss + self.distill_weight * distill, distill.detach()
        return loss, terms

    def _denoising(self, student_logits_NV, batch, counts) -> torch.Tensor:
        """CE on all masked positions under the run's weighting and normalisation."""
        t_N = batch["t"][batch["row"]]
        weights_N = 1.0
        if self.ce_weighting == "schedule" and self.chunk_weighting == "exact":
            weights_N = chunk_loss_weight(t_N, batch["chunk_tokens"], self.schedule)
        elif self.ce_weighting == "schedule":
            weights_N = loss_weight(t_N, self.schedule)
        num_items = counts[0].float()
        if self.loss_normalization != "token":
            num_items = counts[3].float().expand(len(t_N))
        if self.loss_normalization == "sequence":
            num_items = num_items * batch["row_tokens"][batch["row"]]
        return denoising_loss(student_logits_NV, batch["targets"], weights_N, num_items=num_items)

    def _distillation(self, student_logits_NV, batch, counts, lambda_progress, teacher_logits, shared_vocab_size):
        """The divergence, or TIDAL, over pairs (tokens) or active chunks."""
        pair, teacher_pair = batch["pair"], batch["teacher_pair"]
        by_token = self.divergence in TOKEN_DIVERGENCES
        t = batch["t"][batch["row"][pair] if by_token else batch["chunk_row"]]
        num_items = counts[1 if by_token else 2].float()
        student, teacher = student_logits_NV[pair], teacher_logits[teacher_pair]
        shared = {"shared_vocab_size": shared_vocab_size} if by_token else {}
        if not by_token:
            student = self._chunk_likelihoods(student, batch["targets"][pair], batch["pair_chunk"], len(t))
            teacher = self._chunk_likelihoods(
                teacher, batch["teacher_targets"][teacher_pair], batch["teacher_pair_chunk"], len(t)
            )
        if self.tidal:
            tidal = tidal_loss if by_token else self._tidal_chunk_loss()
            weights = timestep_weight(t, self.timestep_weight) * self.tidal_scale
            strength = tidal_lambda(lambda_progress, self.lambda_max, t, self.lambda_axes)
            weighted = {"weights_N" if by_token else "weights_C": weights}
            return tidal(
                student, teacher, strength, num_items=num_items, temperature=self.temperature, **weighted, **shared
            )
        divergence = {**TOKEN_DIVERGENCES, **CHUNK_DIVERGENCES}[self.divergence]
        if self.divergence == "jsd":
            divergence = partial(divergence, beta=self.jsd_beta)
        return divergence(student, teacher, num_items=num_items, temperature=self.temperature, **shared)

    def _chunk_likelihoods(self, logits, targets, chunk_numbers, num_chunks):
        return chunk_log_likelihood(true_token_log_probs(logits, targets), chunk_numbers, num_chunks)

    def _tidal_chunk_loss(self):
        return partial(tidal_chunk_loss, reverse=self.divergence in REVERSE_DIVERGENCES)


def resolve_objective(config, alignment: str) -> Objective:
    """Fills every None of a configuration from its preset, for one pipeline.

    Args:
        config ([`TIDEConfig`]): given fields win over the preset's.
        alignment (`str`): `"token"` (shared tokenizer) or `"chunk"` (two tokenizers).

    Raises:
        ValueError: for fields that do not go together, with the reason.
    """
    preset = dict(PRESETS[config.preset]) if config.preset else {"divergence": (None, None)}
    preset["divergence"] = preset["divergence"][ALIGNMENTS.index(alignment)]
    values = {**PRESET_DEFAULTS, **preset}
    values |= {name: getattr(config, name) for name in values if getattr(config, name) is not None}
    divergence = values["divergence"]
    if divergence is None:
        why = (
            f"preset {config.preset!r} compares vocabularies token by token" if config.preset else "no preset is given"
        )
        raise ValueError(
            f"{why}, so the {alignment} pipeline needs divergence set: one of "
            f"{', '.join(DIVERGENCES if alignment == 'token' else CHUNK_DIVERGENCES)}."
        )
    if alignment == "chunk" and divergence in TOKEN_DIVERGENCES:
        raise ValueError(
            f"divergence={divergence!r} compares token distributions, which needs one shared vocabulary; teacher and "
            f"student have different tokenizers here. Use one of {', '.join(CHUNK_DIVERGENCES)}."
        )
    if divergence == "none":
        values |= {"tidal": False, "comp_demo": False}
    if values["tidal"]:
        _check_tidal(divergence, config.allow_reverse_tidal)
    objective = Objective(
        preset=config.preset,
        alignment=alignment,
        schedule=config.schedule,
        ce_weighting=config.ce_weighting,
        chunk_weighting=config.chunk_weighting,
        loss_normalization=config.loss_normalization,
        **values,
    )
    if objective.tidal and objective.tidal_normalization == "expected":
        strength = expected_tidal_strength(
            partial(masked_probability, schedule=config.schedule),
            lambda_init=objective.lambda_init,
            lambda_max=objective.lambda_max,
            growth=objective.lambda_growth,
            axes=objective.lambda_axes,
            weight=objective.timestep_weight,
            time_epsilon=config.time_epsilon,
        )
        objective = Objective(**{**objective.to_dict(), "tidal_scale": 1 / strength})
    return objective


def _check_tidal(divergence: str, allow_reverse: bool) -> None:
    """TIDAL goes with forward objectives."""
    if divergence in REVERSE_DIVERGENCES:
        if allow_reverse and divergence == "reverse_calm":
            return
        raise ValueError(
            f"tidal=True goes with forward objectives only, got divergence={divergence!r}: late in training and at "
            "large t the (1−λ) share of the target suppresses the self-selection that reverse objectives live on. Use "
            "divergence='forward_kl' (shared tokenizer) or 'calm' (two tokenizers)"
            + (", or allow_reverse_tidal=True for the ablation." if divergence == "reverse_calm" else ".")
        )
    if divergence not in ("forward_kl", "calm"):
        raise ValueError(f"tidal=True needs divergence 'forward_kl' or 'calm', got {divergence!r}.")
