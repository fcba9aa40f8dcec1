"""What one training step costs: the library's step beside the straightforward one, same loss and same gradients.

Method: a student of hidden size 256 and 6 layers, a teacher of hidden size 512 and 8 layers, random weights, random
tokens; the first part of each row is its prompt, the rest is trained on; every round draws new noise, the same on both
sides. A step is everything from the padded batch to the gradients: noise, layouts, teacher, student, loss, backward.
The straightforward side is built here from the plain functions of `tide_hf.losses`: both halves of [xt ; x0] whole,
logits of the full vocabulary at every position of them, one teacher pass per CompDemo view, the cross-entropy of every
noised position (row by row) under weights that are 0 where nothing is masked. `selected` is the same but for dropping
the unmasked logits before the cross-entropy, a good deal of the gain already.
First its loss and every gradient are compared with the library's; where float32 rounds the two too far apart, it is
run in float64 for that. Then all run in turn in one process; times are medians over `--rounds` rounds, and the ratio
is the median of the rounds' ratios. Peak memory is that of one step in a process of its own, above what was resident
with both networks loaded; gradients count, optimizer states do not exist.
On a CPU it is the resident set's, with an allocator that gives large blocks back at once (MALLOC_MMAP_THRESHOLD_).

`*_time_ratio` and `*_memory_ratio` are that side's cost over the library's.

Hardware: any CPU with 8 GB, for the sweep of the straightforward side 16. On 2 cores the default, both pipelines once,
takes seven minutes, that sweep forty, of the library alone (`--sides library`) fifteen. Nothing is downloaded.

    python recipes/benchmark_step.py
    python recipes/benchmark_step.py --pipelines shared --batch 4 --vocab 32000 --rounds 15
    python recipes/benchmark_step.py --sweep --sides plain library --output outputs/costs.json
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from benchmarking import peak_growth, seconds, write_results

from tide_hf import TIDEConfig, TIDEQwen3Config, TIDEQwen3ForBlockDiffusion, TIDETrainer, diffusion, losses
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.models.masked_diffusion import CLEAN_STREAM, NOISED_STREAM, block_visibility

PIPELINES = {"shared": "TIDAL + CompDemo", "cross": "Reverse CALM"}
SIDES = ("plain", "selected", "library")
BLOCK_SIZE = 32
# what is varied in a sweep, one at a time around the default case
SWEEP = {
    "vocab": (32_000,),
    "prompt": (0.25, 0.75),
    "batch": (1, 4),
    "length": (256, 1024),
    "teacher_dtype": ("bfloat16",),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: `length` tokens a row, `prompt` the share of them that is not trained on."""

    pipeline: str
    vocab: int = 151_936
    prompt: float = 0.5
    batch: int = 2
    length: int = 512
    teacher_dtype: str = "float32"
    hidden: int = 256
    layers: int = 6
    teacher_hidden: int = 512
    teacher_layers: int = 8

    def __str__(self):
        return (
            f"{self.pipeline}, {self.vocab:,} ids, {self.batch} x {self.length} tokens, {self.prompt:.0%} prompt, "
            f"teacher {self.teacher_dtype}"
        )


