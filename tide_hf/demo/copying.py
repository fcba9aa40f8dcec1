"""Copy a word in lower case or in capitals: either is right, a mixture is not.

The prompt determines the letters of the answer; their case is one choice for all of them. A network that reveals n
letters in one step draws each case on its own, so all n agree with probability 2^(1−n): the fewer steps, the harder.
"""

import random

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from .sorting import SPECIAL_TOKENS, with_special_tokens

LETTERS = "abcdefghij"
WORD_LENGTH = 32
HELD_OUT_SEED = 20_260_219  # of the prompts on which results are reported
VALIDATION_SEED = 777_777  # of those on which settings were chosen


def build_case_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter of either case, with the special tokens and chat template of [`~tide_hf.demo.sorting`]."""
    vocab = {token: index for index, token in enumerate((*LETTERS, *LETTERS.upper(), *SPECIAL_TOKENS))}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split("", "isolated"), Fuse()
    return with_special_tokens(tokenizer)


def copying_rows(num_rows: int, seed: int, length: int = WORD_LENGTH) -> Dataset:
    """Conversations: a random word, and the same word in lower case or in capitals, with equal probability.

    Args:
        num_rows (`int`): how many.
        seed (`int`): of the draws.
        length (`int`): letters of a word.
    """
    draw, rows = random.Random(seed), []
    for _ in range(num_rows):
        word = "".join(draw.choices(LETTERS, k=length))
        answer = draw.choice(both_cases(word))
        rows.append({"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": answer}]})
    return Dataset.from_list(rows)


def both_cases(word: str) -> tuple[str, str]:
    """The two right answers to `word`."""
    return word, word.upper()
