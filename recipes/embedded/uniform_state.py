"""A small uniform-state diffusion LM, trained and distilled to few steps here: repeat one digit four times.

The answer to the one prompt is any digit, four times. In a single step a network cannot know which digit its other
positions will take. Answers that agree with themselves need several steps, or a student that learned to do with few.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, default_data_collator

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.few_step import IDLMConfig, UniformIDLMTrainer
from tide_hf.models import TIDEUniformQwen3Config, TIDEUniformQwen3ForDiffusion

from .harness import Job, Result, run_jobs
from .networks import Network, shape_of, train, training_arguments
from .report import cell, format_table, summarize

NUM_REPEATS, PROMPT, NUM_ROWS = 4, [{"role": "user", "content": "0"}], 1000
TEACHER = Network(hidden=32, layers=2, heads=4, steps=1200, batch_size=64)
STUDENT = Network(hidden=32, layers=2, heads=4, steps=200, batch_size=64, learning_rate=3e-4)


def repeated_digits(num_rows: int) -> Dataset:
    """Conversations with one prompt, and each digit equally often as the answer."""
    answers = [{"role": "assistant", "content": str(index % 10) * NUM_REPEATS} for index in range(num_rows)]
    return Dataset.from_list([{"messages": [*PROMPT, answer]} for answer in answers])


def train_teacher(tokenizer: PreTrainedTokenizerBase, path: Path, seed: int, network: Network = TEACHER):
    """A network trained from random weights by `transformers.Trainer` on the NELBO of its own forward.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of digits.
        path (`Path`): where it is saved.
        seed (`int`): of weights, rows and noise.
        network ([`Network`]): size and training.
    """
    torch.manual_seed(seed)
    model = TIDEUniformQwen3ForDiffusion(TIDEUniformQwen3Config(**shape_of(network, tokenizer)))
    rows = tokenizer.apply_chat_template(
        list(repeated_digits(NUM_ROWS)["messages"]), return_dict=True, return_assistant_tokens_mask=True
    )
    labels = [
        [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
        for ids, mask in zip(rows["input_ids"], rows["assistant_masks"], strict=True)
    ]
    dataset = Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels})
    args = training_arguments(network, path, seed, TrainingArguments)
    return train(Trainer, model, args, dataset, tokenizer, data_collator=default_data_collator).model


def train_student(teacher, tokenizer, path: Path, seed: int, num_steps: int, network: Network = STUDENT):
    """IDLM (arXiv 2602.19066) from the teacher's weights, which it changes.

    Args:
        teacher, tokenizer: the network, and what it reads.
        path (`Path`): where the student is saved.
        seed (`int`): of rows and noise.
        num_steps (`int`): denoising steps that it learns to do with.
        network ([`Network`]): its training.

    Returns:
        what is saved: the moving average of the student's weights.
    """
    args = training_arguments(
        network,
        path,
        seed,
        IDLMConfig,
        max_length=16,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        ema_decay=0.99,
        num_steps=num_steps,
    )
    train(UniformIDLMTrainer, teacher, args, repeated_digits(NUM_ROWS), tokenizer)
    return TIDEUniformQwen3ForDiffusion.from_pretrained(path)


def measure(model, tokenizer, steps: Sequence[int], num_samples: int = 1000) -> dict[str, dict[str, float]]:
    """Samples answers at each number of steps.

    Args:
        model, tokenizer: the network, and what it reads.
        steps (`Sequence[int]`): numbers of denoising steps.
        num_samples (`int`): answers at each.

    Returns:
        `{number of steps: {"share", "digits"}}`: the share of answers that repeat one digit, and how many digits
        those spread over (the exponential of the entropy of the digit, 10 where all are equally likely).
    """
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompts, found = prompt["input_ids"].repeat(num_samples, 1), {}
    model.eval()
    for num_steps in steps:
        output = model.generate(
            prompts,
            max_new_tokens=NUM_REPEATS + 1,
            num_steps=num_steps,
            generator=torch.Generator().manual_seed(0),
        )
        answers = tokenizer.batch_decode(output[:, prompts.shape[1] :])
        valid = [answer[0] for answer in answers if answer == answer[0] * NUM_REPEATS + tokenizer.eos_token]
        shares = [count / len(valid) for count in Counter(valid).values()]
        digits = math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0
        found[str(num_steps)] = {"share": len(valid) / num_samples, "digits": digits}
    return found


def compare(output_dir: str | Path, seed: int, num_steps: int, steps: Sequence[int]) -> list[Result]:
    """Trains teacher and student of a seed, and measures both.

    Args:
        output_dir (`str` or `Path`): checkpoints go to `<output_dir>/teacher-<seed>` and `student-<seed>`.
        seed (`int`): of both.
        num_steps (`int`): denoising steps that the student learns to do with.
        steps (`Sequence[int]`): numbers of denoising steps that both are measured at.

    Returns:
        `list[Result]` of the networks teacher and student; metrics as in [`measure`].
    """
    tokenizer = build_tokenizer()
    paths = {name: Path(output_dir) / f"{name}-{seed}" for name in ("teacher", "student")}
    teacher = train_teacher(tokenizer, paths["teacher"], seed)
    measured = {"teacher": measure(teacher, tokenizer, steps)}
    student = train_student(teacher, tokenizer, paths["student"], seed, num_steps)
    measured["student"] = measure(student, tokenizer, steps)
    return [Result("repeating", name, seed, metrics, str(paths[name])) for name, metrics in measured.items()]


def show_uniform_state(output_dir: str, seeds: Sequence[int] = (0, 1, 2), num_steps: int = 4) -> None:
    """Runs [`compare`] for every seed and prints what was measured.

    Args:
        output_dir (`str`): of the checkpoints.
        seeds (`Sequence[int]`), num_steps (`int`): as in [`compare`].
    """
    steps = (1, 2, 4, 8, 16, 32)
    jobs = [Job(partial(compare, output_dir, seed, num_steps, steps), TEACHER.steps + STUDENT.steps) for seed in seeds]
    results = run_jobs(f"teacher and student x {len(seeds)}", jobs)
    print(
        "\nanswers that repeat one digit, in % ± standard deviation over seeds (digits they spread over, of 10), by "
        "denoising steps\n"
    )
    print(format_table(summarize(results), {str(number): partial(_cell, number=str(number)) for number in steps}))


def _cell(entry: dict, number: str) -> str:
    return f"{cell(entry[number]['share'], '{:.1f}', 100)} ({entry[number]['digits']['mean']:.1f})"
