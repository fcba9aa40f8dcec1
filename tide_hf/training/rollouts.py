"""Answers that a student writes to be trained on: writing them, and the states of them that it is trained at.

Everything that is drawn is keyed by (seed, row key, number of the answer), row by row.

Shapes: B rows, W columns of a canvas, A answer columns.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from peft import PeftModel
from transformers import LogitsProcessor, LogitsProcessorList

from ..data import Prompt, RowPreparation, align_written
from ..diffusion import LayoutSpec, diffusion_time, row_uniforms
from ..models.canvas_tide import answer_canvas
from ..models.decoding_tide import Decoder
from ..models.generation_config_tide import DEFAULTS, TIDEGenerationConfig
from ..models.masked_diffusion import masked_probability
from ..models.reveal_rules_tide import RevealQuota
from ..models.row_noise import RowDraws, uniforms
from ..models.sampling_tide import Rules
from ..models.settings_tide import said_by

# what a key is for: independent draws of one answer
CHOICE, TOKENS, STATE = 1, 2, 3
# of `row_uniforms`: first stream of the masks of `random_mask`, beside those of other methods
MASK_STREAM = 1000


@dataclass(frozen=True)
class Rollout:
    """An answer that the student wrote, and how.

    Args:
        row_key (`int`), number (`int`): what its draws were keyed by: the row's key, and how many answers to it came
            before.
        prompt (`list[int]`), teacher_prompt (`list[int]`): tokens before the answer in the two rows.
        answer (`list[int]`): token ids, up to and including the one that ends it.
        steps (`list[int]`): the step of its block, from 1, at which each of them was revealed.
        num_steps (`list[int]`): steps of each block that the answer has tokens in.
        is_ended (`bool`): whether the last token ends the answer; otherwise the limit of tokens did.
        width (`int`): columns of the row as the sampler saw it, [MASK] to the end.
        entropy (`float`): in nats, the mean over these tokens of that of the student's distribution when each was
            revealed; of its own, before temperature.
    """

    row_key: int
    number: int
    prompt: list[int]
    teacher_prompt: list[int]
    answer: list[int]
    steps: list[int]
    num_steps: list[int]
    is_ended: bool
    width: int
    entropy: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict:
        """Plain values, for a checkpoint."""
        return asdict(self)

    def blocks(self, block_size: int | None) -> list[int]:
        """The number of each token's block among those of the answer, from 0.

        Args:
            block_size (`int`, *optional*): of the student; None if the answer is one block.
        """
        if block_size is None:
            return [0] * len(self.answer)
        first = len(self.prompt) // block_size
        return [(len(self.prompt) + place) // block_size - first for place in range(len(self.answer))]


def key_of(*numbers: int) -> int:
    """A key in [0, 2³²) for draws that belong to these `numbers` of at most 64 bits."""
    content = np.array(numbers, dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")


def is_on_policy(row_key: int, seed: int, fraction: float) -> bool:
    """Whether a row is one of those to which the student writes an answer: the same in every pass.

    Args:
        row_key (`int`): of the row.
        seed (`int`): of the run.
        fraction (`float`): share of such rows.
    """
    return key_of(CHOICE, seed, row_key) < fraction * 2**32


# -- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writing:
    """How the student writes.

    Args:
        seed (`int`): of the run.
        temperature (`float`): at which tokens are drawn.
        steps (`int`, *optional*): per block; one per token by default.
        order (`str`): which positions of a block are revealed first: `"confidence"` or `"left_to_right"`.
        max_new_tokens (`int`, *optional*): most tokens of an answer; by default what `max_length` leaves.
        max_length (`int`): most tokens of a row, a multiple of the block size; a full-sequence student, whose answer
            is one block, writes `max_new_tokens` in any case.
        num_tokens (`int`): the first ids of the vocabulary, which are all that is drawn.
        block_size (`int`, *optional*): of the student; None if it is a full-sequence student.
    """

    seed: int
    temperature: float
    steps: int | None
    max_new_tokens: int | None
    max_length: int
    num_tokens: int
    block_size: int | None
    order: str = "confidence"

    def limit(self, prompt: Prompt) -> int:
        """Most tokens of an answer to a `prompt`.

        Whole blocks up to `max_length`, or the same number for every row: so it does not matter for an answer which
        others are written with it.
        """
        if self.block_size is None:
            return self.max_new_tokens
        room = self.max_length - len(prompt.ids)
        return room if self.max_new_tokens is None else min(self.max_new_tokens, room)

    @torch.no_grad()
    def __call__(self, model, prompts: Sequence[Prompt], row_keys: Sequence[int], number: int) -> list[Rollout]:
        """Writes an answer to each prompt, in one batch, without dropout.

        Args:
            model (`PreTrainedModel` or `PeftModel`): the student, whose parameters are whole.
            prompts (`Sequence[Prompt]`): at least one, each with room for an answer.
            row_keys (`Sequence[int]`): of their rows.
            number (`int`): how many answers to these rows came before.
        """
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        limits = [self.limit(prompt) for prompt in prompts]
        settings = self._settings(model, max(limits))
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), longest), settings.pad_token_id, device=model.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids, device=model.device)
            mask[row, longest - len(prompt.ids) :] = True
        canvas = answer_canvas([(ids, mask)], settings, full=self.block_size is None)
        keys = torch.tensor([key_of(TOKENS, self.seed, key, number) for key in row_keys], device=model.device)
        warpers = LogitsProcessorList([_FirstTokens(self.num_tokens)])
        was_training = model.training
        model.eval()
        rule = RevealQuota(self.order, steps=self.steps)
        rule.statistics = (*rule.statistics, "entropy")  # noted by the canvas
        Decoder(model, canvas, settings, RowDraws(keys), rules=Rules(warpers=warpers), reveal_rule=rule).run()
        model.train(was_training)
        return self._read(canvas, prompts, row_keys, number, limits)

    def _settings(self, model, max_new_tokens: int) -> TIDEGenerationConfig:
        """The student's tokens and blocks, and this run's steps; every other setting at its default."""
        own = model.generation_config
        tokens = {name: getattr(own, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
        written = {"block_size": self.block_size, "max_new_tokens": max_new_tokens, "steps_per_block": self.steps}
        values = DEFAULTS | said_by(TIDEGenerationConfig.from_model_config(model.config)) | tokens | written
        return TIDEGenerationConfig.from_dict({**values, "temperature": self.temperature})

    def _read(self, canvas, prompts, row_keys, number: int, limits: list[int]) -> list[Rollout]:
        """The rows of a canvas that has been filled."""
        answers, ends = canvas.answer().tolist(), canvas.num_new.tolist()
        columns = canvas.answer_column[:, None] + torch.arange(canvas.num_answer, device=canvas.ids.device)
        steps = canvas.reveal_step.gather(1, columns).tolist()
        entropies = canvas.reveal_entropy.gather(1, columns).tolist()
        of_window = [canvas.reveal_step[:, start:end].amax(1) for start, end in canvas.windows]
        of_window, eos = torch.stack(of_window, 1).tolist(), set(canvas.eos_ids.tolist())
        rollouts = []
        for row, prompt in enumerate(prompts):
            size = min(ends[row], limits[row])
            width, num_blocks = len(prompt.ids) + limits[row], 1
            if self.block_size is not None:
                width = -(-(len(prompt.ids) + size) // self.block_size) * self.block_size
                num_blocks = width // self.block_size - len(prompt.ids) // self.block_size
            answer = answers[row][:size]
            rollouts.append(
                Rollout(
                    row_key=int(row_keys[row]),
                    number=number,
                    prompt=prompt.ids,
                    teacher_prompt=prompt.teacher_ids,
                    answer=answer,
                    steps=steps[row][:size],
                    num_steps=of_window[row][:num_blocks],  # an answer begins in the first window
                    is_ended=answer[-1] in eos,
                    width=width,
                    entropy=sum(entropies[row][:size]) / size,
                )
            )
        return rollouts


class _FirstTokens(LogitsProcessor):
    """Leaves only the first ids of a vocabulary, those that both tokenizers, or the one, know."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def __call__(self, input_ids, scores):
        scores[:, self.num_tokens :] = -torch.inf
        return scores


