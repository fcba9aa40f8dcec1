"""Presets, and the one frozen record of what a run optimises.

A preset means different divergences in the two pipelines, and only the two tokenizers tell which one it is: fields of
TIDEConfig that are None are filled here, once both tokenizers are known.

Shapes: B rows, N masked student positions, the first M of them paired with M_T of the teacher's, C chunks, H and K
hidden sizes, V and U vocabularies.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from transformers.utils import logging

from ..diffusion import chunk_loss_weight
from ..losses import (
    ChunkTerm,
    TokenTerm,
    bernoulli_reverse_kl_loss,
    calm_loss,
    chunk_log_likelihood,
    denoising_loss,
    expected_tidal_strength,
    forward_kl_loss,
    fused_loss,
    fused_true_token_log_probs,
    jsd_loss,
    reverse_calm_loss,
    reverse_kl_loss,
    tidal_chunk_loss,
    tidal_lambda,
    tidal_loss,
    timestep_weight,
    true_token_log_probs,
)
from ..models.masked_diffusion import loss_weight, masked_probability

logger = logging.get_logger(__name__)
TOKEN_DIVERGENCES = {"forward_kl": forward_kl_loss, "reverse_kl": reverse_kl_loss, "jsd": jsd_loss}
CHUNK_DIVERGENCES = {
    "calm": calm_loss,
    "reverse_calm": reverse_calm_loss,
    "bernoulli_reverse_kl": bernoulli_reverse_kl_loss,
}
DIVERGENCES = (*TOKEN_DIVERGENCES, *CHUNK_DIVERGENCES, "none")
TIDAL_FIELDS = (
    *("lambda_init", "lambda_max", "lambda_growth", "lambda_axes", "timestep_weight", "tidal_normalization"),
    "allow_reverse_tidal",
)
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
    def by_token(self) -> bool:
        """Whether token distributions are compared, not chunk likelihoods."""
        return self.divergence in TOKEN_DIVERGENCES

    @property
    def distills(self) -> bool:
        """Whether a teacher is needed."""
        return self.divergence != "none" and self.distill_weight != 0

    @property
    def evaluated(self) -> "Objective":
        """What evaluation reports: TIDAL at λ = 1, ω = 1 and no scale is its divergence to the teacher, which does not
        move while the weights stand still."""
        return replace(self, tidal=False, tidal_scale=1.0)

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
        """The loss of one micro-batch from logits, each term its local sum over the global count: the definition.

        Args:
            student_logits_NV (`torch.Tensor` of shape `(N, V)`): at the masked positions.
            batch (`Mapping`): see [`~tide_hf.diffusion.Noising`].
            counts (`torch.Tensor` of shape `(4,)`): trained-on tokens, pairs, active chunks and rows of the whole
                global batch.
            lambda_progress (`float`): λ(s) at this step.
            teacher_logits (`torch.Tensor` of shape `(M_T, U)`, *optional*): at the teacher's asked positions, in the
                order of `batch["teacher_asked"]`.
            shared_vocab_size (`int`, *optional*): ids that mean the same on both sides (token alignment).

        Returns:
            the scalar loss, and the detached, unweighted terms `ce` and `distill`.
        """
        weights_N, num_items = self._denoising_weights(batch, counts)
        ce = denoising_loss(student_logits_NV, batch["targets"], weights_N, num_items=num_items)
        loss, terms = self.ce_weight * ce, {"ce": ce.detach()}
        if not self.distills:
            return loss, terms
        rows, weights, strength, num_items = self._distillation_weights(batch, counts, lambda_progress)
        student = student_logits_NV[: len(batch["pair_chunk"])]
        if self.by_token:
            distill = self._token_loss(strength)(
                student,
                teacher_logits,
                num_items=num_items,
                temperature=self.temperature,
                weights_N=weights,
                shared_vocab_size=shared_vocab_size,
            )
        else:
            likelihoods = [
                chunk_log_likelihood(
                    true_token_log_probs(logits, batch[f"{side}targets"][: len(logits)]),
                    batch[f"{side}pair_chunk"],
                    len(rows),
                )
                for side, logits in (("", student), ("teacher_", teacher_logits))
            ]
            distill = self._chunk_loss(strength)(*likelihoods, num_items=num_items, weights_C=weights)
        return loss + self.distill_weight * distill, {**terms, "distill": distill.detach()}

    def from_hidden(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        counts: torch.Tensor,
        lambda_progress: float,
        teacher_hidden: torch.Tensor | None = None,
        teacher_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
        shared_vocab_size: int | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The same loss at a fraction of the memory (see `losses.fused`), and the same terms by row.

        Args:
            hidden_NH (`torch.Tensor` of shape `(N, H)`): the student's hidden states at the masked positions.
            weight_VH (`torch.Tensor` of shape `(V, H)`): its head's weight.
            teacher_hidden (`torch.Tensor` of shape `(M_T, K)`, *optional*): the teacher's at its asked positions.
            teacher_head (`Callable`, *optional*): hidden states to logits, without gradient.

        Returns:
            the scalar loss, and the detached, unweighted terms `ce` and `distill` of each row, `(B,)`; where the batch
            has `is_fill (N,)`, also `ce_answer`, which leaves those positions out.
        """
        precision = torch.promote_types(hidden_NH.dtype, torch.float32)
        weights_N, num_items = self._denoising_weights(batch, counts)
        weights_N = weights_N.to(precision) / num_items.clamp(min=1)
        if not self.distills:
            loss, nll_N, _ = fused_loss(hidden_NH, weight_VH, batch["targets"], self.ce_weight * weights_N)
            return loss, _denoising_terms(nll_N * weights_N, batch)
        rows, weights, strength, num_items = self._distillation_weights(batch, counts, lambda_progress)
        weights = weights.to(precision) / num_items.clamp(min=1)
        if self.by_token:
            term = TokenTerm(
                kind="tidal" if self.tidal else self.divergence,
                teacher_hidden_MK=teacher_hidden,
                teacher_head=teacher_head,
                weights=self.distill_weight * weights,
                temperature=self.temperature,
                lambda_M=strength,
                beta=self.jsd_beta,
                shared_vocab_size=shared_vocab_size,
            )
        else:
            log_probs = fused_true_token_log_probs(
                teacher_hidden, teacher_head, batch["teacher_targets"], len(weight_VH)
            )
            teacher_C = chunk_log_likelihood(log_probs, batch["teacher_pair_chunk"], len(rows))

            def chunk_values(student_C, chunks):
                loss = self._chunk_loss(None if strength is None else strength[chunks])
                return loss(student_C, teacher_C[chunks], num_items=None)

            term = ChunkTerm(chunk_values, batch["pair_chunk"], batch["chunk_ends"], self.distill_weight * weights)
        loss, nll_N, values = fused_loss(hidden_NH, weight_VH, batch["targets"], self.ce_weight * weights_N, term)
        return loss, {
            **_denoising_terms(nll_N * weights_N, batch),
            "distill": _by_row(values * weights, rows, batch["t"]),
        }

    def _denoising_weights(self, batch, counts) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the masked positions (N,) under the run's weighting, and what divides their sum."""
        t_N = batch["t"][batch["row"]]
        weights_N = torch.ones_like(t_N)
        if self.ce_weighting == "schedule" and self.chunk_weighting == "exact":
            weights_N = chunk_loss_weight(t_N, batch["chunk_tokens"], self.schedule)
        elif self.ce_weighting == "schedule":
            weights_N = loss_weight(t_N, self.schedule)
        num_items = counts[0].float()
        if self.loss_normalization != "token":
            num_items = counts[3].float().expand(len(t_N))
        if self.loss_normalization == "sequence":
            num_items = num_items * batch["row_tokens"][batch["row"]]
        return weights_N, num_items

    def _distillation_weights(self, batch, counts, lambda_progress):
        """Of the pairs (tokens) or active chunks: row, weight, TIDAL's λ (or None); and what divides their sum."""
        rows = batch["row"][: len(batch["pair_chunk"])] if self.by_token else batch["chunk_row"]
        t, num_items = batch["t"][rows], counts[1 if self.by_token else 2].float()
        if not self.tidal:
            return rows, torch.ones_like(t), None, num_items
        strength = tidal_lambda(lambda_progress, self.lambda_max, t, self.lambda_axes)
        return rows, timestep_weight(t, self.timestep_weight) * self.tidal_scale, strength, num_items

    def _token_loss(self, lambda_M):
        if self.tidal:
            return partial(tidal_loss, lambda_N=lambda_M)
        loss = TOKEN_DIVERGENCES[self.divergence]
        return partial(loss, beta=self.jsd_beta) if self.divergence == "jsd" else loss

    def _chunk_loss(self, lambda_C):
        if self.tidal:
            loss = partial(tidal_chunk_loss, lambda_C=lambda_C, reverse=self.divergence in REVERSE_DIVERGENCES)
        else:
            loss = CHUNK_DIVERGENCES[self.divergence]
        return partial(loss, temperature=self.temperature)


