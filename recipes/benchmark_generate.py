"""How fast a student generates: the library's `generate` beside a plain block sampler, same tokens out.

Method: a student with random weights (Qwen3, hidden 256, 6 layers, vocabulary 151,936, blocks of 32) answers random
prompts greedily. The plain sampler is the field's usual one, written from its description: at each block it runs
prompt and finished blocks into a new cache; at each step it runs the whole block over that cache, with the head and a
softmax over the vocabulary at every position of the block. It is spared what costs nothing to spare: no head over the
prefix, no copy of the cache per step (the block is cropped off again), no noise at temperature 0. Both must give the
same tokens, else the benchmark stops with exit status 1. Then they are timed in turns in one process; each time is the
median over `--rounds` rounds, each ratio the median of the rounds' ratios.

Settings: one token per step; four tokens per step; a confidence threshold, which a quarter of each row's first block
reaches in the first step. `ratio` is the plain sampler's time over the library's at equal steps, `vs 1/step` the plain
sampler's at one token per step over the library's. `--no_cache` adds a sampler without any cache.

Memory is what torch allocates during a run, from its profiler: the peak; and by how much the last of four blocks holds
more at any of its steps than the block before it did at the same step, per step.

`--output` writes JSON: `student`, `arguments`, `threads`, `torch`; `rows`, one per prompt length, batch and setting
(`prompt`, `batch`, `setting`, `forward_passes`, `plain_seconds`, `library_seconds`, `ratio`, `ratio_to_one_per_step`);
`memory` of `library` and `plain` for the last prompt length and batch (`peak_bytes`, `growth_per_step_bytes`).

Hardware: any CPU; eighteen minutes on 2 cores, seconds with `--quick`. Nothing is downloaded.

    python recipes/benchmark_generate.py --output outputs/benchmark_generate.json
"""

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import torch
from benchmarking import seconds, write_results

