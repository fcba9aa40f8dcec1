"""Students: transformers' own decoders run as masked diffusion LMs (MDLM 2406.07524, BD3LM 2503.09573).

Without a 4-D mask a student is fully bidirectional. `forward(labels=…)` draws noise and returns the denoising loss, so
that a plain Trainer, SFT-style code and PEFT train it correctly: with the causal loss of the base class, a
bidirectional model would learn to copy its input. This file travels with checkpoints: it imports its siblings, torch
and transformers alone.

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
    predicting_columns,
)
from .refusals import FOREIGN_LOSS, RefusesNextTokenTrainers
from .row_noise import fresh_keys, mean_nats, row_keys, row_positions, stratified_times, uniforms

# transformers 5.24 renamed past_key_values, in outputs and in arguments
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


@dataclass
class MaskedDiffusionOutput(CausalLMOutputWithPast):
    """What a student's forward returns.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): denoising loss (with `labels`), or `head_fn`'s first result.
        logits (`torch.Tensor` of shape `(B, L, V)`, *optional*): of the same position or, if
            `config.shifted_logits`, of the next one; absent with `head_fn`.
        terms (`dict[str, torch.Tensor]`, *optional*): what `head_fn` returned second.
        cache (before transformers 5.24 `past_key_values`), hidden_states, attentions: as in transformers.
    """

    terms: dict[str, torch.Tensor] | None = None


class MaskedDiffusionMixin(RefusesNextTokenTrainers, BlockDiffusionGenerationMixin):
    """`forward` and `generate` of a student; comes before a transformers `…ForCausalLM` in the bases.

    Args:
        config ([`DiffusionConfig`]): of the student.

    Attributes:
        eval_num_times (`int`): noise levels at which `forward(labels=…)` runs each row in eval mode, one drawn from
            each of as many equal parts of [0, 1]; each takes a forward.
        accepts_foreign_loss (`bool`): True lets other code train on the logits of input without a [MASK].
    """

    eval_num_times: int = 8

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
            position_ids, inputs_embeds, use_cache, logits_to_keep, kwargs: as in transformers, without `labels`.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): `input_ids` where trained on, −100 elsewhere.
                Positions are masked with probability 1 − α(t), t uniform per row. In eval mode a row is run at
                `eval_num_times` times, and its noise follows from its tokens and labels alone.
            head_fn (`Callable`, *optional*): `head_fn(hidden (B, L, H), lm_head_weight (V, H)) -> (loss, terms)`, run
                instead of the head, inside the forward that DDP, FSDP and PEFT wrap.
            num_items_in_batch (`int`, *optional*): trained-on tokens of the whole batch, the loss's divisor; those of
                this call by default. In eval mode this call's share of the batch follows from it.
            cache (`Cache`, *optional*): keys and values of earlier columns; past_key_values is its older name.

        Returns:
            [`MaskedDiffusionOutput`]: with `labels`, a loss in nats per trained-on token: the mean over tokens in
            training, in eval mode the mean over rows of each row's mean; and logits for xt, in eval mode those of the
            middle time.

        Raises:
            ValueError: for labels with arguments that contradict them; in `backward`, for a loss that is not a
                denoising one (set `accepts_foreign_loss = True` on the model to allow it).
        """
        further = {"position_ids": position_ids, "inputs_embeds": inputs_embeds, **kwargs}
        if labels is not None:
            return self._denoise(input_ids, attention_mask, labels, num_items_in_batch, **further)
        cache = past_key_values if cache is None else cache
        further |= {"input_ids": input_ids, "attention_mask": attention_mask, "cache": cache, "use_cache": use_cache}
        outputs = self._network(head_fn, logits_to_keep, **further)
        if self.training and outputs.logits is not None and outputs.logits.requires_grad:
            self._watch_for_a_foreign_loss(input_ids, outputs.logits)
        return outputs

    def _network(self, head_fn: Callable | None, logits_to_keep, **kwargs) -> MaskedDiffusionOutput:
        """Decoder and head, or `head_fn` instead of the head."""
        outputs = self.run_decoder(**kwargs)
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
        """The decoder without the head.

        Args:
            attention_mask (*optional*): as in `forward`, or a dictionary of such masks by kind of layer. Boolean ones
                are put into the form that the attention implementation applies.
            cache (`Cache`, *optional*), kwargs: as in transformers.
        """
        kwargs[CACHE_NAME] = cache
        if isinstance(attention_mask, dict):
            attention_mask = {kind: self._applicable(mask) for kind, mask in attention_mask.items()}
        else:
            attention_mask = self._applicable(attention_mask)
        return self.run_body(attention_mask=attention_mask, **kwargs)

    def _applicable(self, mask):
        """A 4-D boolean mask in the form of its attention implementation; anything else as it is."""
        if not isinstance(mask, torch.Tensor) or mask.ndim == 2:
            return mask
        if mask.ndim != 4 or mask.dtype != torch.bool:
            raise ValueError(
                "attention_mask must be a (B, L) padding mask or a 4-D boolean one, True where the query may attend; "
                f"got {mask.dtype} of shape {tuple(mask.shape)}, which attention implementations read in different "
                "ways, or not at all."
            )
        return attention_mask_for(mask, self.config._attn_implementation, self.dtype)

    @torch.compiler.disable
    def _watch_for_a_foreign_loss(self, input_ids, logits) -> None:
        """Stops other code's loss on input without a [MASK], where nothing is noised and there is nothing to learn.

        A denoising loss of the user's own passes: it sends no gradient where nothing is masked.
        """
        mask_token_id = self.config.known_mask_token_id
        if self.accepts_foreign_loss or input_ids is None or mask_token_id is None:
            return
        is_clean = ~(input_ids == mask_token_id).any()

        def refuse(gradient):
            if is_clean and gradient.any():
                raise ValueError(FOREIGN_LOSS.format(how="A loss was computed from logits of input without a [MASK]"))

        logits.register_hook(refuse)

    def _denoise(
        self, input_ids, attention_mask, labels, num_items_in_batch, position_ids, inputs_embeds, **kwargs
    ) -> MaskedDiffusionOutput:
        """Masks trained-on positions, at one time in training and at several in eval mode; loss and xt's logits."""
        if position_ids is not None or inputs_embeds is not None:
            raise ValueError(
                "forward(labels=…) noises input_ids and counts positions itself; it takes neither position_ids "
                "(rows packed with several documents would attend across them) nor inputs_embeds."
            )
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                "forward(labels=…) makes its own 4-D mask, as config.diffusion_type asks; it takes a (B, L) padding "
                f"mask, got shape {tuple(attention_mask.shape)}."
            )
        if self.config.known_mask_token_id is None:
            raise ValueError(
                "forward(labels=…) needs config.mask_token_id, which this checkpoint does not have: "
                "set model.config.mask_token_id = tokenizer.mask_token_id."
            )
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        trained, positions = (labels != -100) & valid, row_positions(valid)
        predicts_BL = predicting_columns(valid, self.config.shifted_logits)
        keys_B = row_keys(input_ids, labels, valid)
        keys_B, num_times = (fresh_keys(keys_B), 1) if self.training else (keys_B, self.eval_num_times)
        schedule, nats_B = self.config.noise_schedule, 0
        for number in range(num_times):
            t_B1 = TIME_EPSILON + (1 - TIME_EPSILON) * stratified_times(keys_B, number, number, num_times)
            masked = (uniforms(keys_B, number, positions) < masked_probability(t_B1, schedule)) & trained
            outputs = self._predict(input_ids, masked, valid, attention_mask is not None, **kwargs)
            row_N, _ = masked.nonzero(as_tuple=True)
            logits_NV = outputs.logits[row_N, predicts_BL[masked]].float()
            nll = F.cross_entropy(logits_NV, input_ids[masked], reduction="none")
            nll_BL = nll.new_zeros(masked.shape).masked_scatter(masked, nll)
            nats_B = nats_B + (nll_BL * loss_weight(t_B1, schedule)).sum(1) / num_times
            if number == num_times // 2:
                returned = outputs
        returned.loss = mean_nats(nats_B, trained.sum(1), num_items_in_batch, self.training)
        return returned

    def _predict(self, input_ids, masked, valid, padded: bool, **kwargs) -> MaskedDiffusionOutput:
        """Logits of xt: [xt ; x0] under the block mask (block), or xt alone (full)."""
        length = input_ids.shape[1]
        noised = torch.where(masked, self.config.known_mask_token_id, input_ids)
        position = row_positions(valid).sub(1).clamp(min=0)
        if self.config.diffusion_type == "full":
            if padded:  # without a padding mask, transformers would take position ids for packed documents
                kwargs |= {"attention_mask": valid.long(), "position_ids": position}
            return self._network(None, 0, input_ids=noised, use_cache=False, **kwargs)
        block = torch.where(valid, position // self.config.block_size, -1)
        streams = [torch.where(valid, stream, PADDING_STREAM) for stream in (NOISED_STREAM, CLEAN_STREAM)]
        stream, order = torch.cat(streams, 1), torch.arange(length, device=input_ids.device).expand_as(block)
        if self.config.causal_blocks:
            order = (2 * block + masked).argsort(dim=1, stable=True)
            stream = torch.cat([streams[0].gather(1, order), streams[1]], 1)
        laid_out = [torch.cat([values.gather(1, order), values], 1) for values in (block, position)]
        outputs = self._network(
            None,
            torch.arange(length, device=input_ids.device),
            input_ids=torch.cat([noised.gather(1, order), input_ids], 1),
            attention_mask=block_visibility(stream, laid_out[0], stream, laid_out[0], self.config.causal_blocks),
            position_ids=laid_out[1],
            use_cache=False,
            **kwargs,
        )
        if self.config.causal_blocks:
            outputs.logits = outputs.logits.take_along_dim(order.argsort(dim=1)[:, :, None], 1)
        return outputs


class TIDEQwen3ForBlockDiffusion(MaskedDiffusionMixin, Qwen3ForCausalLM):
    """Qwen3 as a block-diffusion (or, by `config.diffusion_type`, full-sequence) masked diffusion LM."""

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
