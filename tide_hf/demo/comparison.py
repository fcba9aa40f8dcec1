"""Trains a teacher and students under several objectives, and compares them.

Everything goes through the library's public doors: rows of messages, TIDETrainer, save_pretrained, from_pretrained.
Rows of the table run as at most two processes side by side, one thread each.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from ..config import TIDEConfig
from ..models import TIDEQwen3Config, TIDEQwen3ForBlockDiffusion
from ..trainer import TIDETrainer
from .decoding import complete, exact_match

NUM_WORKERS = 2
EQUAL_TIME = "ce_equal_time"
NUM_TIMED_PROMPTS = 64  # of a text task, decoded in one batch


@dataclass(frozen=True)
class Network:
    """Size and training of one network.

    Args:
        hidden, layers, heads (`int`): width, depth, attention heads.
        steps, batch_size (`int`), learning_rate, weight_decay (`float`): of AdamW with a linear schedule.
    """

    hidden: int
    layers: int
    heads: int
    steps: int
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.0


@dataclass(frozen=True)
class TaskData:
    """What a task brings: a tokenizer and rows of messages."""

    tokenizer: PreTrainedTokenizerBase
    teacher_rows: Dataset
    student_rows: Dataset
    held_out_rows: Dataset


@dataclass(frozen=True)
class Task:
    """One embedded comparison.

    Args:
        name (`str`): of the report.
        load (`Callable[[int], TaskData]`): data of a seed.
        metric (`str`): `"exact_match"` (fraction of held-out answers decoded exactly) or `"nll"` (nats per masked
            token at `noise_levels`).
        max_length, block_size (`int`): tokens.
        teacher, student ([`Network`]): sizes and training.
        num_student_rows (`int`): training rows of the student at most.
        objectives (`dict`): row name -> TIDEConfig fields of the student's run.
        training (`dict`): TIDEConfig fields of every run.
        noise_levels (`tuple[float, ...]`): diffusion times of the `"nll"` metric.
        curve_every (`int`): steps between points of the curve.
        num_completion_tokens (`int`): length of the completions that a text task prints.
    """

    name: str
    load: Callable[[int], TaskData]
    metric: str
    max_length: int
    block_size: int
    teacher: Network
    student: Network
    num_student_rows: int
    objectives: dict[str, dict]
    training: dict = field(default_factory=dict)
    noise_levels: tuple[float, ...] = ()
    curve_every: int = 100
    num_completion_tokens: int = 48


@dataclass
class RowResult:
    """One trained network: what the report and the plot need.

    Args:
        value (`float` or `dict[str, float]`): exact match, or nats by diffusion time.
        train_seconds (`float`): CPU seconds of training on one thread, evaluation left out.
        tokens_per_second (`float`): answer tokens decoded per CPU second, held-out prompts in one batch.
        curve (`list`): `{"step", "loss", …}` as logged; with `"metric"` where it was measured.
        path (`str`): the saved checkpoint.
    """

    name: str
    seed: int
    value: float | dict[str, float]
    parameters: int
    steps: int
    train_seconds: float
    tokens_per_second: float
    curve: list[dict]
    path: str


@dataclass
class _Job:
    """One training run, picklable for a worker process."""

    task: Task
    name: str
    seed: int
    output_dir: Path
    network: Network
    overrides: dict = field(default_factory=dict)
    queue: object = None


def run_comparison(task: Task, seeds: list[int], output_dir: str | Path) -> list[RowResult]:
    """Teacher and every student row for every seed.

    Students are compared at equal steps, and the row `ce_equal_time` gives CE alone as many CPU seconds as the last
    objective took.

    Args:
        task ([`Task`]): what to run.
        seeds (`list[int]`): one teacher and one set of students each.
        output_dir (`str`): checkpoints go to `<output_dir>/runs/<row>-seed<seed>`.

    Returns:
        `list[RowResult]`, rows in the order of the table, seeds inside.
    """
    output_dir = Path(output_dir)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = get_context("spawn")
    with (
        _single_threaded_children(),
        context.Manager() as manager,
        ProcessPoolExecutor(NUM_WORKERS, mp_context=context) as pool,
    ):
        queue = manager.Queue()

        def run(title: str, jobs: list[_Job]) -> list[RowResult]:
            jobs = [replace(job, queue=queue) for job in jobs]
            with _progress_bar(title, sum(job.network.steps for job in jobs), queue):
                return list(pool.map(train_row, jobs))

        teachers = run(
            f"teacher x {len(seeds)}",
            [_Job(task, "teacher", seed, output_dir, task.teacher, {"preset": "ce"}) for seed in seeds],
        )
        jobs = [
            _Job(task, name, seed, output_dir, task.student, overrides)
            for name, overrides in task.objectives.items()
            for seed in seeds
        ]
        students = run(f"{', '.join(task.objectives)} x {len(seeds)}", jobs)
        *_, slowest = task.objectives
        jobs = []
        for seed in seeds:
            seconds = {row.name: row.train_seconds for row in students if row.seed == seed}
            steps = round(task.student.steps * seconds[slowest] / seconds["ce"])
            network = replace(task.student, steps=max(steps, task.student.steps))
            jobs.append(_Job(task, EQUAL_TIME, seed, output_dir, network, task.objectives["ce"]))
        students += run(f"{EQUAL_TIME} x {len(seeds)}", jobs)
    return teachers + students


def train_row(job: _Job) -> RowResult:
    """Trains, evaluates and saves one network; runs in a worker process."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    task, network = job.task, job.network
    data = task.load(job.seed)
    is_teacher = job.name == "teacher"
    path = job.output_dir / "runs" / f"{job.name}-seed{job.seed}"
    args = TIDEConfig(
        output_dir=str(path),
        max_length=task.max_length,
        block_size=task.block_size,
        max_steps=network.steps,
        per_device_train_batch_size=network.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=network.learning_rate,
        weight_decay=network.weight_decay,
        logging_steps=max(task.curve_every // 2, 1),
        save_strategy="no",
        eval_noise_levels=list(task.noise_levels) or None,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=job.seed,
        **task.training,
        **job.overrides,
    )
    teacher = None if args.preset == "ce" else str(job.output_dir / "runs" / f"teacher-seed{job.seed}")
    callback = _Clock(job.queue, network.steps)
    trainer = TIDETrainer(
        model=build_network(network, data.tokenizer, task.block_size, job.seed),
        teacher=teacher,
        args=args,
        train_dataset=data.teacher_rows if is_teacher else data.student_rows,
        eval_dataset=data.held_out_rows if task.metric == "nll" else None,
        processing_class=data.tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    if task.metric == "exact_match":
        callback.measure = lambda: exact_match(trainer.model, data.tokenizer, data.held_out_rows)[0]
        callback.every = task.curve_every
    trainer.train()
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(path)
    if task.metric == "exact_match":
        value, tokens_per_second = exact_match(model, data.tokenizer, data.held_out_rows)
    else:
        prompts = data.held_out_rows.select(range(min(NUM_TIMED_PROMPTS, len(data.held_out_rows))))
        _, tokens_per_second = complete(model, data.tokenizer, prompts, task.num_completion_tokens)
        metrics = trainer.evaluate()
        value = {f"{t:g}": metrics[f"eval_nll_{t:g}"] for t in task.noise_levels}
    return RowResult(
        name=job.name,
        seed=job.seed,
        value=value,
        parameters=model.num_parameters(),
        steps=network.steps,
        train_seconds=callback.seconds,
        tokens_per_second=tokens_per_second,
        curve=trainer.state.log_history + callback.points,
        path=str(path),
    )


def build_network(network: Network, tokenizer, block_size: int, seed: int) -> TIDEQwen3ForBlockDiffusion:
    """A small dense diffusion LM with random weights drawn from the seed."""
    torch.manual_seed(seed)
    config = TIDEQwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=network.hidden,
        intermediate_size=3 * network.hidden,
        num_hidden_layers=network.layers,
        num_attention_heads=network.heads,
        num_key_value_heads=network.heads,
        head_dim=network.hidden // network.heads,
        block_size=block_size,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TIDEQwen3ForBlockDiffusion(config)


class _Clock(TrainerCallback):
    """CPU seconds of the training steps alone, a tick per step for the bar, and points of a measured curve."""

    def __init__(self, queue, num_steps: int):
        self.queue, self.num_steps = queue, num_steps
        self.seconds, self.points = 0.0, []
        self.measure: Callable[[], float] | None = None
        self.every = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self._started
        if self.queue is not None:
            self.queue.put(1)
        if self.measure is not None and (state.global_step % self.every == 0 or state.global_step == self.num_steps):
            self.points.append({"step": state.global_step, "metric": self.measure()})
        self._started = time.process_time()


@contextmanager
def _progress_bar(title: str, total: int, queue):
    """A bar of the training steps of all processes, fed through the queue."""
    with tqdm(total=total, desc=title, unit="step") as bar:

        def listen():
            while (ticks := queue.get()) is not None:
                bar.update(ticks)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            yield
        finally:
            queue.put(None)
            listener.join()


@contextmanager
def _single_threaded_children():
    """Child processes start with one thread, and without the launcher's idea of a process group."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