def _denoising_terms(values_N: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The denoising loss of each row, of all its positions and of those that are no fill."""
    terms = {"ce": _by_row(values_N, batch["row"], batch["t"])}
    if "is_fill" in batch:
        terms["ce_answer"] = _by_row(values_N * ~batch["is_fill"], batch["row"], batch["t"])
    return terms


def _by_row(values: torch.Tensor, rows: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """Sums by row, (B,)."""
    return values.new_zeros(len(t_B)).index_add_(0, rows, values)


def resolve_objective(config, alignment: str, schedule: str = "linear") -> Objective:
    """Fills every None of a configuration from its preset, for one pipeline.

    Args:
        config ([`TIDEConfig`]): given fields win over the preset's.
        alignment (`str`): `"token"` (shared tokenizer) or `"chunk"` (two tokenizers).
        schedule (`str`): the student's own `noise_schedule`, where the configuration gives none.

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
        schedule=config.schedule or schedule,
        ce_weighting=config.ce_weighting,
        chunk_weighting=config.chunk_weighting,
        loss_normalization=config.loss_normalization,
        **values,
    )
    _check_weights(objective)
    _warn_about_unread(config, objective)
    if objective.tidal and objective.tidal_normalization == "expected":
        strength = expected_tidal_strength(
            partial(masked_probability, schedule=objective.schedule),
            lambda_init=objective.lambda_init,
            lambda_max=objective.lambda_max,
            growth=objective.lambda_growth,
            axes=objective.lambda_axes,
            weight=objective.timestep_weight,
            time_epsilon=config.time_epsilon,
        )
        objective = replace(objective, tidal_scale=1 / strength)
    return objective


