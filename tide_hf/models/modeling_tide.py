"""Students: transformers' own decoders run as masked diffusion LMs.

Without a 4-D mask a student is fully bidirectional. `forward(labels=…)` draws noise and returns the denoising loss, so
that a plain Trainer, SFT-style code and PEFT train it correctly: the causal loss of the base class would let a
bidirectional model copy its input. This file travels with checkpoints: it imports its siblings, torch and
transformers alone.

Shapes: B rows, L positions, H hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from transformers import Cache, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tide import TIDELlamaConfig, TIDEQwen2Config, TIDEQwen3Config
from .generation_tide import BlockDiffusionGenerationMixin
from .masked_diffusion import (
    CLEAN_STREAM,
    NOISED_STREAM,
    PADDING_STREAM,
    TIME_EPSILON,
    attention_mask_for,
    block_visibility,
    loss_weight,
    masked_probability,
)

# transformers 5.24 renamed past_key_values, in outputs and in arguments
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


@dataclass
class MaskedDiffusionOutput(CausalLMOutputWithPast):
    """What a student's forward returns.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): denoising loss (with `labels`), or `head_fn`'s first result.
        logits (`torch.Tensor` of shape `(B, L, V)`, *optional*): same-position logits; absent with `head_fn`.
        terms (`dict[str, torch.Tensor]`, *optional*): what `head_fn` returned second.
        cache (before transformers 5.24 `past_key_values`), hidden_states, attentions: as in transformers.
    """

    terms: dict[str, torch.Tensor] | None = None


class MaskedDiffusionMixin(BlockDiffusionGenerationMixin):
    """`forward` and `generate` of a student; stands before a transformers `…ForCausalLM` in the bases."""

    def __init__(self, config):
        super().__init__(config)
        self._runs_decoder = False
        self.model.register_forward_pre_hook(self._refuse_a_loss_that_bypasses_forward)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        head_fn: Callable | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> MaskedDiffusionOutput:
        """Runs the network; with `labels` also the forward process and the denoising loss.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): clean tokens with `labels`, noised ones otherwise.
            attention_mask (`torch.Tensor`, *optional*): `(B, L)` padding mask, or `(B, 1, L, K)` boolean mask that is
                applied as given (see `masked_diffusion.block_visibility`) by every attention implementation.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): `input_ids` where trained on, −100 elsewhere.
                Positions are masked with probability 1 − α(t), t uniform per row; in eval mode the noise is the same
                at each call.
            head_fn (`Callable`, *optional*): `head_fn(hidden (B, L, H), lm_head_weight (V, H)) -> (loss, terms)`, run
                in place of the head, inside the forward that DDP, FSDP and PEFT wrap.
            num_items_in_batch (`int`, *optional*): trained-on tokens of the whole batch, the loss's divisor; those of
                this call by default.
            cache (`Cache`, *optional*), past_key_values: keys and values of earlier columns, under its new and its old
                name.

        Returns:
            [`MaskedDiffusionOutput`]
        """
        if labels is not None:
            if position_ids is not None or inputs_embeds is not None:
                raise ValueError(
                    "forward(labels=…) noises input_ids and counts positions itself; it takes neither position_ids "
                    "(rows packed with several documents would attend across them) nor inputs_embeds."
                )
            if attention_mask is not None and attention_mask.ndim != 2:
                raise ValueError(
                    "forward(labels=…) makes its own 4-D mask from the objective; it takes a (B, L) padding mask, got "
                    f"shape {tuple(attention_mask.shape)}."
                )
            return self._denoise(input_ids, attention_mask, labels, num_items_in_batch, **kwargs)
        outputs = self.run_decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_BLH = outputs.last_hidden_state
        if head_fn is not None:
            if hasattr(self.lm_head, "unshard"):
                self.lm_head.unshard()  # FSDP2 gathers the weights of a module that is called, which the head is not
            loss, terms = head_fn(hidden_BLH, self.lm_head.weight)
            return MaskedDiffusionOutput(loss=loss, terms=terms)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.lm_head(hidden_BLH if isinstance(keep, int) else hidden_BLH[:, keep])
        further = {name: outputs.get(name) for name in (CACHE_NAME, "hidden_states", "attentions")}
        return MaskedDiffusionOutput(logits=logits, **further)

    def run_decoder(self, attention_mask=None, cache: Cache | None = None, **kwargs):
        """The body without the head, a 4-D boolean mask put into the form its attention implementation honours."""
        kwargs[CACHE_NAME] = cache
        if isinstance(attention_mask, dict):
            attention_mask = {kind: self._honoured(mask) for kind, mask in attention_mask.items()}
        else:
            attention_mask = self._honoured(attention_mask)
        self._runs_decoder = True
        try:
            return self.model(attention_mask=attention_mask, **kwargs)
        finally:
            self._runs_decoder = False

    def _honoured(self, mask):
        """A tensor mask in its implementation's form; anything else as it is."""
        if not isinstance(mask, torch.Tensor) or mask.ndim == 2:
            return mask
        if mask.ndim != 4 or mask.dtype != torch.bool:
            raise ValueError(
                "attention_mask must be a (B, L) padding mask or a 4-D boolean one, True where the query may attend; "
                f"got {mask.dtype} of shape {tuple(mask.shape)}, which attention implementations read in different "
                "ways, or not at all."
            )
        return attention_mask_for(mask, self.config._attn_implementation, self.dtype)

    def _refuse_a_loss_that_bypasses_forward(self, *_):
        """Stops a trainer that replaced `forward` and runs the body under a causal loss of its own."""
        if self.training and not self._runs_decoder and "forward" in vars(self):
            raise ValueError(
                "The forward of this diffusion LM was replaced by one that scores the next token, as TRL's SFTTrainer "
                "does; a bidirectional model would learn to copy its input. Train it with TIDETrainer, with "
                "transformers.Trainer, or with `class DiffusionSFTTrainer(SFTTrainer): compute_loss = "
                "Trainer.compute_loss`, which takes the model's own loss."
            )

    def _denoise(self, input_ids, attention_mask, labels, num_items_in_batch, **kwargs) -> MaskedDiffusionOutput:
        """Masks the trained-on positions, runs [xt ; x0] (block) or xt (full), and returns loss and xt's logits."""
        if self.config.mask_token_id is None:
            raise ValueError(
                "forward(labels=…) needs config.mask_token_id, and this checkpoint does not say it: "
                "set model.config.mask_token_id = tokenizer.mask_token_id."
            )
        generator = None
        if not self.training:
            generator = torch.Generator(input_ids.device).manual_seed(0)
        num_rows, length = input_ids.shape
        uniform = torch.rand(num_rows, length + 1, device=input_ids.device, generator=generator)
        t_B1 = TIME_EPSILON + (1 - TIME_EPSILON) * uniform[:, :1]
        schedule = self.config.noise_schedule
        masked = (uniform[:, 1:] < masked_probability(t_B1, schedule)) & (labels != -100)
        noised = torch.where(masked, self.config.mask_token_id, input_ids)
        valid = torch.ones_like(masked) if attention_mask is None else attention_mask.bool()
        if self.config.objective == "full":
            outputs = self(noised, attention_mask=attention_mask, use_cache=False, **kwargs)
        else:
            position = valid.long().cumsum(-1).sub(1).clamp(min=0)
            block = torch.where(valid, position // self.config.block_size, -1)
            streams = [torch.where(valid, stream, PADDING_STREAM) for stream in (NOISED_STREAM, CLEAN_STREAM)]
            stream, block = torch.cat(streams, 1), block.repeat(1, 2)
            outputs = self(
                torch.cat([noised, input_ids], 1),
                attention_mask=block_visibility(stream, block, stream, block),
                position_ids=position.repeat(1, 2),
                logits_to_keep=torch.arange(length, device=input_ids.device),
                use_cache=False,
                **kwargs,
            )
        nll = F.cross_entropy(outputs.logits[masked].float(), input_ids[masked], reduction="none")
        num_items = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        outputs.loss = (nll * loss_weight(t_B1, schedule).expand_as(masked)[masked]).sum() / num_items
        return outputs


class TIDEQwen3ForBlockDiffusion(MaskedDiffusionMixin, Qwen3ForCausalLM):
    """Qwen3 as a block-diffusion (or, by `config.objective`, full-sequence) masked diffusion LM."""

    config_class = TIDEQwen3Config
    config: TIDEQwen3Config


class TIDEQwen2ForBlockDiffusion(MaskedDiffusionMixin, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 as masked diffusion LMs, as [`TIDEQwen3ForBlockDiffusion`]."""

    config_class = TIDEQwen2Config
    config: TIDEQwen2Config


class TIDELlamaForBlockDiffusion(MaskedDiffusionMixin, LlamaForCausalLM):
    """Llama as a masked diffusion LM, as [`TIDEQwen3ForBlockDiffusion`]."""

    config_class = TIDELlamaConfig
    config: TIDELlamaConfig
