"""What a run optimises: one frozen record; calling it gives the loss of a micro-batch.

Shapes: B rows, N masked student positions, the first M of them paired with M_T of the teacher's, C chunks, H and K
hidden sizes, V and U vocabularies.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from ..diffusion import NoisedBatch, chunk_loss_weight
from ..diffusion.cached import CachedPredictions
from ..losses import (
    Divergence,
    Segment,
    chunk_divergence,
    chunk_log_likelihood,
    denoising_loss,
    sliced_log_probs,
    sliced_loss,
    tidal_lambda,
    timestep_weight,
    token_divergence,
    top_k_divergence,
)
from ..models.masked_diffusion import loss_weight

NO_DIVERGENCE = "none"


@dataclass(frozen=True)
class TeacherStates:
    """What a teacher that has just been run provides for a batch.

    Args:
        hidden (`torch.Tensor` of shape `(M_T, K)`): its hidden states at its asked positions.
        head (`Callable`): hidden states `(R, K)` to logits `(R, U)`, without gradient.
        shared_vocab_size (`int`): ids that mean the same on both sides; used where tokens are compared.
    """

    hidden: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]
    shared_vocab_size: int

    @property
    def frozen(self) -> tuple[Callable[[slice], torch.Tensor], ...]:
        """Its logits at some of the paired positions, for a [`~tide_hf.losses.Segment`]."""
        return (lambda rows: self.head(self.hidden[rows]),)

    def divergence(self, divergence: Divergence, logits: torch.Tensor, rows: slice, *frozen, **settings):
        """[`~tide_hf.losses.token_divergence`] at some of the paired positions, `(R,)`.

        Args:
            divergence ([`~tide_hf.losses.Divergence`]): D.
            logits (`torch.Tensor` of shape `(R, V)`): the student's.
            rows (`slice`): which positions.
            frozen: what `frozen` gave for them.
            settings: temperature and λ.
        """
        return token_divergence(divergence, logits, *frozen, shared_vocab_size=self.shared_vocab_size, **settings)

    def log_probs(self, targets: torch.Tensor, vocab: int) -> torch.Tensor:
        """Log-probabilities `(M_T,)` of its true tokens `targets`, in slices as for a head of `vocab` tokens."""
        return sliced_log_probs(self.hidden, self.head, targets, vocab)


@dataclass(frozen=True)
class CachedStates:
    """The same of a teacher that was run before.

    Args:
        predictions ([`~tide_hf.diffusion.cached.CachedPredictions`]): at its asked positions.
        shared_vocab_size (`int`): as there.
    """

    predictions: CachedPredictions
    shared_vocab_size: int

    frozen = ()

    def divergence(self, divergence: Divergence, logits: torch.Tensor, rows: slice, **settings):
        """[`~tide_hf.losses.top_k_divergence`] at some of the paired positions, `(R,)`.

        Args:
            divergence ([`~tide_hf.losses.Divergence`]), logits (`torch.Tensor` of shape `(R, V)`), rows (`slice`),
                settings: as there.
        """
        ids, log_probs = self.predictions.top_ids[rows], self.predictions.top_log_probs[rows]
        return top_k_divergence(
            divergence, logits, ids, log_probs, shared_vocab_size=self.shared_vocab_size, **settings
        )

    def log_probs(self, targets: torch.Tensor, vocab: int) -> torch.Tensor:
        """Log-probabilities `(M_T,)` of its true tokens; `targets` and `vocab` are not needed."""
        return self.predictions.log_probs


@dataclass(frozen=True)
class Objective:
    """What one run optimises, with every field decided.

    Fields as in [`~tide_hf.TIDEConfig`]; but `divergence` is None where nothing is distilled, and TIDAL's loss is
    multiplied by `tidal_scale`: 1, or the reciprocal of its expected strength.
    """

    preset: str | None
    alignment: str
    divergence: Divergence | None
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
    schedule: str
    ce_weighting: str
    chunk_weighting: str
    loss_normalization: str
    tidal_scale: float = 1.0
    on_policy_fraction: float = 0.0
    suffix_mask_fraction: float = 0.0
    ar_targets: str | None = None

    @property
    def by_token(self) -> bool:
        """Whether token distributions are compared, not chunk likelihoods."""
        return self.divergence is not None and self.divergence.pairs == "token"

    @property
    def distills(self) -> bool:
        """Whether a teacher is needed."""
        return self.divergence is not None and self.distill_weight != 0

    @property
    def evaluated(self) -> "Objective":
        """What evaluation reports: with TIDAL, the divergence to the teacher itself (λ = 1, ω = 1, no scale), which
        does not change at fixed weights; for the same reason, annealed targets all count. The rows are the data's."""
        ar_targets = "all" if self.ar_targets == "annealed" else self.ar_targets
        return replace(self, tidal=False, tidal_scale=1.0, ar_targets=ar_targets, on_policy_fraction=0.0)

    def to_dict(self) -> dict:
        """Plain values, for logs and cards; a divergence as its name and parameters."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("suffix_mask_fraction", "ar_targets", "on_policy_fraction"):
            if not values[name]:  # most runs have no such part
                del values[name]
        values["divergence"] = NO_DIVERGENCE if self.divergence is None else self.divergence.name
        return values if self.divergence is None else {**values, **self.divergence.to_dict()}

    def __call__(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        batch: NoisedBatch,
        lambda_progress: float,
        teacher: TeacherStates | CachedStates | None = None,
        progress: float = 0.0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one micro-batch: each term is its local sum divided by its global count.

        Args:
            hidden_NH (`torch.Tensor` of shape `(N, H)`): the student's hidden states at the masked positions.
            weight_VH (`torch.Tensor` of shape `(V, H)`): its head's weight.
            batch ([`~tide_hf.diffusion.NoisedBatch`]): with the counts of the global batch.
            lambda_progress (`float`): λ(s) at this step.
            teacher ([`TeacherStates`] or [`CachedStates`], *optional*): needed if the objective distils.
            progress (`float`): s, the share of training that is done; annealed targets weigh 1 − s where not exact.

        Returns:
            the scalar loss, and the detached, unweighted terms `ce` and `distill` of each row, `(B,)`; where the batch
            has `is_fill`, also `ce_answer`, which leaves those positions out; and, with an `on_policy_fraction`,
            `on_policy`, the divergence in rows that the student wrote, of which the other terms know nothing.
        """
        precision = torch.promote_types(hidden_NH.dtype, torch.float32)
        targets_N, weights_N = batch.student.targets, self._denoising_weights(batch).to(precision)
        nll_N, num_paired = torch.zeros_like(weights_N), 0 if not self.distills else len(batch.pairs.student_chunk)

        def nll_of(logits, rows):
            nll = denoising_loss(logits, targets_N[rows], num_items=None)
            nll_N[rows] = nll.detach()
            return nll

        def denoising(nll, rows):
            return (1 - self.on_policy_fraction) * self.ce_weight * (nll * weights_N[rows]).sum()

        def alone(logits, rows):
            return denoising(nll_of(logits, rows), rows)

        segments = [Segment(slice(num_paired, len(targets_N)), alone)]
        if self.distills:
            compared = _Compared(self, batch, lambda_progress, progress, teacher, precision, len(weight_VH))

            def paired(logits, rows, *teacher_logits):
                nll = nll_of(logits, rows)
                distill = compared.weighted(logits, -nll, rows, *teacher_logits)
                return denoising(nll, rows) + self.distill_weight * distill

            segments.append(Segment(slice(0, num_paired), paired, compared.frozen, compared.ends))
        loss = sliced_loss(hidden_NH, weight_VH, segments)
        terms = _denoising_terms(nll_N * weights_N, batch)
        if self.distills:
            terms["distill"] = _by_row(compared.values * compared.weights, compared.rows, batch)
        if self.on_policy_fraction:
            terms["on_policy"] = terms["distill"] * batch.is_written
            terms["distill"] = terms["distill"] * ~batch.is_written
        return loss, {name: terms[name] for name in ("on_policy",)} if self.on_policy_fraction == 1 else terms

    def compared_rows(self, batch: NoisedBatch) -> torch.Tensor:
        """The row of each compared pair of tokens `(M,)`, or of each active chunk `(C,)`, of a `batch`."""
        pairs = batch.pairs
        return batch.row[: len(pairs.student_chunk)] if self.by_token else pairs.chunk_row

    def _denoising_weights(self, batch: NoisedBatch) -> torch.Tensor:
        """Weights of the masked positions under the run's weighting, each divided by the divisor of the loss, (N,)."""
        t_N, counts = batch.t[batch.row], batch.counts
        weights_N = torch.ones_like(t_N)
        if self.ce_weighting == "schedule" and self.chunk_weighting == "exact":
            weights_N = chunk_loss_weight(t_N, batch.chunk_tokens, self.schedule)
        elif self.ce_weighting == "schedule":
            weights_N = loss_weight(t_N, self.schedule)
        if self.ce_weighting == "schedule" and batch.suffix_weight is not None:
            weights_N = torch.where(batch.suffix_weight > 0, batch.suffix_weight.to(t_N), weights_N)
        num_items = counts.tokens if self.loss_normalization == "token" else counts.rows
        if self.loss_normalization == "sequence":
            num_items = num_items * batch.row_tokens[batch.row]
        weights_N = weights_N / num_items.to(t_N).clamp(min=1)
        return weights_N if batch.is_written is None else weights_N * ~batch.is_written[batch.row]


