"""The samplers published with masked diffusion LMs, rewritten for one row: a full forward in every pass, no cache.

Written from what each does, not from its code. Three things differ from the originals on purpose. [MASK] has the logit
−∞, so that it is never proposed. A quota that is larger than the number of masks left reveals those alone; SDAR's
`topk` would then overwrite tokens of the prompt. LLaDA's `confidence_eos_eot_inf` takes both ids out of the confidence
at every temperature; in the original EOS stays in at temperatures above 0.

Sources: ML-GSAI/LLaDA generate.py; NVlabs/Fast-dLLM llada/generate.py; JetAstra/SDAR generate.py; ZHZisZZ/dllm
pipelines/llada2/sampler.py, pipelines/llada21/sampler.py; DreamLM/Dream generation_utils.py.
"""

import numpy as np
import torch
from naive_sampler import PAD, prompt, tiny
from tiny import MASK


@torch.no_grad()
def logits_of(model, ids: list[int], end: int | None = None) -> torch.Tensor:
    """Float32 logits of the first `end` tokens, which block-diffusion models see block by block, all others whole."""
    row = torch.tensor([ids[:end]])
    mask = None
    if model.config.diffusion_type == "block":
        number = torch.arange(row.shape[1]) // model.config.block_size
        mask = (number[:, None] >= number[None, :])[None, None]
    logits = model(row, attention_mask=mask).logits[0].float()
    logits[:, MASK] = -torch.inf
    return logits


def largest(values: dict[int, float], number: int) -> list[int]:
    """The keys of the largest values; among equals the smaller key."""
    return sorted(values, key=lambda position: (-values[position], position))[:number]


def llada(model, prompt, gen_length, block_length, steps, logits_ids=(), confidence_ids=()):
    """LLaDA: the masks of a block over its steps, what does not divide first; the most confident go first.

    `logits_ids` are never proposed. `confidence_ids` may be, and are left out of the probabilities that order.
    """
    ids = [*prompt, *[MASK] * gen_length]
    for start in range(len(prompt), len(ids), block_length):
        share, more = divmod(block_length, steps)
        for step in range(steps):
            logits = logits_of(model, ids)
            logits[:, list(logits_ids)] = -torch.inf
            token = logits.argmax(-1)
            logits[:, list(confidence_ids)] = -torch.inf
            probability = logits.softmax(-1)
            masked = [p for p in range(start, start + block_length) if ids[p] == MASK]
            confidence = {p: float(probability[p, token[p]]) for p in masked}
            for p in largest(confidence, share + (step < more)):
                ids[p] = int(token[p])
    return ids[len(prompt) :]


def fast_dllm(model, prompt, gen_length, block_length, threshold):
    """Fast-dLLM without caches: every token of the block whose probability is not below the threshold."""
    ids = [*prompt, *[MASK] * gen_length]
    for start in range(len(prompt), len(ids), block_length):
        while MASK in (block := ids[start : start + block_length]):
            probability, token = logits_of(model, ids).softmax(-1).max(-1)
            confidence = {start + i: float(probability[start + i]) for i, t in enumerate(block) if t == MASK}
            (best,) = largest(confidence, 1)
            for p, value in confidence.items():
                if p == best or not value < threshold:
                    ids[p] = int(token[p])
    return ids[len(prompt) :]


