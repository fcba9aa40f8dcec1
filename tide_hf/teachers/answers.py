"""A teacher writes: prompts in, its own answers out (sequence-level distillation, Kim & Rush 1606.07947).

An answer depends on its prompt and its key alone, not on the rows that share its batch: greedy ones because nothing is
drawn (up to the rounding of the network's precision), drawn ones because each has random numbers of its own. In an
autoregressive teacher's batch they are hashes of the answer's key and the token's place. A diffusion teacher draws
from a generator of torch, which a batch would share: its drawn answers are written one at a time.

Shapes: B answers of a batch, P prompt columns, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..models import MODELS
from ..models.row_noise import uniforms
from .contract import REFUSED
from .loading import load_teacher, quantization_4bit

# decided by the other fields of AnswerDecoding, or by the way answers are written
DECIDED = (
    *("do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "max_length", "generator", "num_beams"),
    *("num_return_sequences", "return_dict_in_generate", "streamer", "generation_config"),
)
DIFFUSION, AUTOREGRESSIVE = "diffusion", "autoregressive"
# settings of a diffusion LM that draw where no token is drawn
DRAWING = {"remasking": "random", "step_quota": "binomial"}


@dataclass(frozen=True)
class AnswerDecoding:
    """How a teacher decodes its answers.

    Args:
        temperature (`float`): 0 takes the most probable token (greedy); above, tokens are drawn.
        top_p (`float`), top_k (`int`): narrow what is drawn from; 1 and 0 are off.
        max_new_tokens (`int`): the most tokens of an answer, with the one that ends it.
        settings (`dict`): further arguments of the model's `generate`, such as `steps_per_block` of a diffusion LM or
            `repetition_penalty`.

    Raises:
        ValueError: for a value out of range, a narrowing where nothing is drawn, and a setting that is decided here.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        if not (0 <= self.temperature < float("inf") and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise ValueError(
                f"Expected temperature ≥ 0, 0 < top_p ≤ 1 and top_k ≥ 0, got temperature={self.temperature}, "
                f"top_p={self.top_p}, top_k={self.top_k}."
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if not self.temperature and (self.top_p != 1 or self.top_k):
            raise ValueError(
                f"top_p={self.top_p} and top_k={self.top_k} narrow what tokens are drawn from, and greedy answers "
                "take the most probable one: leave them out, or draw the answers."
            )
        if decided := sorted(self.settings.keys() & set(DECIDED)):
            raise ValueError(f"{', '.join(decided)} cannot be given as further settings of generate: leave them out.")


@dataclass(frozen=True)
class WrittenAnswer:
    """What a teacher wrote.

    Args:
        text (`str`): without special tokens, and without what follows the end.
        is_finished (`bool`): whether the teacher ended it itself.
    """

    text: str
    is_finished: bool


def answer_key(seed: int, prompt_key: int, number: int) -> int:
    """The key of one answer's draws, in [0, 2³²).

    Args:
        seed (`int`): of all answers.
        prompt_key (`int`): of the prompt, see [`prompt_key`].
        number (`int`): which of the prompt's answers, from 0.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {prompt_key} {number}".encode(), digest_size=4).digest(), "little")


def prompt_key(ids: Sequence[int]) -> int:
    """A signed 64-bit hash of a prompt's token `ids`: the same wherever it is read, in any order, part or process."""
    content = ",".join(map(str, ids)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def kind_of(config: PreTrainedConfig) -> str:
    """What a model is, by the model_type of its `config`: one of this library's (`"diffusion"`), or autoregressive."""
    known = {known.model_type for known in MODELS} | set(REFUSED)
    return DIFFUSION if config.model_type in known else AUTOREGRESSIVE


def load_writer(
    name_or_path: str, kind: str, dtype: str = "auto", load_in_4bit: bool = False, **init_kwargs
) -> PreTrainedModel:
    """Loads a teacher that writes answers, from transformers' or the library's own classes, never from remote code.

    Args:
        name_or_path (`str`): Hub name or folder.
        kind (`str`): of [`kind_of`].
        dtype (`str`), load_in_4bit (`bool`): as in [`load_teacher`].
        init_kwargs: further `from_pretrained` arguments.

    Returns:
        `PreTrainedModel`, in eval mode.

    Raises:
        ImportError, ValueError: as [`load_teacher`].
    """
    if kind == DIFFUSION:
        return load_teacher(name_or_path, dtype, load_in_4bit, **init_kwargs)
    if load_in_4bit:
        init_kwargs["quantization_config"] = quantization_4bit()
    return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, trust_remote_code=False, **init_kwargs)


class AnswerWriter:
    """A loaded teacher with its tokenizer and the way it decodes.

    Args:
        model (`PreTrainedModel`): a causal LM of transformers, or a diffusion LM of this library. Of its own
            generation config only the token ids are used where it is autoregressive, so that greedy is greedy.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        decoding ([`AnswerDecoding`]): how.
        batch_size (`int`): answers that are written together, at least 1.

    Raises:
        ValueError: for a batch size below 1, and a teacher that has no token to end an answer with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: AnswerDecoding,
        batch_size: int = 16,
    ):
        if batch_size < 1:
            raise ValueError(f"answer_batch_size={batch_size} must be at least 1.")
        self.model, self.tokenizer, self.decoding = model.eval(), tokenizer, decoding
        self.is_diffusion = kind_of(model.config) == DIFFUSION
        own = model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        self.eos = list(dict.fromkeys(id_ for id_ in (*own, tokenizer.eos_token_id) if id_ is not None))
        if not self.eos:
            raise ValueError(
                f"{model.name_or_path or 'The teacher'} has no end-of-text token, neither in its generation config "
                "nor in its tokenizer: no answer could be told to be finished. Set tokenizer.eos_token."
            )
        pad = tokenizer.pad_token_id
        self.pad = self.eos[0] if pad is None else pad
        self.batch_size = 1 if self.is_diffusion and self._draws() else batch_size
        if not self.is_diffusion:
            bos = model.generation_config.bos_token_id
            model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=self.eos, pad_token_id=self.pad)

    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> list[WrittenAnswer]:
        """Writes one answer to each prompt.

        Batches are of prompts of similar length; the result has the order that was given.

        Args:
            prompts (`Sequence[Sequence[int]]`): token ids, up to where the answer begins; none empty.
            keys (`Sequence[int]`): of the draws, in [0, 2³²), see [`answer_key`]; one for each prompt.
        """
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        found = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            texts = self._write_batch([prompts[index] for index in chosen], [keys[index] for index in chosen])
            found.update(zip(chosen, texts, strict=True))
        return [found[index] for index in range(len(prompts))]

    def _draws(self) -> bool:
        """Whether a diffusion teacher draws anything: tokens, or the places that it reveals."""
        own = self.model.generation_config
        asked = {name: self.decoding.settings.get(name, getattr(own, name, None)) for name in DRAWING}
        return bool(self.decoding.temperature) or any(asked[name] == value for name, value in DRAWING.items())

    @torch.no_grad()
    def _write_batch(self, prompts: list[Sequence[int]], keys: list[int]) -> list[WrittenAnswer]:
        device, width = self.model.device, max(map(len, prompts))
        padded = [[self.pad] * (width - len(ids)) + list(ids) for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        sequences = self.model.generate(
            torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=self.decoding.max_new_tokens,
            **(self._diffusion_arguments(keys) if self.is_diffusion else self._causal_arguments(keys, width)),
            **self.decoding.settings,
        )
        return [self._read(ids) for ids in sequences[:, width:].tolist()]

    def _diffusion_arguments(self, keys: list[int]) -> dict:
        """Temperature and narrowing, None where the model's own config is not to count; and the generator of a row."""
        decoding = self.decoding
        drawn = decoding.temperature > 0
        arguments = {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p if drawn else None,
            "top_k": decoding.top_k if drawn else None,
        }
        if self.batch_size == 1:
            arguments["generator"] = torch.Generator(self.model.device).manual_seed(keys[0])
        return arguments

    def _causal_arguments(self, keys: list[int], width: int) -> dict:
        """The greedy search of transformers, which takes the token that a row's own draw has left, if it has one."""
        arguments = {"do_sample": False}
        if self.decoding.temperature:
            draws = RowSampling(self.decoding, torch.tensor(keys, device=self.model.device), width)
            arguments["logits_processor"] = LogitsProcessorList([draws])
        return arguments

    def _read(self, ids: list[int]) -> WrittenAnswer:
        """An answer's new tokens as text, up to the first that ends it."""
        end = next((place for place, id_ in enumerate(ids) if id_ in self.eos), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return WrittenAnswer(text, end is not None)


class RowSampling(LogitsProcessor):
    """Draws each row's next token with a random number of its own, and leaves no other to choose from.

    The number is a hash of the row's key and the token's place in the answer; the token is where the cumulative
    distribution, in the order of the ids, passes it: exact sampling, whatever else is in the batch.

    Args:
        decoding ([`AnswerDecoding`]): temperature, then `top_k`, then `top_p`, as in transformers.
        keys_B (`torch.LongTensor` of shape `(B,)`): of the rows, in [0, 2³²).
        num_prompt_columns (`int`): P.
    """

    def __init__(self, decoding: AnswerDecoding, keys_B: torch.LongTensor, num_prompt_columns: int):
        self.keys_B, self.num_prompt_columns = keys_B, num_prompt_columns
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(decoding.temperature))])
        if decoding.top_k:
            self.warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            self.warpers.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `(B, V)`: 0 for the drawn token, −∞ for all others; arguments as in transformers."""
        scores = self.warpers(input_ids, scores)
        place = torch.full((len(scores), 1), input_ids.shape[1] - self.num_prompt_columns, device=scores.device)
        # 24 bits alone could not tell apart the rarest tokens of a large vocabulary
        coarse_B1, fine_B1 = (uniforms(self.keys_B, part, place).double() for part in (0, 1))
        below_BV = scores.double().softmax(-1).cumsum(-1)
        # the first token beyond the draw: one of probability 0 adds nothing and is never the first
        tokens_B1 = torch.searchsorted(below_BV, (coarse_B1 + fine_B1 / (1 << 24)) * below_BV[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens_B1, 0.0)
