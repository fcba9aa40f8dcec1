"""Published families as students: the tiny networks that tests train, and what a naive denoiser predicts."""

import pytest
import torch
from published import naive_logits, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from tide_hf.models import MODELS

MASK, PAD, BLOCK = 23, 20, 4
# short blocks, so that a short row has several; families without blocks have the field and do not read it
BLOCKS = {"block_size": BLOCK}
# how a family is trained: tokens per block where config.json is silent (None: one sequence), and what is peculiar
STUDENTS = {
    "llada-8b": (None, ""),
    "llada-moe": (None, ""),
    "llada2": (32, ""),
    "sdar": (4, ""),
    "sdar-moe": (4, ""),
    "dream": (None, "shifted"),
    "wedlm-8b": (32, "causal"),
    "wedlm-7b": (32, "causal"),
}
families = pytest.mark.parametrize("family", list(STUDENTS))


def block_size_of(family: str, config: dict, length: int) -> int:
    """Tokens per block of a family; the whole length where there are no blocks."""
    size = STUDENTS[family][0]
    return length if size is None else config.get("block_size", size)


def naive_denoiser(family: str, config: dict, weights: dict, ids, masked, mask: int) -> torch.Tensor:
    """(L, V) logits OF each position of one row that ends in the block being denoised.

    `masked (L,)` says where [MASK] stands; what precedes the last block is clean. A shifted network's logits of
    position i stand at i − 1, position 0 has its own; a causal one reads what is unmasked of the block, then what is
    masked, each at its own position.
    """
    length, peculiar = len(ids), STUDENTS[family][1]
    size = block_size_of(family, config, length)
    order, shown = torch.arange(length), torch.where(masked, mask, ids)
    visible = order[:, None] // size >= order // size
    if peculiar == "causal":
        start = (length - 1) // size * size
        block = order[start:]
        order = torch.cat([order[:start], block[~masked[start:]], block[masked[start:]]])
        visible = torch.ones(length, length, dtype=torch.bool).tril()
    logits = naive_logits(family, config, weights, shown[order], visible, order)[order.argsort()]
    return torch.cat([logits[:1], logits[:-1]]) if peculiar == "shifted" else logits


def naive_masked_logits(family: str, config: dict, weights: dict, ids, masked, mask: int) -> dict[int, torch.Tensor]:
    """Logits of each masked position of one row without padding, block by block after a clean prefix."""
    size, found = block_size_of(family, config, len(ids)), {}
    for start in range(0, len(ids), size):
        end = min(start + size, len(ids))
        noised = masked[:end] & (torch.arange(end) >= start)
        if noised.any():
            logits = naive_denoiser(family, config, weights, ids[:end], noised, mask)
            found |= {position: logits[position] for position in noised.nonzero()[:, 0].tolist()}
    return found


def plain_logits(size: int | None, peculiar: str):
    """`(model, noised, clean) -> (L, V)` logits of each position of one row, by one forward of the network's body per
    block after a clean prefix; `size` is its configuration's, None without blocks."""

    def logits_of(model, noised, clean):
        length, found = len(clean), []
        step = length if size is None else model.config.block_size
        for start in range(0, length, step):
            end = min(start + step, length)
            ids, order = torch.cat([clean[:start], noised[start:end]]), torch.arange(end)
            visible = order[:, None] // step >= order // step
            if peculiar == "causal":
                masked = (ids == model.config.mask_token_id) & (order >= start)
                order = torch.cat([order[~masked], order[masked]])
                visible = torch.ones(end, end, dtype=torch.bool).tril()
            hidden = model.model(
                input_ids=ids[order][None],
                attention_mask=visible[None, None],
                position_ids=order[None],
                use_cache=False,
            ).last_hidden_state
            found.append(model.lm_head(hidden)[0][order.argsort()][start:])
        logits = torch.cat(found)
        return torch.cat([logits[:1], logits[:-1]]) if peculiar == "shifted" else logits

    return logits_of


def published_student(path, family: str, dtype=torch.float32):
    """config.json, the published tensors and the loaded network; it has a [MASK] and short blocks."""
    config, weights = write_checkpoint(path, family, mask_token_id=MASK, pad_token_id=PAD, **BLOCKS)
    return config, weights, AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def fresh_student(path, family: str):
    """A network of the family's class and layout with small random weights, to be trained."""
    write_checkpoint(path, family, mask_token_id=MASK, pad_token_id=PAD, initializer_range=0.05, **BLOCKS)
    config = AutoConfig.from_pretrained(path)
    torch.manual_seed(0)
    return MODELS[type(config)](config)
