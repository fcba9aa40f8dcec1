"""Sort six digits: clean rows for a teacher, and rows with wrong digits, as few as one likes, for a student."""

import random
from collections.abc import Sequence

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

NUM_DIGITS = 6
SPECIAL_TOKENS = ("<pad>", "<user>", "<assistant>", "<eos>", "<mask>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<user>{{ message.content }}"
    "{% else %}<assistant>{% generation %}{{ message.content }}<eos>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELD_OUT_SEED = 20_260_429  # the held-out prompts are the same in every run and in no training set


def build_tokenizer(merged_pairs: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of digits, with mask token, offsets and a `{% generation %}` template.

    Args:
        merged_pairs (`Sequence[str]`): pairs of digits that are one token, in order of precedence. By default every
            digit is a token, and the ids 0 to 9 are the digits.
    """
    vocab = {token: index for index, token in enumerate((*"0123456789", *SPECIAL_TOKENS, *merged_pairs))}
    if merged_pairs:
        tokenizer = Tokenizer(BPE(vocab, [tuple(pair) for pair in merged_pairs], unk_token="<pad>"))
    else:
        tokenizer = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
        tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return with_special_tokens(tokenizer)


def with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The special tokens and the chat template of this module on any trained tokenizer.

    Args:
        tokenizer (`Tokenizer`): its vocabulary contains the special tokens.
    """
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        additional_special_tokens=["<user>", "<assistant>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def held_out_rows(num_rows: int = 400) -> Dataset:
    """Distinct conversations for evaluation; their prompts never occur in [`sorting_rows`].

    Args:
        num_rows (`int`): how many; there are about 1,000.
    """
    return Dataset.from_list([_row(prompt, sorted(prompt)) for prompt in _held_out_prompts()[:num_rows]])


def sorting_rows(num_rows: int, seed: int, wrong: float = 0.0) -> Dataset:
    """Training conversations: a prompt of six digits, answered by the same digits in ascending order.

    Args:
        num_rows (`int`): how many.
        seed (`int`): of the draws.
        wrong (`float`): probability that an answer digit is replaced by another one, independently.
    """
    draw, held_out, rows = random.Random(seed), set(_held_out_prompts()), []
    while len(rows) < num_rows:
        prompt = _prompt(draw)
        if prompt in held_out:
            continue
        answer = [
            draw.choice([other for other in "0123456789" if other != digit]) if draw.random() < wrong else digit
            for digit in sorted(prompt)
        ]
        rows.append(_row(prompt, answer))
    return Dataset.from_list(rows)


def _prompt(draw: random.Random) -> str:
    return "".join(draw.choices("0123456789", k=NUM_DIGITS))


def _held_out_prompts() -> list[str]:
    draw = random.Random(HELD_OUT_SEED)
    return list(dict.fromkeys(_prompt(draw) for _ in range(1000)))


def _row(prompt: str, answer) -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "".join(answer)}]}
