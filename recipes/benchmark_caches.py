"""What an approximate cache costs a full-sequence student in answers, and what it saves (Fast-dLLM 2505.22618).

Method: small full-sequence students learn to sort six digits, three in 300 steps, one in 1,000, and answer prompts
that they were not trained on: without a cache, with the prefix cache and with the dual cache, in blocks of several
sizes, one token per pass and above a confidence threshold. `match` is the share of right answers; `agreement` is the
share of tokens, and `same` the share of whole answers, that equal those without a cache; `columns` is what the passes
ran per row, and `saved` the columns without a cache over them. The same is counted for a larger student with random
weights (Qwen3, hidden 256, 6 layers, vocabulary 151,936), one and four tokens per pass. This one is also timed, with
the three caches in turns in one process: each time is the median over `--rounds` rounds, each ratio the median of the
rounds' ratios.

`--output` writes JSON: `arguments`, `threads`, `torch`; `rows`, one per student, block size, setting and cache
(`student`, `seed`, `new_tokens`, `block_size`, `setting`, `cache`, `exact_match` (null for random weights),
`agreement`, `same_answers`, `forward_passes`, `columns`, `saved`); `times`, one per cache (`prompt`, `new_tokens`,
`block_size`, `steps_per_block`, `cache`, `seconds`, `ratio`: the time without a cache over this one's).

Hardware: any CPU; about fifteen minutes on one core, seconds with `--quick`. Nothing is downloaded.

    python recipes/benchmark_caches.py --output outputs/benchmark_caches.json
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from benchmark_generate import QUICK, build_student
from benchmarking import seconds, write_results
from embedded.networks import Network, shape_of, train, training_arguments

CACHES = (None, "prefix", "dual")
# of a block size
ONE_TOKEN = {"one token per pass": lambda size: {}}
THRESHOLD = {"threshold 0.9": lambda size: {"confidence_threshold": 0.9}}
FOUR_TOKENS = {"four tokens per pass": lambda size: {"steps_per_block": size // 4}}
SORTING = Network(64, layers=2, heads=4, steps=0)
TRAININGS = ((300, 0), (300, 1), (300, 2), (1000, 0))  # steps and seed
SORTING_BLOCKS, RANDOM_BLOCKS = (2, 4, 7), (8, 16, 32)
BLOCK_SIZE, STEPS_PER_BLOCK = 32, 8  # of the runs that are timed
HEADER = ("student", "seed", "block", "setting", "cache", "match", "agreement", "same", "passes", "columns", "saved")
LINE = "{:<10} {:>4} {:>5} {:<20} {:<6} {:>7} {:>9} {:>7} {:>6} {:>8} {:>6}"


def sorting_student(network: Network, seed: int):
    """A full-sequence student trained on clean rows of the sorting task, and its tokenizer."""
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    from tide_hf import TIDETrainer
    from tide_hf.demo.sorting import build_tokenizer, sorting_rows
    from tide_hf.models import TIDEQwen3Config, TIDEQwen3ForBlockDiffusion

    disable_progress_bars()
    disable_progress_bar()
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    shape = shape_of(network, tokenizer) | {"mask_token_id": tokenizer.mask_token_id, "diffusion_type": "full"}
    model = TIDEQwen3ForBlockDiffusion(TIDEQwen3Config(**shape))
    rows = sorting_rows(network.steps * network.batch_size, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(network, folder, seed, preset="ce", max_length=16, lr_scheduler_type="cosine")
        train(TIDETrainer, model, args, rows, tokenizer)
    return model.eval(), tokenizer


def run(model, ids, mask=None, **settings) -> tuple[torch.Tensor, int, int]:
    """Answer tokens `(B, A)`, network calls, and columns that these ran per row."""
    columns, run_decoder = [], model.run_decoder
    model.run_decoder = lambda **given: columns.append(given["input_ids"].shape[1]) or run_decoder(**given)
    try:
        out = model.generate(ids, attention_mask=mask, **settings)
    finally:
        del model.run_decoder
    return out[:, ids.shape[1] :], len(columns), sum(columns)


def compare(names: dict, model, ids, mask, num_new: int, blocks, settings_of_size: dict, right=None) -> list[dict]:
    """A row of results per block size, setting and cache; `right` are the reference answers `(B, A)`."""
    rows = []
    for size in blocks:
        for setting, of_size in settings_of_size.items():
            settings = {"max_new_tokens": num_new, "block_size": size, "eos_token_id": None, **of_size(size)}
            exact, _, all_columns = run(model, ids, mask, **settings)
            for cache in CACHES:
                answer, passes, columns = run(model, ids, mask, approximate_cache=cache, **settings)
                row = {**names, "new_tokens": num_new, "block_size": size, "setting": setting, "cache": cache}
                row["exact_match"] = None if right is None else (answer == right).all(1).float().mean().item()
                row["agreement"] = (answer == exact).float().mean().item()
                row["same_answers"] = (answer == exact).all(1).float().mean().item()
                rows.append(row | {"forward_passes": passes, "columns": columns, "saved": all_columns / columns})
                print(format_row(rows[-1]), flush=True)
    return rows


def on_sorting(network: Network, seed: int, num_prompts: int) -> list[dict]:
    """[`compare`] on held-out prompts of the sorting task."""
    from tide_hf.demo.sorting import held_out_rows

    model, tokenizer = sorting_student(network, seed)
    messages = held_out_rows(num_prompts)["messages"]
    prompts = [turns[:-1] for turns in messages]
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    answers = [turns[-1]["content"] + tokenizer.eos_token for turns in messages]
    right = tokenizer(answers, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    names = {"student": f"{network.steps} steps", "seed": seed}
    return compare(names, model, ids, mask, right.shape[1], SORTING_BLOCKS, ONE_TOKEN | THRESHOLD, right)


def times(model, ids, num_new: int, rounds: int) -> list[dict]:
    """A row per cache: the median time of `rounds` rounds in turns, and its ratio to the time without a cache."""
    settings = {"block_size": BLOCK_SIZE, "steps_per_block": STEPS_PER_BLOCK}
    found = [
        {
            cache: seconds(
                lambda cache=cache: model.generate(ids, max_new_tokens=num_new, approximate_cache=cache, **settings)
            )
            for cache in CACHES
        }
        for _ in range(rounds)
    ]
    return [
        {
            "prompt": ids.shape[1],
            "new_tokens": num_new,
            **settings,
            "cache": cache,
            "seconds": statistics.median(of_round[cache] for of_round in found),
            "ratio": statistics.median(of_round[None] / of_round[cache] for of_round in found),
        }
        for cache in CACHES
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=400, help="held-out prompts of the sorting task")
    parser.add_argument("--prompt_lengths", type=int, nargs="+", default=[64, 512], help="tokens; runs that are timed")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens to generate; runs that are timed")
    parser.add_argument("--rounds", type=int, default=7, help="at least 7 for a median to trust")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument("--quick", action="store_true", help="small students: a smoke test, not a measurement")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(LINE.format(*HEADER))
    rows = []
    for steps, seed in ((2, 0),) if arguments.quick else TRAININGS:
        rows += on_sorting(replace(SORTING, steps=steps), seed, arguments.prompts)
    model = build_student(**QUICK if arguments.quick else {}, diffusion_type="full")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size - 1, (4, 32), generator=generator)
    rows += compare({"student": "random", "seed": 0}, model, ids, None, 32, RANDOM_BLOCKS, ONE_TOKEN | FOUR_TOKENS)
    timed = []
    for length in arguments.prompt_lengths:
        ids = torch.randint(0, model.config.vocab_size - 1, (1, length), generator=generator)
        timed += times(model, ids, arguments.new_tokens, arguments.rounds)
    for row in timed:
        line = "prompt {prompt}, {new_tokens} new tokens, cache {cache}: {seconds:.2f} s, {ratio:.2f}× as fast as none"
        print(line.format(**row))
    if arguments.output is not None:
        report = {"arguments": {**vars(arguments), "output": None}, "threads": torch.get_num_threads()}
        write_results(arguments.output, report | {"torch": torch.__version__, "rows": rows, "times": timed})


def format_row(row: dict) -> str:
    """A result as a line of the table."""
    match = "–" if row["exact_match"] is None else f"{row['exact_match']:.1%}"
    shares = (match, f"{row['agreement']:.1%}", f"{row['same_answers']:.1%}")
    names = (row["student"], row["seed"], row["block_size"], row["setting"], row["cache"] or "none")
    return LINE.format(*names, *shares, row["forward_passes"], row["columns"], f"{row['saved']:.2f}×")


if __name__ == "__main__":
    main()