class _Compared:
    """The pairs of tokens, or active chunks, that are compared with the teacher, and each one's value once computed.

    Attributes:
        rows, weights, values (`torch.Tensor` of shape `(M,)` or `(C,)`): row; ω(t) / global count; divergence.
        shares (`float`, or `torch.Tensor` of the same shape): what the loss counts each for: the share of its kind of
            row, where the student writes some.
        frozen, ends: of the [`~tide_hf.losses.Segment`] of the paired positions.
    """

    def __init__(self, objective: Objective, batch, lambda_progress, progress, teacher, precision, vocab):
        self.divergence, self.temperature = objective.divergence, objective.temperature
        self.by_token, self.pairs = objective.by_token, batch.pairs
        self.teacher, self.strength = teacher, None
        self.rows = objective.compared_rows(batch)
        t = batch.t[self.rows]
        weights = torch.ones_like(t)
        if objective.tidal:
            self.strength = tidal_lambda(lambda_progress, objective.lambda_max, t, objective.lambda_axes)
            weights = timestep_weight(t, objective.timestep_weight) * objective.tidal_scale
        if objective.ar_targets == "annealed":
            # with a shared vocabulary a chunk is one token
            weights = torch.where(self.pairs.is_exact, weights, weights * (1 - progress))
        counts, self.shares = batch.counts, 1.0
        num_items = counts.pairs if self.by_token else counts.chunks
        if objective.on_policy_fraction:
            written, share = batch.is_written[self.rows], objective.on_policy_fraction
            num_written = counts.written_pairs if self.by_token else counts.written_chunks
            num_items = torch.where(written, num_written, num_items)
            self.shares = torch.where(written, share, 1 - share).to(precision)
        self.weights = (weights / num_items.to(t).clamp(min=1)).to(precision)
        self.values = torch.zeros_like(self.weights)
        if self.by_token:
            self.frozen, self.ends = teacher.frozen, None
        else:
            self.frozen, self.ends = (), self.pairs.chunk_ends
            log_probs = teacher.log_probs(batch.teacher.targets, vocab)
            self.teacher_C = chunk_log_likelihood(log_probs, self.pairs.teacher_chunk, len(self.rows))

    def weighted(
        self, logits: torch.Tensor, log_probs: torch.Tensor, rows: slice, *teacher_logits: torch.Tensor
    ) -> torch.Tensor:
        """Σ ω · D / count over some positions, scalar; records each value. `log_probs` are the true tokens'."""
        if self.by_token:
            which = rows
            settings = {"temperature": self.temperature, "lambda_N": self._strength(which)}
            values = self.teacher.divergence(self.divergence, logits, which, *teacher_logits, **settings)
        else:
            # the positions are cut at the ends of chunks only, so these are whole
            which = slice(bisect_left(self.ends, rows.start + 1), bisect_left(self.ends, rows.stop) + 1)
            chunk_ids, num_chunks = self.pairs.student_chunk[rows] - which.start, which.stop - which.start
            values = chunk_divergence(
                self.divergence,
                chunk_log_likelihood(log_probs, chunk_ids, num_chunks),
                self.teacher_C[which],
                temperature=self.temperature,
                lambda_C=self._strength(which),
            )
        self.values[which] = values.detach()
        values = values * self.weights[which]
        return (values if isinstance(self.shares, float) else values * self.shares[which]).sum()

    def _strength(self, which: slice) -> torch.Tensor | None:
        return None if self.strength is None else self.strength[which]


def _denoising_terms(values_N: torch.Tensor, batch: NoisedBatch) -> dict[str, torch.Tensor]:
    """The denoising loss of each row, of all its positions and of those that are not fill."""
    terms = {"ce": _by_row(values_N, batch.row, batch)}
    if batch.is_fill is not None:
        terms["ce_answer"] = _by_row(values_N * ~batch.is_fill, batch.row, batch)
    return terms


def _by_row(values: torch.Tensor, rows: torch.Tensor, batch: NoisedBatch) -> torch.Tensor:
    """Sums by row, (B,)."""
    return values.new_zeros(len(batch.t)).index_add_(0, rows, values)