class Bench:
    """Both networks in a TIDETrainer, and one padded batch."""

    def __init__(self, case: Case):
        self.case = case
        self.output = tempfile.TemporaryDirectory()
        shared = case.pipeline == "shared"
        tokenizers = build_tokenizer(), build_tokenizer(() if shared else ("12",))
        torch.manual_seed(0)
        student = build_model(case, case.hidden, case.layers, "block")
        # LLaDA2 as published TIDE feeds it sees the noised row alone, from both sides
        teacher = build_model(case, case.teacher_hidden, case.teacher_layers, "block" if shared else "full")
        self.teacher = teacher.to(getattr(torch, case.teacher_dtype))
        self.trainer = TIDETrainer(
            model=student,
            teacher=self.teacher,
            args=TIDEConfig(
                output_dir=self.output.name,
                preset="tide-shared" if shared else "tide-cross",
                shared_vocab_size=case.vocab if shared else None,
                max_length=case.length,
                max_steps=10,
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=sorting_rows(2, seed=0),
            processing_class=tokenizers[0],
            teacher_processing_class=tokenizers[1],
        )
        self.student = self.trainer.model
        self.trainer.state.max_steps, self.trainer.state.global_step = 10, 3
        self.batch = token_rows(case)

    def step(self, side: str, index: int):
        """Loss of one side's step under the noise of a round; gradients in place."""
        uniforms = diffusion.row_uniforms(0, index, range(self.case.batch), self.case.length)
        if side == "library":
            batch = self.trainer.noising(self.batch, uniforms)
            loss = self.trainer.compute_loss(self.student, self.trainer._prepare_inputs(batch))
        else:
            loss = (shared_loss if self.case.pipeline == "shared" else cross_loss)(self, uniforms, side == "selected")
        loss.backward()
        return loss.detach()

    def gradients(self, side: str, index: int):
        """Loss and gradients of one step from scratch."""
        self.student.zero_grad()
        loss = self.step(side, index)
        return loss, [parameter.grad.clone() for parameter in self.student.parameters()]


def build_model(case: Case, hidden: int, layers: int, diffusion_type: str):
    """A Qwen3 diffusion LM with random weights, tied embeddings."""
    config = TIDEQwen3Config(
        vocab_size=case.vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
        max_position_embeddings=4 * case.length,
        tie_word_embeddings=True,
        block_size=BLOCK_SIZE,
        diffusion_type=diffusion_type,
        mask_token_id=case.vocab - 1,
    )
    return TIDEQwen3ForBlockDiffusion(config)


def token_rows(case: Case) -> dict:
    """A padded batch of random tokens; across tokenizers in chunks of two tokens on average."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.length)
    ids = torch.randint(case.vocab - 1, shape, generator=generator)
    trained = (torch.arange(case.length) >= round(case.prompt * case.length)).expand(shape)
    chunk_ids = teacher_chunk_ids = torch.arange(case.length).expand(shape)
    teacher_ids = ids
    if case.pipeline == "cross":
        teacher_ids = torch.randint(case.vocab - 1, shape, generator=generator)
        chunk_ids, teacher_chunk_ids = (torch.randint(2, shape, generator=generator).cumsum(1) for _ in range(2))
    return {
        "row_key": torch.arange(case.batch),
        "input_ids": ids,
        "labels": torch.where(trained, ids, -100),
        "chunk_ids": torch.where(trained, chunk_ids, -1),
        "attention_mask": torch.ones_like(ids),
        "teacher_input_ids": teacher_ids,
        "teacher_chunk_ids": torch.where(trained, teacher_chunk_ids, -1),
        "teacher_attention_mask": torch.ones_like(ids),
    }


# -- the straightforward step -----------------------------------------------------------------------------------------


def noised_logits(model, noised, clean, blocks: bool):
    """Full-vocabulary logits of the noised half; in blocks of [xt ; x0], or of xt alone."""
    length = clean.shape[1]
    position = torch.arange(length, device=clean.device).expand_as(clean)
    if not blocks:
        return model(noised, position_ids=position, use_cache=False).logits
    streams = [torch.full_like(clean, stream) for stream in (NOISED_STREAM, CLEAN_STREAM)]
    stream, block = torch.cat(streams, 1), (position // BLOCK_SIZE).repeat(1, 2)
    return model(
        torch.cat([noised, clean], 1),
        attention_mask=block_visibility(stream, block, stream, block),
        position_ids=position.repeat(1, 2),
        use_cache=False,
    ).logits[:, :length]


def cross_entropy(logits_BLV, ids, masked, weights_BL, num_items, select: bool):
    """The denoising loss at every noised position, or at the masked ones alone; and the logits of the masked ones."""
    if select:
        logits_NV = logits_BLV[masked]
        return losses.denoising_loss(logits_NV, ids[masked], weights_BL[masked], num_items=num_items), logits_NV
    weights = torch.where(masked, weights_BL, 0.0).flatten()
    return losses.denoising_loss(logits_BLV.flatten(0, 1), ids.flatten(), weights, num_items=num_items), logits_BLV[
        masked
    ]


def shared_loss(bench: Bench, uniforms, select: bool):
    """CE + TIDAL with CompDemo's two teacher passes."""
    device, objective = bench.student.device, bench.trainer.objective
    batch = {name: value.to(device) for name, value in bench.batch.items()}
    u_time, u_mask, u_demo = (draw.to(device) for draw in uniforms)
    ids, labels = batch["input_ids"], batch["labels"]
    t = diffusion.diffusion_time(u_time)
    masked = diffusion.mask_positions(u_mask, t, labels)
    part_a, part_b = diffusion.complementary_split(masked, u_demo)
    mask_id = bench.student.config.mask_token_id
    with torch.no_grad():
        views = [
            noised_logits(bench.teacher, torch.where(part, mask_id, ids), ids, True)[masked]
            for part in (part_b, part_a)
        ]
        teacher = torch.where(part_a[masked][:, None], views[1], views[0])
    t_BL = t[:, None].expand_as(masked)
    t_N = t_BL[masked]
    ce, student = cross_entropy(
        noised_logits(bench.student, torch.where(masked, mask_id, ids), ids, True),
        ids,
        masked,
        1 / t_BL,
        (labels != -100).sum(),
        select,
    )
    lambda_N = losses.tidal_lambda(bench.trainer._lambda_progress(), objective.lambda_max, t_N)
    distill_N = losses.token_divergence(
        losses.DIVERGENCES["forward_kl"](), student, teacher, temperature=objective.temperature, lambda_N=lambda_N
    )
    return ce + (losses.timestep_weight(t_N) * distill_N).sum() / masked.sum()


def likelihoods(logits_NV, ids, masked, chunk_ids, active):
    """Log-likelihoods of the active chunks."""
    flat = (chunk_ids + torch.arange(len(ids), device=ids.device)[:, None] * active.shape[1])[masked]
    return losses.chunk_log_likelihood(losses.true_token_log_probs(logits_NV, ids[masked]), flat, active.numel())[
        active.flatten()
    ]


def cross_loss(bench: Bench, uniforms, select: bool):
    """CE + Reverse CALM; the teacher sees its noised row alone."""
    device = bench.student.device
    batch = {name: value.to(device) for name, value in bench.batch.items()}
    u_time, u_mask, _ = (draw.to(device) for draw in uniforms)
    ids, labels, chunks = batch["input_ids"], batch["labels"], batch["chunk_ids"]
    teacher_ids, teacher_chunks = batch["teacher_input_ids"], batch["teacher_chunk_ids"]
    t, num_chunks = diffusion.diffusion_time(u_time), bench.case.length
    masked, hit = diffusion.complete_chunks(diffusion.mask_positions(u_mask, t, labels), chunks, labels, num_chunks)
    teacher_masked = diffusion.chunk_member(hit, teacher_chunks)
    active = hit & diffusion.masked_chunks(teacher_masked, teacher_chunks, num_chunks)
    with torch.no_grad():
        noised = torch.where(teacher_masked, bench.teacher.config.mask_token_id, teacher_ids)
        logits = noised_logits(bench.teacher, noised, teacher_ids, False)[teacher_masked]
        teacher = likelihoods(logits, teacher_ids, teacher_masked, teacher_chunks, active)
    sizes = torch.zeros_like(hit, dtype=torch.long).scatter_add_(1, chunks.clamp(min=0), (labels != -100).long())
    ce, logits = cross_entropy(
        noised_logits(bench.student, torch.where(masked, bench.student.config.mask_token_id, ids), ids, True),
        ids,
        masked,
        diffusion.chunk_loss_weight(t[:, None], sizes.gather(1, chunks.clamp(min=0)).clamp(min=1)),
        (labels != -100).sum(),
        select,
    )
    student, temperature = likelihoods(logits, ids, masked, chunks, active), bench.trainer.objective.temperature
    distill_C = losses.chunk_divergence(
        losses.DIVERGENCES["reverse_calm"](), student, teacher, temperature=temperature
    )
    return ce + distill_C.sum() / active.sum()


# -- measuring --------------------------------------------------------------------------------------------------------


def largest_difference(bench: Bench, exact: bool = False) -> float:
    """Of the losses, relative; and of every gradient's entries, in units of that gradient's largest one.

    Args:
        exact (`bool`): runs the straightforward step in float64; both networks are float32.
    """
    loss, gradients = bench.gradients("library", 0)
    if exact:
        bench.student.double()
        bench.teacher.double()
    expected, references = bench.gradients("plain", 0)
    if exact:
        bench.student.float()
        bench.teacher.float()
    differences = [
        float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
        for ours, theirs in zip([loss, *gradients], [expected, *references], strict=True)
    ]
    return max(differences)


def step_seconds(bench: Bench, side: str, index: int) -> float:
    """Wall time of one step with empty gradients."""
    bench.student.zero_grad()
    return seconds(lambda: bench.step(side, index))


def peak_bytes(case: Case, side: str) -> int:
    """Peak memory of one step above the weights, in this process, which has to be fresh."""
    bench = Bench(case)
    return peak_growth(lambda: bench.step(side, 0))


def measure(case: Case, sides: list[str], rounds: int, with_memory: bool) -> dict:
    """One row of the table."""
    bench, row = Bench(case), dataclasses.asdict(case)
    if "plain" in sides:
        row["largest_difference"] = difference = largest_difference(bench)
        # float32 sums in another order; a bfloat16 teacher rounds its logits, which depend on how many rows are run
        tolerance = 1e-5 if case.teacher_dtype == "float32" else 5e-2
        if difference > tolerance and case.teacher_dtype == "float32":
            # of the two roundings the library's alone is what counts
            row["largest_difference"] = difference = largest_difference(bench, exact=True)
        if difference > tolerance:
            sys.exit(f"{case}: the library's step differs from the plain one by {difference:.1e} of its scale.")
    else:
        bench.step("library", 0)  # warm
    times = [{side: step_seconds(bench, side, index) for side in sides} for index in range(rounds)]
    for side in sides:
        row[f"{side}_s"] = statistics.median(each[side] for each in times)
        row[f"{side}_time_ratio"] = statistics.median(each[side] / each["library"] for each in times)
    if with_memory:
        peaks = {side: subprocess_peak(case, side) for side in sides}
        for side in sides:
            row |= {f"{side}_bytes": peaks[side], f"{side}_memory_ratio": peaks[side] / peaks["library"]}
    return row


def subprocess_peak(case: Case, side: str) -> int:
    """[`peak_bytes`] in a process of its own."""
    command = [sys.executable, __file__, "--peak_of", side, "--case", json.dumps(dataclasses.asdict(case))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1])


