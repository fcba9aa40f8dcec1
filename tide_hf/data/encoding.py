"""Tokens of a text as at inference: the prompt tokenised alone, with the tokens that the tokenizer prepends."""

from dataclasses import dataclass, field
from itertools import pairwise

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

# put before a text to be tokenised as the continuation of another one
ANCHORS = ("\n", ".", "a")
# a space in the byte-level alphabet; tokenizers with `trim_offsets` do not count it in a token's offsets
SPACE = "Ġ"


@dataclass(frozen=True)
class JoinedEncoding:
    """Tokens of several stretches of one text; has the two attributes of `tokenizers.Encoding` that are read.

    Args:
        ids (`list[int]`): token ids.
        offsets (`list[tuple[int, int]]`): character range of each token in the text.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoder:
    """Tokenises texts with one fast tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer.
        leading (`tuple[int, ...]`): ids that `tokenizer(text)` prepends to a text, such as BOS.
        begins (`bool`): whether the beginning of a text is tokenised differently from its middle.
    """

    tokenizer: PreTrainedTokenizerBase
    leading: tuple[int, ...]
    begins: bool
    _seen: dict = field(default_factory=dict, init=False, compare=False, repr=False)

    def __reduce__(self):
        """Leaves out the cache: the datasets library would take a changed state for another preparation."""
        return Encoder, (self.tokenizer, self.leading, self.begins)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Encoder":
        """Finds out what a `tokenizer` does at the beginning of a text."""
        plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
        places = range(len(whole) - len(plain) + 1)
        num_leading = next((place for place in places if whole[place : place + len(plain)] == plain), 0)
        encoder = cls(tokenizer, tuple(whole[:num_leading]), True)
        return cls(tokenizer, encoder.leading, encoder._middle("a").ids != encoder._whole("a").ids)

    def encode(self, text: str, cuts: list[int]) -> tuple[Encoding | JoinedEncoding, int]:
        """Tokenises a text so that no token crosses a cut; special tokens are not added.

        Args:
            text (`str`): the text.
            cuts (`list[int]`): positions in it, in increasing order.

        Returns:
            the tokens, and the number of cuts that the tokenizer itself would not have respected.
        """
        encoding = self._whole(text)
        crossed = [cut for cut in cuts if 0 < cut < len(text) and self._joins(encoding, text, cut)]
        if not crossed:
            return encoding, 0
        ids, offsets = [], []
        for start, end in pairwise([0, *crossed, len(text)]):
            part = self.continuation(text[start:end]) if start else self._whole(text[start:end])
            ids += part.ids
            offsets += [(start + first, start + last) for first, last in part.offsets]
        return JoinedEncoding(ids, offsets), len(crossed)

    def continuation(self, text: str) -> Encoding | JoinedEncoding:
        """Tokenises a `text` that follows another one; special tokens are not added."""
        return self._middle(text) if self.begins else self._whole(text)

    def _joins(self, encoding: Encoding, text: str, cut: int) -> bool:
        """Whether the text before a cut has other tokens than it would have alone."""
        if _crosses(self.tokenizer, encoding, text, cut):
            return True
        if not text[cut - 1].isspace() and text[cut].isascii():
            return False
        # what follows may change the tokens of white space, or combine with the character before it
        tail = text[max(len(text[:cut].rstrip()) - 1, 0) : cut]
        key = tail, text[cut]
        if key not in self._seen:
            if len(self._seen) > 10_000:
                self._seen.clear()
            alone = self._whole(tail).ids
            self._seen[key] = self._whole(tail + text[cut]).ids[: len(alone)] == alone
        if self._seen[key]:
            return False
        alone = self._whole(text[:cut]).ids
        return encoding.ids[: len(alone)] != alone

    def _whole(self, text: str) -> Encoding:
        """Tokens of a whole text in the backend's own form, which `tokenizer(text)` would convert to lists."""
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != self.tokenizer.split_special_tokens:
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return backend.encode(text, add_special_tokens=False)

    def _middle(self, text: str) -> Encoding | JoinedEncoding:
        """Tokens of a text that continues another one: without the space that a beginning would get."""
        for anchor in ANCHORS:
            before, both = self._whole(anchor), self._whole(anchor + text)
            size = len(before.ids)
            # no token may span both anchor and text
            if both.ids[:size] == before.ids and all(start >= 1 for start, _ in both.offsets[size:]):
                moved = [(start - 1, end - 1) for start, end in both.offsets[size:]]
                return JoinedEncoding(both.ids[size:], moved)
        return self._whole(text)


def _crosses(tokenizer: PreTrainedTokenizerBase, encoding: Encoding, text: str, cut: int) -> bool:
    """Whether one token has characters on both sides of a cut."""
    token = encoding.char_to_token(cut)
    if not text[cut - 1].isspace() or encoding.char_to_token(cut - 1) is not None:
        return token is not None and encoding.token_to_chars(token)[0] < cut
    # these offsets do not count white space: the tokens' own text tells where they begin
    place = cut
    while place < len(text) and (token := encoding.char_to_token(place)) is None:
        place += 1
    if token is None:
        token, begin = len(encoding), len(text)
    else:
        begin = encoding.token_to_chars(token)[0] - _spaces(tokenizer, encoding.ids[token])
    while begin > cut and token > 0:
        token -= 1
        size = _spaces(tokenizer, encoding.ids[token])
        if not size:
            return False
        begin -= size
        if begin < cut:
            return True
    return begin < cut


def _spaces(tokenizer: PreTrainedTokenizerBase, index: int) -> int:
    """Number of spaces that a token begins with."""
    token = tokenizer.convert_ids_to_tokens(index)
    return len(token) - len(token.lstrip(SPACE))
