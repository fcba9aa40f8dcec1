"""A teacher, students taught on its answers, and an IDLM student, compared by number of denoising steps.

Every network decodes as IDLM assumes (arXiv 2602.19066): random order, temperature 1, a fixed number of network calls.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tide_hf.evaluation import unigram_entropy
from tide_hf.few_step import IDLMConfig, IDLMTrainer
from tide_hf.hub.provenance import hardware
from tide_hf.hub.record import today
from tide_hf.training.trainer import TIDETrainer

from .comparison import TEACHER, TaskData
from .decoding import complete
from .harness import Job, Result, workers
from .networks import Network, build_network, train, training_arguments
from .report import cell, environment, format_table, plot, summarize

SAMPLED, GREEDY, IDLM = "taught on its samples", "taught on its greedy answers", "IDLM"
STUDENTS = (SAMPLED, GREEDY, IDLM)
NETWORKS = (TEACHER, *STUDENTS)
FULL = "full"
SAMPLING = {"remasking": "random", "temperature": 1.0, "do_sample": True}
# how the teacher writes the answers that a student is taught on, one token a step
TAUGHT_ON = {SAMPLED: {"temperature": 1.0, "remasking": "random"}, GREEDY: {"temperature": 0.0}}
# metric -> title of its table, factor, format
METRICS = {
    "accuracy": ("right answers, %", 100, "{:.1f}"),
    "differ": ("two right answers to a prompt differ, %", 100, "{:.1f}"),
    "entropy": ("unigram entropy of an answer, nats", 1, "{:.2f}"),
    "speed": ("tokens per CPU second", 1, "{:,.0f}"),
}
PLOT_FILE = "few_step.png"


@dataclass(frozen=True)
class FewStepTask:
    """One task of the comparison.

    Args:
        name (`str`): of the report.
        load (`Callable[[int], TaskData]`): data of a seed; one tokenizer for all.
        right_answers (`Callable[[str], tuple[str, …]]`): prompt -> every right answer.
        steps (`tuple[int, …]`): network calls per block, or per answer of a full-sequence network; the last reveals
            one token at a time and is called full.
        max_length (`int`): tokens of a row.
        teacher, student ([`Network`]): sizes and training; the students start from the teacher, so only steps, batch
            size and learning rate of theirs count.
        num_taught (`int`): answers of the teacher's that a student is taught on.
        block_size (`int`, *optional*): tokens per block; None for a full-sequence network.
        eos_fill (`str`): of every run, see [`DiffusionTrainingArguments`].
        teacher_training (`dict`): TIDEConfig fields of the teacher's run.
        teacher_recipe (`str`, *optional*): a recipe whose comparison of the same name trains this very teacher; where
            that has run, its teacher is taken.
        idlm (`dict`): further fields of [`IDLMConfig`].
    """

    name: str
    load: Callable[[int], TaskData]
    right_answers: Callable[[str], tuple[str, ...]]
    steps: tuple[int, ...]
    max_length: int
    teacher: Network
    student: Network
    num_taught: int
    block_size: int | None = None
    eos_fill: str = "block"
    teacher_training: dict = field(default_factory=dict)
    teacher_recipe: str | None = None
    idlm: dict = field(default_factory=dict)


# -- running ----------------------------------------------------------------------------------------------------------


def run_few_step(tasks: list[FewStepTask], seeds: list[int], output_dir: str | Path) -> list[Result]:
    """All networks of all tasks and seeds.

    Args:
        tasks (`list[FewStepTask]`), seeds (`list[int]`): what to run.
        output_dir (`str` or `Path`): checkpoints go to `<output_dir>/<task>/runs/<network>-seed<seed>`.

    Returns:
        `list[Result]`, by task, network and seed; metrics are `train_seconds` (CPU seconds; of taught students with
        making the rows) and `steps`, see [`measure`].
    """
    output_dir, results = Path(output_dir), []
    with workers() as run:
        jobs = [
            Job(partial(make_teacher, task, seed, output_dir), task.teacher.steps) for task in tasks for seed in seeds
        ]
        teachers = run(f"{TEACHER} x {len(seeds)}", jobs)
        paths = {(result.task, result.seed): result.path for result in teachers}
        jobs = [
            Job(partial(make_student, task, name, seed, paths[task.name, seed], output_dir), task.student.steps)
            for task in tasks
            for name in STUDENTS
            for seed in seeds
        ]
        students = run(f"students x {len(seeds)}", jobs)
    for task in tasks:
        results += [result for result in teachers + students if result.task == task.name]
    return results


def make_teacher(task: FewStepTask, seed: int, output_dir: Path) -> list[Result]:
    """Finds or trains a teacher, and measures it.

    Args:
        task ([`FewStepTask`]), seed (`int`), output_dir (`Path`): as in [`run_few_step`].
    """
    data, started = task.load(seed), time.process_time()
    path = find_teacher(task, seed, output_dir)
    if path is None:
        path = _run_folder(task, TEACHER, seed, output_dir)
        model = build_network(task.teacher, data.tokenizer, task.block_size or task.max_length, seed)
        model.config.diffusion_type = "full" if task.block_size is None else "block"
        fields = {**_fields(task), "preset": "ce", "block_size": task.block_size, **task.teacher_training}
        args = training_arguments(task.teacher, path, seed, **fields)
        train(TIDETrainer, model, args, data.teacher_rows, data.tokenizer)
    return _measured(task, TEACHER, seed, path, data, time.process_time() - started)


def find_teacher(task: FewStepTask, seed: int, output_dir: Path) -> Path | None:
    """The checkpoint of a seed that the recipe of `task.teacher_recipe` left beside this output; None without one.

    Args:
        task ([`FewStepTask`]), seed (`int`), output_dir (`Path`): as in [`run_few_step`].
    """
    if task.teacher_recipe is None:
        return None
    folder = output_dir.parent / task.teacher_recipe
    path, report = folder / "runs" / f"{TEACHER}-seed{seed}", folder / "report.json"
    if not (path / "config.json").is_file() or not report.is_file():
        return None
    # the recipe's last run may have been of another task
    return path if json.loads(report.read_text())["task"] == task.name else None


def make_student(task: FewStepTask, name: str, seed: int, teacher: str, output_dir: Path) -> list[Result]:
    """Trains a student from its teacher's weights, and measures it.

    Args:
        task ([`FewStepTask`]), seed (`int`), output_dir (`Path`): as in [`run_few_step`].
        name (`str`): one of `STUDENTS`.
        teacher (`str`): its checkpoint.
    """
    data, path = task.load(seed), _run_folder(task, name, seed, output_dir)
    tokenizer, rows = AutoTokenizer.from_pretrained(teacher), data.student_rows
    fields = {**_fields(task), **cosine_schedule(task.student)}
    started = time.process_time()
    if name == IDLM:
        fields = {**fields, "max_grad_norm": 1.0, "ema_decay": 0.98, **task.idlm}
        args = training_arguments(task.student, path, seed, IDLMConfig, **fields)
        train(IDLMTrainer, teacher, args, rows, tokenizer)
    else:
        rows = rows.select(range(min(task.num_taught, len(rows))))
        taught = _answered(AutoModelForCausalLM.from_pretrained(teacher), tokenizer, rows, TAUGHT_ON[name])
        args = training_arguments(task.student, path, seed, preset="ce", **fields)
        train(TIDETrainer, teacher, args, taught, tokenizer)
    return _measured(task, name, seed, path, data, time.process_time() - started)


def cosine_schedule(network: Network) -> dict:
    """Fields of a cosine schedule with a short warm-up."""
    return {"lr_scheduler_type": "cosine", "warmup_steps": min(20, network.steps // 4)}


def _fields(task: FewStepTask) -> dict:
    return {"max_length": task.max_length, "eos_fill": task.eos_fill}


def _run_folder(task: FewStepTask, name: str, seed: int, output_dir: Path) -> Path:
    return output_dir / task.name / "runs" / f"{name.replace(' ', '-')}-seed{seed}"


def _measured(task: FewStepTask, name: str, seed: int, path: Path, data: TaskData, seconds: float) -> list[Result]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    steps = measure(task, model, tokenizer, data.held_out_rows, seed)
    return [Result(task.name, name, seed, {"train_seconds": seconds, "steps": steps}, str(path))]


def measure(task: FewStepTask, model, tokenizer, rows: Dataset, seed: int) -> dict[str, dict[str, float]]:
    """Answers every held-out prompt twice at each number of steps.

    Args:
        task ([`FewStepTask`]): gives the numbers of steps and the right answers.
        model, tokenizer: the network and what it reads.
        rows (`Dataset`): held-out conversations.
        seed (`int`): of the sampling.

    Returns:
        `{number of steps: {"accuracy", "differ", "entropy", "speed"}}`. `accuracy` is the share of answers that are
        right; `differ` the share of prompts, among those with two right answers, whose two answers differ, NaN if
        there are none; `entropy` the unigram entropy of an answer in nats; `speed` tokens per CPU second.
    """
    metrics, prompts = {}, [messages[0]["content"] for messages in rows["messages"]]
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


def _answered(teacher, tokenizer, rows: Dataset, settings: dict) -> Dataset:
    """The same prompts with the teacher's own answers."""
    answers, _ = complete(teacher, tokenizer, rows, generator=torch.Generator().manual_seed(0), **settings)
    turned = [
        {"messages": [question, {**answer, "content": text}]}
        for (question, answer), text in zip(rows["messages"], answers, strict=True)
        if text
    ]
    return Dataset.from_list(turned)