STUDENT = {
    "vocab_size": 151_936,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,  # wide enough that positions differ in what they predict and how surely
    "block_size": 32,
}
QUICK = {"vocab_size": 4_096, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
ONE, FOUR, THRESHOLD = "one token per step", "four tokens per step", "threshold"
NUM_BLOCKS = 4  # of the run whose memory is measured
COLUMNS = ("prompt", "batch", "setting", "forwards", "plain s", "library s", "ratio", "vs 1/step")


def build_student(**changes):
    """A student with random weights; [MASK] is its vocabulary's last id, and no token ends an answer."""
    from tide_hf.models import TIDEQwen3Config, TIDEQwen3ForBlockDiffusion

    values = STUDENT | changes
    torch.manual_seed(0)
    ids = {"mask_token_id": values["vocab_size"] - 1, "eos_token_id": None, "pad_token_id": 0}
    return TIDEQwen3ForBlockDiffusion(TIDEQwen3Config(**values, **ids)).eval()


def block_causal(length: int, size: int) -> torch.Tensor:
    """Each position sees its own block and those before it, `(1, 1, length, length)`."""
    block = torch.arange(length) // size
    return (block[:, None] >= block[None, :])[None, None]


@torch.no_grad()
def plain_sampler(model, ids, num_new, steps_per_block=None, confidence_threshold=None, cached=True, seen=None):
    """The plain sampler; prompts must be whole blocks of one length, and steps must divide a block evenly.

    Args:
        ids (`torch.LongTensor` of shape `(B, P)`): prompts.
        cached (`bool`): False runs prompt and finished blocks at each step.
        seen (`list`, *optional*): gets the probability `(B, K)` of each position's best token, per step.

    Returns:
        `torch.LongTensor` of shape `(B, P + num_new)`.
    """
    from tide_hf.models.modeling_tide import CACHE_NAME

    size, mask_id = model.config.block_size, model.config.mask_token_id
    share = size // (steps_per_block or size)
    for _ in range(0, num_new, size):
        start, end = ids.shape[1], ids.shape[1] + size
        visible, position = block_causal(end, size), torch.arange(end)[None]
        cache = None
        if cached:
            prefix = {"attention_mask": visible[:, :, :start, :start], "position_ids": position[:, :start]}
            cache = model(ids, **prefix, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        block = torch.full((len(ids), size), mask_id)
        while (block == mask_id).any():
            first = start if cached else 0
            logits = model(
                block if cached else torch.cat([ids, block], 1),
                attention_mask=visible[:, :, first:],
                position_ids=position[:, first:],
                cache=cache,
                use_cache=cached,
                logits_to_keep=size,
            ).logits
            if cached:
                cache.crop(-size)
            logits[..., mask_id] = -torch.inf
            probability, token = logits.softmax(-1).max(-1)
            if seen is not None:
                seen.append(probability)
            masked = block == mask_id
            confidence = torch.where(masked, probability, -1.0)
            chosen = torch.zeros_like(block, dtype=torch.bool)
            chosen.scatter_(1, confidence.topk(share if confidence_threshold is None else 1).indices, True)
            if confidence_threshold is not None:
                chosen |= confidence >= confidence_threshold
            block = torch.where(chosen & masked, token, block)
        ids = torch.cat([ids, block], 1)
    return ids


def first_quarter(model, ids) -> float:
    """A threshold that a quarter of each row's first block reaches in the first step, no row's next one in one row."""
    seen: list[torch.Tensor] = []
    plain_sampler(model, ids, model.config.block_size, steps_per_block=1, seen=seen)
    ranked, quarter = seen[0].sort(descending=True).values, model.config.block_size // 4
    least_sure = ranked[ranked[:, quarter - 1].argmin()]
    return float((least_sure[quarter - 1] + least_sure[quarter]) / 2)


def require_equal(expected: torch.Tensor, got: torch.Tensor, name: str) -> None:
    """Stops a comparison of two samplers that do different work."""
    if not torch.equal(expected, got):
        row, column = (expected != got).nonzero()[0].tolist()
        raise SystemExit(
            f"{name}: the library's tokens differ from the plain sampler's, first in row {row} at column {column} "
            f"({got[row, column]} instead of {expected[row, column]}); times of different answers say nothing."
        )


def compare(model, ids, num_new: int, rounds: int, no_cache: bool) -> list[dict]:
    """One row of results per setting for these prompts: tokens compared once, then `rounds` rounds in turns."""
    settings = {
        ONE: {},
        FOUR: {"steps_per_block": model.config.block_size // 4},
        THRESHOLD: {"confidence_threshold": first_quarter(model, ids)},
    }
    runs, passes = {}, {}
    for name, setting in settings.items():
        out = model.generate(ids, max_new_tokens=num_new, return_dict_in_generate=True, **setting)
        require_equal(plain_sampler(model, ids, num_new, **setting), out.sequences, f"{tuple(ids.shape)}, {name}")
        passes[name] = out.forward_passes
        runs["library", name] = lambda setting=setting: model.generate(ids, max_new_tokens=num_new, **setting)
        runs["plain", name] = lambda setting=setting: plain_sampler(model, ids, num_new, **setting)
    if no_cache:
        runs["no cache", ONE] = lambda: plain_sampler(model, ids, num_new, cached=False)
    times = [{key: seconds(run) for key, run in runs.items()} for _ in range(rounds)]

    def median(key, over=None):
        return statistics.median(time[key] / (time[over] if over else 1) for time in times)

    rows = []
    for name in settings:
        ours, plain = ("library", name), ("plain", name)
        row = {"prompt": ids.shape[1], "batch": len(ids), "setting": name, "forward_passes": passes[name]}
        row |= {"plain_seconds": median(plain), "library_seconds": median(ours), "ratio": median(plain, ours)}
        row["ratio_to_one_per_step"] = median(("plain", ONE), ours)
        if no_cache:
            row["ratio_to_no_cache"] = median(("no cache", ONE), ours)
        rows.append(row)
    return rows


def memory(model, run) -> dict[str, float]:
    """Bytes that torch allocated in a run and holds: the peak, and growth per step over the last of the blocks."""
    mark = "student forward"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        body = model.model.forward

        def marked(*args, **kwargs):
            with torch.profiler.record_function(mark):
                return body(*args, **kwargs)

        model.model.forward = marked
        try:
            run()
        finally:
            model.model.forward = body
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if "ts" in event]
    live, peak, at_step = 0, 0, []
    for event in sorted(events, key=lambda event: event["ts"]):
        if event["name"] == "[memory]":
            live += event["args"]["Bytes"]
            peak = max(peak, live)
        elif event["name"] == mark:
            at_step.append(live)
    steps = len(at_step) // NUM_BLOCKS
    growth = max(later - earlier for earlier, later in zip(at_step[-2 * steps :], at_step[-steps:], strict=False))
    return {"peak_bytes": peak, "growth_per_step_bytes": growth / steps}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512], help="prompt tokens, whole blocks of 32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="rows")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens to generate per row, whole blocks of 32")
    parser.add_argument("--rounds", type=int, default=7, help="at least 7 for a median to trust")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument("--no_cache", action="store_true", help="also time a sampler without any cache (slow)")
    parser.add_argument("--quick", action="store_true", help="a small student: a smoke test, not a measurement")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    size = STUDENT["block_size"]
    if any(length % size for length in (*arguments.prompts, arguments.new_tokens)):
        parser.error(f"--prompts and --new_tokens must be multiples of the block size, {size}.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = build_student(**QUICK if arguments.quick else {})
    print(f"{torch.get_num_threads()} thread(s), {arguments.new_tokens} new tokens, medians of {arguments.rounds}")
    print("{:>6} {:>5} {:<21} {:>8} {:>8} {:>9} {:>7} {:>9}".format(*COLUMNS))
    rows = []
    for length, batch in itertools.product(arguments.prompts, arguments.batches):
        generator = torch.Generator().manual_seed(length + batch)
        ids = torch.randint(0, model.config.vocab_size - 1, (batch, length), generator=generator)
        found = compare(model, ids, arguments.new_tokens, arguments.rounds, arguments.no_cache)
        print("\n".join(map(format_row, found)), flush=True)
        rows += found
    num_new, steps = NUM_BLOCKS * size, {"steps_per_block": size // 4}
    of_run = {
        "library": memory(model, lambda: model.generate(ids, max_new_tokens=num_new, **steps)),
        "plain": memory(model, lambda: plain_sampler(model, ids, num_new, **steps)),
    }
    for name, found in of_run.items():
        print(
            f"memory of the {name} sampler, prompt {ids.shape[1]}, batch {len(ids)}: peak "
            f"{found['peak_bytes'] / 2**20:,.1f} MiB above the weights, growth per step "
            f"{found['growth_per_step_bytes'] / 2**10:,.1f} KiB"
        )
    if arguments.output is not None:
        report = {"student": model.config.to_dict(), "arguments": {**vars(arguments), "output": None}}
        report |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows, "memory": of_run}
        write_results(arguments.output, report)


def format_row(row: dict) -> str:
    """A result as a line of the table."""
    line = "{prompt:>6} {batch:>5} {setting:<21} {forward_passes:>8} {plain_seconds:>8.2f} {library_seconds:>9.2f} "
    line = (line + "{ratio:>6.2f}× {ratio_to_one_per_step:>8.2f}×").format(**row)
    return line + (f"  {row['ratio_to_no_cache']:.2f}× vs no cache" if "ratio_to_no_cache" in row else "")


if __name__ == "__main__":
    main()
