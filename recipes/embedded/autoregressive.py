"""The small autoregressive networks of the embedded comparisons: trained on answers, decoded from left to right."""

from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from tide_hf.evaluation import exact_match

from .decoding import num_right
from .harness import Clock, Result
from .networks import Network, shape_of, train, training_arguments

AUTOREGRESSIVE = "autoregressive_teacher"


def build_autoregressive(network: Network, tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    """A small Qwen3 with random weights.

    Args:
        network ([`Network`]): its size.
        tokenizer (`PreTrainedTokenizerBase`): what it reads.
        seed (`int`): of the weights.
    """
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**shape_of(network, tokenizer), bos_token_id=None))


def train_autoregressive(
    network: Network,
    path: str | Path,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    max_length: int,
    callbacks: tuple = (),
    **fields,
) -> Trainer:
    """Next-token prediction of the answers, by transformers' own Trainer; the network is saved.

    Args:
        network ([`Network`]): size and training.
        path (`str` or `Path`): where it is saved.
        rows (`Dataset`): conversations.
        tokenizer (`PreTrainedTokenizerBase`), seed (`int`): as in [`build_autoregressive`].
        max_length (`int`): tokens of a row.
        callbacks (`tuple`): beside the one that moves the progress bar.
        fields: further training arguments.
    """
    encoded = rows.map(partial(_encode, tokenizer, max_length), remove_columns=rows.column_names)
    return train(
        Trainer,
        build_autoregressive(network, tokenizer, seed),
        training_arguments(network, path, seed, TrainingArguments, **fields),
        encoded,
        tokenizer,
        callbacks,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, max_length: int, row: dict) -> dict:
    """Token ids and, of the answers alone, labels."""
    encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    labels = [token if inside else -100 for token, inside in pairs]
    return {"input_ids": encoded["input_ids"][:max_length], "labels": labels[:max_length]}


def answer_left_to_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_new_tokens: int = 16, **settings
) -> list[str]:
    """The network's answers to the prompts of conversations, greedy unless settings say otherwise.

    Args:
        model, tokenizer: the network, and what it reads.
        rows (`Dataset`): conversations.
        max_new_tokens (`int`): most tokens of an answer.
        settings: further arguments of `generate`.
    """
    prompts = tokenizer.apply_chat_template(
        [messages[:-1] for messages in rows["messages"]],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    model.eval()
    arguments = {"max_new_tokens": max_new_tokens, "do_sample": False, **settings}
    output = model.generate(prompts["input_ids"], attention_mask=prompts["attention_mask"], **arguments)
    return tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def train_second_teacher(task, seed: int, runs: Path) -> list[Result]:
    """Trains, saves and measures the autoregressive teacher.

    Args:
        task ([`~embedded.comparison.Task`]), seed (`int`), runs (`Path`): as in [`train_row`].
    """
    data, network, path = task.load(seed), task.autoregressive, runs / f"{AUTOREGRESSIVE}-seed{seed}"
    tokenizer, clock = data.teacher_tokenizer or data.tokenizer, Clock(task.curve_every, network.steps)
    known = {field.name for field in fields(TrainingArguments)}
    settings = {name: value for name, value in task.training.items() if name in known}
    trainer = train_autoregressive(
        network, path, data.teacher_rows, tokenizer, seed, task.max_length, (clock,), **settings
    )
    model, rows, nothing = trainer.model, data.held_out_rows, float("nan")
    metrics = {"tokens_per_second": nothing}
    if task.decodes:
        answers = answer_left_to_right(model, tokenizer, rows, task.max_length)
        metrics["exact_match"] = exact_match(answers, [messages[-1]["content"] for messages in rows["messages"]])
    if task.right_answers is not None:
        metrics |= {"valid": nothing, "differ": nothing}
        metrics["exact_match"] = num_right(task.right_answers, rows, answers) / len(rows)
    metrics |= {"nll": {f"{t:g}": nothing for t in task.noise_levels}} if task.noise_levels else {}
    if task.steps_per_block:
        metrics["by_steps"] = {str(steps): nothing for steps in task.steps_per_block}
    size = {"parameters": model.num_parameters(), "steps": network.steps, "train_seconds": clock.seconds}
    return [Result(task.name, AUTOREGRESSIVE, seed, {**metrics, **size}, str(path))]
