"""How fast rows are prepared across tokenizers: the alignment alone, and the whole beside the two tokenisations.

Method: conversations whose answers are cut from the sources of the running Python's standard library, rendered with
two chat templates. First it is checked that prepared rows hold the tokenizers' own tokens and that the two sides of
each chunk stand for the same characters, else the benchmark stops with exit status 1. Then each number is the median
over `--repeats` rounds; within a round all are measured side by side, so that other load on the machine meets all of
it. One core: no worker processes, no tokenizer threads. `cost` is the time of the whole preparation over that of the
two tokenisations alone. Growth with length compares the longest rows with the shortest, per row.

Memory per worker: fresh processes prepare the same rows over and over, streaming and by `Dataset.map`, some rows and
four times as many; each says by how much its peak of resident memory exceeds the peak before the first row. `map`
includes the pages of the file it writes.

`--output` writes JSON: `arguments`; `rows`, one per length (`tokens_per_row`, `alignment`, `tokenisations`,
`preparation`, all three in student tokens/s, `cost`); `growth` (`length`, `alignment`, `preparation`, each over the
shortest rows'); `memory`, one per way (`way`, `rows`, `peak_bytes`, `rows_4x_peak_bytes`).

Hardware: any CPU; about a minute. Nothing is downloaded: without names two byte-level BPE tokenizers of two sizes
are trained on the same sources.

    python recipes/benchmark_prepare.py
    python recipes/benchmark_prepare.py --tokenizer Qwen/Qwen3-0.6B --teacher_tokenizer inclusionAI/LLaDA2.0-mini
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarking import peak_resident, seconds, write_results

os.environ["TOKENIZERS_PARALLELISM"] = "false"

TEMPLATES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% for message in messages %}<role>{{ message.role | upper }}</role>{{ message.content }}<|role_end|>"
    "{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}",
)
CHARACTERS = (1_400, 5_600, 22_400)  # per answer; the first is about 350 tokens
CHARACTERS_PER_ROUND = 280_000
MEMORY_ROWS = 400
WAYS = ("streaming", "map")


def sources() -> str:
    """Some two million characters of Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))[:80]]
    return "\n".join(texts)


def load_tokenizer(name: str | None, template: str, text: str, vocab_size: int):
    """A published tokenizer by name or path, or a byte-level BPE trained here; always with the given template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(text.splitlines(keepends=True), trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


def seconds_of_all(function, items) -> float:
    """Wall time of one pass over the items."""

    def one_pass():
        for item in items:
            function(item)

    return seconds(one_pass)


def conversation(text: str) -> list[dict]:
    """A question and the text as its answer."""
    return [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}]


def tokens_of_parts(tokenizer, text: str, start: int) -> dict[str, list]:
    """Ids and offsets of a text whose answer, from `start` on, is tokenised separately from the prompt."""
    whole = {"input_ids": [], "offset_mapping": []}
    for first, part in ((0, text[:start]), (start, text[start:])):
        tokens = tokenizer(part, return_offsets_mapping=True, add_special_tokens=False)
        whole["input_ids"] += tokens["input_ids"]
        whole["offset_mapping"] += [(first + begin, first + end) for begin, end in tokens["offset_mapping"]]
    return whole


def require_correct(preparation, conversations: list) -> None:
    """Stops a measurement of wrong rows: other tokens than the tokenizers', or chunks of different characters."""
    from tide_hf.alignment import render_chat

    for messages in conversations:
        columns, _ = preparation.prepare({"messages": messages})
        sides = []
        for who, tokenizer in (("", preparation.tokenizer), ("teacher_", preparation.teacher_tokenizer)):
            text, (answer,) = render_chat(tokenizer, messages)
            expected = tokens_of_parts(tokenizer, text[: answer.end], answer.start)
            ids = columns[f"{who}input_ids"]
            same = min(len(ids), len(expected["input_ids"]))
            places: dict[int, list[int]] = {}
            chunk_ids = columns[f"{who}chunk_ids"][:same]
            for number, (start, end) in zip(chunk_ids, expected["offset_mapping"], strict=False):
                places.setdefault(number, [start, end])[1] = end
            if ids[:same] != expected["input_ids"][:same]:
                raise SystemExit(f"{who}input_ids of a prepared row are not what its tokenizer makes of the text.")
            places.pop(-1, None)
            sides.append({number: text[start:end] for number, (start, end) in places.items()})
        if not sides[0] or sides[0] != sides[1]:
            raise SystemExit(
                f"Expected equal characters in the chunks of both sides, got {len(sides[0])} and {len(sides[1])} "
                "chunks, of which some differ or none is there."
            )


def measure(preparation, conversations: list, repeats: int) -> dict[str, float]:
    """One of the JSON's `rows`: medians over the rounds."""
    from tide_hf.alignment import TokenBytes, align_chunks, answers_in_bytes, render_chat

    sides = []
    for tokenizer in (preparation.tokenizer, preparation.teacher_tokenizer):
        table = TokenBytes.of(tokenizer)
        rendered = [render_chat(tokenizer, messages) for messages in conversations]
        located = [table.locate(text, tokenizer(text).encodings[0]) for text, _ in rendered]
        answers = [answers_in_bytes(found, place) for (_, found), (_, place) in zip(rendered, located, strict=True)]
        sides.append((tokenizer, rendered, list(zip((tokens for tokens, _ in located), answers, strict=True))))
    (student, rendered, ours), (teacher, teacher_rendered, theirs) = sides
    texts = [(text, other) for (text, _), (other, _) in zip(rendered, teacher_rendered, strict=True)]
    num_tokens = sum(len(located.nbytes) for located, _ in ours)
    rounds = []
    for _ in range(repeats):
        alignment = seconds_of_all(lambda pair: align_chunks(*pair[0], *pair[1]), list(zip(ours, theirs, strict=True)))
        tokenisation = seconds_of_all(lambda pair: (student(pair[0]), teacher(pair[1])), texts)
        whole = seconds_of_all(lambda messages: preparation({"messages": messages}), conversations)
        rounds.append((num_tokens / alignment, num_tokens / tokenisation, num_tokens / whole, whole / tokenisation))
    values = [statistics.median(column) for column in zip(*rounds, strict=True)]
    names = ("alignment", "tokenisations", "preparation", "cost")
    return {"tokens_per_row": num_tokens / len(conversations), **dict(zip(names, values, strict=True))}