# -- showing ----------------------------------------------------------------------------------------------------------


def build_few_step_report(tasks: list[FewStepTask], results: list[Result], seeds: list[int]) -> dict:
    """The record of a comparison.

    Args:
        tasks (`list[FewStepTask]`), results (`list[Result]`), seeds (`list[int]`): what was run, and what came of it.

    Returns:
        `{"environment", "hardware", "seeds", "tasks": [{"name", "settings", "networks": [{"name", "train_seconds",
        "steps": {number: {metric: {"mean", "sd", "values"}}}}]}]}`; metrics as in [`measure`], `sd` the sample
        standard deviation over seeds, None for one seed.
    """
    report = {"environment": environment(), "hardware": hardware(1), "seeds": seeds, "tasks": []}
    for task in tasks:
        settings = {
            "student": vars(task.student),
            "idlm": task.idlm,
            "num_taught": task.num_taught,
            "num_held_out": len(task.load(seeds[0]).held_out_rows),
            "max_length": task.max_length,
        }
        entries = summarize([result for result in results if result.task == task.name])
        networks = [{**entry, "train_seconds": entry["train_seconds"]["mean"]} for entry in entries]
        report["tasks"].append({"name": task.name, "settings": settings, "networks": networks})
    return report


def few_step_table(task: dict) -> str:
    """One task of a report as text: a block per metric, a line per network, a column per number of steps.

    Args:
        task (`dict`): of the `tasks` in [`build_few_step_report`].
    """

    def step_cell(number: str, metric: str, form: str, factor: float) -> Callable[[dict], str]:
        return lambda network: cell(network["steps"][number][metric], form, factor)

    blocks = [f"{task['name']}: columns are network calls per block, or per answer"]
    for metric, (title, factor, form) in METRICS.items():
        columns = {number: step_cell(number, metric, form, factor) for number in task["networks"][0]["steps"]}
        blocks.append(format_table(task["networks"], columns, corner=title, names_left=True))
    seconds = ", ".join(f"{network['name']} {network['train_seconds']:.0f}" for network in task["networks"])
    return "\n\n".join([*blocks, f"CPU seconds of training (teaching: with making the rows): {seconds}"])


