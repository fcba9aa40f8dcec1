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
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from tide_hf.training.config import TIDEConfig
from tide_hf.training.trainer import TIDETrainer

from .decoding import complete, decode_and_match
from .networks import Network, build_network

NUM_WORKERS = 2
START = "start"  # the students' weights as they were drawn
EQUAL_TIME = "ce_equal_time"
NUM_TIMED_PROMPTS = 64  # of a text task, decoded in one batch


@dataclass(frozen=True)
class TaskData:
    """What a task brings: a tokenizer, or one for the student and one for the teacher, and rows of messages."""

    tokenizer: PreTrainedTokenizerBase
    teacher_rows: Dataset
    student_rows: Dataset
    held_out_rows: Dataset
    teacher_tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True)
class Task:
    """One embedded comparison.

    Args:
        name (`str`): of the report.
        load (`Callable[[int], TaskData]`): data of a seed.
        decodes (`bool`): whether answers are short enough for `exact_match`, the fraction of held-out ones that are
            decoded exactly; otherwise some completions are shown.
        max_length, block_size (`int`): tokens.
        teacher, student ([`Network`]): sizes and training.
        num_student_rows (`int`): training rows of the student at most.
        objectives (`dict`): row name -> TIDEConfig fields of the student's run; a row named "start" does not train.
        training (`dict`): TIDEConfig fields of every run.
        noise_levels (`tuple[float, ...]`): diffusion times at which `nll` is measured, nats per masked held-out token.
        curve_every (`int`): steps between points of the curve.
        num_completion_tokens (`int`): length of the completions that a text task prints.
        distilled (`str`): the objective whose student the run hands over.
    """

    name: str
    load: Callable[[int], TaskData]
    decodes: bool
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
    distilled: str = "tide"


@dataclass
class RowResult:
    """One trained network: what the report and the plot need.

    Args:
        metrics (`dict`): `exact_match` (a fraction) and `nll` (nats by diffusion time), where they are measured.
        train_seconds (`float`): CPU seconds of training on one thread, evaluation left out.
        tokens_per_second (`float`): answer tokens decoded per CPU second, held-out prompts in one batch.
        curve (`list`): `{"step", "loss", …}` as logged; with `"exact_match"` where it was measured.
        path (`str`): the saved checkpoint.
        preparation (`dict`): what became of its training rows, see [`~tide_hf.data.PreparationReport`].
    """

    name: str
    seed: int
    metrics: dict
    parameters: int
    steps: int
    train_seconds: float
    tokens_per_second: float
    curve: list[dict]
    path: str
    preparation: dict = field(default_factory=dict)


@dataclass
class Job:
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
        single_threaded_children(),
        context.Manager() as manager,
        ProcessPoolExecutor(NUM_WORKERS, mp_context=context) as pool,
    ):
        queue = manager.Queue()

        def run(title: str, jobs: list[Job]) -> list[RowResult]:
            jobs = [replace(job, queue=queue) for job in jobs]
            with _progress_bar(title, sum(job.network.steps for job in jobs), queue):
                return list(pool.map(train_row, jobs))

        teachers = run(
            f"teacher x {len(seeds)}",
            [Job(task, "teacher", seed, output_dir, task.teacher, {"preset": "ce"}) for seed in seeds],
        )
        networks = {START: replace(task.student, steps=0)}
        jobs = [
            Job(task, name, seed, output_dir, networks.get(name, task.student), overrides)
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
            jobs.append(Job(task, EQUAL_TIME, seed, output_dir, network, task.objectives["ce"]))
        students += run(f"{EQUAL_TIME} x {len(seeds)}", jobs)
    return teachers + students


def train_row(job: Job) -> RowResult:
    """Trains, evaluates and saves one network; runs in a worker process."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    task, network = job.task, job.network
    data = task.load(job.seed)
    is_teacher = job.name == "teacher"
    teacher_tokenizer = data.teacher_tokenizer or data.tokenizer
    tokenizer = teacher_tokenizer if is_teacher else data.tokenizer
    path = job.output_dir / "runs" / f"{job.name}-seed{job.seed}"
    args = _training_arguments(job, path)
    teacher = None if args.preset == "ce" else str(job.output_dir / "runs" / f"teacher-seed{job.seed}")
    callback = _Clock(job.queue, network.steps)
    trainer = TIDETrainer(
        model=build_network(network, tokenizer, task.block_size, job.seed),
        teacher=teacher,
        args=args,
        train_dataset=data.teacher_rows if is_teacher else data.student_rows,
        eval_dataset=data.held_out_rows if task.noise_levels else None,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    if task.decodes:
        callback.measure = lambda: decode_and_match(trainer.model, tokenizer, data.held_out_rows)[0]
        callback.every = task.curve_every
    if network.steps:
        trainer.train()
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(path)
    metrics = {}
    if task.decodes:
        metrics["exact_match"], tokens_per_second = decode_and_match(model, tokenizer, data.held_out_rows)
    else:
        prompts = data.held_out_rows.select(range(min(NUM_TIMED_PROMPTS, len(data.held_out_rows))))
        _, tokens_per_second = complete(model, tokenizer, prompts, task.num_completion_tokens)
    if task.noise_levels:
        measured = trainer.evaluate()
        metrics["nll"] = {f"{t:g}": measured[f"eval_nll_{t:g}"] for t in task.noise_levels}
    return RowResult(
        name=job.name,
        seed=job.seed,
        metrics=metrics,
        parameters=model.num_parameters(),
        steps=network.steps,
        train_seconds=callback.seconds,
        tokens_per_second=tokens_per_second,
        curve=trainer.state.log_history + callback.points,
        path=str(path),
        preparation=asdict(trainer.preparation_reports["train"]),
    )


def _training_arguments(job: Job, path: Path) -> TIDEConfig:
    """Settings of the task, of the network and of the row, the last winning."""
    task, network = job.task, job.network
    return TIDEConfig(
        output_dir=str(path),
        max_length=task.max_length,
        block_size=task.block_size,
        max_steps=network.steps or -1,
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
        **{**task.training, **job.overrides},
    )


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
            self.points.append({"step": state.global_step, "exact_match": self.measure()})
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
def single_threaded_children():
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
