"""Which bytes each token represents, and where they are in the tokenised text.

The bytes follow from the tokenizer's alphabet, the positions from the bytes if these spell the text exactly, otherwise
from the character offsets. Misreading a vocabulary costs coverage, never correctness: chunks compare bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from .chat import Answer


@dataclass(frozen=True)
class LocatedTokens:
    """The tokens of one text.

    Args:
        ids (`np.ndarray` of shape `(n,)`): token ids.
        spans (`np.ndarray` of shape `(n, 2)`): byte range of each token in the text's UTF-8, half-open, in text order;
            a token for part of a character may have the range of the whole character.
        nbytes (`np.ndarray` of shape `(n,)`): bytes of the token itself.
        stream (`bytes`): the tokens' own bytes, joined.
        text (`bytes`): the text's UTF-8.
        exact (`bool`): whether the two are the same and no token is empty, so that the spans are exact.
    """

    ids: np.ndarray
    spans: np.ndarray
    nbytes: np.ndarray
    stream: bytes
    text: bytes
    exact: bool


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of each id of a vocabulary; arrays, so that it is quick to pickle and to hash.

    Args:
        data (`np.ndarray` of shape `(N,)`): uint8, all tokens joined in the order of their ids.
        ends (`np.ndarray` of shape `(V,)`): where each token ends in it.
        nbytes (`np.ndarray` of shape `(V,)`): bytes of each token; 0 for ids without one.
    """

    data: np.ndarray
    ends: np.ndarray
    nbytes: np.ndarray

    def __len__(self) -> int:
        return len(self.nbytes)

    def __getitem__(self, index: int) -> bytes:
        """Bytes of one token."""
        return self.data[self.ends[index] - self.nbytes[index] : self.ends[index]].tobytes()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenBytes":
        """Reads the vocabulary of a fast tokenizer: byte-level BPE, SentencePiece, WordPiece, or plain text.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): with all tokens that will ever be added to it.

        Raises:
            ValueError: for a tokenizer without a Rust backend, which gives neither bytes nor offsets.
        """
        require_fast(tokenizer)
        vocabulary = tokenizer.get_vocab()
        read = _reader(tokenizer.backend_tokenizer)
        pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            pieces[index] = read(token)
        for index, token in tokenizer.added_tokens_decoder.items():
            pieces[index] = token.content.encode()
        nbytes = np.fromiter(map(len, pieces), np.int64, len(pieces))
        return cls(np.frombuffer(b"".join(pieces), np.uint8), nbytes.cumsum(), nbytes)

    def locate(self, text: str, encoding: Encoding) -> tuple[LocatedTokens, np.ndarray | None]:
        """Finds the tokens of a tokenised text, in bytes.

        Args:
            text (`str`): what was tokenised.
            encoding (`tokenizers.Encoding`): its tokens; their offsets are read only if they are needed.

        Returns:
            the tokens, and the [`byte_positions`] of the text.

        Raises:
            ValueError: for a token that was added to the tokenizer after this table was made.
        """
        ids, data, positions = np.array(encoding.ids, dtype=np.int64), text.encode(), byte_positions(text)
        if ids.max(initial=-1) >= len(self):
            raise ValueError(
                f"token id {ids.max()} lies outside the {len(self)} ids known: tokens were added to the tokenizer "
                "after it was given to the preparation; add them before."
            )
        nbytes = self.nbytes[ids]
        ends = nbytes.cumsum()
        place = np.repeat(self.ends[ids] - ends, nbytes)
        place += np.arange(len(place))
        stream = self.data[place].tobytes()
        if stream == data and nbytes.all():
            return LocatedTokens(ids, np.stack([ends - nbytes, ends], 1), nbytes, stream, data, True), positions
        spans = character_spans(encoding)
        if positions is not None:
            spans = positions[spans]
        return LocatedTokens(ids, spans, nbytes, stream, data, False), positions


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer without a Rust backend, which gives neither bytes nor offsets.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of student or teacher.

    Raises:
        ValueError: naming it.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} of {tokenizer.name_or_path or 'unknown origin'} is a slow tokenizer, "
            "which tells neither the bytes nor the positions of its tokens: load its fast version "
            "(AutoTokenizer.from_pretrained(..., use_fast=True)), or convert it to a tokenizer.json."
        )


def character_spans(encoding: Encoding) -> np.ndarray:
    """Character range of each token of an `encoding`, int64 of shape `(n, 2)`."""
    return np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(encoding)).reshape(-1, 2)


def byte_positions(text: str) -> np.ndarray | None:
    """Where each character of a `text` begins in its UTF-8, shape `(characters + 1,)`; None if all take one byte."""
    if text.isascii():
        return None
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points > 0x7F) + (points > 0x7FF).astype(np.int64) + (points > 0xFFFF)
    return np.concatenate([[0], widths.cumsum()])


def answers_in_bytes(answers: Sequence[Answer], positions: np.ndarray | None) -> list[Answer]:
    """The same answers with byte instead of character positions.

    Args:
        answers (`Sequence[Answer]`): in characters.
        positions (`np.ndarray`, *optional*): the [`byte_positions`] of their text.
    """
    if positions is None:
        return list(answers)
    places = [(int(positions[answer.start]), int(positions[answer.end])) for answer in answers]
    return [
        replace(answer, start=start, end=end, anchor=int(positions[answer.anchor]))
        for answer, (start, end) in zip(answers, places, strict=True)
    ]


def _byte_alphabet() -> dict[int, int]:
    """Code point -> byte of the byte-level alphabet: printable Latin-1 is itself, the rest follows from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + index: byte for index, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def _reader(backend):
    """The function from a vocabulary entry to its bytes, by the parts the tokenizer is made of."""
    parts = [*_parts(backend.decoder), *_parts(backend.pre_tokenizer), *_parts(backend.normalizer)]
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return _byte_level
    spaces = {part["replacement"] for part in parts if part["type"] == "Metaspace"}
    if any(part["type"] == "Replace" and "▁" in json.dumps(part, ensure_ascii=False) for part in parts):
        spaces.add("▁")
    prefix = getattr(backend.model, "continuing_subword_prefix", None) or ""
    suffix = getattr(backend.model, "end_of_word_suffix", None) or ""
    byte_fallback = "ByteFallback" in kinds or bool(getattr(backend.model, "byte_fallback", False))

    def read(token: str) -> bytes:
        if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        for space in spaces:
            token = token.replace(space, " ")
        return token.removeprefix(prefix).removesuffix(suffix).encode()

    return read


def _byte_level(token: str) -> bytes:
    """Bytes of an entry in the byte-level alphabet."""
    try:
        return token.translate(BYTE_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def _parts(component) -> list[dict]:
    """The settings of a normalizer, pre-tokenizer or decoder, those inside sequences included."""
    found, queue = [], [] if component is None else [json.loads(component.__getstate__())]
    while queue:
        part = queue.pop()
        if not isinstance(part, dict):
            continue
        found.append(part)
        for name in ("normalizers", "pretokenizers", "decoders"):
            queue += part.get(name, [])
    return found
