"""Filling the holes of a text: text in, text out.

This file travels with checkpoints: it imports Python's standard library alone.
"""

import re

HOLE = r"\[MASK(?::[1-9]\d*)?\]"


class TextInfillingMixin:
    """`infill_text` over a model's `infill`."""

    def infill_text(self, tokenizer, text: str | list[str], **kwargs) -> str | list[str]:
        """Fills the holes of a text; what stands between them is returned exactly as given.

        A hole is `[MASK]` (one token), `[MASK:8]` (eight tokens), or the tokenizer's own mask token. How much of the
        text after a hole the model sees depends on the model: see `infill`.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): the model's; its mask token must be the model's.
            text (`str` or `list[str]`): several texts are filled as one batch.
            kwargs: passed to `infill`.

        Returns:
            `str` or `list[str]`, as given: special tokens that a hole was filled with (such as EOS) are left out.

        Raises:
            ValueError: for a tokenizer without a mask token, a text without holes, holes that the tokenizer merges.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if tokenizer.mask_token_id is None:
            raise ValueError("infill_text needs tokenizer.mask_token, and this tokenizer has none: set it.")
        kwargs.setdefault("mask_token_id", tokenizer.mask_token_id)
        holes = re.compile(f"(?:{HOLE}|{re.escape(tokenizer.mask_token)})+")
        for given in texts:
            if not holes.search(given):
                raise ValueError(
                    f"Expected a hole, [MASK] or [MASK:number of tokens], in every text, and found none in {given!r}."
                )
        masked = [re.sub(HOLE, lambda hole: tokenizer.mask_token * int(hole[0][6:-1] or 1), given) for given in texts]
        inputs = tokenizer(masked, padding=len(texts) > 1, return_tensors="pt").to(self.device)
        mask = inputs["attention_mask"].bool()
        output = self.infill(inputs["input_ids"], attention_mask=mask, **kwargs)
        filled = output if hasattr(output, "shape") else output.sequences
        results = []
        for row, given in enumerate(texts):
            was_mask = inputs["input_ids"][row][mask[row]] == kwargs["mask_token_id"]
            pieces = _decode_holes(tokenizer, filled[row][mask[row]].tolist(), was_mask.tolist())
            if len(pieces) != len(holes.findall(given)):
                raise ValueError(
                    f"Expected {len(holes.findall(given))} separate holes after tokenisation, got {len(pieces)}: the "
                    "tokenizer drops what stands between them or splits its mask token. Fill token ids with infill."
                )
            between = holes.split(given)
            results.append("".join(part for pair in zip(between, [*pieces, ""], strict=True) for part in pair))
        return results[0] if isinstance(text, str) else results


def _decode_holes(tokenizer, ids: list[int], was_mask: list[bool]) -> list[str]:
    """The text of each run of filled tokens, decoded after what precedes it (spaces belong to the next token)."""
    pieces, start = [], None
    for index, filled in enumerate([*was_mask, False]):
        if filled and start is None:
            start = index
        elif not filled and start is not None:
            before = tokenizer.decode(ids[:start], skip_special_tokens=True)
            pieces.append(tokenizer.decode(ids[:index], skip_special_tokens=True)[len(before) :])
            start = None
    return pieces
