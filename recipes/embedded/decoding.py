"""Decoding in the embedded comparisons: exact match, completions to look at, one prompt being denoised."""

import time
from collections.abc import Callable

import torch
from datasets import Dataset

from tide_hf.evaluation import exact_match


def complete(
    model, tokenizer, rows: Dataset, max_new_tokens: int | None = None, **settings
) -> tuple[list[str], float]:
    """Answers to the prompts of conversations, in one batch; greedy and one token per step unless settings, or the
    model's generation config, say otherwise.

    Args:
        model, tokenizer: the network, and what it reads.
        rows (`Dataset`): `messages`, a user turn and an assistant turn each.
        max_new_tokens (`int`, *optional*): the longest reference answer and its EOS by default.
        settings: further arguments of `generate`.

    Returns:
        the answers as text, and generated tokens per CPU second.
    """
    prompts = [messages[:-1] for messages in rows["messages"]]
    if max_new_tokens is None:
        answers = [messages[-1]["content"] for messages in rows["messages"]]
        max_new_tokens = 1 + max(len(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"])
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    started = time.process_time()
    output = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **settings,
    )
    seconds = time.process_time() - started
    num_tokens = output.tokens_per_forward * output.forward_passes * len(prompts)
    new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new_ids, skip_special_tokens=True), num_tokens / max(seconds, 1e-9)


def decode_and_match(model, tokenizer, rows: Dataset, **settings) -> tuple[float, float]:
    """Share of held-out answers decoded exactly, and generated tokens per CPU second; arguments as in [`complete`]."""
    answers, tokens_per_second = complete(model, tokenizer, rows, **settings)
    return exact_match(answers, [messages[-1]["content"] for messages in rows["messages"]]), tokens_per_second


def num_right(right_answers: Callable[[str], tuple[str, ...]], rows: Dataset, answers: list[str]) -> int:
    """How many answers are right.

    Args:
        right_answers (`Callable`): prompt -> every right answer.
        rows (`Dataset`): conversations.
        answers (`list[str]`): one to each of their prompts.
    """
    prompts = [messages[0]["content"] for messages in rows["messages"]]
    return sum(answer in right_answers(prompt) for prompt, answer in zip(prompts, answers, strict=True))


def share_of_right(right_answers: Callable, model, tokenizer, rows: Dataset, **settings) -> tuple[float, float]:
    """The same as [`decode_and_match`] where a prompt has several right answers, see [`num_right`]."""
    answers, tokens_per_second = complete(model, tokenizer, rows, **settings)
    return num_right(right_answers, rows, answers) / len(rows), tokens_per_second


def two_draws(right_answers: Callable, model, tokenizer, rows: Dataset, seed: int) -> dict[str, float]:
    """Answers each prompt twice at temperature 1, one token a step.

    Args:
        right_answers (`Callable`): as in [`num_right`].
        model, tokenizer, rows (`Dataset`): as in [`complete`].
        seed (`int`): of the draws.

    Returns:
        `{"valid", "differ"}`: the share of answers that are right, and among the prompts with two right ones the share
        whose two answers differ, NaN if there are none.
    """
    draws = {"temperature": 1.0, "do_sample": True, "generator": torch.Generator().manual_seed(seed)}
    first, second = (complete(model, tokenizer, rows, **draws)[0] for _ in range(2))
    prompts = [messages[0]["content"] for messages in rows["messages"]]
    pairs = list(zip(prompts, first, second, strict=True))
    both = [(one, other) for prompt, one, other in pairs if {one, other} <= {*right_answers(prompt)}]
    num_valid = sum(num_right(right_answers, rows, answers) for answers in (first, second))
    differ = sum(one != other for one, other in both) / len(both) if both else float("nan")
    return {"valid": num_valid / (2 * len(rows)), "differ": differ}


class DenoisingLines:
    """A streamer that prints each state of the block being denoised on a line of its own.

    Args:
        tokenizer: of the model.
        mask_as (`str`): what stands for a masked token.
    """

    def __init__(self, tokenizer, mask_as: str = "_"):
        self.tokenizer, self.mask_as = tokenizer, mask_as
        self._is_prompt, self._finished = True, torch.zeros(0, dtype=torch.long)

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each finished block."""
        if self._is_prompt:
            self._is_prompt = False
            print(f"  {self._text(value.flatten())}")
        else:
            self._finished = torch.cat([self._finished, value.flatten()])

    def put_draft(self, value: torch.Tensor, **kwargs) -> None:
        """The active block after one denoising step."""
        print(f"  … {self._text(torch.cat([self._finished, value.flatten()]))}")

    def end(self) -> None:
        """Nothing is left to print."""

    def _text(self, ids: torch.Tensor) -> str:
        return self.tokenizer.decode(ids).replace(self.tokenizer.mask_token, self.mask_as)


def show_denoising(model, tokenizer, messages: list[dict]) -> None:
    """Prints one prompt and its answer becoming visible, step by step.

    Args:
        model, tokenizer: the network, and what it reads.
        messages (`list[dict]`): a conversation; its last message sets the length.
    """
    prompt = tokenizer.apply_chat_template(
        [messages[:-1]], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    model.generate(prompt, max_new_tokens=len(answer) + 1, streamer=DenoisingLines(tokenizer))
