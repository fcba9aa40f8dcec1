"""What each generation setting means to this library's decoders: read, or refused by name with the reason.

A setting comes from a keyword, from the `generation_config` argument, or from `model.generation_config`; the nearest
wins, in this order. No setting that differs from its default is silently ignored: the tables below name every
attribute of transformers' `GenerationConfig` and every argument of its `generate`.

This file travels with checkpoints: it imports its siblings and transformers alone.
"""

from transformers import GenerationConfig
from transformers.utils import logging

from .generation_config_tide import OWN_FIELDS, OWN_FIELDS_FOR_ANSWERS, RULE_FIELDS, TOKEN_IDS
from .presets_tide import fill_in

logger = logging.get_logger(__name__)

# transformers' warpers, which narrow what is sampled from -> the value that switches each off. The installed
# transformers may be older than one of them
OFF_WARPERS = {
    name: off
    for name, off in {
        "top_h": None,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
    }.items()
    if hasattr(GenerationConfig(), name)
}
# transformers' logits processors and stopping criteria; those of the second group count from where an answer begins
PROCESSORS = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "remove_invalid_values",
    "renormalize_logits",
)
ANSWER_PROCESSORS = (
    "min_length",
    "min_new_tokens",
    "begin_suppress_tokens",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
)
CRITERIA = ("max_time", "stop_strings")
# disable_compile is read by doing nothing: decoding never compiles
FOR_INFILL = tuple(
    dict.fromkeys(
        (
            "mask_token_id",
            "pad_token_id",
            *(name for name in OWN_FIELDS if name not in OWN_FIELDS_FOR_ANSWERS),
            "do_sample",
            "temperature",
            *OFF_WARPERS,
            *PROCESSORS,
            "use_cache",
            "disable_compile",
            "return_dict_in_generate",
        )
    )
)
# not for infill: a hole neither lengthens nor ends a row, and the blocks of a text are counted from its beginning
FOR_ANSWERS = (
    "max_new_tokens",
    "max_length",
    "bos_token_id",
    "eos_token_id",
    *OWN_FIELDS_FOR_ANSWERS,
    "num_return_sequences",
    *ANSWER_PROCESSORS,
    *CRITERIA,
)
READ = (*FOR_ANSWERS, *FOR_INFILL, "guidance_scale")