# -- training on them -------------------------------------------------------------------------------------------------


def written_row(
    rollout: Rollout, preparation: RowPreparation, mask_token_id: int, teacher: LayoutSpec
) -> dict[str, list[int] | int]:
    """An answer as a prepared row, with [MASK] behind its end, where nothing is trained on.

    Args:
        rollout ([`Rollout`]): the answer.
        preparation ([`~tide_hf.data.RowPreparation`]): of the run, with the teacher's tokenizer.
        mask_token_id (`int`): the student's.
        teacher ([`~tide_hf.diffusion.LayoutSpec`]): how the teacher is fed.
    """
    teacher_answer, chunks, teacher_chunks = align_written(preparation, rollout.answer, rollout.is_ended)
    given, answer = rollout.prompt, rollout.answer
    num_behind = rollout.width - len(given) - len(answer)
    teacher_ids = rollout.teacher_prompt + teacher_answer
    # what the sampler had behind the answer; a teacher with blocks sees its last one whole, as it was trained
    teacher_behind = -len(teacher_ids) % teacher.block_size if teacher.block_size else num_behind
    if teacher.autoregressive:  # it reads the answer alone
        teacher_behind = 0
    return {
        "row_key": rollout.row_key,
        "input_ids": given + answer + [mask_token_id] * num_behind,
        "labels": [-100] * len(given) + answer + [-100] * num_behind,
        "chunk_ids": [-1] * len(given) + chunks + [-1] * num_behind,
        "teacher_input_ids": teacher_ids + [teacher.mask_token_id] * teacher_behind,
        "teacher_chunk_ids": [-1] * len(rollout.teacher_prompt) + teacher_chunks + [-1] * teacher_behind,
    }


