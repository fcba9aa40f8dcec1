"""The embedded few-step comparison: a teacher, students taught on its answers, and an IDLM student, by step count.

Every network decodes as IDLM assumes: random order, temperature 1, a fixed number of network calls.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging as transformers_logging

from tide_hf.demo.copying import HELD_OUT_SEED, both_cases, build_case_tokenizer, copying_rows
from tide_hf.demo.sorting import held_out_rows, sorting_rows
from tide_hf.evaluation import unigram_entropy
from tide_hf.few_step import IDLMConfig, IDLMTrainer
from tide_hf.training.config import TIDEConfig
from tide_hf.training.trainer import TIDETrainer

from .comparison import NUM_WORKERS, Job, single_threaded_children, train_row
from .decoding import complete
from .networks import Network, build_network
from .tasks import sorting_task

TEACHER, SAMPLED, GREEDY, IDLM = "teacher", "taught on its samples", "taught on its greedy answers", "IDLM"
NETWORKS = (TEACHER, SAMPLED, GREEDY, IDLM)
FULL = "full"


@dataclass(frozen=True)
class FewStepTask:
    """One task of the comparison.

    Args:
        name (`str`): of the report.
        make_teacher (`Callable[[int, Path], Path]`): seed and folder of the runs -> a saved teacher.
        train_rows, held_out (`Callable`): seed -> conversations that students learn from; conversations they are
            measured on.
        right_answers (`Callable[[str], tuple[str, …]]`): prompt -> every right answer.
        steps (`tuple[int, …]`): network calls per block, or per answer of a full-sequence network; the last reveals
            one token at a time and is called full.
        max_length (`int`): tokens of a row.
        student (`Network`): steps, batch size and learning rate of every student; its size is the teacher's.
        num_taught (`int`): answers of the teacher's that a student is taught on.
        eos_fill (`str`): of every run, see [`DiffusionTrainingArguments`].
        idlm (`dict`): further fields of [`IDLMConfig`].
    """

    name: str
    make_teacher: Callable[[int, Path], Path]
    train_rows: Callable[[int], Dataset]
    held_out: Callable[[], Dataset]
    right_answers: Callable[[str], tuple[str, ...]]
    steps: tuple[int, ...]
    max_length: int
    student: Network
    num_taught: int
    eos_fill: str = "block"
    idlm: dict = field(default_factory=dict)


@dataclass
class FewStepResult:
    """One network of one seed, by number of steps: `metrics[steps] = {"accuracy", "differ", "entropy", "speed"}`.

    `accuracy` is the share of answers that are right; `differ` the share of prompts, among those answered rightly
    twice, whose two answers differ; `entropy` the unigram entropy of an answer in nats; `speed` tokens per CPU second.
    """

    task: str
    name: str
    seed: int
    metrics: dict[str, dict[str, float]]
    train_seconds: float
    path: str


# -- tasks ------------------------------------------------------------------------------------------------------------


def copying_task(teacher_steps: int = 2000, student_steps: int = 100, num_held_out: int = 100) -> FewStepTask:
    """Copy 32 letters in small letters or in capitals, the whole answer at once.

    The teacher's length is the shortest of 600, 1,000, 1,500 and 2,000 steps after which three seeds' teachers answer
    nine in ten of 40 validation prompts rightly.
    """
    teacher = Network(hidden=64, layers=2, heads=4, steps=teacher_steps)
    return FewStepTask(
        name="copying",
        make_teacher=partial(_train_copying_teacher, network=teacher),
        train_rows=partial(_copying_students_rows, num_rows=student_steps * teacher.batch_size),
        held_out=partial(copying_rows, num_held_out, HELD_OUT_SEED),
        right_answers=both_cases,
        steps=(1, 2, 4, 8, 16, 32, 33),
        max_length=COPYING_LENGTH,
        # learning rate, ratio and clipping were chosen on validation prompts
        student=replace(teacher, steps=student_steps, learning_rate=1e-3),
        num_taught=20 * teacher.batch_size,
        eos_fill="none",
        idlm={"num_steps": 4, "fake_steps_per_student_step": 3},
    )


def sorting_few_step_task(steps: int = 100, num_held_out: int = 200, dense_runs: str | None = None) -> FewStepTask:
    """Sort six digits in blocks of four, from the dense recipe's teacher: one right answer, few steps are enough."""
    network = sorting_task().teacher
    return FewStepTask(
        name="sorting",
        make_teacher=partial(_dense_teacher, dense_runs=dense_runs),
        train_rows=partial(_sorting_students_rows, num_rows=steps * network.batch_size),
        held_out=partial(held_out_rows, num_held_out),
        right_answers=_sorted_digits,
        steps=(1, 2, 4),
        max_length=16,
        student=replace(network, steps=steps, learning_rate=1e-3),
        num_taught=50 * network.batch_size,
        idlm={"num_steps": 1, "fake_steps_per_student_step": 3},
    )


COPYING_LENGTH = 80


def _train_copying_teacher(seed: int, folder: Path, network: Network) -> Path:
    """A full-sequence network trained on the task."""
    tokenizer, path = build_case_tokenizer(), folder / f"teacher-seed{seed}"
    model = build_network(network, tokenizer, COPYING_LENGTH, seed)
    model.config.diffusion_type = "full"
    rows = copying_rows(network.steps * network.batch_size, seed=2 * seed)
    args = _arguments(TIDEConfig, path, network, seed, max_length=COPYING_LENGTH, eos_fill="none")
    return _train(TIDETrainer, model, path, rows, args, tokenizer)


def _copying_students_rows(seed: int, num_rows: int) -> Dataset:
    return copying_rows(num_rows, seed=2 * seed + 1)


