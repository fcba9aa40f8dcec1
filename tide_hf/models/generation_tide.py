"""`generate` and `infill` of a masked diffusion LM, and their settings.

This file travels with checkpoints: it imports its siblings, torch and transformers.

Shapes: B rows, P prompt columns, L columns of a text with masks in it.
"""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import ModelOutput

from .canvas_tide import Canvas, answer_canvas, infill_canvas
from .decoding_tide import Decoder
from .generation_config_tide import DEFAULTS, TIDEGenerationConfig
from .infilling_tide import TextInfillingMixin
from .prompts_tide import check_ids, padding_mask, token_rows
from .reveal_rules_tide import RevealRule
from .sampling_tide import Rules, transformers_rules
from .settings_tide import (
    FOR_ANSWERS,
    FOR_INFILL,
    READ,
    REFUSED,
    REFUSED_FOR_INFILL,
    MergedSettings,
    said_by,
)


@dataclass
class BlockDiffusionOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(B, P + new)`): the prompt as given, then the generated tokens.
        forward_passes (`int`): network calls. The prompt and finished blocks have none of their own: they run in the
            next block's first.
        tokens_per_forward (`float`): generated tokens (up to and including EOS, mean over rows) per network call.
    """

    sequences: torch.LongTensor | None = None
    forward_passes: int | None = None
    tokens_per_forward: float | None = None


class BlockDiffusionGenerationMixin(TextInfillingMixin, GenerationMixin):
    """`generate` and `infill`; a `GenerationMixin` for what PEFT and pipelines look up there."""

    generation_config_class = TIDEGenerationConfig

    def adjust_generation_fn(self, generation_config, *args, **kwargs):
        """Reads generation_config.json, loaded as `generation_config`, as [`TIDEGenerationConfig`].

        Args:
            args, kwargs: as in transformers.
        """
        super().adjust_generation_fn(generation_config, *args, **kwargs)
        base = TIDEGenerationConfig.from_model_config(self.config)
        said = self.translated_settings(said_by(self.generation_config))
        self.generation_config = TIDEGenerationConfig.from_dict(said_by(base) | said)

    def translated_settings(self, said: dict) -> dict:
        """What generation_config.json has `said`, under the names of [`TIDEGenerationConfig`].

        A family whose authors have names of their own replaces this.
        """
        return said

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor=None,
        stopping_criteria=None,
        attention_mask: torch.Tensor | None = None,
        negative_prompt_ids: torch.LongTensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        streamer=None,
        generator: torch.Generator | None = None,
        tokenizer=None,
        reveal_rule: RevealRule | None = None,
        **kwargs,
    ) -> torch.LongTensor | BlockDiffusionOutput:
        """Denoises an answer after each prompt.

        Args:
            inputs (`torch.LongTensor` of shape `(B, P)`): prompts; also accepted as `input_ids`. BOS by default.
            generation_config ([`TIDEGenerationConfig`], *optional*): settings, over the model's own.
            logits_processor (`LogitsProcessorList`, *optional*): transformers' processors, called before temperature
                once per n-th new token that is proposed, with what a token-by-token decoder would pass them:
                `input_ids (B, P + n)`, the prompts, padded on the left, and the n new tokens to the left ([MASK] where
                not revealed yet), and float32 `scores (B, V)` (zeros in rows where none is proposed, ignored).
            stopping_criteria (`StoppingCriteriaList`, *optional*): called after each block, once per new token n, with
                `input_ids (B, P + n)` and None. A row ends after the first token for which one returns True, and all
                rows after the block in which a `MaxTimeCriteria` does.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 0 at padding, on either side, and at tokens
                to leave out. Without it `pad_token_id` at the ends of a row is padding, unless that is EOS too.
            negative_prompt_ids (`torch.LongTensor` of shape `(B, P′)` or `(1, P′)`, *optional*): what `guidance_scale`
                guides away from. [MASK] instead of every prompt token gives the unconditional guidance of the
                published samplers (their `cfg_scale` is `guidance_scale − 1`).
            negative_prompt_attention_mask (`torch.Tensor`, *optional*): 0 at its padding.
            streamer (*optional*): gets the prompt and each finished block through `put`, the block being denoised
                through `put_draft` if it has that ([`~transformers.TextDiffusionStreamer`]); one row only.
            generator (`torch.Generator`, *optional*): source of all random draws.
            tokenizer (*optional*): for `stop_strings`.
            reveal_rule ([`RevealRule`], *optional*): decides which tokens a pass reveals, instead of the settings that
                do (`decoding`, `steps_per_block`, `step_quota`, `confidence_threshold`, `threshold_inclusive`,
                `entropy_bound`, `remasking`), which are refused beside it.
            kwargs: settings of [`TIDEGenerationConfig`], over `generation_config`.

        Returns:
            `torch.LongTensor` of shape `(B · num_return_sequences, P + new)`, or [`BlockDiffusionOutput`].

        Raises:
            ValueError: a setting that is not read or contradicts another, no prompt, no mask token, prompts or masks
                of the wrong shape, type or vocabulary, a streamer with several rows, guidance without a negative
                prompt or the reverse.
        """
        settings, prompt_ids = self._answer_settings(inputs, generation_config, kwargs, reveal_rule)
        negative = negative_prompt_ids, negative_prompt_attention_mask
        (prompt_ids, prompt_mask), *_ = prompts = self._prompts(settings, prompt_ids, attention_mask, *negative)
        if streamer is not None and len(prompt_ids) > 1:
            raise ValueError(f"A streamer shows one row, got {len(prompt_ids)} prompts.")
        canvas = answer_canvas(prompts, settings, full=self.config.diffusion_type == "full")
        given = logits_processor, stopping_criteria
        rules = transformers_rules(self, settings, canvas.prompt_ids, (~prompt_mask).sum(-1), tokenizer, *given)
        if streamer is not None:
            streamer.put(prompt_ids.cpu())
        decoder = self._decode(canvas, settings, generator, rules, reveal_rule, streamer)
        answer = canvas.answer()[:, : int(canvas.num_new.max())]
        return _output(torch.cat([prompt_ids, answer], 1), canvas.num_new, decoder)

    @torch.no_grad()
    def infill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor=None,
        generator: torch.Generator | None = None,
        reveal_rule: RevealRule | None = None,
        **kwargs,
    ) -> torch.LongTensor | BlockDiffusionOutput:
        """Replaces every [MASK] in the rows; all other tokens stay as given.

        A full-sequence student fills all masks at once and sees the whole text on both sides of each. A
        block-diffusion student fills the blocks that hold masks from left to right, on the grid it was trained on: it
        sees everything before a block, and what stands to the right of a mask within the mask's own block. It cannot
        see later blocks, which its block-causal attention hides. To let a hole see what follows, place it so that the
        text after it falls into the same block, or use a full-sequence student.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): tokens, and `mask_token_id` where something is missing.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): as in `generate`.
            generation_config ([`TIDEGenerationConfig`], *optional*), kwargs: as in `generate`. With `steps_per_block`
                a block's masks are divided among that many passes. EOS does not end a row. Settings about answers
                (their length, end, number, block grid, negative prompt) are refused here, and ignored in
                `model.generation_config`.
            logits_processor (`LogitsProcessorList`, *optional*): as in `generate`, without a prompt and with the text
                to the left as new tokens.
            generator (`torch.Generator`, *optional*): source of all random draws.
            reveal_rule ([`RevealRule`], *optional*): as in `generate`.

        Returns:
            `torch.LongTensor` of shape `(B, L)`, or [`BlockDiffusionOutput`], which counts the filled masks.

        Raises:
            ValueError: a setting that is not read or contradicts another, no mask token, rows or masks of the wrong
                shape, type or vocabulary.
        """
        input_ids = token_rows(input_ids)
        settings, _ = self._generation_settings("infill", generation_config, kwargs, reveal_rule)
        valid = padding_mask(input_ids, attention_mask, settings, self.config.vocab_size)
        settings.pad_token_id = _filling(settings)
        canvas = infill_canvas(input_ids, valid, settings, full=self.config.diffusion_type == "full")
        num_masked = canvas.masked.sum(-1)
        rules = transformers_rules(self, settings, canvas.prompt_ids, processors=logits_processor)
        decoder = self._decode(canvas, settings, generator, rules, reveal_rule)
        filled = input_ids.clone()
        filled[valid] = canvas.ids[canvas.valid]
        return _output(filled, num_masked, decoder)

    def _decode(self, canvas: Canvas, settings, generator, rules: Rules, reveal_rule, streamer=None) -> Decoder:
        """Fills the canvas, without dropout; the model's mode is restored."""
        decoder, was_training = Decoder(self, canvas, settings, generator, streamer, rules, reveal_rule), self.training
        self.eval()
        try:
            decoder.run()
        finally:
            self.train(was_training)
        return decoder

    def _answer_settings(
        self, inputs, generation_config, kwargs, reveal_rule
    ) -> tuple[TIDEGenerationConfig, torch.LongTensor]:
        """Settings of `generate`, and its prompts `(B, P)`."""
        prompt_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        settings, merged = self._generation_settings("generate", generation_config, kwargs, reveal_rule)
        if prompt_ids is None and settings.bos_token_id is None:
            raise ValueError("generate needs prompts: pass input_ids of shape (rows, tokens).")
        if prompt_ids is None:
            prompt_ids = torch.tensor([[settings.bos_token_id]], device=self.device)
        prompt_ids = token_rows(prompt_ids)
        settings.max_new_tokens = merged.answer_length(prompt_ids.shape[1], DEFAULTS["max_new_tokens"])
        settings.max_length = prompt_ids.shape[1] + settings.max_new_tokens
        if settings.min_new_tokens is not None:
            settings.min_length = None  # as in transformers
            if settings.min_new_tokens > settings.max_new_tokens:
                raise ValueError(
                    f"min_new_tokens={settings.min_new_tokens} is more than the {settings.max_new_tokens} tokens "
                    "generated at most: raise max_new_tokens, or lower it."
                )
        draws = settings.temperature or settings.remasking == "random" or settings.step_quota == "binomial"
        if (settings.num_return_sequences or 1) > 1 and not draws and reveal_rule is None:
            raise ValueError(
                f"num_return_sequences={settings.num_return_sequences} would give equal answers, since nothing is "
                "drawn: pass do_sample=True or a temperature above 0, or leave it out."
            )
        if settings.denoise_whole_blocks and self.config.diffusion_type == "full":
            raise ValueError(
                "denoise_whole_blocks=True (which decoding='sdar' and 'llada2' ask for) denoises what follows an "
                "answer in its last block, and nothing follows that of a full-sequence student: set it to False."
            )
        whole = (settings.block_size or settings.max_new_tokens) >= settings.max_new_tokens
        if settings.max_time is not None and self.config.diffusion_type == "full" and whole:
            raise ValueError(
                f"max_time={settings.max_time} is checked after each block, and this full-sequence student denoises "
                "its answer as one: set block_size, or leave max_time out."
            )
        if settings.exponential_decay_length_penalty is not None and settings.eos_token_id is None:
            raise ValueError("exponential_decay_length_penalty raises the score of EOS: pass eos_token_id.")
        return settings, prompt_ids

    def _prompts(self, settings, prompt_ids, attention_mask, negative_ids, negative_mask) -> list[tuple]:
        """The prompts `(R, P)` and their mask, then with guidance the negative ones; R counts returned sequences."""
        if (settings.guidance_scale in (None, 1)) != (negative_ids is None):
            raise ValueError(
                "Guidance needs both negative_prompt_ids and a guidance_scale other than 1, got "
                f"negative_prompt_ids={'None' if negative_ids is None else 'given'} and "
                f"guidance_scale={settings.guidance_scale}: pass both or neither."
            )
        if negative_ids is None and negative_mask is not None:
            raise ValueError("negative_prompt_attention_mask needs negative_prompt_ids, which are not given.")
        num_rows, vocab_size = len(prompt_ids), self.config.vocab_size
        prompts = [(prompt_ids, padding_mask(prompt_ids, attention_mask, settings, vocab_size))]
        if negative_ids is not None:
            ids = token_rows(negative_ids, "negative_prompt_ids")
            if len(ids) not in (1, num_rows):
                raise ValueError(
                    f"negative_prompt_ids must have one row or {num_rows} as the prompts, got {len(ids)}."
                )
            mask = padding_mask(ids, negative_mask, settings, vocab_size, "negative_prompt_ids")
            prompts.append((ids.expand(num_rows, -1), mask.expand(num_rows, -1)))
        settings.pad_token_id = _filling(settings)  # only now: padding_mask looks at what the caller calls padding
        copies = settings.num_return_sequences or 1
        return [(ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)) for ids, mask in prompts]

    def _generation_settings(
        self, method: str, given, kwargs, reveal_rule=None
    ) -> tuple[TIDEGenerationConfig, MergedSettings]:
        """Keyword arguments over the given config over the model's own over the defaults; checked for `method`."""
        read, left_alone, refused = READ, (), REFUSED
        if method == "infill":
            read, left_alone, refused = FOR_INFILL, FOR_ANSWERS, REFUSED_FOR_INFILL
        merged = MergedSettings(method, self.generation_config, given, kwargs, read, left_alone, refused)
        if not isinstance(reveal_rule, RevealRule | None):
            raise ValueError(f"reveal_rule must be a RevealRule, got a {type(reveal_rule).__name__}.")
        merged.settle_rule(reveal_rule)
        merged.check_approximate_cache(method, full=self.config.diffusion_type == "full")
        values = DEFAULTS | said_by(TIDEGenerationConfig.from_model_config(self.config))
        # a keyword None undoes what configs say, back to the default; EOS and padding may stay None
        defaults = {name: value for name, value in values.items() if name not in ("eos_token_id", "pad_token_id")}
        values |= merged.values
        values |= {name: value for name, value in defaults.items() if values[name] is None}
        values["temperature"] = merged.temperature()
        settings = TIDEGenerationConfig.from_dict(values)
        if settings.mask_token_id is None:
            settings.mask_token_id = self.config.known_mask_token_id
        if settings.mask_token_id is None:
            raise ValueError(f"{method} needs a mask token: pass mask_token_id=tokenizer.mask_token_id.")
        for name in ("mask_token_id", "pad_token_id", "suppress_confidence_tokens"):
            if getattr(settings, name) is not None:
                check_ids(torch.tensor(getattr(settings, name)), self.config.vocab_size, name)
        return settings, merged


def _filling(settings: TIDEGenerationConfig) -> int:
    """What follows an answer's end: padding, or EOS, or any token."""
    eos = settings.eos_token_id
    if settings.pad_token_id is not None:
        return settings.pad_token_id
    return 0 if eos is None else eos[0] if isinstance(eos, list) else eos


def _output(
    sequences: torch.LongTensor, num_new: torch.LongTensor, decoder: Decoder
) -> torch.LongTensor | BlockDiffusionOutput:
    """The sequences, with what they cost where that is asked for; without a network call nothing was generated."""
    if not decoder.settings.return_dict_in_generate:
        return sequences
    return BlockDiffusionOutput(
        sequences=sequences,
        forward_passes=decoder.forward_passes,
        tokens_per_forward=num_new.float().mean().item() / max(decoder.forward_passes, 1),
    )
