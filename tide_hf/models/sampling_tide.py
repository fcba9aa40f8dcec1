"""What one denoising step reveals: a token for each masked position, and how many and which positions keep theirs.

This file travels with checkpoints: it imports its siblings, torch and transformers.

Shapes: B rows, K columns being denoised, N masked positions among them (row by row, left to right), V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

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


@lru_cache(maxsize=1024)
def reveal_counts(num_masked: int, steps: int) -> tuple[int, ...]:
    """How many of `num_masked` positions each of at most `steps` steps reveals, without steps that reveal none.

    Step j of S goes from time t = (S−j)/S to s = (S−j−1)/S. Under the linear schedule a position stays masked with
    probability s/t, so round(left · (1 − s/t)) of those left are revealed: equal shares, whatever schedule the model
    was trained with, since the network is not told the time. The quotient is taken in float32 from 1 − (1 − s), as in
    the published sampler: that decides which way a half is rounded, and the result is the same token for token.

    Args:
        num_masked (`int`): masked positions of a row's block.
        steps (`int`): S, at least 1.

    Returns:
        `tuple[int]`: positive counts that add up to `num_masked`.

    Source: MDLM 2406.07524 eq. 7; the sampler of dllm and TIDE.
    """
    time = (torch.arange(steps, -1, -1, dtype=torch.float64) / steps).float()
    masked_probability = 1 - (1 - time)
    stays_masked = (masked_probability[1:] / masked_probability[:-1]).tolist()
    counts, left = [], num_masked
    for probability in stays_masked:
        counts.append(min(round(left * (1 - probability)), left))
        left -= counts[-1]
    return tuple(count for count in counts if count)


def propose_tokens(
    logits_NV: torch.Tensor, temperature: float, warpers: LogitsProcessorList, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each masked position, `(N,)`, and its probability at temperature 1, `(N,)`.

    Args:
        logits_NV (`torch.Tensor` of shape `(N, V)`): float; overwritten.
        temperature (`float`): 0 takes the most probable token.
        warpers (`LogitsProcessorList`): narrow what is sampled from.
        generator (`torch.Generator`, *optional*): of the draws.
    """
    if not temperature:
        return most_probable([(0, logits_NV)])
    warped_NV = warpers(None, logits_NV / temperature)
    tokens = torch.multinomial(warped_NV.softmax(-1), 1, generator=generator).squeeze(-1)
    return tokens, 1 / logits_NV.sub_(logits_NV.gather(-1, tokens[:, None])).exp_().sum(-1)


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


def rank_descending(score_BK: torch.Tensor) -> torch.Tensor:
    """Rank of each column in its row's descending order of `score_BK`, from 0; among equals, left before right."""
    # the second argsort inverts the permutation that the first one gives; the first is stable so that ties are decided
    # in the same way on every device and in every batch
    return score_BK.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def within_entropy_bound(entropy_BK: torch.Tensor, bound: float) -> torch.Tensor:
    """The columns to reveal under an entropy bound.

    In ascending order of entropy (among equals the left one first) the longest prefix U with
    Σ_{i∈U} H_i − max_{i∈U} H_i ≤ bound. That bounds what the revealed tokens say about one another, since the joint
    entropy is at least the largest and at most the sum. The first is always revealed; bound 0 reveals one token per
    step, and those that are certain.

    Args:
        entropy_BK (`torch.Tensor` of shape `(B, K)`): nats; infinite where nothing is to be revealed.
        bound (`float`): nats, ≥ 0.

    Returns:
        `torch.BoolTensor` of shape `(B, K)`.

    Source: EB-Sampler, arXiv 2505.24857 §3.
    """
    ascending, column = entropy_BK.sort(dim=-1, stable=True)
    # in this order the largest of a prefix is its last: the sum without it is the sum of those before
    before = torch.cat([torch.zeros_like(ascending[:, :1]), ascending[:, :-1].cumsum(-1)], -1)
    revealed = (before <= bound) & ascending.isfinite()
    return torch.zeros_like(revealed).scatter(-1, column, revealed)