def _warn_about_unread(config, objective: Objective) -> None:
    """Says which fields were given and play no part in this objective."""
    read = {
        "jsd_beta": objective.divergence == "jsd",
        "demo_ratio": objective.comp_demo,
        "temperature": objective.distills,
        **dict.fromkeys(("tidal", "comp_demo"), objective.distills),
        **dict.fromkeys(TIDAL_FIELDS, objective.tidal),
    }
    unread = [f"{name}={getattr(config, name)}" for name, is_read in read.items() if not is_read]
    unread = [text for text in unread if not text.endswith(("=None", "=False"))]
    if unread:
        logger.warning(
            f"Given and not read, for the objective has no such part (divergence={objective.divergence!r}, "
            f"distill_weight={objective.distill_weight}, tidal={objective.tidal}, comp_demo={objective.comp_demo}): "
            f"{', '.join(unread)}."
        )


def _check_weights(objective: Objective) -> None:
    """Something must be learned."""
    axes = objective.lambda_axes
    is_still = objective.lambda_max == 0 and (objective.lambda_init == 0 or axes == "time")
    if objective.distills and objective.tidal and is_still:
        raise ValueError(
            f"lambda_init={objective.lambda_init} and lambda_max=0 with lambda_axes={axes!r} make TIDAL's target the "
            "student itself at every step, so that the teacher would teach nothing: raise lambda_max."
        )
    if objective.ce_weight == 0 and not objective.distills:
        raise ValueError(
            f"ce_weight=0 and no distillation term (divergence={objective.divergence!r}, distill_weight="
            f"{objective.distill_weight}) leave nothing to train on: set one of the weights."
        )


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
