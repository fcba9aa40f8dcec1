"""What a denoising step proposes: a token for each masked position, and how sure the network is of it.

This file travels with checkpoints: it imports its siblings, torch and transformers.

Shapes: B rows, N positions of them (row by row, left to right), V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from .settings_tide import ANSWER_PROCESSORS, CRITERIA, OFF_WARPERS, PROCESSORS

RUN = 128  # consecutive logits among which the largest is searched for one by one


@dataclass
class Rules:
    """transformers' objects that take part in decoding.

    Args:
        processors (`LogitsProcessorList`): change the logits of a masked token, before temperature.
        warpers (`LogitsProcessorList`): narrow what is sampled from, after temperature.
        criteria (`StoppingCriteriaList`): end rows.
    """

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    warpers: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)


def transformers_rules(
    model, settings, prompt_ids: torch.LongTensor, num_padding=None, tokenizer=None, processors=None, criteria=None
) -> Rules:
    """The rules that transformers' own code makes of the settings, with those given by the caller.

    Args:
        model (`GenerationMixin`): its methods build the rules.
        settings ([`TIDEGenerationConfig`]): of the call.
        prompt_ids (`torch.LongTensor` of shape `(B, P)`): padded on the left; no columns for a text with holes.
        num_padding (`torch.LongTensor` of shape `(B,)`, *optional*): columns of padding; None for a text with holes.
        tokenizer (*optional*): for `stop_strings`.
        processors (*optional*), criteria (*optional*): lists given by the caller. One that is of the same kind as a
            setting's replaces it, as in transformers.
    """
    columns, eos, options = torch.arange(prompt_ids.shape[1], device=prompt_ids.device), settings.eos_token_id, {}
    if num_padding is None:  # a text with holes: nothing ends it, and it has no prompt
        eos, num_columns = None, 1
    else:
        num_columns = len(columns)
        options["encoder_input_ids"] = prompt_ids
        options["model_kwargs"] = {"attention_mask": (columns >= num_padding[:, None]).long()} if num_columns else {}
    options |= {"input_ids_seq_length": num_columns, "device": prompt_ids.device}
    eos = None if eos is None else torch.tensor(eos, dtype=torch.long, device=prompt_ids.device).reshape(-1)
    asked = _part(settings, (*PROCESSORS, *ANSWER_PROCESSORS, "max_length"), _eos_token_tensor=eos)
    narrowed = _part(settings, OFF_WARPERS, do_sample=True)
    stops = _part(settings, CRITERIA, _eos_token_tensor=None)  # the canvas ends rows at EOS and at the last token
    return Rules(
        model._get_logits_processor(asked, logits_processor=LogitsProcessorList(processors or []), **options),
        model._get_logits_processor(narrowed, logits_processor=LogitsProcessorList(), **options),
        _stopping_criteria(model, stops, criteria, tokenizer),
    )


def _stopping_criteria(model, stops: GenerationConfig, criteria, tokenizer) -> StoppingCriteriaList:
    """transformers' criteria; those of `stop_strings` read the text of each token of the vocabulary."""
    try:
        return model._get_stopping_criteria(stops, StoppingCriteriaList(criteria or []), tokenizer=tokenizer)
    except ValueError as error:
        if "substring not found" not in str(error):
            raise
        raise ValueError(
            f"stop_strings={stops.stop_strings!r} needs a tokenizer that can write any letter: transformers' "
            f"criterion decodes its tokens after a letter, and this {type(tokenizer).__name__} cannot. Pass a "
            "stopping_criteria of your own."
        ) from error


def _part(settings, names: Iterable[str], **changes) -> GenerationConfig:
    """A generation config with some of the settings, in the form in which transformers' `generate` passes it on."""
    part = GenerationConfig()
    for name, value in ({name: getattr(settings, name) for name in names} | changes).items():
        setattr(part, name, value)
    return part


@dataclass
class Scoring:
    """What is to be known of the proposed tokens.

    Args:
        statistics (`tuple[str, ...]`): `"confidence"`, `"entropy"`, `"margin"`; see [`MaskedPositions`].
        of_sampling (`bool`): whether of the distribution that tokens are drawn from, after temperature and warpers,
            instead of the model's own.
        suppressed (`torch.LongTensor`, *optional*): ids that are left out of the distribution first; a proposed one of
            them has confidence 0.
    """

    statistics: tuple[str, ...] = ("confidence",)
    of_sampling: bool = False
    suppressed: torch.LongTensor | None = None

    @property
    def is_confidence(self) -> bool:
        """Whether nothing beyond the probability of the token is asked for."""
        return set(self.statistics) <= {"confidence"} and self.suppressed is None