def _sorting_students_rows(seed: int, num_rows: int) -> Dataset:
    return sorting_rows(num_rows, seed=2 * seed + 1)


def _sorted_digits(prompt: str) -> tuple[str]:
    return ("".join(sorted(prompt)),)


def _dense_teacher(seed: int, folder: Path, dense_runs: str | None) -> Path:
    """The dense recipe's teacher of a seed where that recipe has run, otherwise the same made here."""
    found = Path(dense_runs or "") / f"teacher-seed{seed}"
    if dense_runs is not None and (found / "config.json").is_file():
        return found
    task = sorting_task()
    return Path(train_row(Job(task, "teacher", seed, folder.parent, task.teacher, {"preset": "ce"})).path)


# -- training ---------------------------------------------------------------------------------------------------------


def run_few_step(tasks: list[FewStepTask], seeds: list[int], output_dir: str | Path) -> list[FewStepResult]:
    """All networks of all tasks and seeds, seeds side by side in at most two processes of one thread.

    Args:
        output_dir (`str`): checkpoints go to `<output_dir>/<task>/runs/<network>-seed<seed>`.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    jobs = [(task, seed, Path(output_dir) / task.name / "runs") for task in tasks for seed in seeds]
    with (
        single_threaded_children(),
        ProcessPoolExecutor(NUM_WORKERS, mp_context=get_context("spawn")) as pool,
    ):
        return [result for results in pool.map(run_seed, *zip(*jobs, strict=True)) for result in results]


def run_seed(task: FewStepTask, seed: int, folder: Path) -> list[FewStepResult]:
    """One teacher and its students, measured."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    rows, results = task.train_rows(seed), []
    data = {"max_length": task.max_length, "eos_fill": task.eos_fill}
    teacher_path, seconds = _timed(task.make_teacher, seed, folder)
    teacher, tokenizer = (
        AutoModelForCausalLM.from_pretrained(teacher_path),
        AutoTokenizer.from_pretrained(teacher_path),
    )
    for name in NETWORKS:
        path = teacher_path if name == TEACHER else folder / f"{name.replace(' ', '-')}-seed{seed}"
        if name in (SAMPLED, GREEDY):
            greedy = {"temperature": 0.0} if name == GREEDY else {"temperature": 1.0, "remasking": "random"}
            started = time.process_time()
            taught = _answered(task, teacher, tokenizer, rows.select(range(min(task.num_taught, len(rows)))), greedy)
            args = _arguments(TIDEConfig, path, task.student, seed, **data)
            _train(TIDETrainer, str(teacher_path), path, taught, args, tokenizer)
            seconds = time.process_time() - started
        elif name == IDLM:
            settings = {"max_grad_norm": 1.0, "ema_decay": 0.98, **task.idlm}
            args = _arguments(IDLMConfig, path, task.student, seed, **data, **settings)
            _, seconds = _timed(_train, IDLMTrainer, str(teacher_path), path, rows, args, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(path)
        results.append(FewStepResult(task.name, name, seed, measure(task, model, tokenizer, seed), seconds, str(path)))
    return results


def measure(task: FewStepTask, model, tokenizer, seed: int) -> dict[str, dict[str, float]]:
    """[`FewStepResult.metrics`] of a network: every held-out prompt answered twice at each number of steps."""
    rows, metrics = task.held_out(), {}
    prompts = [messages[0]["content"] for messages in rows["messages"]]
    for steps in task.steps:
        generator = torch.Generator().manual_seed(seed)
        runs = [
            complete(model, tokenizer, rows, steps_per_block=steps, generator=generator, **SAMPLING) for _ in range(2)
        ]
        pairs = list(zip(prompts, *(texts for texts, _ in runs), strict=True))
        right = [answer in task.right_answers(prompt) for prompt, *answers in pairs for answer in answers]
        both = [pair for index, pair in enumerate(pairs) if all(right[2 * index : 2 * index + 2])]
        answers = [ids for texts, _ in runs for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if ids]
        metrics[FULL if steps == task.steps[-1] else str(steps)] = {
            "accuracy": sum(right) / len(right),
            "differ": sum(first != second for _, first, second in both) / len(both) if both else float("nan"),
            "entropy": unigram_entropy(answers) if answers else 0.0,
            "speed": sum(speed for _, speed in runs) / 2,
        }
    return metrics


SAMPLING = {"remasking": "random", "temperature": 1.0, "do_sample": True}


def _answered(task: FewStepTask, teacher, tokenizer, rows: Dataset, settings: dict) -> Dataset:
    """The same prompts with the teacher's own answers, one token a step."""
    generator = torch.Generator().manual_seed(0)
    answers, _ = complete(teacher, tokenizer, rows, generator=generator, **settings)
    turned = [
        {"messages": [question, {**answer, "content": text}]}
        for (question, answer), text in zip(rows["messages"], answers, strict=True)
        if text
    ]
    return Dataset.from_list(turned)


def _arguments(config_class, path: Path, network: Network, seed: int, **fields):
    """Settings of one run."""
    defaults = {"preset": "ce"} if config_class is TIDEConfig else {}
    return config_class(
        output_dir=str(path),
        max_steps=network.steps,
        per_device_train_batch_size=network.batch_size,
        learning_rate=network.learning_rate,
        weight_decay=network.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, network.steps // 4),
        logging_steps=max(network.steps // 10, 1),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
        **{**defaults, **fields},
    )


def _train(trainer_class, model, path: Path, rows: Dataset, args, tokenizer) -> Path:
    """One run, saved."""
    trainer = trainer_class(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return path


def _timed(function, *arguments):
    """What a function returns, and its CPU seconds."""
    started = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - started