def build_preparation(tokenizer, teacher_tokenizer):
    """The preparation across two tokenizers, without truncation."""
    from tide_hf.data import RowPreparation

    return RowPreparation(
        tokenizer,
        teacher_tokenizer,
        max_length=1 << 20,
        teacher_max_length=1 << 20,
        block_size=32,
        alignment="chunk",
    )


def peak_memory(folder: str, way: str, texts: list[str], num_rows: int) -> int:
    """Bytes by which a process's peak of resident memory grows while it prepares `num_rows` rows."""
    from datasets import Dataset, IterableDataset, disable_progress_bars
    from transformers import AutoTokenizer

    from tide_hf.data import prepare_dataset

    def rows():
        for _, text in zip(range(num_rows), itertools.cycle(texts), strict=False):
            yield {"messages": conversation(text)}

    disable_progress_bars()
    preparation = build_preparation(*(AutoTokenizer.from_pretrained(f"{folder}/{who}") for who in ("one", "two")))
    cache = f"{folder}/{way}{num_rows}"
    dataset = (
        IterableDataset.from_generator(rows) if way == "streaming" else Dataset.from_generator(rows, cache_dir=cache)
    )
    before = peak_resident()
    prepared, _ = prepare_dataset(dataset, preparation)
    for _ in prepared if way == "streaming" else ():
        pass
    return peak_resident() - before


def measure_memory(preparation, texts: list[str], num_rows: int) -> list[dict]:
    """Peaks of both ways of preparing, each in a process of its own, for `num_rows` rows and four times as many."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        preparation.tokenizer.save_pretrained(f"{folder}/one")
        preparation.teacher_tokenizer.save_pretrained(f"{folder}/two")
        for way in WAYS:
            peaks = []
            for rows in (num_rows, 4 * num_rows):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    peaks.append(process.submit(peak_memory, folder, way, texts, rows).result())
            found.append({"way": way, "rows": num_rows, "peak_bytes": peaks[0], "rows_4x_peak_bytes": peaks[1]})
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="student's tokenizer, a name or a folder; default: trained here")
    parser.add_argument("--teacher_tokenizer", help="teacher's tokenizer, a name or a folder; default: trained here")
    parser.add_argument("--repeats", type=int, default=7, help="rounds per length, at least 7 for a median to trust")
    parser.add_argument("--characters", type=int, nargs="+", default=CHARACTERS, help="lengths of the answers")
    parser.add_argument("--per_round", type=int, default=CHARACTERS_PER_ROUND, help="characters of all answers")
    parser.add_argument("--memory_rows", type=int, default=MEMORY_ROWS, help="rows whose peak of memory is measured")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    text = sources()
    preparation = build_preparation(
        load_tokenizer(arguments.tokenizer, TEMPLATES[0], text, 16_000),
        load_tokenizer(arguments.teacher_tokenizer, TEMPLATES[1], text, 6_000),
    )
    print("student tokens/s on one core, medians", f"of {arguments.repeats} rounds")
    print(f"{'tokens/row':>10} {'alignment':>12} {'2 tokenisations':>16} {'preparation':>12} {'cost':>7}")
    rows = []
    for size in arguments.characters:
        starts = [index * size for index in range(arguments.per_round // size)]
        conversations = [conversation(text[start : start + size]) for start in starts]
        require_correct(preparation, conversations)
        row = measure(preparation, conversations, arguments.repeats)
        line = (
            "{tokens_per_row:>10,.0f} {alignment:>12,.0f} {tokenisations:>16,.0f} {preparation:>12,.0f} {cost:>6.2f}×"
        )
        print(line.format(**row), flush=True)
        rows.append(row)
    length = rows[-1]["tokens_per_row"] / rows[0]["tokens_per_row"]
    growth = {"length": length}
    growth |= {name: length * rows[0][name] / rows[-1][name] for name in ("alignment", "preparation")}
    line = (
        "growth: {length:.1f}× the tokens, {alignment:.1f}× the alignment's time, {preparation:.1f}× the preparation's"
    )
    print(line.format(**growth))
    size = arguments.characters[0]
    texts = [text[start : start + size] for start in range(0, arguments.per_round - size + 1, size)]
    memory = measure_memory(preparation, texts, arguments.memory_rows)
    for found in memory:
        peaks = [found[name] / 2**20 for name in ("peak_bytes", "rows_4x_peak_bytes")]
        print(
            "{way}: peak of memory {0:.1f} MiB for {rows} rows, {1:.1f} MiB for four times as many".format(
                *peaks, **found
            )
        )
    if arguments.output is not None:
        report = {"arguments": {**vars(arguments), "output": None}, "rows": rows, "growth": growth, "memory": memory}
        write_results(arguments.output, report)


if __name__ == "__main__":
    main()
