"""Trains a teacher and students under several objectives, and compares them.

Everything goes through public classes: rows of messages, TIDETrainer, save_pretrained, from_pretrained.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from tide_hf.commands.answer_arguments import AnswerArguments, TeacherModel
from tide_hf.commands.answers import write_answers
from tide_hf.training.config import TIDEConfig
from tide_hf.training.trainer import TIDETrainer

from .autoregressive import AUTOREGRESSIVE, train_second_teacher
from .decoding import complete, decode_and_match, share_of_right, two_draws
from .harness import Clock, Job, Result, workers
from .networks import Network, build_network, train, training_arguments
from .report import cell, environment, format_table, mean_curve, plot, summarize

TEACHER = "teacher"
START = "start"  # the students' weights as they were drawn
EQUAL_TIME = "ce_equal_time"
NUM_TIMED_PROMPTS = 64  # of a text task, decoded in one batch
NUM_ANSWER_TOKENS = 64  # most tokens of an answer that a teacher writes


@dataclass(frozen=True)
class TaskData:
    """What a task is made of: tokenizers and rows of messages.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the student's, and the teacher's unless that has its own.
        teacher_rows, student_rows (`Dataset`): what each is trained on.
        held_out_rows (`Dataset`): what both are measured on.
        teacher_tokenizer (`PreTrainedTokenizerBase`, *optional*): the teacher's.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_rows: Dataset
    student_rows: Dataset
    held_out_rows: Dataset
    teacher_tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True)
class CardFacts:
    """What the card of a task's networks says and its report does not.

    Args:
        example_prompt (`str`): for the code of the card.
        language (`str`): ISO 639 code of the data.
        alignment (`str`): `"token"`, or `"chunk"` where teacher and student have different tokenizers.
    """

    example_prompt: str
    language: str
    alignment: str = "token"


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
        card ([`CardFacts`]): for the cards of its networks.
        training (`dict`): TIDEConfig fields of every run.
        noise_levels (`tuple[float, ...]`): diffusion times at which `nll` is measured, nats per masked held-out token.
        curve_every (`int`): steps between points of the curve.
        num_completion_tokens (`int`): length of the completions that a text task prints.
        distilled (`str`): the objective whose student ends up in the output folder.
        equal_time (`bool`): whether CE alone is also given the time of the last objective.
        autoregressive ([`Network`], *optional*): a second teacher, trained on the rows of the first; the rows whose
            preset begins with `ar-` learn from it. An objective may also say `"answers": (teacher, number)`: the
            student is trained on so many answers of that teacher's to each prompt; one is greedy, more are drawn.
        right_answers (`Callable`, *optional*): prompt -> every right answer, for `exact_match` and for two answers
            drawn at temperature 1 (`valid`, and how often two valid ones `differ`); by default the one in the rows.
        steps_per_block (`tuple[int, …]`): further numbers of steps at which `exact_match` is measured.
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
    card: CardFacts
    training: dict = field(default_factory=dict)
    noise_levels: tuple[float, ...] = ()
    curve_every: int = 100
    num_completion_tokens: int = 48
    distilled: str = "tide"
    equal_time: bool = True
    autoregressive: Network | None = None
    right_answers: Callable[[str], tuple[str, ...]] | None = None
    steps_per_block: tuple[int, ...] = ()


# -- running ----------------------------------------------------------------------------------------------------------


def run_comparison(task: Task, seeds: list[int], output_dir: str | Path) -> list[Result]:
    """Teacher and every student row for every seed.

    Students are compared at equal steps, and the row `ce_equal_time` gives CE alone as many CPU seconds as the last
    objective took, if the task asks for it.

    Args:
        task ([`Task`]): what to run.
        seeds (`list[int]`): one teacher and one set of students each.
        output_dir (`str` or `Path`): checkpoints go to `<output_dir>/runs/<row>-seed<seed>`.

    Returns:
        `list[Result]`, rows in the order of the table, seeds inside; metrics as in [`train_row`].
    """
    runs = Path(output_dir) / "runs"

    def job(name: str, seed: int, network: Network, fields: dict) -> Job:
        return Job(partial(train_row, task, name, seed, runs, network, fields), network.steps)

    networks = {START: replace(task.student, steps=0)}
    with workers() as run:
        jobs = [job(TEACHER, seed, task.teacher, {"preset": "ce"}) for seed in seeds]
        if task.autoregressive is not None:
            steps = task.autoregressive.steps
            jobs += [Job(partial(train_second_teacher, task, seed, runs), steps) for seed in seeds]
        teachers = run(f"teachers x {len(seeds)}", jobs)
        jobs = [
            job(name, seed, networks.get(name, task.student), fields)
            for name, fields in task.objectives.items()
            for seed in seeds
        ]
        students = run(f"{', '.join(task.objectives)} x {len(seeds)}", jobs)
        if not task.equal_time:
            return teachers + students
        jobs = [job(EQUAL_TIME, seed, _equal_time(task, students, seed), task.objectives["ce"]) for seed in seeds]
        return teachers + students + run(f"{EQUAL_TIME} x {len(seeds)}", jobs)


