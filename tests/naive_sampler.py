"""Samplers without cache and batching, written from the definition, and the tiny student they are compared on."""

import numpy as np
import torch
from tiny import BLOCK, MASK, SHAPE
from transformers import GenerationConfig

from tide_hf.models import TIDEQwen3Config, TIDEQwen3ForBlockDiffusion

EOS, PAD = 22, 21


def tiny(seed=0, **changes) -> TIDEQwen3ForBlockDiffusion:
    values = {
        **SHAPE,
        "mask_token_id": MASK,
        "block_size": BLOCK,
        "eos_token_id": None,
        "pad_token_id": PAD,
        **changes,
    }
    torch.manual_seed(seed)
    return TIDEQwen3ForBlockDiffusion(TIDEQwen3Config(**values)).double().eval()


def prompt(length, seed=1):
    return torch.randint(0, 20, (1, length), generator=torch.Generator().manual_seed(seed + length))


def holes(length=7, columns=(2, 5)):
    """A prompt's tokens with [MASK] in some columns."""
    ids = prompt(length)
    ids[0, list(columns)] = MASK
    return ids


def seeded():
    return torch.Generator().manual_seed(0)


def with_setting(name, value, config_class=GenerationConfig):
    """A config as a file with this value gives it, without the checks of its constructor."""
    config = config_class()
    setattr(config, name, value)
    return config


def published_split(num_masked, steps):
    """Tokens per step of the published samplers: of those left, the rounded share that unmasks between two times.

    Written with numpy scalars in the precision they use (times float32, product float64): it decides halves.
    """
    one, split = np.float32(1), []
    for step in range(steps):
        t, s = np.float32((steps - step) / steps), np.float32((steps - step - 1) / steps)
        unmasks = 1 - float((one - (one - s)) / (one - (one - t)))
        split.append(min(int(np.rint(num_masked * unmasks)), num_masked))
        num_masked -= split[-1]
    return [count for count in split if count]


@torch.no_grad()
def naive_generate(
    model, prompt_ids, max_new_tokens, eos=None, steps_per_block=None, confidence_threshold=None, order=None
):
    """One row from the definition: blocks from absolute position 0, a full forward of [prefix ; block] each step.

    Of the last block only what is returned is denoised; the rest stays masked.

    Returns the new ids, cut after EOS, and the number of denoising steps of each block.
    """
    ids, length = list(prompt_ids), len(prompt_ids)
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    full = model.config.diffusion_type == "full"
    size = length + max_new_tokens if full else model.config.block_size
    num_steps = []
    for block in range(length // size, -(-(length + max_new_tokens) // size)):
        start, end = block * size, (block + 1) * size
        ids = ids + [MASK] * (end - len(ids))
        masked = list(range(max(start, length), min(end, length + max_new_tokens)))
        quota = published_split(len(masked), steps_per_block or len(masked))
        number = torch.arange(end) // size
        visible = (number[:, None] >= number[None, :])[None, None]
        step = 0
        while masked:
            logits = model(torch.tensor([ids]), attention_mask=None if full else visible).logits[0].float()
            logits[:, MASK] = -torch.inf
            probability, token = logits.softmax(-1).max(-1)
            noise = order(size) if order else None
            key = (lambda p: -float(noise[p - start])) if order else (lambda p: -float(probability[p]))  # noqa: B023
            ranked = sorted(masked, key=key)  # stable: the earlier position first
            if confidence_threshold is None:
                chosen = ranked[: quota[step]]
            else:
                chosen = [p for p in masked if p == ranked[0] or float(probability[p]) >= confidence_threshold]
            for position in chosen:
                ids[position] = int(token[position])
                masked.remove(position)
            step += 1
        num_steps.append(step)
        if ends & set(ids[length:]):
            break
    new = ids[length : length + max_new_tokens]
    first_end = next((index for index, token in enumerate(new) if token in ends), len(new))
    return new[: first_end + 1], num_steps
