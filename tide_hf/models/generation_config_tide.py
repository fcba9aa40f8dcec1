"""How a student decodes: the settings of `generate` and `infill`.

A new setting is an entry of `OWN_FIELDS`, with its check and its help, here, and the code in `decoding_tide.py` that
reads it.

This file travels with checkpoints: it imports its siblings and transformers alone.
"""

from numbers import Integral

from transformers import GenerationConfig

from .presets_tide import PRESETS
from .reveal_rules_tide import SPLITS

TOKEN_IDS = ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
# settings that transformers does not have -> default; None is off, or the model's own
OWN_FIELDS = {
    "mask_token_id": None,
    "block_size": None,
    "block_grid": "absolute",
    "denoise_whole_blocks": False,
    "decoding": None,
    "steps_per_block": None,
    "step_quota": "even",
    "confidence_threshold": None,
    "threshold_inclusive": True,
    "entropy_bound": None,
    "remasking": "confidence",
    "confidence_from": "model",
    "suppress_confidence_tokens": None,
    "editing_threshold": None,
    "max_editing_steps": 16,
    "approximate_cache": None,
}
# those that infill does not read: they are about an answer after a prompt
OWN_FIELDS_FOR_ANSWERS = ("block_grid", "denoise_whole_blocks")
DEFAULTS = {"max_new_tokens": 256, "temperature": 0.0} | {
    name: default for name, default in OWN_FIELDS.items() if default is not None
}
# what a reveal rule of the caller's stands for
RULE_FIELDS = (
    "decoding",
    "steps_per_block",
    "step_quota",
    "confidence_threshold",
    "threshold_inclusive",
    "entropy_bound",
    "remasking",
)
# what validate checks: choices, least values of integers, and shares between 0 and 1
CHOICES = {
    "decoding": tuple(PRESETS),
    "step_quota": tuple(SPLITS),
    "remasking": ("confidence", "entropy", "margin", "left_to_right", "random"),
    "confidence_from": ("model", "sampling"),
    "block_grid": ("absolute", "prompt_aligned"),
    **dict.fromkeys(("threshold_inclusive", "denoise_whole_blocks"), (True, False)),
    "approximate_cache": ("prefix", "dual"),
}
AT_LEAST = {
    **dict.fromkeys(("max_new_tokens", "max_length", "block_size", "steps_per_block", "num_return_sequences"), 1),
    "max_editing_steps": 0,
    **dict.fromkeys(("top_k", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
}
SHARES = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "editing_threshold")


class TIDEGenerationConfig(GenerationConfig):
    """How a student decodes.

    Args:
        max_new_tokens (`int`): the most tokens to generate, 256 by default. Only these are denoised: where they end
            inside a block, the rest of it stays [MASK] (see `denoise_whole_blocks`), and without `steps_per_block`
            there are as many passes as tokens.
        max_length (`int`, *optional*): as in transformers, the same including the prompt's columns. Of the two, the
            one set nearer to the call counts (keyword, given config, model's config); `max_new_tokens` if both are
            set in one place.
        mask_token_id (`int`, *optional*): id of [MASK]; the model's by default. [MASK] is never generated.
        block_size (`int`, *optional*): tokens per block; the model's by default, which it was trained with. A
            full-sequence student denoises its whole answer at once or, with this set, block by block from left to
            right.
        block_grid (`str`): where a block-diffusion student's blocks begin. `"absolute"`, the default: counted from
            position 0 as in training, so the answer's first tokens share a block with the end of the prompt.
            `"prompt_aligned"`: the answer starts a block and the prompt's first block is short, as in the sampler that
            dllm and TIDE published with their BD3LM students.
        denoise_whole_blocks (`bool`): True also denoises what follows the last new token in its block, as SDAR and
            LLaDA2 do; it is dropped in the end. Not for full-sequence students, whose answer has no such rest.
        decoding (`str`, *optional*): a published sampler, which fills in the settings below; those given in the same
            place win, and so does what is nearer to the call. Steps and block size are given beside it.
            `"llada"` (ML-GSAI/LLaDA), `"fast-dllm"` (NVlabs/Fast-dLLM, with a threshold), `"sdar"` (JetAstra/SDAR,
            `low_confidence_dynamic`; without its threshold, `low_confidence_static`), `"llada2"` and `"llada2.1"`
            (inclusionAI), `"dream"` (DreamLM/Dream, `entropy`; with `remasking="confidence"`, `maskgit_plus`, with
            `"margin"`, `topk_margin`; where both are given, `top_p` narrows after `top_k`, in Dream before it),
            `"wedlm"` (Tencent/WeDLM, `generate_wedlm`).
            Without it students decode as in dllm and TIDE (MDLM, BD3LM).
        steps_per_block (`int`, *optional*): forward passes per block; one per token by default. Fewer reveal several
            tokens at a time.
        step_quota (`str`): how steps divide a row's n masks of a block. `"even"`, the default: of those left, the
            rounded share (`reveal_rules_tide.reveal_counts`). `"remainder_first"`: n // steps each, and one more in
            the first n % steps (LLaDA). `"remainder_last"`: of those left, the share rounded down, and the rest in the
            last step (Dream). `"of_block"`: as `remainder_first` with the block's size in place of n, until no mask is
            left (SDAR). `"binomial"`: as many as if each mask were revealed on its own with probability 1 − s/t
            (with `remasking="random"` Dream's `origin`).
        confidence_threshold (`float`, *optional*): in every pass reveal all tokens whose confidence reaches it, and at
            least as many as the step's quota, which is one without `steps_per_block`.
        threshold_inclusive (`bool`): whether a confidence reaches the threshold that equals it; False asks for more.
        entropy_bound (`float`, *optional*): in nats; reveal positions in ascending order of entropy while the sum of
            their entropies, without the largest, is at most this, instead of a fixed number of steps (EB-Sampler,
            arXiv 2505.24857).
        remasking (`str`): which positions are revealed first: those with the largest `"confidence"` (probability of
            the token), the smallest `"entropy"`, or the largest `"margin"` (between the two largest probabilities);
            `"left_to_right"`; or in `"random"` order.
        confidence_from (`str`): the distribution that confidence, entropy and margin are taken from: the `"model"`'s,
            at temperature 1, or the one for `"sampling"`, after temperature, `top_k`, `top_p` and the like.
        suppress_confidence_tokens (`list[int]`, *optional*): ids that are left out of that distribution. A proposed
            one of them has confidence 0, so that EOS and the like are revealed last (LLaDA's
            `confidence_eos_eot_inf`; its `logits_eos_inf` is `suppress_tokens`).
        editing_threshold (`float`, *optional*): every pass also replaces tokens revealed before in the block under way
            where another is proposed whose confidence is larger than this (LLaDA2.1); given tokens never change.
        max_editing_steps (`int`): with an editing threshold, the most passes over a block after its last mask is gone.
            They end when one changed nothing. A row without masks is left alone once it has come to that.
        temperature (`float`): 0, the default, takes the most probable token; anything above 0 samples.
        do_sample (`bool`, *optional*): True samples at the temperature given, or at 1; False takes the most probable
            token.
        top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, top_h (*optional*): narrow what is sampled from, as
            in transformers; refused where nothing is sampled.
        guidance_scale (`float`, *optional*): with a negative prompt, logits are z⁻ + scale · (z − z⁻); 1 is no
            guidance.
        num_return_sequences (`int`, *optional*): answers sampled for each prompt, in consecutive rows.
        max_time (`float`, *optional*): seconds; checked after each block, so that the block under way is finished.
        use_cache (`bool`, *optional*): False runs the columns before a block again in every pass.
        approximate_cache (`str`, *optional*): for full-sequence students, with `block_size`: the first pass over each
            block runs all columns, and the further passes reuse keys and values that are no longer exact, so that
            answers may differ. `"prefix"` reuses those of the columns before the block, `"dual"` those after it as
            well, which with one block is the same (Fast-dLLM, arXiv 2505.22618). None, the default, runs all columns
            in every pass. Block-diffusion students have an exact cache, and refuse it.
        kwargs: transformers' further settings. Processors of logits (`repetition_penalty`, `no_repeat_ngram_size`,
            `suppress_tokens`, `min_new_tokens`, …) and `stop_strings` are transformers' own objects and are applied as
            those given to `generate`. Tokens are revealed in any order: rules about single tokens and positions hold
            exactly; rules about the text to the left (`repetition_penalty`, n-grams, words of several tokens) see only
            what has been revealed of it, which with `block_size=1` is all of it. Every other setting may be loaded and
            saved, and is refused by `generate` and `infill` unless it is off: `settings_tide.py` says why for each.
        eos_token_id, pad_token_id, return_dict_in_generate: as in transformers. A row ends at its first EOS; what
            follows is padding.
        bos_token_id (`int`, *optional*): the prompt where none is given.
    """

    def __init__(self, **kwargs):
        for name in OWN_FIELDS:
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)

    def validate(self, *args, **kwargs):
        """Checks the settings that this decoder reads; `args` and `kwargs`, in transformers' signature, are not used.

        Raises:
            ValueError: with the field, its value, and the values it may have.
        """
        for name, least in AT_LEAST.items():
            value = getattr(self, name, None)
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise ValueError(f"{name} must be a whole number, got {value!r}.")
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        for name in SHARES:
            value = getattr(self, name, None)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}.")
        if self.confidence_threshold is not None and not 0 < self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold must lie in (0, 1], got {self.confidence_threshold}.")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            # 1 == True, and 1 is no choice
            if value is not None and not (value in choices and type(value) in map(type, choices)):
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
        if (self.temperature or 0) < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}.")
        if self.max_time is not None and self.max_time <= 0:
            raise ValueError(f"max_time must be a positive number of seconds, got {self.max_time}.")
        if self.approximate_cache is not None and self.use_cache is False:
            raise ValueError(
                f"approximate_cache={self.approximate_cache!r} keeps keys and values, and use_cache=False keeps none: "
                "set approximate_cache to None, or use_cache to True."
            )
        if self.entropy_bound is None:
            return
        if self.entropy_bound < 0:
            raise ValueError(f"entropy_bound must be 0 or more nats, got {self.entropy_bound}.")
        for name, unread in (("confidence_threshold", None), ("remasking", "confidence"), ("step_quota", "even")):
            if getattr(self, name) not in (None, unread):
                raise ValueError(
                    f"entropy_bound={self.entropy_bound} decides by entropy which positions are revealed and how "
                    f"many, so {name}={getattr(self, name)!r} would be ignored: set one of them to None."
                )

    @classmethod
    def from_model_config(cls, model_config) -> "TIDEGenerationConfig":
        """Token ids and block size of a `model_config` (or its dict); everything else at its default."""
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        # a full-sequence model's config has a block size too, which it was not trained with
        names = TOKEN_IDS if values.get("diffusion_type") == "full" else (*TOKEN_IDS, "block_size")
        return cls(**{name: values[name] for name in names if values.get(name) is not None})