def _equal_time(task: Task, students: list[Result], seed: int) -> Network:
    """The student, with as many steps of CE as take the CPU seconds of the last objective."""
    seconds = {row.network: row.metrics["train_seconds"] for row in students if row.seed == seed}
    *_, last = task.objectives
    steps = round(task.student.steps * seconds[last] / seconds["ce"])
    return replace(task.student, steps=max(steps, task.student.steps))


def train_row(task: Task, name: str, seed: int, runs: Path, network: Network, fields: dict) -> list[Result]:
    """Trains, saves and measures one network.

    Args:
        task ([`Task`]): which comparison.
        name (`str`), seed (`int`): row of the table, and seed.
        runs (`Path`): folder of the checkpoints, in which the teacher lies by now.
        network ([`Network`]): size and steps.
        fields (`dict`): TIDEConfig fields of this row.

    Returns:
        one [`Result`]. Its metrics: `exact_match` (a fraction) and `nll` (nats by diffusion time) where the task
        measures them, `parameters`, `steps`, `train_seconds` (CPU seconds of training, without evaluation) and
        `tokens_per_second` (answer tokens decoded per CPU second, held-out prompts in one batch).
    """
    data, fields = task.load(seed), dict(fields)
    teaches, answers = name == TEACHER, fields.pop("answers", None)
    tokenizer = (data.teacher_tokenizer or data.tokenizer) if teaches else data.tokenizer
    path, started = runs / f"{name}-seed{seed}", time.process_time()
    rows = data.teacher_rows if teaches else data.student_rows
    if answers is not None:
        rows = _answered(rows, runs / f"{answers[0]}-seed{seed}", answers[1], runs / f"{name}-answers-seed{seed}")
    clock = Clock(task.curve_every, network.steps, before=time.process_time() - started)
    args = _training_arguments(task, network, path, seed, fields)
    if task.decodes and not task.steps_per_block:
        clock.measure = lambda model: decode_and_match(model, tokenizer, data.held_out_rows)[0]
    second = str(args.preset).startswith("ar-")
    trainer = train(
        TIDETrainer,
        build_network(network, tokenizer, task.block_size, seed),
        args,
        rows,
        tokenizer,
        callbacks=(clock,),
        teacher=None if args.preset == "ce" else str(runs / f"{AUTOREGRESSIVE if second else TEACHER}-seed{seed}"),
        eval_dataset=data.held_out_rows if task.noise_levels else None,
    )
    metrics, speed = measure_row(task, AutoModelForCausalLM.from_pretrained(path), tokenizer, data, seed)
    if task.noise_levels:
        measured = trainer.evaluate()
        metrics["nll"] = {f"{t:g}": measured[f"eval_nll_{t:g}"] for t in task.noise_levels}
    size = {"parameters": trainer.model.num_parameters(), "steps": network.steps, "train_seconds": clock.seconds}
    curve = trainer.state.log_history + clock.points
    prepared = asdict(trainer.preparation_reports["train"])
    return [Result(task.name, name, seed, {**metrics, **size, **speed}, str(path), curve, prepared)]


def measure_row(task: Task, model, tokenizer, data: TaskData, seed: int) -> tuple[dict, dict]:
    """What decoding tells of a network: its metrics, and `tokens_per_second`.

    Args:
        task ([`Task`]): what is measured.
        model, tokenizer: the network, and what it reads.
        data ([`TaskData`]): with the held-out rows.
        seed (`int`): of drawn answers.
    """
    rows = data.held_out_rows
    if not task.decodes:
        prompts = rows.select(range(min(NUM_TIMED_PROMPTS, len(rows))))
        return {}, {"tokens_per_second": complete(model, tokenizer, prompts, task.num_completion_tokens)[1]}
    match, metrics = partial(decode_and_match, model, tokenizer, rows), {}
    if task.right_answers is not None:
        match = partial(share_of_right, task.right_answers, model, tokenizer, rows)
        metrics = two_draws(task.right_answers, model, tokenizer, rows, seed)
    metrics["exact_match"], speed = match()
    if task.steps_per_block:
        metrics["by_steps"] = {str(steps): match(steps_per_block=steps)[0] for steps in task.steps_per_block}
    return metrics, {"tokens_per_second": speed}


def _answered(rows: Dataset, teacher: Path, num_answers: int, folder: Path) -> Dataset:
    """The same prompts with answers that a teacher wrote, as recipes/prepare_data.py has them written."""
    drawn = {"teacher_answers": "sample", "num_answers": num_answers}
    how = AnswerArguments(
        **(drawn if num_answers > 1 else {"teacher_answers": "greedy"}),
        max_new_tokens=NUM_ANSWER_TOKENS,
        answer_batch_size=64,
    )
    return write_answers({"train": rows}, TeacherModel(str(teacher)), how, folder, source={})["train"]


