"""Where the time of a training step goes: writing answers, the teacher, the student; and how each grows with answers.

Method: the library's own step, from the padded batch to the gradients, without the optimizer's. Random weights, random
characters, prompts of 32 tokens. Its parts, of which each moment counts for one:
`rollout`, the student writes its answers, one token per pass; `teacher`, its forward and its head; `student`, forward,
loss and backward; `rest`, noise, layouts, and looking up kept predictions. The kinds of steps:
`kl` and `ar-kl`, a diffusion teacher and an autoregressive one in memory; the same from predictions that were kept
(the 16 likeliest tokens, so that the loss is over 17 outcomes instead of the vocabulary); on-policy with a diffusion
teacher, where new answers are written for every step or for every fourth.
All kinds and lengths run in turn in one process, a few steps each a round: four, or one where every step writes. The
noise is the same in every round. Times are medians over `--rounds` rounds of the mean over a round's steps, shares and
ratios medians of the rounds' own. The optimizer takes no step, so that random weights stay random: hardly an answer
ends before its limit.

`--output` writes JSON: `arguments`, `environment`; `rows`, one per kind and length of answers in tokens: `kind`,
`answer`; `step_s`, seconds of a step; `seconds` and `share` of each part; `ratio`, a step over that of `kl` with
answers as long; `growth`, a step over one with the shortest answers; `rollout_tokens`, the mean length of what the
student wrote, if it did.

Hardware: a CPU; four minutes on one core. Nothing is downloaded. Small networks on a CPU say how the parts
compare in kind, not what an 8B teacher costs on a GPU: give `--teacher_hidden` and the like.

    python recipes/benchmark_parts.py
    python recipes/benchmark_parts.py --answers 64 512 --teacher_hidden 1024 --output outputs/parts.json
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from benchmarking import write_results
from datasets import Dataset, disable_progress_bars, load_from_disk
from embedded.autoregressive import build_autoregressive
from embedded.networks import Network, build_network, training_arguments
from embedded.report import environment
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers.utils import logging

from tide_hf import TIDETrainer
from tide_hf.commands.prepare import parse_prepare_arguments, run_preparation
from tide_hf.demo.sorting import SPECIAL_TOKENS, with_special_tokens

PARTS = ("rollout", "teacher", "student", "rest")
PROMPT, STEPS, FIRST_CHARACTER = 32, 4, 0x4E00


@dataclass(frozen=True)
class Kind:
    """A kind of step.

    Args:
        teacher (`str`): `"diffusion"` or `"autoregressive"`.
        fields (`dict`): TIDEConfig fields of the run.
        from_cache (`bool`): without the teacher, from its predictions.
    """

    teacher: str
    fields: dict = field(default_factory=dict)
    from_cache: bool = False

    @property
    def steps(self) -> int:
        """Steps of a round."""
        return self.fields.get("rollout_reuse", 1) if self.writes else STEPS

    @property
    def writes(self) -> bool:
        """Whether the student writes answers."""
        return "on_policy_fraction" in self.fields


KL, AR_KL = {"preset": "kl"}, {"preset": "ar-kl"}
ON_POLICY = KL | {"on_policy_fraction": 1.0}
KINDS = {
    "kl": Kind("diffusion", KL),
    "kl, cache": Kind("diffusion", KL, from_cache=True),
    "ar-kl": Kind("autoregressive", AR_KL),
    "ar-kl, cache": Kind("autoregressive", AR_KL, from_cache=True),
    "on-policy": Kind("diffusion", ON_POLICY),
    "on-policy, reuse 4": Kind("diffusion", ON_POLICY | {"rollout_reuse": STEPS}),
}


class Clock:
    """Seconds of each part; a part inside another one interrupts it."""

    def __init__(self):
        self.seconds, self._open, self._since = dict.fromkeys(PARTS, 0.0), [], 0.0

    def _count(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, whose calls count for a part."""

        def call(*args, **kwargs):
            self._count()
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._count()
                self._open.pop()

        return call


