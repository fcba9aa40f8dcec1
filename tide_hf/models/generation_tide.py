"""`generate` and `infill` of a masked diffusion LM, and their settings (SPEC §1, inference).

This file travels with checkpoints: it imports its siblings, torch and transformers.

Shapes: B rows, P prompt columns, L columns of a text with masks in it.
"""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import ModelOutput

from .canvas_tide import answer_canvas, infill_canvas
from .decoding_tide import Decoder
from .generation_config_tide import TIDEGenerationConfig
from .infilling_tide import TextInfillingMixin
from .prompts_tide import check_ids, padding_mask, token_rows
from .sampling_tide import transformers_rules
from .settings_tide import (
    DEFAULTS,
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
        forward_passes (`int`): network calls; prompt and finished blocks run along with the next block's first.
        tokens_per_forward (`float`): generated tokens (up to and with EOS, mean over rows) per network call.
    """

    sequences: torch.LongTensor | None = None
    forward_passes: int | None = None
    tokens_per_forward: float | None = None


class BlockDiffusionGenerationMixin(TextInfillingMixin, GenerationMixin):
    """`generate` and `infill`; subclasses `GenerationMixin` for what PEFT and pipelines look up there."""

    generation_config_class = TIDEGenerationConfig

    def adjust_generation_fn(self, generation_config, *args, **kwargs):
        """Loads generation_config.json as [`TIDEGenerationConfig`]."""
        super().adjust_generation_fn(generation_config, *args, **kwargs)
        base = TIDEGenerationConfig.from_model_config(self.config)
        self.generation_config = TIDEGenerationConfig.from_dict(said_by(base) | said_by(self.generation_config))

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
        **kwargs,
    ) -> torch.LongTensor | BlockDiffusionOutput:
        """Denoises an answer behind each prompt.

        Args:
            inputs (`torch.LongTensor` of shape `(B, P)`): prompts; also accepted as `input_ids`. Without any, BOS.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 0 at padding, on either side, and at tokens
                to leave out. Without it `pad_token_id` at the ends of a row is padding, unless that is EOS too.
            generation_config ([`TIDEGenerationConfig`], *optional*): settings, over the model's own; keyword arguments
                override it.
            logits_processor (`LogitsProcessorList`, *optional*): transformers' processors, called before temperature
                once per n-th new token that is still masked, with what a token-by-token decoder would hand them:
                `input_ids (B, P + n)`, the prompts, padded on the left, and the n new tokens to the left ([MASK]
                where not revealed yet), and float32 `scores (B, V)` (zeros in rows whose token is revealed, ignored).
            stopping_criteria (`StoppingCriteriaList`, *optional*): asked after each block, once per new token n, with
                `input_ids (B, P + n)` and None; a row ends behind the first token for which one says True, and all
                of them behind the block in which a `MaxTimeCriteria` does.
            negative_prompt_ids (`torch.LongTensor` of shape `(B, P′)` or `(1, P′)`, *optional*): what guidance leads
                away from, with `guidance_scale`; [MASK] in place of every prompt token gives the unconditional
                guidance of the published samplers (their `cfg_scale` is `guidance_scale − 1`).
            negative_prompt_attention_mask (`torch.Tensor`, *optional*): 0 at its padding.
            streamer (*optional*): gets the prompt and each finished block through `put`, the block being denoised
                through `put_draft` where it has that ([`~transformers.TextDiffusionStreamer`]); one row only.
            generator (`torch.Generator`, *optional*): source of all random draws.
            tokenizer (*optional*): for `stop_strings`.

        Returns:
            `torch.LongTensor` of shape `(B · num_return_sequences, P + new)`, or [`BlockDiffusionOutput`].

        Raises:
            ValueError: a setting that is not read or contradicts another, no prompt, no mask token, prompts or masks
                of the wrong shape, type or vocabulary, a streamer with several rows, guidance without a negative
                prompt or the reverse.
        """
        settings, prompt_ids = self._answer_settings(inputs, generation_config, kwargs)
        prompts = [(prompt_ids, padding_mask(prompt_ids, attention_mask, settings, self.config.vocab_size))]
        prompts += self._negative_prompt(
            settings, len(prompt_ids), negative_prompt_ids, negative_prompt_attention_mask
        )
        settings.pad_token_id = _filling(settings)
        copies = settings.num_return_sequences or 1
        if copies > 1:
            prompts = [[part.repeat_interleave(copies, 0) for part in pair] for pair in prompts]
            prompt_ids = prompts[0][0]
        if streamer is not None and len(prompt_ids) > 1:
            raise ValueError(f"A streamer shows one row, got {len(prompt_ids)} prompts.")
        full = self.config.diffusion_type == "full"
        canvas = answer_canvas(*prompts[0], settings, full, *(prompts[1] if len(prompts) > 1 else ()))
        if settings.max_time is not None and full and len(canvas.windows) == 1:
            raise ValueError(
                f"max_time={settings.max_time} is asked for behind each block, and this full-sequence student "
                "denoises its answer as one: set block_size, or leave max_time out."
            )
        given = logits_processor, stopping_criteria
        rules = transformers_rules(self, settings, canvas.prompt_ids, (~prompts[0][1]).sum(-1), tokenizer, *given)
        if streamer is not None:
            streamer.put(prompt_ids.cpu())
        decoder = Decoder(self, canvas, settings, generator, streamer, rules)
        self._run_in_eval_mode(decoder)
        if streamer is not None:
            streamer.end()
        num_new = canvas.num_new
        sequences = torch.cat([prompt_ids, canvas.answer()[:, : int(num_new.max())]], dim=1)
        return _output(sequences, num_new, decoder) if settings.return_dict_in_generate else sequences

    @torch.no_grad()
    def infill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor=None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> torch.LongTensor | BlockDiffusionOutput:
        """Replaces every [MASK] in the rows; all other tokens stay as given.

        A full-sequence student fills all masks at once and sees the whole text on both sides of each. A
        block-diffusion student fills the blocks that hold masks from left to right, on the grid it was trained on:
        it sees everything before a block, and what stands to the right of a mask within the mask's own block. Later
        blocks it cannot see: under its block-causal attention nothing behind a block can reach it. To let a hole see
        what follows, place it so that the text behind it falls into the same block, or use a full-sequence student.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): tokens with `mask_token_id` where something is missing.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): as in `generate`.
            generation_config, generator, keyword arguments: as in `generate`, where they mean something; with
                `steps_per_block` a block's masks are divided among that many passes. EOS does not end a row. Settings
                about answers (their length, end, number, block grid, negative prompt) are refused, and left alone
                in `model.generation_config`.
            logits_processor (`LogitsProcessorList`, *optional*): as in `generate`, with no prompt and the text to the
                left as new tokens.

        Returns:
            `torch.LongTensor` of shape `(B, L)`, or [`BlockDiffusionOutput`], which counts the filled masks.

        Raises:
            ValueError: unknown arguments, no mask token.
        """
        input_ids = token_rows(input_ids)
        settings, _ = self._generation_settings("infill", generation_config, kwargs)
        valid = padding_mask(input_ids, attention_mask, settings, self.config.vocab_size)
        settings.pad_token_id = _filling(settings)
        canvas = infill_canvas(input_ids, valid, settings, full=self.config.diffusion_type == "full")
        num_masked = canvas.masked.sum(-1)
        rules = transformers_rules(self, settings, canvas.prompt_ids, processors=logits_processor)
        decoder = Decoder(self, canvas, settings, generator, rules=rules)
        self._run_in_eval_mode(decoder)
        filled = input_ids.clone()
        filled[valid] = canvas.ids[canvas.valid]
        return _output(filled, num_masked, decoder) if settings.return_dict_in_generate else filled

    def _run_in_eval_mode(self, decoder: Decoder) -> None:
        """Without dropout, whatever mode the model is in, which it keeps."""
        was_training = self.training
        self.eval()
        try:
            decoder.run()
        finally:
            self.train(was_training)

    def _answer_settings(self, inputs, generation_config, kwargs) -> tuple[TIDEGenerationConfig, torch.LongTensor]:
        """Settings of `generate`, and its prompts `(B, P)`."""
        prompt_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        settings, merged = self._generation_settings("generate", generation_config, kwargs)
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
                    f"min_new_tokens={settings.min_new_tokens} is more than the {settings.max_new_tokens} tokens that "
                    "are generated at most: raise max_new_tokens, or lower it."
                )
        if (settings.num_return_sequences or 1) > 1 and not settings.temperature and settings.remasking != "random":
            raise ValueError(
                f"num_return_sequences={settings.num_return_sequences} would give equal answers, since nothing is "
                "drawn: pass do_sample=True or a temperature above 0, or leave it out."
            )
        if settings.exponential_decay_length_penalty is not None and settings.eos_token_id is None:
            raise ValueError("exponential_decay_length_penalty raises the score of EOS: pass eos_token_id.")
        return settings, prompt_ids

    def _negative_prompt(self, settings, num_rows: int, ids, attention_mask) -> list[tuple]:
        """Negative prompts `(B, P′)` and their masks, or nothing without guidance."""
        if (settings.guidance_scale in (None, 1)) != (ids is None):
            raise ValueError(
                "Guidance needs both negative_prompt_ids and a guidance_scale other than 1, got "
                f"negative_prompt_ids={'None' if ids is None else 'given'} and "
                f"guidance_scale={settings.guidance_scale}: pass both or neither."
            )
        if ids is None:
            if attention_mask is not None:
                raise ValueError("negative_prompt_attention_mask needs negative_prompt_ids, which are not given.")
            return []
        ids = token_rows(ids, "negative_prompt_ids")
        if len(ids) not in (1, num_rows):
            raise ValueError(f"negative_prompt_ids must have one row or {num_rows} as the prompts, got {len(ids)}.")
        mask = padding_mask(ids, attention_mask, settings, self.config.vocab_size, "negative_prompt_ids")
        return [(ids.expand(num_rows, -1), mask.expand(num_rows, -1))]

    def _generation_settings(self, method: str, given, kwargs) -> tuple[TIDEGenerationConfig, MergedSettings]:
        """Keyword arguments over the given config over the model's own over the defaults."""
        read, left_alone, refused = READ, (), REFUSED
        if method == "infill":
            read, left_alone, refused = FOR_INFILL, FOR_ANSWERS, REFUSED_FOR_INFILL
        merged = MergedSettings(method, self.generation_config, given, kwargs, read, left_alone, refused)
        merged.check_steps()
        values = DEFAULTS | said_by(TIDEGenerationConfig.from_model_config(self.config))
        # a keyword None takes back what configs say; EOS and padding may be none
        defaults = {name: value for name, value in values.items() if name not in ("eos_token_id", "pad_token_id")}
        values |= merged.values
        values |= {name: value for name, value in defaults.items() if values[name] is None}
        values["temperature"] = merged.temperature()
        settings = TIDEGenerationConfig.from_dict(values)
        if settings.mask_token_id is None:
            raise ValueError(f"{method} needs a mask token: pass mask_token_id=tokenizer.mask_token_id.")
        for name in ("mask_token_id", "pad_token_id"):
            if getattr(settings, name) is not None:
                check_ids(torch.tensor(getattr(settings, name)), self.config.vocab_size, name)
        return settings, merged


def _filling(settings: TIDEGenerationConfig) -> int:
    """What stands behind an answer's end: padding, or EOS, or anything."""
    eos = settings.eos_token_id
    if settings.pad_token_id is not None:
        return settings.pad_token_id
    return 0 if eos is None else eos[0] if isinstance(eos, list) else eos


def _output(sequences: torch.Tensor, num_new: torch.Tensor, decoder: Decoder) -> BlockDiffusionOutput:
    """The sequences and what they cost; without a network call nothing was generated either."""
    return BlockDiffusionOutput(
        sequences=sequences,
        forward_passes=decoder.forward_passes,
        tokens_per_forward=num_new.float().mean().item() / max(decoder.forward_passes, 1),
    )
