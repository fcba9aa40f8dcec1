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
from .infilling_tide import TextInfillingMixin

REMASKING = ("confidence", "random")
BLOCK_GRIDS = ("absolute", "prompt_aligned")
DEFAULTS = {"max_new_tokens": 256, "remasking": "confidence", "temperature": 0.0, "block_grid": "absolute"}
TOKEN_IDS = ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
OWN_FIELDS = (
    "mask_token_id",
    "block_size",
    "block_grid",
    "steps_per_block",
    "confidence_threshold",
    "entropy_bound",
    "remasking",
)
# the settings this decoder reads; any other keyword would be accepted and ignored
SETTINGS = tuple(
    dict.fromkeys(
        (
            *DEFAULTS,
            *TOKEN_IDS,
            *OWN_FIELDS,
            "do_sample",
            "top_k",
            "top_p",
            "guidance_scale",
            "return_dict_in_generate",
        )
    )
)
# a hole neither grows nor ends a row, and blocks of a text are counted from its beginning
INFILL_SETTINGS = tuple(
    name
    for name in SETTINGS
    if name not in ("max_new_tokens", "bos_token_id", "eos_token_id", "block_grid", "guidance_scale")
)


class TIDEGenerationConfig(GenerationConfig):
    """How a student decodes.

    Args:
        max_new_tokens (`int`): tokens to generate at most, 256 by default.
        mask_token_id (`int`, *optional*): id of [MASK]; the model's by default. It is never generated.
        block_size (`int`, *optional*): tokens per block; the model's by default, which it was trained with. A
            full-sequence student denoises its whole answer at once, or with this set blocks of it from left to right.
        block_grid (`str`): where a block-diffusion student's blocks begin. `"absolute"`, the default: counted from
            position 0 as in training, so the answer's first tokens share a block with the prompt's tail.
            `"prompt_aligned"`: the answer starts a block and the prompt's first block is short, as in the sampler
            published with BD3LM students by dllm and TIDE.
        steps_per_block (`int`, *optional*): forward passes per block; one per token by default. Fewer reveal several
            tokens at a time, divided as `sampling_tide.reveal_counts` says.
        confidence_threshold (`float`, *optional*): reveal every token whose probability reaches it (at least one per
            pass), in place of a fixed number of steps.
        entropy_bound (`float`, *optional*): in nats; reveal positions in ascending order of entropy while the sum of
            the revealed ones' entropies without the largest is at most this, in place of a fixed number of steps
            (EB-Sampler, arXiv 2505.24857).
        remasking (`str`): which positions are revealed first: `"confidence"` (most probable) or `"random"`.
        temperature (`float`): 0 takes the most probable token, anything above samples. `do_sample=False` too
            is greedy.
        top_k (`int`, *optional*), top_p (`float`, *optional*): restrict sampling, as in transformers.
        guidance_scale (`float`, *optional*): with a negative prompt, logits are z⁻ + scale · (z − z⁻); 1 is none.
        eos_token_id, pad_token_id, return_dict_in_generate: as in transformers. A row ends at its first EOS; what
            follows is padding.
    """

    def __init__(self, **kwargs):
        for name in OWN_FIELDS:
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)

    def validate(self, *args, **kwargs):
        """Checks what this decoder reads.

        Raises:
            ValueError: with the field, its value, and what it may be.
        """
        for name in ("max_new_tokens", "block_size", "steps_per_block", "top_k"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.confidence_threshold is not None and not 0 < self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold must lie in (0, 1], got {self.confidence_threshold}.")
        if self.remasking not in (None, *REMASKING):
            raise ValueError(f"remasking must be one of {', '.join(REMASKING)}, got {self.remasking!r}.")
        if self.block_grid not in (None, *BLOCK_GRIDS):
            raise ValueError(f"block_grid must be one of {', '.join(BLOCK_GRIDS)}, got {self.block_grid!r}.")
        if (self.temperature or 0) < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}.")
        if self.entropy_bound is None:
            return
        if self.entropy_bound < 0:
            raise ValueError(f"entropy_bound must be 0 or more nats, got {self.entropy_bound}.")
        for name, unread in (("confidence_threshold", None), ("remasking", "confidence")):
            if getattr(self, name) not in (None, unread):
                raise ValueError(
                    f"entropy_bound={self.entropy_bound} decides by entropy which positions are revealed and how "
                    f"many, so {name}={getattr(self, name)!r} would be ignored: set one of them to None."
                )

    @classmethod
    def from_model_config(cls, model_config) -> "TIDEGenerationConfig":
        """Token ids and block size of a model's config; everything else at its default."""
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        # a full-sequence model has a block size in its config and was not trained in blocks
        names = TOKEN_IDS if values.get("objective") == "full" else (*TOKEN_IDS, "block_size")
        return cls(**{name: values[name] for name in names if values.get(name) is not None})


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
        self.generation_config = TIDEGenerationConfig.from_dict(_given(base) | _given(self.generation_config))

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
        **kwargs,
    ) -> torch.LongTensor | BlockDiffusionOutput:
        """Denoises an answer behind each prompt.

        Args:
            inputs (`torch.LongTensor` of shape `(B, P)`): prompts; also accepted as `input_ids`.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 0 at padding, on either side.
            generation_config ([`TIDEGenerationConfig`], *optional*): settings; keyword arguments override it.
            logits_processor (`LogitsProcessorList`, *optional*): transformers' processors, called before temperature
                once per n-th new token that is still masked, with what a token-by-token decoder would hand them:
                `input_ids (B, P + n)`, the prompts as given and the n new tokens to the left ([MASK] where not
                revealed yet), and float32 `scores (B, V)` (zeros in rows whose token is revealed, ignored).
            stopping_criteria (`StoppingCriteriaList`, *optional*): asked after each block, once per new token n, with
                `input_ids (B, P + n)` and None; a row ends behind the first token for which one says True.
            negative_prompt_ids (`torch.LongTensor` of shape `(B, P′)` or `(1, P′)`, *optional*): what guidance leads
                away from, with `guidance_scale`; [MASK] in place of every prompt token gives the unconditional
                guidance of the published samplers (their `cfg_scale` is `guidance_scale − 1`).
            negative_prompt_attention_mask (`torch.Tensor`, *optional*): 0 at its padding.
            streamer (*optional*): gets the prompt and each finished block through `put`, the block being denoised
                through `put_draft` where it has that ([`~transformers.TextDiffusionStreamer`]); one row only.
            generator (`torch.Generator`, *optional*): source of all random draws.

        Returns:
            `torch.LongTensor` of shape `(B, P + new)`, or [`BlockDiffusionOutput`].

        Raises:
            ValueError: unknown arguments, no prompt, no mask token, a streamer with several rows, guidance without
                a negative prompt or the reverse.
        """
        prompt_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if prompt_ids is None:
            raise ValueError("generate needs prompts: pass input_ids of shape (rows, tokens).")
        settings = self._generation_settings(generation_config, kwargs, "generate", SETTINGS)
        if (settings.guidance_scale in (None, 1)) != (negative_prompt_ids is None):
            raise ValueError(
                "Guidance needs both negative_prompt_ids and a guidance_scale other than 1, got "
                f"negative_prompt_ids={'None' if negative_prompt_ids is None else 'given'} and "
                f"guidance_scale={settings.guidance_scale}: pass both or neither."
            )
        if streamer is not None:
            if len(prompt_ids) > 1:
                raise ValueError(f"A streamer shows one row, got {len(prompt_ids)} prompts.")
            streamer.put(prompt_ids.cpu())
        canvas = answer_canvas(
            prompt_ids,
            _padding_mask(prompt_ids, attention_mask),
            settings,
            full=self.config.objective == "full",
            negative_ids=negative_prompt_ids,
            negative_mask=negative_prompt_attention_mask,
        )
        decoder = Decoder(self, canvas, settings, generator, streamer, logits_processor, stopping_criteria)
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
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 at padding, on either side.
            generation_config, generator, keyword arguments: as in `generate`, where they mean something; with
                `steps_per_block` a block's masks are divided among that many passes. EOS does not end a row.
            logits_processor (`LogitsProcessorList`, *optional*): as in `generate`, with no prompt and the text to the
                left as new tokens.

        Returns:
            `torch.LongTensor` of shape `(B, L)`, or [`BlockDiffusionOutput`], which counts the filled masks.

        Raises:
            ValueError: unknown arguments, no mask token.
        """
        settings = self._generation_settings(generation_config, kwargs, "infill", INFILL_SETTINGS)
        valid = _padding_mask(input_ids, attention_mask)
        canvas = infill_canvas(input_ids, valid, settings, full=self.config.objective == "full")
        num_masked = canvas.masked.sum(-1)
        decoder = Decoder(self, canvas, settings, generator, processors=logits_processor)
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

    def _generation_settings(self, generation_config, kwargs, method: str, read: tuple) -> TIDEGenerationConfig:
        """Keyword arguments over the given config over the model's own over the defaults."""
        unread = [name for name in kwargs if name not in read]
        if unread:
            raise ValueError(
                f"{method} does not read {', '.join(unread)}; block diffusion takes {', '.join(read)} "
                "and the arguments in its signature."
            )
        own = TIDEGenerationConfig.from_model_config(self.config)
        values = DEFAULTS | _given(own) | _given(self.generation_config) | _given(generation_config) | kwargs
        settings = TIDEGenerationConfig.from_dict(values)
        if settings.pad_token_id is None:
            eos = settings.eos_token_id
            settings.pad_token_id = (eos[0] if isinstance(eos, list) else eos) if eos is not None else 0
        if settings.mask_token_id is None:
            raise ValueError(f"{method} needs a mask token: pass mask_token_id=tokenizer.mask_token_id.")
        return settings


def _given(config: GenerationConfig | None) -> dict:
    """What a generation config says; unset fields say nothing."""
    return {} if config is None else {k: v for k, v in config.to_diff_dict().items() if v is not None}


def _padding_mask(ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.BoolTensor:
    """True at tokens; all of them without a mask."""
    return torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


def _output(sequences: torch.Tensor, num_new: torch.Tensor, decoder: Decoder) -> BlockDiffusionOutput:
    """The sequences and what they cost; without a network call nothing was generated either."""
    return BlockDiffusionOutput(
        sequences=sequences,
        forward_passes=decoder.forward_passes,
        tokens_per_forward=num_new.float().mean().item() / max(decoder.forward_passes, 1),
    )
