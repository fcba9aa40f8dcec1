"""Generation by block diffusion: a clean prefix in a KV cache, one block of [MASK] denoised at a time (SPEC §1).

This file travels with checkpoints: it imports its siblings, torch and transformers.

Shapes: B rows, P prompt columns, K block size, N masked positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.generation import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper
from transformers.modeling_outputs import ModelOutput

from .masked_diffusion import CLEAN_STREAM, PADDING_STREAM, block_visibility

REMASKING = ("confidence", "random")
DEFAULTS = {"max_new_tokens": 256, "remasking": "confidence", "temperature": 0.0}
TOKEN_IDS = ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
# the settings this decoder reads; any other keyword would be accepted and ignored
SETTINGS = (
    *DEFAULTS,
    *TOKEN_IDS,
    "block_size",
    "steps_per_block",
    "confidence_threshold",
    "do_sample",
    "top_k",
    "top_p",
    "return_dict_in_generate",
)


class TIDEGenerationConfig(GenerationConfig):
    """How a student decodes.

    Args:
        max_new_tokens (`int`): tokens to generate at most, 256 by default.
        mask_token_id (`int`, *optional*): id of [MASK]; the model's by default. It is never generated.
        block_size (`int`, *optional*): tokens per block; the model's by default, which it was trained with.
        steps_per_block (`int`, *optional*): forward passes per block; one per token by default. Fewer reveal several
            tokens at a time.
        confidence_threshold (`float`, *optional*): reveal every token whose probability reaches it (at least one per
            pass), in place of a fixed number of steps.
        remasking (`str`): which positions are revealed first: `"confidence"` (most probable) or `"random"`.
        temperature (`float`): 0 takes the most probable token, anything above samples. `do_sample=False` too
            is greedy.
        top_k (`int`, *optional*), top_p (`float`, *optional*): restrict sampling, as in transformers.
        eos_token_id, pad_token_id, return_dict_in_generate: as in transformers. A row ends at its first EOS; what
            follows is padding.
    """

    def __init__(self, **kwargs):
        self.mask_token_id = kwargs.pop("mask_token_id", None)
        self.block_size = kwargs.pop("block_size", None)
        self.steps_per_block = kwargs.pop("steps_per_block", None)
        self.confidence_threshold = kwargs.pop("confidence_threshold", None)
        self.remasking = kwargs.pop("remasking", None)
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
        if (self.temperature or 0) < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}.")

    @classmethod
    def from_model_config(cls, model_config) -> "TIDEGenerationConfig":
        """Token ids and block size of a model's config; everything else at its default."""
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        return cls(**{name: values[name] for name in (*TOKEN_IDS, "block_size") if values.get(name) is not None})