def propose_tokens(
    logits_NV: torch.Tensor,
    temperature: float,
    warpers: LogitsProcessorList,
    generator: torch.Generator | Callable[[torch.Tensor], torch.Tensor] | None,
    scoring: Scoring | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A token for each position, `(N,)`, and the statistics asked for, `(N,)` each; by default its probability.

    Args:
        logits_NV (`torch.Tensor` of shape `(N, V)`): float; overwritten.
        temperature (`float`): 0 takes the most probable token.
        warpers (`LogitsProcessorList`): narrow what is sampled from.
        generator (`torch.Generator` or `Callable`, *optional*): of the draws, or what draws a token from each row of
            probabilities `(N, V)`.
        scoring ([`Scoring`], *optional*): the statistics, and of which distribution.
    """
    scoring = Scoring() if scoring is None else scoring
    if not temperature and scoring.is_confidence:
        tokens, probability_N = most_probable([(0, logits_NV)])
        return tokens, {"confidence": probability_N}
    if temperature:
        sampled_NV = warpers(None, logits_NV / temperature)
        probability_NV = sampled_NV.softmax(-1)
        if callable(generator):
            tokens = generator(probability_NV)
        else:
            tokens = torch.multinomial(probability_NV, 1, generator=generator).squeeze(-1)
        if scoring.of_sampling:
            logits_NV = sampled_NV
    else:
        tokens, _ = _largest(logits_NV)
    return tokens, _statistics(logits_NV, tokens, scoring)


def _statistics(logits_NV: torch.Tensor, tokens: torch.Tensor, scoring: Scoring) -> dict[str, torch.Tensor]:
    """The statistics of `softmax(logits_NV)` that are asked for, `(N,)` each; overwrites the logits."""
    found, logit_N = {}, logits_NV.gather(-1, tokens[:, None])
    if scoring.suppressed is not None:
        logits_NV = logits_NV.index_fill(-1, scoring.suppressed, -torch.inf)
    if "entropy" in scoring.statistics:
        # of a distribution with nothing left in it (NaN) nothing is known
        found["entropy"] = token_entropy(logits_NV).nan_to_num(nan=torch.finfo(torch.float32).max)
    if "margin" in scoring.statistics:
        first, second = logits_NV.softmax(-1).topk(2).values.unbind(-1)
        found["margin"] = (first - second).nan_to_num()
    if "confidence" in scoring.statistics:
        found["confidence"] = 1 / logits_NV.sub_(logit_N).exp_().sum(-1)
        if scoring.suppressed is not None:
            found["confidence"].masked_fill_(torch.isin(tokens, scoring.suppressed), 0)
    return found


def most_probable(stretches: Iterable[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable token of each position, `(N,)`, the first among equals, and its probability, `(N,)`.

    Args:
        stretches (`Iterable[tuple[int, torch.Tensor]]`): the vocabulary in consecutive pieces: first token id and
            float logits `(N, v)`, which are overwritten. In each row at least one is finite.
    """
    found = []
    for first, logits in stretches:
        token, value = _largest(logits)
        # −∞ in a piece without any possible token would become NaN below
        value = value.clamp(min=torch.finfo(value.dtype).min)
        found.append((first + token, value, logits.sub_(value[:, None]).exp_().sum(-1)))
    tokens_SN, largest_SN, total_SN = map(torch.stack, zip(*found, strict=True))
    largest, stretch = largest_SN.max(0)
    total = (total_SN * (largest_SN - largest).exp()).sum(0)
    return tokens_SN.gather(0, stretch[None])[0], 1 / total


def _largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and value of each row's largest logit, `(N,)`; among equals the first.

    On a CPU argmax and max visit one number after another and take ten times as long as amax. So amax finds the run of
    [`RUN`] logits that holds the largest, and max searches that run alone.
    """
    width = logits.shape[-1]
    size = min(RUN, width)
    runs = logits[:, : width // size * size].unflatten(-1, (-1, size)).amax(-1)
    if width % size:  # a last run that ends with the row, and overlaps the one before it
        runs = torch.cat([runs, logits[:, -size:].amax(-1, keepdim=True)], -1)
    start = (runs.argmax(-1) * size).clamp(max=width - size)
    value, place = logits.gather(-1, start[:, None] + torch.arange(size, device=start.device)).max(-1)
    return start + place, value


def token_entropy(logits_NV: torch.Tensor) -> torch.Tensor:
    """Entropy of each position's distribution, `softmax(logits_NV)`, in nats, `(N,)`."""
    return torch.special.entr(logits_NV.softmax(-1)).sum(-1)