def _training_arguments(task: Task, network: Network, path: Path, seed: int, fields: dict) -> TIDEConfig:
    """Settings of the network, of the task and of the row, the last winning."""
    settings = {
        "max_length": task.max_length,
        "block_size": task.block_size,
        "per_device_eval_batch_size": 64,
        "logging_steps": max(task.curve_every // 2, 1),
        "eval_noise_levels": list(task.noise_levels) or None,
    }
    return training_arguments(network, path, seed, **{**settings, **task.training, **fields})


# -- showing ----------------------------------------------------------------------------------------------------------


def build_report(task: Task, results: list[Result], seeds: list[int]) -> dict:
    """The record of a comparison.

    Args:
        task ([`Task`]), results (`list[Result]`), seeds (`list[int]`): what was run, and what came of it.

    Returns:
        `{"task", "settings", "environment", "preparation", "rows": [{"name", "exact_match" and "nll": {"mean", "sd",
        "values"}, "parameters", "tokens_per_second", "train_seconds", "steps"}]}`. `exact_match` is a fraction, and so
        are `valid`, `differ` and `by_steps`, where the task measures them; the
        `mean`, `sd` and each value of `nll` map a diffusion time to nats per masked token. `sd` is the sample standard
        deviation over seeds, None for one seed. `preparation` is that of the student's rows of the first seed.
    """
    settings = asdict(task)
    for name in ("load", "card", "right_answers"):
        del settings[name]
    return {
        "task": task.name,
        "settings": {**settings, "seeds": seeds},
        "environment": environment(),
        "preparation": next((result.preparation for result in results if result.network == task.distilled), {}),
        "rows": [_report_row(entry) for entry in summarize(results)],
    }


def _report_row(entry: dict) -> dict:
    """A network of [`summarize`] as it stands in a report."""
    row = {"name": entry["name"]}
    row |= {name: entry[name] for name in ("exact_match", "valid", "differ", "by_steps") if name in entry}
    if "nll" in entry:
        row["nll"] = _by_statistic(entry["nll"])
    steps = entry["steps"]["mean"]
    return {
        **row,
        "parameters": entry["parameters"]["values"][0],
        "tokens_per_second": entry["tokens_per_second"]["mean"],
        "train_seconds": entry["train_seconds"]["mean"],
        "steps": int(steps) if steps.is_integer() else steps,
    }


def _by_statistic(levels: dict[str, dict]) -> dict:
    """`{time: {"mean", "sd", "values"}}` as `{"mean": {time: …}, "sd": {time: …}, "values": [{time: …}, …]}`."""
    by_seed = zip(*(summary["values"] for summary in levels.values()), strict=True)
    values = [dict(zip(levels, numbers, strict=True)) for numbers in by_seed]
    mean, sd = ({t: summary[name] for t, summary in levels.items()} for name in ("mean", "sd"))
    return {"mean": mean, "sd": sd if len(values) > 1 else None, "values": values}


def comparison_table(report: dict) -> str:
    """A report as text, one line per network.

    Args:
        report (`dict`): see [`build_report`].
    """

    def level_cell(t: str) -> Callable[[dict], str]:
        return lambda row: cell({"mean": row["nll"]["mean"][t], "sd": (row["nll"]["sd"] or {}).get(t)}, "{:.3f}")

    first, columns = report["rows"][0], {}
    if "exact_match" in first:
        columns["exact match"] = lambda row: cell(row["exact_match"], "{:.1f}", 100, " %")
    for name, title in (("valid", "valid draws"), ("differ", "two draws differ")):
        if name in first:
            columns[title] = partial(lambda row, name: cell(row[name], "{:.1f}", 100, " %"), name=name)
    for steps in first.get("by_steps", ()):
        title = f"{steps} step{'s' * (steps != '1')} a block"
        columns[title] = partial(lambda row, steps: cell(row["by_steps"][steps], "{:.1f}", 100, " %"), steps=steps)
    columns |= {f"nll t={t}": level_cell(t) for t in (first["nll"]["mean"] if "nll" in first else ())}
    columns |= {
        "parameters": lambda row: f"{row['parameters']:,}",
        "steps": lambda row: f"{row['steps']:,.0f}",
        "train CPU s": lambda row: f"{row['train_seconds']:.1f}",
        "tokens/s": lambda row: "–" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
    }
    return format_table(report["rows"], columns)


def plot_curves(report: dict, results: list[Result], path: Path) -> None:
    """Losses, λ and the measured metric against steps, mean over seeds.

    Args:
        report (`dict`), results (`list[Result]`): of one comparison.
        path (`Path`): file to write.
    """
    panels = [("ce", "denoising loss (nats per token)"), ("distill", "distillation term"), ("lambda", "λ(s)")]
    if any("exact_match" in point for result in results for point in result.curve):
        panels.append(("exact_match", "exact match"))
    with plot(path, len(panels)) as (figure, axes):
        for axis, (key, title) in zip(axes, panels, strict=True):
            for index, row in enumerate(report["rows"]):
                curve = mean_curve([result for result in results if result.network == row["name"]], key)
                if len(curve):
                    axis.plot(curve.index, curve, color=f"C{index}", label=row["name"])
            axis.set(xlabel="optimizer step", title=title)
        axes[0].set_yscale("log")
        axes[0].legend(fontsize="small")
        figure.suptitle(f"{report['task']}, {len(report['settings']['seeds'])} seed(s)")
