"""How fast rows are prepared across tokenizers: the alignment alone, and the whole beside the two tokenisations.

Method: conversations whose answers are cut from the sources of the running Python's standard library, rendered with
two chat templates. Each number is the median over `--repeats` rounds; within a round all are measured side by side,
so that other load on the machine meets all of it. One core: no worker processes, no tokenizer threads.

Hardware: any CPU; about half a minute. Nothing is downloaded: without names two byte-level BPE tokenizers of two sizes
are trained on the same sources.

    python recipes/benchmark_prepare.py
    python recipes/benchmark_prepare.py --tokenizer Qwen/Qwen3-0.6B --teacher_tokenizer inclusionAI/LLaDA2.0-mini

Measured on one of two shared cores, rows of about 350 to 400 tokens: alignment 4.1 million student tokens/s,
preparation at 61 % of the speed of the two tokenisations alone (58 % on a busier machine; 66 % with the tokenizers of
Qwen and DeepSeek, which are slower themselves), 85 % at 5,900 tokens a row. Some two fifths of the
rest is the rendering of the two templates.
"""

import argparse
import os
import statistics
import sysconfig
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

TEMPLATES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% for message in messages %}<role>{{ message.role | upper }}</role>{{ message.content }}<|role_end|>"
    "{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}",
)
CHARACTERS = (1_400, 5_600, 22_400)  # per answer; the first is about 350 tokens
CHARACTERS_PER_ROUND = 280_000


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


def seconds(function, items) -> float:
    """Wall time of one pass over the items."""
    start = time.perf_counter()
    for item in items:
        function(item)
    return time.perf_counter() - start


def measure(preparation, conversations: list, repeats: int) -> tuple[float, float, float, float]:
    """Medians over the rounds, in student tokens/s: alignment, two tokenisations, preparation; and the mean length."""
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
        alignment = seconds(lambda pair: align_chunks(*pair[0], *pair[1]), list(zip(ours, theirs, strict=True)))
        tokenisation = seconds(lambda pair: (student(pair[0]), teacher(pair[1])), texts)
        whole = seconds(lambda messages: preparation({"messages": messages}, 0), conversations)
        rounds.append((num_tokens / alignment, num_tokens / tokenisation, num_tokens / whole, tokenisation / whole))
    *speeds, share = (statistics.median(values) for values in zip(*rounds, strict=True))
    return *speeds, share, num_tokens / len(conversations)


def main() -> None:
    from tide_hf.data import RowPreparation

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="student's tokenizer, a name or a folder; default: trained here")
    parser.add_argument("--teacher_tokenizer", help="teacher's tokenizer, a name or a folder; default: trained here")
    parser.add_argument("--repeats", type=int, default=7, help="rounds per length, at least 7 for a median to trust")
    arguments = parser.parse_args()
    text = sources()
    preparation = RowPreparation(
        load_tokenizer(arguments.tokenizer, TEMPLATES[0], text, 16_000),
        load_tokenizer(arguments.teacher_tokenizer, TEMPLATES[1], text, 6_000),
        max_length=1 << 20,
        teacher_max_length=1 << 20,
        block_size=32,
        alignment="chunk",
    )
    print("student tokens/s on one core, medians", f"of {arguments.repeats} rounds")
    print(f"{'tokens/row':>10} {'alignment':>12} {'2 tokenisations':>16} {'preparation':>12} {'share':>7}")
    for size in CHARACTERS:
        starts = [index * size for index in range(CHARACTERS_PER_ROUND // size)]
        conversations = [
            [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text[start : start + size]}]
            for start in starts
        ]
        alignment, tokenisations, whole, share, length = measure(preparation, conversations, arguments.repeats)
        print(f"{length:>10,.0f} {alignment:>12,.0f} {tokenisations:>16,.0f} {whole:>12,.0f} {share:>7.0%}")


if __name__ == "__main__":
    main()