def visited_states(rollouts: Sequence[Rollout], seed: int, use: int, block_size: int | None) -> list[list[bool]]:
    """What of each answer is masked at a step k of each block, drawn uniformly: what was revealed at step k or later.

    Args:
        rollouts (`Sequence[Rollout]`): the answers.
        seed (`int`): of the run.
        use (`int`): how many optimizer steps have trained on these answers.
        block_size (`int`, *optional*): of the student; None if an answer is one block.

    Source: OPDLM (arXiv 2606.06712).
    """
    keys = torch.tensor([key_of(STATE, seed, one.row_key, one.number, use) for one in rollouts], dtype=torch.long)
    most = max((len(one.num_steps) for one in rollouts), default=0)
    states, draws = [], uniforms(keys, 0, torch.arange(most)[None]).tolist()
    for one, of_block in zip(rollouts, draws, strict=True):
        chosen = [1 + int(draw * num) for draw, num in zip(of_block, one.num_steps, strict=False)]
        blocks = one.blocks(block_size)
        states.append([step >= chosen[block] for step, block in zip(one.steps, blocks, strict=True)])
    return states


def random_state(rollout: Rollout, seed: int, use: int, schedule: str, time_epsilon: float) -> list[bool]:
    """The same, masked by the forward process instead.

    Args:
        rollout ([`Rollout`]), seed (`int`), use (`int`): as in [`visited_states`].
        schedule (`str`), time_epsilon (`float`): of the run.
    """
    size = len(rollout.answer)
    time, mask, _ = row_uniforms(seed, rollout.number, [rollout.row_key], size, MASK_STREAM + use)
    return (mask[0] < masked_probability(diffusion_time(time, time_epsilon), schedule)).tolist()