_BEAMS = "a row is denoised as one answer, and there are no beams to compare"
_DRAFTS = "no second model drafts tokens; how many a pass reveals follows from steps_per_block and its alternatives"
_CACHE = "finished blocks are kept in a cache of this decoder's own"
_ENCODER = "it belongs to models with an encoder"
_STATES = "a pass scores all masked tokens of a block, so there is no such output per new token"
_STRATEGY = "it is a strategy of token-by-token decoding"
_ORDER = "it needs the tokens to the left to be final, and here tokens are revealed in any order"
# setting -> why it is not read, and the values, besides None and False, that ask for nothing
REFUSED = {
    "num_beams": (_BEAMS, 1),
    "num_beam_groups": (_BEAMS, 1),
    "diversity_penalty": (_BEAMS, 0.0),
    "length_penalty": (_BEAMS, 1.0),
    "early_stopping": (_BEAMS,),
    "constraints": (_BEAMS,),
    "force_words_ids": (_BEAMS,),
    "use_mtp": (_DRAFTS,),
    "is_assistant": (_DRAFTS,),
    "num_assistant_tokens": (_DRAFTS, 20),
    "num_assistant_tokens_schedule": (_DRAFTS, "constant"),
    "assistant_confidence_threshold": (_DRAFTS, 0.4),
    "assistant_lookbehind": (_DRAFTS, 10),
    "target_lookbehind": (_DRAFTS, 10),
    "assistant_early_exit": (_DRAFTS,),
    "assistant_ensemble_weight": (_DRAFTS,),
    "speculation_type": (_DRAFTS,),
    "prompt_lookup_num_tokens": (_DRAFTS,),
    "max_matching_ngram_size": (_DRAFTS,),
    "cache_implementation": (_CACHE,),
    "cache_config": (_CACHE,),
    "max_cache_len": (_CACHE,),
    "prefill_chunk_size": ("the prompt runs along with the first block",),
    "continuous_batching_config": ("rows are denoised as one batch",),
    "compile_config": ("nothing is compiled here; call torch.compile on the model",),
    "low_memory": (_STRATEGY,),
    "penalty_alpha": (_STRATEGY,),
    "dola_layers": (_STRATEGY,),
    "forced_bos_token_id": (_ENCODER,),
    "decoder_start_token_id": (_ENCODER,),
    "token_healing": ("the prompt is taken as given",),
    "watermarking_config": (_ORDER,),
    "output_attentions": (_STATES,),
    "output_hidden_states": (_STATES,),
    "output_scores": (_STATES,),
    "output_logits": (_STATES,),
    # arguments of transformers' generate that are not settings
    "prefix_allowed_tokens_fn": (_ORDER,),
    "assistant_model": (_DRAFTS,),
    "assistant_tokenizer": (_DRAFTS,),
    "custom_generate": ("this model's own generate is what decodes it",),
    "synced_gpus": ("every process stops with its own rows; gather the weights on each before generating",),
    "inputs_embeds": ("prompts are token ids",),
    "position_ids": ("positions are counted over the attention mask",),
    "token_type_ids": ("the network has no segments",),
    "cache": (_CACHE,),
    "past_key_values": (_CACHE,),
}
# settings that one method reads and another refuses -> the value that asks for nothing, or for what is done anyway
NEUTRAL = OFF_WARPERS | {
    "temperature": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "use_cache": True,
    "disable_compile": True,
}


def _unread(names: tuple, reason: str) -> dict:
    """Entries as in [`REFUSED`] for the settings `names`, which another method or model reads."""
    return {name: (reason, NEUTRAL.get(name)) for name in names}


