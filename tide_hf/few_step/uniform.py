"""Inverse distillation of a uniform-state diffusion LM (IDLM 2602.19066 with Duo 2506.10892).

The student's predictions q enter the noised sequence `x_t = α̃ q + σ̃ ξ`, which all networks see softly, as
softmax(x_t/τ): the gradient reaches q through the inputs of teacher and fake too, unlike in the masked case. The loss
is evaluated at z = argmax x_t.

Shapes: B rows, L positions, V vocabulary, N trained-on positions.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.utils import DistributedType

from ..diffusion import Record, gaussian_schedule
from ..losses.denoising import as_full_precision
from ..models import NOISE_EPSILON, uniform_divergence
from .config import IDLMConfig
from .noising import Draws
from .trainer import IDLMTrainer


@dataclass
class UniformBatch(Record):
    """One micro-batch of an update of a uniform-state model.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, L)`): the rows' own tokens.
        attention_mask (`torch.LongTensor` of shape `(B, L)`): 0 at padding.
        trained (`torch.BoolTensor` of shape `(B, L)`): positions that are trained on.
        student_alpha, alpha (`torch.Tensor` of shape `(B,)`): α of the student's noise, and of x_t's.
        noise_key (`torch.LongTensor` of shape `(B,)`): of the Gaussian noise.
        row_key (`torch.LongTensor` of shape `(B,)`): of the row.
        num_rows (`torch.Tensor`): the loss's divisor; see [`~tide_hf.few_step.batch.InverseBatch`].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    trained: torch.Tensor
    student_alpha: torch.Tensor
    alpha: torch.Tensor
    noise_key: torch.Tensor
    row_key: torch.Tensor
    num_rows: torch.Tensor

    @property
    def inputs(self) -> "UniformBatch":
        """What the student is run on."""
        return self

    @property
    def is_real(self) -> torch.Tensor:
        """bool `(B, L)`: False at padding."""
        return self.attention_mask.bool()

    def row_ids(self, row: int) -> torch.Tensor:
        """Token ids of a `row`."""
        return self.input_ids[row][self.is_real[row]]


@dataclass(frozen=True)
class UniformNoising:
    """Draws α of both noises and the keys of the Gaussian ones, on the host.

    Args:
        student_grid (`int`, *optional*): S: the student learns at the α that S steps of `generate` start from; None: α
            uniform in [ε, 1 − ε], as t always is.
    """

    student_grid: int | None = None

    def __call__(self, batch: Mapping[str, torch.Tensor], draws: Draws) -> UniformBatch:
        """A collated `batch` with the noise of its `draws`."""
        student_t = _within(draws.student_time)
        if self.student_grid is not None:
            student_t = ((draws.student_time * self.student_grid).floor() + 1) / self.student_grid
            student_t = student_t.clamp(NOISE_EPSILON, 1 - NOISE_EPSILON)
        # two draws of 24 bits of the row's first position, so that the key does not depend on the batch
        key = (draws.token[:, 0].double() * 2**24).long() * 2**24 + (draws.mask[:, 0].double() * 2**24).long()
        return UniformBatch(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            trained=batch["labels"] != -100,
            student_alpha=1 - student_t,
            alpha=1 - _within(draws.time),
            noise_key=key,
            row_key=batch["row_key"],
            num_rows=torch.tensor(float(len(batch["input_ids"]))),
        )


class UniformStep:
    """The two losses of a micro-batch, with the interface of [`~tide_hf.few_step.step.InverseStep`].

    Args:
        num_tokens (`int`): V.
        temperature (`float`): τ of the soft inputs.
    """

    def __init__(self, num_tokens: int, temperature: float):
        self.num_tokens, self.temperature = num_tokens, temperature
        self.schedule = gaussian_schedule(num_tokens)

    def fake_loss(self, student: Callable, fake: Callable, batch: UniformBatch, by_row: bool = False):
        """L(f, q): Σ over trained-on positions / number of rows, with gradient through the fake alone.

        Arguments and result as in [`~tide_hf.few_step.step.InverseStep.fake_loss`], the batch a [`UniformBatch`].
        """
        with torch.no_grad():
            clean_BLV, soft_BLV, noised_BL = self._generated(student, batch)
        values_BL = self._values(fake, clean_BLV, soft_BLV, noised_BL, batch)
        return (values_BL.sum(1) if by_row else values_BL.sum()) / batch.num_rows

    def student_loss(
        self, student: Callable, teacher: Callable, fake: Callable, batch: UniformBatch, by_row: bool = False
    ):
        """L(f*, q) − L(f, q), with gradient through the student alone: through q, and through x_t in both networks.

        Arguments and result as in [`~tide_hf.few_step.step.InverseStep.student_loss`], the batch a [`UniformBatch`].
        """
        clean_BLV, soft_BLV, noised_BL = self._generated(student, batch)
        fake = getattr(fake, "module", fake)  # without DDP's hooks, which would wait for gradients of the fake
        with _frozen(fake):
            values_BL = self._values(teacher, clean_BLV, soft_BLV, noised_BL, batch) - self._values(
                fake, clean_BLV, soft_BLV, noised_BL, batch
            )
        return (values_BL.sum(1) if by_row else values_BL.sum()) / batch.num_rows

    def _generated(self, student, batch):
        """q `(B, L, V)`, the soft input made of it, and z `(B, L)`; one-hots and the row's own tokens in prompts."""
        real_BLV = torch.nn.functional.one_hot(batch.input_ids, self.num_tokens).float()
        noise_2BLV = self._noise(batch)
        soft_BLV, _ = self._noised(real_BLV, noise_2BLV[0], batch.student_alpha, batch)
        q_BLV = self._probabilities(student, soft_BLV, batch.student_alpha, batch)
        clean_BLV = torch.where(batch.trained[..., None], q_BLV, real_BLV)
        return clean_BLV, *self._noised(clean_BLV, noise_2BLV[1], batch.alpha, batch)

    def _noise(self, batch) -> torch.Tensor:
        """ξ of both noises `(2, B, L, V)`, by each row's key, position by position."""
        length, device, drawn = batch.input_ids.shape[1], batch.input_ids.device, []
        for key in batch.noise_key.tolist():
            generator = torch.Generator(device).manual_seed(key)
            drawn.append(torch.randn(length, 2, self.num_tokens, device=device, generator=generator))
        return torch.stack(drawn).permute(2, 0, 1, 3)

    def _noised(self, clean_BLV, noise_BLV, alpha_B, batch):
        """softmax(x_t/τ) and argmax x_t where trained on, the tokens themselves elsewhere."""
        gamma_B11 = self.schedule.gamma(alpha_B.cpu()).to(clean_BLV)[:, None, None]
        latent_BLV = (-gamma_B11).sigmoid().sqrt() * clean_BLV + gamma_B11.sigmoid().sqrt() * noise_BLV
        trained_BL1 = batch.trained[..., None]
        soft_BLV = torch.where(trained_BL1, (latent_BLV / self.temperature).softmax(-1), clean_BLV)
        return soft_BLV, torch.where(batch.trained, latent_BLV.argmax(-1), batch.input_ids)

    def _probabilities(self, network, soft_BLV, alpha_B, batch) -> torch.Tensor:
        logits_BLV = network(
            token_probabilities=soft_BLV,
            attention_mask=batch.attention_mask,
            noise_level=(1 - alpha_B)[:, None] * batch.trained,
        ).logits
        return as_full_precision(logits_BLV).softmax(-1)

    def _values(self, network, clean_BLV, soft_BLV, noised_BL, batch) -> torch.Tensor:
        """The divergence at each position `(B, L)`, 0 where not trained on."""
        trained = batch.trained
        predicted_BLV = self._probabilities(network, soft_BLV, batch.alpha, batch)
        alpha_N = batch.alpha[:, None].expand_as(trained)[trained]
        # α = 1 − t: the rate is 1
        values_N = uniform_divergence(clean_BLV[trained], predicted_BLV[trained], noised_BL[trained], alpha_N, 1.0)
        return torch.zeros(trained.shape, dtype=values_N.dtype, device=trained.device).masked_scatter(
            trained, values_N
        )


class UniformIDLMTrainer(IDLMTrainer):
    """[`IDLMTrainer`] for uniform-state diffusion LMs ([`~tide_hf.models.TIDEUniformQwen3ForDiffusion`]).

    All `V` probabilities of every position exist at once in each network, and x_t carries a gradient, so it needs more
    memory than the masked case. FSDP is refused.
    """

    DIFFUSION_TYPES = ("uniform",)
    UNREAD = {  # noqa: RUF012
        "schedule": "a uniform-state model has one, of its Gaussian noise",
        "time_epsilon": "a uniform-state model keeps its own distance from both ends of time",
        "mask_token_id": "a uniform-state model has no mask token",
        "block_size": "a uniform-state model denoises whole rows",
        "head_slice_size": "all probabilities of a row are needed at once",
    }

    def _configure_student(self, model, args: IDLMConfig, tokenizer, plan) -> None:
        """Writes into the student's config what it generates with."""
        config = model.config
        config.num_steps = args.num_steps
        if config.eos_token_id is None:
            config.eos_token_id = tokenizer.eos_token_id

    def _refuse_engines(self) -> None:
        super()._refuse_engines()
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("UniformIDLMTrainer does not shard: use plain data parallelism.")

    def _make_step(self, plan, config, args: IDLMConfig) -> tuple[UniformNoising, UniformStep]:
        """As in the masked case, with its own noise and losses."""
        grid = args.num_steps if args.student_times == "grid" else None
        return UniformNoising(grid), UniformStep(config.vocab_size, args.input_temperature)


def _within(uniform_B: torch.Tensor) -> torch.Tensor:
    """t in [ε, 1 − ε]."""
    return NOISE_EPSILON + (1 - 2 * NOISE_EPSILON) * uniform_B


@contextmanager
def _frozen(network: torch.nn.Module):
    """Inside, the network computes with a gradient for its inputs and none for its weights."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