class Bench:
    """A trainer of one kind on one batch, with a clock in its step."""

    def __init__(self, kind: Kind, answer: int, folder: Path, arguments):
        self.clock, self.steps = Clock(), kind.steps
        rows, teacher = load_from_disk(folder / f"rows-{answer}"), str(folder / kind.teacher)
        length = -(-(PROMPT + answer) // arguments.block_size) * arguments.block_size
        fields = {"max_length": length, "block_size": arguments.block_size, **kind.fields}
        if kind.writes:
            fields["rollout_max_new_tokens"] = answer
        if kind.from_cache:
            rows, teacher = keep_predictions(kind, folder, answer, fields), None
        size = Network(arguments.hidden, arguments.layers, arguments.heads, steps=STEPS, batch_size=arguments.batch)
        args = training_arguments(size, folder / "run", 0, **fields)
        self.trainer = trainer = TIDETrainer(str(folder / "student"), teacher=teacher, args=args, train_dataset=rows)
        trainer.state.max_steps = STEPS
        self.batch = next(iter(trainer.get_train_dataloader()))
        self._prepare = self.clock.timed("rest", trainer.get_batch_samples)
        self._train = self.clock.timed("student", self._forward_and_backward)
        trainer._write = self.clock.timed("rollout", trainer._write)
        if trainer.signal is not None:
            for name in ("hidden", "logits"):
                setattr(trainer.signal, name, self.clock.timed("teacher", getattr(trainer.signal, name)))

    def _forward_and_backward(self, batch) -> None:
        self.trainer.compute_loss(self.trainer.model, self.trainer._prepare_inputs(batch)).backward()

    def round(self) -> dict[str, float]:
        """Seconds of each part of a step, the mean over some."""
        self.clock.seconds = dict.fromkeys(PARTS, 0.0)
        for index in range(self.steps):
            self.trainer._pass = index  # a new noise, and new answers
            self.trainer.model.zero_grad()
            batches, _ = self._prepare(iter([self.batch]), 1, self.trainer.args.device)
            self._train(*batches)
        return {part: seconds / self.steps for part, seconds in self.clock.seconds.items()}


def keep_predictions(kind: Kind, folder: Path, answer: int, fields: dict) -> Dataset:
    """Prepared rows with the predictions of a teacher, as recipes/prepare_data.py makes them."""
    words = ["--model_name_or_path", folder / "student", "--teacher_model_name_or_path", folder / kind.teacher]
    words += ["--dataset_name", folder / f"rows-{answer}", "--output_dir", folder / f"{kind.teacher}-{answer}"]
    words += [word for name, value in fields.items() for word in (f"--{name}", value)]
    words += ["--teacher_cache", *(["--cache_passes", STEPS] if kind.teacher == "diffusion" else [])]
    with redirect_stdout(StringIO()):
        return run_preparation(parse_prepare_arguments([str(word) for word in words]))["train"]


def build_folder(folder: Path, arguments) -> None:
    """Saves the networks, and one batch of rows for each length of answers."""
    characters = [chr(FIRST_CHARACTER + index) for index in range(arguments.vocab - len(SPECIAL_TOKENS))]
    vocab = {token: index for index, token in enumerate((*characters, *SPECIAL_TOKENS))}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer = with_special_tokens(tokenizer)
    student = Network(arguments.hidden, arguments.layers, arguments.heads, steps=0)
    teacher = Network(arguments.teacher_hidden, arguments.teacher_layers, arguments.heads, steps=0)
    networks = {
        "student": build_network(student, tokenizer, arguments.block_size, seed=0),
        "diffusion": build_network(teacher, tokenizer, arguments.block_size, seed=1),
        "autoregressive": build_autoregressive(teacher, tokenizer, seed=1),
    }
    for name, network in networks.items():
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices(characters, k=length))

    for answer in arguments.answers:
        rows = [
            # the tokens that begin the two turns, and the one that ends the answer, count
            {
                "messages": [
                    {"role": "user", "content": text(PROMPT - 2)},
                    {"role": "assistant", "content": text(answer - 1)},
                ]
            }
            for _ in range(arguments.batch)
        ]
        Dataset.from_list(rows).save_to_disk(folder / f"rows-{answer}")


def summarize(times: dict[tuple[str, int], list[dict[str, float]]], benches: dict) -> list[dict]:
    """One row of the table per kind and length."""
    steps = {case: [sum(parts.values()) for parts in rounds] for case, rounds in times.items()}
    shortest, first = min(answer for _, answer in times), next(iter(KINDS))
    rows = []
    for (kind, answer), rounds in times.items():
        mine = steps[kind, answer]

        def against(others: list[float], mine=mine) -> float:
            return statistics.median(own / other for own, other in zip(mine, others, strict=True))

        seconds = {part: statistics.median(parts[part] for parts in rounds) for part in PARTS}
        shares = {part: statistics.median(parts[part] / sum(parts.values()) for parts in rounds) for part in PARTS}
        row = {"kind": kind, "answer": answer, "step_s": statistics.median(mine), "seconds": seconds, "share": shares}
        row |= {"ratio": against(steps[first, answer]), "growth": against(steps[kind, shortest])}
        bench = benches[kind, answer]
        if KINDS[kind].writes:
            row["rollout_tokens"] = statistics.mean(len(one.answer) for one in bench.trainer._rollouts.batches[0])
        rows.append(row)
    return rows


HEADER = (
    f"{'kind':<20}{'answer':>7}{'ms':>9}" + "".join(f"{part:>16}" for part in PARTS) + f"{'ratio':>8}{'growth':>8}"
)


def format_row(row: dict) -> str:
    """One line of the table: milliseconds, and the share of the step."""
    parts = [f"{1000 * row['seconds'][part]:,.1f} ({row['share'][part]:.0%})" for part in PARTS]
    head = f"{row['kind']:<20}{row['answer']:>7}{1000 * row['step_s']:>9,.1f}"
    return head + "".join(f"{part:>16}" for part in parts) + f"{row['ratio']:>8.2f}{row['growth']:>8.1f}"


def main(command_line: list[str] | None = None) -> None:
    """Prints the table; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[16, 64, 256], help="lengths of answers, in tokens")
    sizes = {"vocab": 4096, "batch": 2, "block_size": 32, "hidden": 128, "layers": 3, "heads": 4}
    for name, size in {**sizes, "teacher_hidden": 384, "teacher_layers": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--rounds", type=int, default=7, help="at least 7 for a median to trust")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args(command_line)
    disable_progress_bars()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        build_folder(Path(name), arguments)
        benches = {
            (kind, answer): Bench(KINDS[kind], answer, Path(name), arguments)
            for answer in arguments.answers
            for kind in KINDS
        }
        for bench in benches.values():
            bench.round()  # warm
        times = {case: [] for case in benches}
        for _ in range(arguments.rounds):
            for case, bench in benches.items():
                times[case].append(bench.round())
        rows = summarize(times, benches)
    print(HEADER)
    for row in rows:
        print(format_row(row))
    if arguments.output:
        given = {name: value for name, value in vars(arguments).items() if name != "output"}
        write_results(arguments.output, {"arguments": given, "environment": environment(), "rows": rows}, indent=1)


if __name__ == "__main__":
    main()