REFUSED_FOR_INFILL = (
    REFUSED
    | _unread(FOR_ANSWERS, "a hole neither lengthens nor ends a text, and has no prompt")
    | _unread(("guidance_scale",), "a text with holes has no negative prompt to be guided away from")
)
# a uniform-state diffusion LM draws whole answers, and reads little
FOR_UNIFORM = ("max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "do_sample")
REFUSED_FOR_UNIFORM = REFUSED | _unread(
    tuple(name for name in READ if name not in FOR_UNIFORM),
    "the whole answer is drawn from the reverse process of uniform noise, which num_steps and greedy_tail set",
)
# attributes of a GenerationConfig that are not about decoding, besides those that begin with an underscore
NO_SETTINGS = ("transformers_version", "extra_output_flags")

# settings that say nothing without another one
NEEDED = {"threshold_inclusive": "confidence_threshold", "max_editing_steps": "editing_threshold"}

MODEL, GIVEN, KEYWORD = range(3)  # where a setting comes from: the higher, the nearer to the call
OWNERS = {MODEL: "model.generation_config.", GIVEN: "generation_config.", KEYWORD: ""}


def said_by(config: GenerationConfig | None) -> dict:
    """What a generation config says: whatever differs from transformers' default; unset fields say nothing."""
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig, got a {type(config).__name__}.")
    said = {name: value for name, value in config.to_diff_dict().items() if value is not None}
    if said.get("_from_model_config"):
        said.pop("use_cache", None)  # that of config.json is about `forward`; training with checkpointing clears it
    return {name: value for name, value in said.items() if name not in NO_SETTINGS and not name.startswith("_")}


class MergedSettings:
    """The settings of one call, each with the place it comes from.

    Args:
        method (`str`): `"generate"` or `"infill"`, for messages.
        model_config (`GenerationConfig`, *optional*): the model's own settings.
        given_config (`GenerationConfig`, *optional*): the `generation_config` argument.
        keywords (`dict`): the keyword arguments.
        read (`tuple[str]`): settings that the method reads.
        left_alone (`tuple[str]`): settings of another method of the model, ignored in `model_config`.
        refused (`dict`): the table of refusals, [`REFUSED`] by default.

    Raises:
        ValueError: for a setting that is not read and asks for something: its name, its value, why, and what to do.
    """

    def __init__(self, method, model_config, given_config, keywords, read, left_alone=(), refused=REFUSED):
        self.values, self.level = {}, {}
        said_by_model = said_by(model_config)
        if said_by_model.get("max_length") == 20:  # transformers' default for a model without a length of its own
            del said_by_model["max_length"]
        places, self.preset = fill_in([said_by_model, said_by(given_config), keywords], read)
        for level, said in enumerate(places):
            self.values |= said
            self.level |= dict.fromkeys(said, level)
        for name, value in list(self.values.items()):
            if name in read:
                continue
            level = self.level[name]
            reason, *off = refused.get(name, (None,))
            asks = value is not None and value is not False and value not in off
            # token ids stand in every checkpoint's config, whether its method reads them or not
            alone = (level == MODEL and name in left_alone) or (level != KEYWORD and name in TOKEN_IDS)
            if not alone and (asks or reason is None):
                raise ValueError(_refusal(method, name, value, level, reason, off, read))
            if name not in TOKEN_IDS:
                del self.values[name]

    def where(self, name: str) -> int:
        """The place that the setting `name` comes from, −1 where it is not set."""
        return -1 if self.values.get(name) is None else self.level[name]

    def temperature(self) -> float:
        """The temperature to sample at, 0 for the most probable token.

        The nearer of `do_sample` and `temperature` decides: `do_sample=True` samples at the temperature given, or at
        1, `do_sample=False` does not sample, and a temperature alone samples if it is positive.

        Raises:
            ValueError: `do_sample` and a temperature from the same place contradict one another, or a setting narrows
                what is sampled from where nothing is sampled.
        """
        sample, temperature = self.values.get("do_sample"), self.values.get("temperature")
        flag, number = self.where("do_sample"), self.where("temperature")
        decided = max(flag, number)
        if flag == number >= 0:
            # a config may spell out transformers' defaults, do_sample=False with temperature=1
            is_default = not sample and temperature == 1 and flag != KEYWORD
            if bool(sample) != (temperature > 0) and not is_default:
                raise ValueError(
                    f"do_sample={sample} {'draws tokens' if sample else 'takes the most probable token'} and "
                    f"temperature={temperature} asks for the opposite: leave one of them out."
                )
        result = ((temperature or 1.0) if sample else 0.0) if flag >= number else temperature
        if not result:
            for name in OFF_WARPERS:
                if self._narrows(name) and self.where(name) >= decided:
                    raise ValueError(
                        f"{OWNERS[self.where(name)]}{name}={self.values[name]} narrows what tokens are drawn from, "
                        "and without a temperature, with temperature=0 or with do_sample=False the most probable one "
                        f"is taken: pass do_sample=True or a temperature above 0, or leave {name} out."
                    )
        return result

    def _narrows(self, name: str) -> bool:
        """Whether a warper is on; transformers' default of top_k is not somebody's wish."""
        value = self.values.get(name)
        is_default = name == "top_k" and value == 50 and self.where(name) != KEYWORD
        return value is not None and value != OFF_WARPERS[name] and not is_default

    def settle_rule(self, own_rule=None) -> None:
        """Settings that choose which tokens a pass reveals: the nearer replace the farther that they would ignore.

        Args:
            own_rule ([`RevealRule`], *optional*): the caller's own, given as a keyword.

        Raises:
            ValueError: settings that would be ignored, set in the same place as, or nearer than, what decides instead.
        """
        if own_rule is not None:
            self._replace(f"reveal_rule={type(own_rule).__name__}(…)", KEYWORD, RULE_FIELDS)
        elif self.where("entropy_bound") >= 0:
            said = f"{OWNERS[self.where('entropy_bound')]}entropy_bound={self.values['entropy_bound']}"
            names = tuple(name for name in RULE_FIELDS if name not in ("decoding", "entropy_bound"))
            self._replace(said, self.where("entropy_bound"), names)
        # a threshold replaces steps that are farther away, unless it comes with a word on how steps divide a block
        threshold = self.where("confidence_threshold")
        if max(self.where("steps_per_block"), self.where("step_quota")) < threshold:
            self.values["steps_per_block"] = None
        for name, needed in NEEDED.items():
            is_said = self.where(name) >= 0 and name not in self.preset
            if is_said and self.where(needed) < 0 and self.level.get(needed, -1) <= self.level[name]:
                raise ValueError(
                    f"{OWNERS[self.where(name)]}{name}={self.values[name]} says nothing without {needed}: set that "
                    f"too, or {name} to None."
                )

    def _replace(self, decides: str, level: int, names: tuple[str, ...]) -> None:
        """Takes the settings `names` back where they come from farther than `level`, and refuses them elsewhere."""
        for name in names:
            if self.where(name) < 0 or self.values[name] == OWN_FIELDS[name]:
                continue
            if self.where(name) >= level:
                source = f" (of decoding={self.values['decoding']!r})" if name in self.preset else ""
                raise ValueError(
                    f"{decides} decides which tokens a pass reveals and how many, so {OWNERS[self.where(name)]}{name}="
                    f"{self.values[name]!r}{source} would be ignored: set one of them to None."
                )
            self.values[name] = None

    def check_approximate_cache(self, method: str, full: bool) -> None:
        """Refuses `approximate_cache` where it has no meaning.

        Args:
            method (`str`): `"generate"` or `"infill"`.
            full (`bool`): whether every position of the model sees every other.
        """
        level, reason = self.where("approximate_cache"), None
        if not full:
            reason = "the cache of a block-diffusion model's finished blocks is exact"
        elif method == "infill" and self.values.get("block_size") is None and level != MODEL:
            reason = "without block_size the whole text is one block, and no column is left to reuse"
        if level >= 0 and reason is not None:
            name = "approximate_cache"
            raise ValueError(_refusal(method, name, self.values[name], level, reason, [], ()))

    def answer_length(self, num_columns: int, default: int) -> int:
        """The most new tokens: `max_new_tokens`, or `max_length` less the prompt's columns; the nearer of the two.

        Args:
            num_columns (`int`): of the prompts.
            default (`int`): new tokens where neither is set.

        Raises:
            ValueError: a `max_length` that leaves nothing to generate.
        """
        total, new = self.values.get("max_length"), self.values.get("max_new_tokens")
        if total is None or self.where("max_new_tokens") >= self.where("max_length"):
            if total is not None and self.where("max_new_tokens") == self.where("max_length"):
                logger.warning(f"Both max_new_tokens={new} and max_length={total} are set: max_new_tokens is taken.")
            return default if new is None else new
        if total <= num_columns:
            raise ValueError(
                f"max_length={total} counts the prompt, whose {num_columns} columns leave nothing to generate: raise "
                "it, or pass max_new_tokens."
            )
        return total - num_columns


def _refusal(method: str, name: str, value, level: int, reason: str | None, off: list, read: tuple) -> str:
    """The message: what the setting was, why it is not read, and what to do."""
    given = name if level == KEYWORD and reason is None else f"{name}={value!r}"
    remedy = "Leave it out." if level == KEYWORD else f"Set {OWNERS[level]}{name} = {off[0] if off else None!r}."
    if reason is None:
        reason = f"it takes {', '.join(read)} and the arguments in its signature"
    return f"{method} does not read {given}: {reason}. {remedy}"
