"""The embedded start from an autoregressive model: trained here, converted, taught to denoise; nothing downloaded."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from tide_hf.demo.sorting import build_tokenizer, held_out_rows, sorting_rows
from tide_hf.evaluation import exact_match
from tide_hf.models import convert_to_diffusion
from tide_hf.training.trainer import TIDETrainer

from .autoregressive import answer_left_to_right, build_autoregressive, train_autoregressive
from .command import refuse_other_flags
from .decoding import decode_and_match
from .harness import Job, Result, run_jobs
from .networks import Network, train, training_arguments
from .report import cell, format_table, summarize

AUTOREGRESSIVE = Network(hidden=64, layers=2, heads=4, steps=400)
DENOISING_STEPS, NUM_HELD_OUT = 100, 400


def run_from_autoregressive(
    output_dir: str | Path,
    network: Network = AUTOREGRESSIVE,
    denoising_steps: int = DENOISING_STEPS,
    num_held_out: int = NUM_HELD_OUT,
    diffusion_type: str = "block",
    seed: int = 0,
) -> list[Result]:
    """Sorting six digits: an autoregressive model, the same converted, and converted and trained to denoise.

    A fourth network takes the same denoising steps from random weights, which shows what the start is worth.

    Args:
        output_dir (`str` or `Path`): the trained student goes here, the other two trained networks into the folders
            `autoregressive` and `from_random_weights`.
        network ([`Network`]): size, and the autoregressive training.
        denoising_steps (`int`): optimizer steps of the denoising.
        num_held_out (`int`): prompts of the evaluation.
        diffusion_type (`str`): `"block"` or `"full"`.
        seed (`int`): of weights, rows and noise.

    Returns:
        `list[Result]` of the four networks, with the metric `exact_match`: a fraction of the held-out prompts.
    """
    output_dir, tokenizer, held_out = Path(output_dir), build_tokenizer(), held_out_rows(num_held_out)
    rows = sorting_rows(max(network.steps, denoising_steps) * network.batch_size, seed=seed)
    ar_model = train_autoregressive(network, output_dir / "autoregressive", rows, tokenizer, seed, max_length=16).model
    convert = partial(convert_to_diffusion, tokenizer=tokenizer, diffusion_type=diffusion_type, block_size=4)
    shares = {
        "autoregressive": exact_match(
            answer_left_to_right(ar_model, tokenizer, held_out), [row[-1]["content"] for row in held_out["messages"]]
        ),
        "converted": decode_and_match(convert(ar_model)[0], tokenizer, held_out)[0],
    }
    for name, start, folder in (
        ("from random weights", build_autoregressive(network, tokenizer, seed), output_dir / "from_random_weights"),
        ("converted and trained", ar_model, output_dir),
    ):
        training = replace(network, steps=denoising_steps)
        args = training_arguments(training, folder, seed, preset="ce", max_length=16)
        trainer = train(TIDETrainer, convert(start)[0], args, rows, tokenizer)
        shares[name] = decode_and_match(trainer.model, tokenizer, held_out)[0]
    return [Result("sorting", name, seed, {"exact_match": share}) for name, share in shares.items()]


def show_from_autoregressive(arguments) -> None:
    """Runs [`run_from_autoregressive`] and prints what it measured.

    Args:
        arguments ([`~tide_hf.commands.distill.Arguments`]): of the recipe.
    """
    refuse_other_flags(arguments, {"output_dir", "preset"})
    started, output_dir = time.time(), arguments.training.output_dir
    job = Job(partial(run_from_autoregressive, output_dir), AUTOREGRESSIVE.steps + 2 * DENOISING_STEPS)
    results = run_jobs("autoregressive, then denoising", [job])
    columns = {"exact match": lambda entry: cell(entry["exact_match"], "{:.1f}", 100, " %")}
    print(f"\n{NUM_HELD_OUT} held-out prompts (sort six digits), one seed:\n")
    print(format_table(summarize(results), columns))
    print(f"\n{time.time() - started:.0f} s in all. The student is in {output_dir}.")