def sdar(model, prompt, gen_length, steps, strategy="low_confidence_dynamic", threshold=0.85, minimum=1, top_k=None):
    """SDAR, and LLaDA2, whose `minimal_topk` is `minimum`: shares of the block's size, whole blocks.

    With `top_k=1` the distribution that is sampled from holds one token.
    """
    size, end = model.config.block_size, len(prompt) + gen_length
    ids = [*prompt, *[MASK] * (-(-end // size) * size - len(prompt))]
    steps = min(steps, gen_length // minimum)
    share, more = divmod(size, steps)
    for start in range(len(prompt) // size * size, len(ids), size):
        for step in range(steps):
            masked = [p for p in range(start, start + size) if ids[p] == MASK]
            if not masked:
                break
            quota = share + (step < more)
            probability, token = logits_of(model, ids, start + size).softmax(-1).max(-1)
            confidence = {p: 1.0 if top_k == 1 else float(probability[p]) for p in masked}
            sure = [p for p in masked if confidence[p] > threshold]
            if strategy == "sequential":
                chosen = masked[:quota]
            elif strategy == "low_confidence_dynamic" and len(sure) >= quota:
                chosen = sure
            else:
                chosen = largest(confidence, quota)
            for p in chosen:
                ids[p] = int(token[p])
    assert MASK not in ids
    return ids[len(prompt) : end]


def llada21(model, prompt, gen_length, threshold=0.95, editing_threshold=0.9, max_post_steps=16, num_to_transfer=1):
    """LLaDA2.1: as LLaDA2, and each pass edits; returns the answer and how many tokens were edited."""
    size, end, num_edits = model.config.block_size, len(prompt) + gen_length, 0
    ids = [*prompt, *[MASK] * (-(-end // size) * size - len(prompt))]
    for start in range(len(prompt) // size * size, len(ids), size):
        positions, after = range(start, start + size), 0
        while True:
            masked = [p for p in positions if ids[p] == MASK]
            after += not masked
            if after > max_post_steps:
                break
            probability, token = logits_of(model, ids, start + size).softmax(-1).max(-1)
            sure = [p for p in masked if float(probability[p]) > threshold]
            if len(sure) < num_to_transfer:
                sure = largest({p: float(probability[p]) for p in masked}, num_to_transfer)
            edited = [
                p
                for p in positions
                if p not in masked
                and p >= len(prompt)
                and float(probability[p]) > editing_threshold
                and int(token[p]) != ids[p]
            ]
            num_edits += len(edited)
            for p in [*sure, *edited]:
                ids[p] = int(token[p])
            if not masked and not edited:
                break
    return ids[len(prompt) : end], num_edits


def dream_times(steps: int) -> list[np.float32]:
    """1 down to 0.001 in equal steps, in the precision of the original."""
    return [np.float32(value) for value in torch.linspace(1, 1e-3, steps + 1).tolist()]


def dream(model, prompt, gen_length, steps, alg="entropy", temperature=1.0, top_k=None, drawn=None):
    """Dream: in each step the share of the masks left that unmasks until the next time, rounded down.

    The distribution that orders is the one after temperature and `top_k`; tokens are the most probable ones. `drawn`,
    for `alg="origin"`, is a function of step and position in [0, 1): below 1 − s/t the position is revealed.
    """
    ids, time = [*prompt, *[MASK] * gen_length], dream_times(steps)
    for step in range(steps):
        last = step == steps - 1
        unmasks = np.float32(1) - time[step + 1] / time[step]
        logits = logits_of(model, ids) / temperature
        if top_k is not None:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        probability = logits.softmax(-1)
        masked = [p for p in range(len(prompt), len(ids)) if ids[p] == MASK]
        first, second = probability.topk(2).values.unbind(-1)
        order = {
            "maskgit_plus": first,
            "topk_margin": first - second,
            "entropy": (probability * (probability + 1e-10).log()).sum(-1),
            "origin": first,
        }[alg]
        number = len(masked) if last else int(np.float32(len(masked)) * unmasks)
        chosen = largest({p: float(order[p]) for p in masked}, number)
        if alg == "origin":
            chosen = [p for p in masked if last or drawn(step, p - len(prompt)) < unmasks]
        for p in chosen:
            ids[p] = int(logits[p].argmax())
    return ids[len(prompt) :]


# ---- the models and the comparison ----

LENGTHS = (1, 4, 6, 9)  # inside and at the end of a block of 4 and 8


def spread(seed, diffusion_type="block", **changes):
    """A tiny model whose probabilities lie between 0.1 and 1."""
    model = tiny(seed=seed, diffusion_type=diffusion_type, **changes)
    model.lm_head.weight.data *= 2
    return model


def cut(answer, eos):
    return answer[: answer.index(eos) + 1] if eos in answer else answer


def padded(prompts, side):
    width = max(len(row) for row in prompts) + 1
    ids, mask = torch.full((len(prompts), width), 7), torch.zeros(len(prompts), width, dtype=torch.long)
    for index, row in enumerate(prompts):
        columns = slice(width - len(row), None) if side == "left" else slice(None, len(row))
        ids[index, columns], mask[index, columns] = torch.tensor(row), 1
    return {"inputs": ids, "attention_mask": mask}


def assert_equals(model, published, num_new, **settings):
    """`generate` gives what `published(prompt)` gives: row by row, as a batch padded on either side, ended by EOS."""
    prompts = [prompt(length)[0].tolist() for length in LENGTHS]
    answers = [published(row) for row in prompts]
    settings |= {"max_new_tokens": num_new}
    for row, expected in zip(prompts, answers, strict=True):
        assert model.generate(torch.tensor([row]), **settings)[0, len(row) :].tolist() == expected
    for eos, side in ((None, "left"), (answers[0][num_new // 2], "right"), (answers[-1][0], "left")):
        rows = [cut(answer, eos) for answer in answers]
        width = max(map(len, rows))
        rows = [row + [PAD] * (width - len(row)) for row in rows]
        batch = padded(prompts, side)
        out = model.generate(**batch, eos_token_id=eos, pad_token_id=PAD, **settings)
        assert out[:, batch["inputs"].shape[1] :].tolist() == rows
    return answers


def answer(model, **settings):
    return model.generate(prompt(6), max_new_tokens=13, **settings).tolist()