@dataclass
class BlockDiffusionOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(B, P + new)`): the prompt as given, then the generated tokens.
        forward_passes (`int`): network calls, prompt and cache updates included.
        tokens_per_forward (`float`): generated tokens (up to and with EOS, mean over rows) per network call.
    """

    sequences: torch.LongTensor | None = None
    forward_passes: int | None = None
    tokens_per_forward: float | None = None


class BlockCacheLayer(DynamicLayer):
    """Keys and values of the finished blocks, in one buffer; the active block is written behind them and not kept."""

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length, self.committed = max_length, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Writes behind the committed columns and returns views of both together."""
        if not self.is_initialized:
            rows, heads, _, head_dim = key_states.shape
            self.keys = key_states.new_empty(rows, heads, self.max_length, head_dim)
            self.values = value_states.new_empty(rows, heads, self.max_length, value_states.shape[-1])
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        end = self.committed + key_states.shape[-2]
        self.keys[:, :, self.committed : end] = key_states
        self.values[:, :, self.committed : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Committed columns."""
        return self.committed


class BlockDiffusionGenerationMixin(GenerationMixin):
    """`generate` of a masked diffusion LM; subclasses `GenerationMixin` for what PEFT and pipelines look up there."""

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
        attention_mask: torch.Tensor | None = None,
        streamer=None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> torch.LongTensor | BlockDiffusionOutput:
        """Denoises an answer behind each prompt.

        Args:
            inputs (`torch.LongTensor` of shape `(B, P)`): prompts; also accepted as `input_ids`.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 0 at padding, on either side.
            generation_config ([`TIDEGenerationConfig`], *optional*): settings; keyword arguments override it.
            streamer (*optional*): gets the prompt and each finished block through `put`, the block being denoised
                through `put_draft` where it has that ([`~transformers.TextDiffusionStreamer`]); one row only.
            generator (`torch.Generator`, *optional*): source of all random draws.

        Returns:
            `torch.LongTensor` of shape `(B, P + new)`, or [`BlockDiffusionOutput`].

        Raises:
            ValueError: unknown arguments, no mask token, a streamer with several rows.
        """
        prompt_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        settings = self._generation_settings(generation_config, kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(prompt_ids)
        if streamer is not None:
            if len(prompt_ids) > 1:
                raise ValueError(f"A streamer shows one row, got {len(prompt_ids)} prompts.")
            streamer.put(prompt_ids.cpu())
        canvas = _Canvas(prompt_ids, attention_mask.bool(), settings, full=self.config.objective == "full")
        decoder = _Decoder(self, canvas, settings, generator, streamer)
        was_training = self.training
        self.eval()
        try:
            decoder.run()
        finally:
            self.train(was_training)
        new_ids, num_new = canvas.generated()
        if streamer is not None:
            streamer.end()
        sequences = torch.cat([prompt_ids, new_ids], dim=1)
        if not settings.return_dict_in_generate:
            return sequences
        return BlockDiffusionOutput(
            sequences=sequences,
            forward_passes=decoder.forward_passes,
            tokens_per_forward=num_new.float().mean().item() / decoder.forward_passes,
        )

    def _generation_settings(self, generation_config, kwargs) -> TIDEGenerationConfig:
        """Keyword arguments over the given config over the model's own over the defaults."""
        unread = [name for name in kwargs if name not in SETTINGS]
        if unread:
            raise ValueError(
                f"generate does not read {', '.join(unread)}; block diffusion takes {', '.join(SETTINGS)}, "
                "attention_mask, generation_config, streamer and generator."
            )
        own = TIDEGenerationConfig.from_model_config(self.config)
        values = DEFAULTS | _given(own) | _given(self.generation_config) | _given(generation_config) | kwargs
        settings = TIDEGenerationConfig.from_dict(values)
        if settings.pad_token_id is None:
            eos = settings.eos_token_id
            settings.pad_token_id = (eos[0] if isinstance(eos, list) else eos) if eos is not None else 0
        if settings.mask_token_id is None:
            raise ValueError("generate needs a mask token: pass mask_token_id=tokenizer.mask_token_id.")
        return settings


def _given(config: GenerationConfig | None) -> dict:
    """What a generation config says; unset fields say nothing."""
    return {} if config is None else {k: v for k, v in config.to_diff_dict().items() if v is not None}


class _Canvas:
    """Prompts and masks on one block grid: row b's token at position p stands in column p + offset_b.

    Rows are left-padded by whole blocks, so that block edges share columns and every row's first active block, which
    may begin with the prompt's tail, starts at column `start`.
    """

    def __init__(self, prompt_ids, prompt_mask, settings, full: bool):
        num_rows, self.max_new_tokens = len(prompt_ids), settings.max_new_tokens
        self.lengths = prompt_mask.sum(-1)
        # a full-sequence model reads prompt and answer as one block
        self.block_size = int(self.lengths.max()) + self.max_new_tokens if full else settings.block_size
        first_block = self.lengths // self.block_size
        self.start = int(first_block.max()) * self.block_size
        self.offset = (self.start - first_block * self.block_size)[:, None]
        longest_tail = int((self.lengths % self.block_size).max())
        num_blocks = -(-(longest_tail + self.max_new_tokens) // self.block_size)
        self.end = self.start + num_blocks * self.block_size
        columns = torch.arange(self.end, device=prompt_ids.device).expand(num_rows, -1)
        self.position = (columns - self.offset).clamp(min=0)
        self.valid = columns >= self.offset
        if full:  # nothing was trained behind the answer's end
            self.valid = self.valid & (self.position < (self.lengths + self.max_new_tokens)[:, None])
        self.ids = torch.where(self.valid, settings.mask_token_id, settings.pad_token_id)
        row, column = prompt_mask.nonzero(as_tuple=True)
        rank = prompt_mask.long().cumsum(-1)[row, column] - 1
        self.ids[row, rank + self.offset[row, 0]] = prompt_ids[row, column]
        self.masked = self.valid & (self.position >= self.lengths[:, None])
        eos = settings.eos_token_id
        self.eos = torch.tensor([] if eos is None else eos, device=prompt_ids.device, dtype=torch.long).reshape(-1)
        self.pad_token_id = settings.pad_token_id
        self.finished = torch.zeros(num_rows, dtype=torch.bool, device=prompt_ids.device)

    def finish_rows(self, end: int) -> None:
        """Marks rows whose answer holds EOS, or all its tokens, before column `end`."""
        answer = (self.position >= self.lengths[:, None]) & self.valid
        has_eos = (torch.isin(self.ids, self.eos) & answer & ~self.masked)[:, :end].any(-1)
        complete = self.position[:, end - 1] + 1 >= self.lengths + self.max_new_tokens
        self.finished |= has_eos | complete
        self.masked &= ~self.finished[:, None]

    def generated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """New ids (B, max_new_tokens), padded behind EOS and cut where all rows are padding; tokens of each row."""
        column = self.lengths[:, None] + self.offset + torch.arange(self.max_new_tokens, device=self.ids.device)
        new_ids = self.ids.gather(1, column)
        is_eos = torch.isin(new_ids, self.eos) & ~self.masked.gather(1, column)
        behind_eos = is_eos.long().cumsum(-1) - is_eos.long() > 0
        num_new = (~behind_eos).sum(-1)
        return new_ids.masked_fill(behind_eos, self.pad_token_id)[:, : int(num_new.max())], num_new


class _Decoder:
    """Runs the blocks of a canvas in order over one persistent cache."""

    def __init__(self, model, canvas: _Canvas, settings, generator, streamer):
        self.model, self.canvas, self.settings = model, canvas, settings
        self.generator, self.streamer = generator, streamer
        self.forward_passes = 0
        self.cache = Cache(layers=[BlockCacheLayer(canvas.end) for _ in range(model.config.num_hidden_layers)])
        warpers = []
        if settings.top_k:
            warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None and settings.top_p < 1:
            warpers.append(TopPLogitsWarper(settings.top_p))
        self.warpers = LogitsProcessorList(warpers)

    def run(self) -> None:
        """Prompt, then block after block until every row has ended."""
        canvas = self.canvas
        if canvas.start:
            self._forward(0, canvas.start)
            self._commit(canvas.start)
        for start in range(canvas.start, canvas.end, canvas.block_size):
            end = start + canvas.block_size
            self._denoise(start, end)
            canvas.finish_rows(end)
            if self.streamer is not None:
                self.streamer.put(self._streamed(start, end))
            if end == canvas.end or bool(canvas.finished.all()):
                break
            self._forward(start, end)
            self._commit(end)

    def _streamed(self, start: int, end: int) -> torch.Tensor:
        """The first row's answer tokens in the columns [start, end), as they will be returned."""
        answer_start = int(self.canvas.lengths[0] + self.canvas.offset[0])
        new_ids, num_new = self.canvas.generated()
        return new_ids[0, max(start - answer_start, 0) : min(end - answer_start, int(num_new[0]))].cpu()

    def _denoise(self, start: int, end: int) -> None:
        """Reveals the masked positions of one block."""
        canvas, settings = self.canvas, self.settings
        num_masked = canvas.masked[:, start:end].sum(-1)
        steps = settings.steps_per_block or canvas.block_size
        step = 0
        while bool(canvas.masked[:, start:end].any()):
            masked = canvas.masked[:, start:end]
            hidden = self._forward(start, end)
            tokens, confidence = self._propose(self.model.lm_head(hidden[masked]).float())
            score = torch.full(masked.shape, -1.0, device=masked.device).masked_scatter_(masked, confidence)
            reveal = self._choose(score, masked, num_masked, step, steps)
            proposed = torch.zeros_like(canvas.ids[:, start:end]).masked_scatter_(masked, tokens)
            canvas.ids[:, start:end] = torch.where(reveal, proposed, canvas.ids[:, start:end])
            canvas.masked[:, start:end] &= ~reveal
            step += 1
            if self.streamer is not None and hasattr(self.streamer, "put_draft"):
                first_new = max(start, int(canvas.lengths[0] + canvas.offset[0]))
                self.streamer.put_draft(canvas.ids[:1, first_new:end].cpu())

    def _propose(self, logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each masked position and its probability under the model."""
        logits_NV[:, self.settings.mask_token_id] = -torch.inf
        if self.settings.temperature and self.settings.do_sample is not False:
            warped = self.warpers(None, logits_NV / self.settings.temperature)
            tokens = torch.multinomial(warped.softmax(-1), 1, generator=self.generator).squeeze(-1)
        else:
            tokens = logits_NV.argmax(-1)
        chosen = logits_NV.gather(-1, tokens[:, None]).squeeze(-1)
        return tokens, (chosen - logits_NV.logsumexp(-1)).exp()

    def _choose(self, score, masked, num_masked, step: int, steps: int) -> torch.Tensor:
        """Positions to reveal now, (B, K): those above the threshold, or the step's share of the block's masks."""
        settings = self.settings
        order = score
        if settings.remasking == "random":
            noise = torch.rand(score.shape, device=score.device, generator=self.generator)
            order = torch.where(masked, noise, -1.0)
        rank = order.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        if settings.confidence_threshold is not None:
            return masked & ((score >= settings.confidence_threshold) | (rank == 0))
        share = num_masked // steps + (step < num_masked % steps).long()
        return masked & (rank < share[:, None])

    def _forward(self, start: int, end: int) -> torch.Tensor:
        """Hidden states (B, end − start, H) of the columns [start, end), which see the cache and their own block."""
        canvas = self.canvas
        stream = torch.where(canvas.valid[:, :end], CLEAN_STREAM, PADDING_STREAM)
        block = torch.where(canvas.valid[:, :end], canvas.position[:, :end] // canvas.block_size, -1)
        self.forward_passes += 1
        mask = block_visibility(stream[:, start:], block[:, start:], stream, block)
        return self.model.run_decoder(
            input_ids=canvas.ids[:, start:end],
            attention_mask=mask,
            position_ids=canvas.position[:, start:end],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _commit(self, end: int) -> None:
        """Keeps what the last forward wrote: columns before `end` are final."""
        for layer in self.cache.layers:
            layer.committed = end
