"""Runs the jobs of an embedded comparison: each trains and measures networks, in one of two processes side by side.

A process has one thread, so that CPU seconds can be compared, and prints nothing; optimizer steps move one common bar.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context

import torch
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

NUM_WORKERS = 2
_ticks = None  # in a worker: the queue that moves the progress bar


@dataclass
class Result:
    """One network of one seed, trained and measured.

    Args:
        task, network (`str`), seed (`int`): which one it is.
        metrics (`dict`): name -> number, or a mapping of that kind where a metric depends on something:
            `{"exact_match": 0.9, "nll": {"0.5": 0.4}}`. NaN stands for a number that this network does not have.
        path (`str`): the saved checkpoint.
        curve (`list[dict]`): `{"step", "loss", …}` as logged, and points measured during training.
        preparation (`dict`): what became of its training rows, see [`~tide_hf.data.PreparationReport`].
    """

    task: str
    network: str
    seed: int
    metrics: dict
    path: str = ""
    curve: list[dict] = field(default_factory=list)
    preparation: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Work that one process does without a break.

    Args:
        run (`Callable[[], list[Result]]`): trains and measures; it is pickled, so a partial of a module's function.
        num_steps (`int`): the optimizer steps it takes, for the progress bar.
    """

    run: Callable[[], list[Result]]
    num_steps: int


@contextmanager
def workers() -> Iterator[Callable[[str, list[Job]], list[Result]]]:
    """Starts the processes, once for all stages of a comparison.

    Yields:
        a function of the title of a stage and its jobs, which returns their results in the order of the jobs.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = get_context("spawn")
    queue = context.SimpleQueue()
    with (
        single_threaded_children(),
        ProcessPoolExecutor(NUM_WORKERS, mp_context=context, initializer=_start_worker, initargs=(queue,)) as pool,
    ):

        def run(title: str, jobs: list[Job]) -> list[Result]:
            with _progress_bar(title, sum(job.num_steps for job in jobs), queue):
                return [result for results in pool.map(_run_job, jobs) for result in results]

        yield run


def run_jobs(title: str, jobs: list[Job]) -> list[Result]:
    """Runs the jobs of a comparison that has a single stage."""
    with workers() as run:
        return run(title, jobs)


def tick(num_steps: int = 1) -> None:
    """Moves the progress bar; outside a worker there is none."""
    if _ticks is not None:
        _ticks.put(num_steps)


class Ticks(TrainerCallback):
    """Moves the progress bar with every optimizer step."""

    def on_step_end(self, args, state, control, **kwargs):
        tick()


class Clock(TrainerCallback):
    """CPU seconds of what came before and of the training steps, and points of a curve measured between them."""

    def __init__(self, every: int, num_steps: int, before: float = 0.0):
        self.every, self.num_steps = every, num_steps
        self.seconds, self.points = before, []
        self.measure: Callable[..., float] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.process_time()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seconds += time.process_time() - self._started
        if self.measure is not None and (state.global_step % self.every == 0 or state.global_step == self.num_steps):
            self.points.append({"step": state.global_step, "exact_match": self.measure(model)})
        self._started = time.process_time()


@contextmanager
def single_threaded_children() -> Iterator[None]:
    """Processes started inside have one thread each, and do not take themselves for part of the launcher's group."""
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


def _start_worker(queue) -> None:
    global _ticks
    _ticks = queue
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


def _run_job(job: Job) -> list[Result]:
    return job.run()


@contextmanager
def _progress_bar(title: str, total: int, queue) -> Iterator[None]:
    """A bar of the optimizer steps of all processes."""
    with tqdm(total=total, desc=title, unit="step") as bar:

        def listen():
            while (num_steps := queue.get()) is not None:
                bar.update(num_steps)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        try:
            yield
        finally:
            queue.put(None)
            listener.join()