def plot_few_step(report: dict, path: Path) -> None:
    """Right answers against steps, teacher and students, mean and spread over seeds; one panel per task.

    Args:
        report (`dict`): see [`build_few_step_report`].
        path (`Path`): file to write.
    """
    with plot(path, len(report["tasks"]), 5.0, 3.6) as (_, axes):
        for axis, task in zip(axes, report["tasks"], strict=True):
            for network in task["networks"]:
                values = [100 * steps["accuracy"]["mean"] for steps in network["steps"].values()]
                spread = [100 * (steps["accuracy"]["sd"] or 0.0) for steps in network["steps"].values()]
                label = f"{network['name']} (before)" if network["name"] == TEACHER else network["name"]
                axis.errorbar(range(len(values)), values, spread, label=label, marker="o", capsize=3)
            axis.set_xticks(range(len(network["steps"])), list(network["steps"]))
            axis.set(xlabel="denoising steps", ylabel="right answers, %", title=task["name"], ylim=(-3, 103))
        axes[0].legend(fontsize="small")


def extend_card(report: dict, output_dir: Path) -> None:
    """Adds what was measured by number of steps, and the plot, to the card that the student's own run wrote.

    Args:
        report (`dict`): see [`build_few_step_report`].
        output_dir (`Path`): folder of card and plot.
    """
    card, task = output_dir / "README.md", report["tasks"][0]
    text = card.read_text(encoding="utf-8").rstrip()
    lines = [
        "## Quality against denoising steps",
        f"![Right answers against denoising steps]({PLOT_FILE})",
        f"Task `{task['name']}`: {task['settings']['num_held_out']} held-out prompts, each answered twice; mean ± "
        f"sample standard deviation over {len(report['seeds'])} seed(s); on {report['hardware']}; {today()}. The "
        "teacher is the student before distillation.",
        f"```\n{few_step_table(task)}\n```",
    ]
    card.write_text("\n\n".join([text, *lines]) + "\n", encoding="utf-8")