COLUMNS = (
    *[("pipeline", 8, ""), ("vocab", 8, ","), ("batch", 6, ""), ("length", 7, ""), ("prompt", 7, ".0%")],
    *[("teacher_dtype", 14, ""), ("library_s", 10, ".2f"), ("plain_time_ratio", 17, ".1f")],
    *[("selected_time_ratio", 20, ".1f"), ("library_MiB", 12, ",.0f"), ("plain_memory_ratio", 19, ".1f")],
    *[("selected_memory_ratio", 22, ".1f"), ("largest_difference", 19, ".0e")],
)


def format_row(row: dict) -> str:
    """One line of the table; what was not measured stays empty."""
    values = row | ({"library_MiB": row["library_bytes"] / 2**20} if "library_bytes" in row else {})
    return "".join(
        f"{values[name]:>{width}{form}}" if name in values else " " * width for name, width, form in COLUMNS
    )


HEADER = "".join(f"{name:>{width}}" for name, width, _ in COLUMNS)


def main(command_line: list[str] | None = None) -> None:
    """Prints the table; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", nargs="+", default=list(PIPELINES), choices=PIPELINES)
    for field in dataclasses.fields(Case)[1:]:
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    parser.add_argument("--sweep", action="store_true", help="also every other value of " + ", ".join(SWEEP))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="library alone: its costs")
    parser.add_argument("--rounds", type=int, default=7, help="at least 7 for a median to trust")
    parser.add_argument("--no_memory", action="store_true", help="leave out the processes that measure the peaks")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    parser.add_argument("--peak_of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(command_line)
    if arguments.peak_of:
        print(peak_bytes(Case(**arguments.case), arguments.peak_of))
        return
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Case)[1:]}
    rows = []
    for pipeline in arguments.pipelines:
        base = Case(pipeline, **given)
        varied = [{name: value} for name, values in SWEEP.items() for value in values] if arguments.sweep else []
        print(f"{pipeline}: {PIPELINES[pipeline]}\n{HEADER}", flush=True)
        for change in ({}, *varied):
            case = dataclasses.replace(base, **change)
            rows.append(measure(case, arguments.sides, arguments.rounds, not arguments.no_memory))
            print(format_row(rows[-1]), flush=True)
    if arguments.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        write_results(arguments.output, {"versions": versions, "rows": rows}, indent=1)


if __name__ == "__main__":
    main()
