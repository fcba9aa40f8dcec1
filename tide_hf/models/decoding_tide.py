"""Denoises the blocks of a canvas in order, over one cache that is only ever extended (BD3LM 2503.09573, algorithm 2).

This file travels with checkpoints: it imports its siblings, torch and transformers.

Shapes: B rows, R rows in all (2B with guidance), K columns being denoised, N masked positions among them, H hidden,
V vocabulary.
"""

from collections.abc import Iterator
from itertools import zip_longest

import torch
import torch.nn.functional as F
from transformers.generation import MaxTimeCriteria, StoppingCriteriaList

from .caches_tide import new_cache
from .canvas_tide import Canvas
from .masked_diffusion import predicting_columns
from .sampling_tide import (
    RUN,
    Rules,
    most_probable,
    propose_tokens,
    rank_descending,
    reveal_counts,
    token_entropy,
    within_entropy_bound,
)

NUM_LOGITS = 1 << 18  # as many float32 logits as the cache of a CPU core holds, 1 MB
SHORTEST = 8  # least runs per piece of the vocabulary: with fewer, a piece costs more than it saves


class Decoder:
    """Runs the windows of a canvas in order.

    Args:
        model (`MaskedDiffusionMixin`): its `run_decoder` and `lm_head` are called.
        canvas ([`Canvas`]): what is denoised, in place.
        settings ([`TIDEGenerationConfig`]): with every default filled in.
        generator (`torch.Generator`, *optional*): source of all random draws.
        streamer (*optional*): gets each finished window through `put`, its states through `put_draft` if it has that.
        rules ([`~sampling_tide.Rules`], *optional*): transformers' processors, warpers and criteria.
    """

    def __init__(self, model, canvas: Canvas, settings, generator=None, streamer=None, rules: Rules | None = None):
        self.model, self.canvas, self.settings = model, canvas, settings
        self.generator, self.streamer = generator, streamer
        rules = Rules() if rules is None else rules
        self.processors, self.warpers = rules.processors, rules.warpers
        # the clock is read once per block, apart from the criteria: those are called once per token, and would end
        # rows after the first token of the block just finished
        self.deadlines = [rule for rule in rules.criteria if isinstance(rule, MaxTimeCriteria)]
        self.criteria = StoppingCriteriaList(rule for rule in rules.criteria if rule not in self.deadlines)
        self.temperature = settings.temperature
        self.forward_passes = 0
        shape = model.config.num_hidden_layers, canvas.ids.shape[1]
        self.cache = new_cache(*shape, settings, canvas.is_one_block)
        # the column whose hidden state predicts each column; None where that is its own
        self._predicting = predicting_columns(canvas.valid, True) if model.config.shifted_logits else None
        self._span, self._visible = None, None

    def run(self) -> None:
        """Window after window until every row has ended."""
        canvas = self.canvas
        for start, end in canvas.windows:
            self._denoise(start, end)
            is_late = any(bool(rule(canvas.prompt_ids, None).all()) for rule in self.deadlines)
            canvas.end_rows(end, self.criteria, is_late)
            if self.streamer is not None:
                self.streamer.put(self._streamed(start, end))
            if bool(canvas.finished.all()):
                break
        if self.streamer is not None:
            self.streamer.end()

    def _denoise(self, start: int, end: int) -> None:
        """Reveals the masked positions of one window.

        With fixed steps the host knows how many positions each step reveals, and never waits for the device.
        """
        canvas, num_masked = self.canvas, self.canvas.masked[:, start:end].sum(-1).tolist()
        shares, num_left, step = self._shares(num_masked, end - start), sum(num_masked), 0
        while num_left:
            masked = canvas.masked[:, start:end]
            # flat indices of the masks, as nonzero() would give them; that would make the host wait for their number,
            # which it knows here: a stable sort puts them first, row by row and from left to right
            flat = (~masked).flatten().byte().argsort(stable=True)[:num_left]
            tokens, score_N = self._propose(start, end, flat)
            share, num_revealed = (None, None) if shares is None else shares[step]
            chosen = self._choose(masked, flat, score_N, share)
            canvas.reveal(start, end, chosen, _spread(masked, flat, tokens, 0))
            num_left = int(canvas.masked[:, start:end].sum()) if shares is None else num_left - num_revealed
            step += 1
            if self.streamer is not None and hasattr(self.streamer, "put_draft"):
                first_new = int(canvas.answer_column[0])
                draft = slice(max(start, first_new), min(end, first_new + canvas.num_answer))
                self.streamer.put_draft(canvas.ids[:1, draft].cpu())

    def _shares(self, num_masked: list[int], window: int) -> list[tuple[torch.Tensor, int]] | None:
        """Positions that each step reveals in each row, `(B,)`, and in total; None where the logits decide."""
        settings = self.settings
        if settings.confidence_threshold is not None or settings.entropy_bound is not None:
            return None
        rows = [reveal_counts(count, settings.steps_per_block or window) for count in num_masked]
        steps = list(zip_longest(*rows, fillvalue=0))
        return list(zip(torch.tensor(steps, device=self.canvas.ids.device), map(sum, steps), strict=True))

    def _choose(self, masked, flat, score_N, share: torch.Tensor | None) -> torch.Tensor:
        """Positions to reveal now, `(B, K)`: within the entropy bound, above the threshold, or the step's share."""
        settings = self.settings
        if settings.entropy_bound is not None:
            return within_entropy_bound(_spread(masked, flat, score_N, torch.inf), settings.entropy_bound)
        order_BK = score_BK = _spread(masked, flat, score_N, -1.0)
        if settings.remasking == "random":
            noise = torch.rand(masked.shape, device=masked.device, generator=self.generator)
            order_BK = torch.where(masked, noise, -1.0)
        rank = rank_descending(order_BK)
        if settings.confidence_threshold is not None:
            return masked & ((score_BK >= settings.confidence_threshold) | (rank == 0))
        return masked & (rank < share[:, None])

    def _propose(self, start: int, end: int, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each masked position, `(N,)`, and what decides when it is revealed, `(N,)`: its probability or,
        with an entropy bound, the position's entropy."""
        settings = self.settings
        row, column = flat // (end - start), flat % (end - start)
        hidden = self._forward(start, end)
        reads_all = settings.entropy_bound is not None or settings.guidance_scale not in (None, 1)
        if not (reads_all or self.temperature or self.processors):
            return most_probable(_head_in_stretches(self.model.lm_head, hidden[row, column], settings.mask_token_id))
        logits_NV = self._logits(hidden, start, row, column)
        entropy_N = None if settings.entropy_bound is None else token_entropy(logits_NV)
        tokens, probability_N = propose_tokens(logits_NV, self.temperature, self.warpers, self.generator)
        return tokens, probability_N if entropy_N is None else entropy_N

    def _logits(self, hidden: torch.Tensor, start: int, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Float32 logits `(N, V)` of the masked positions, guided and processed; [MASK] has −∞."""
        logits_NV = self.model.lm_head(hidden[row, column]).float()
        num_rows = len(self.canvas.masked)
        if len(hidden) > num_rows:
            negative_NV = self.model.lm_head(hidden[row + num_rows, column]).float()
            logits_NV = negative_NV + self.settings.guidance_scale * (logits_NV - negative_NV)
        logits_NV[:, self.settings.mask_token_id] = -torch.inf
        if self.processors:
            index = start + column - self.canvas.answer_column[row]
            sequences = self.canvas.sequences()
            # processors expect one token per row: the n-th new ones of all rows go together
            for n in index.unique().tolist():
                at = index == n
                scores_BV = logits_NV.new_zeros(num_rows, logits_NV.shape[-1])
                scores_BV[row[at]] = logits_NV[at]
                prefix = sequences[:, : self.canvas.prompt_ids.shape[1] + n]
                logits_NV[at] = self.processors(prefix, scores_BV)[row[at]]
        return logits_NV

    def _forward(self, start: int, end: int) -> torch.Tensor:
        """Hidden states `(R, end − start, H)` that predict the active columns.

        Columns before them are final: those that the cache does not hold yet (the prompt, or the block finished last)
        run in the same call and are kept. Where every column sees every other, all columns run, but for those that an
        approximate cache holds.
        """
        canvas, width = self.canvas, self.canvas.ids.shape[1]
        num_seen = width if canvas.is_one_block else end
        first, stop = (0, num_seen) if self.cache is None else self.cache.columns(start, end)
        if self._span != (first, stop):
            visible = canvas.visible(first, num_seen)[:, :, : stop - first]
            # without a mask, attention takes its fastest path and does not copy the keys that query heads share
            self._span, self._visible = (first, stop), None if bool(visible.all()) else visible
        self.forward_passes += 1
        hidden = self.model.run_decoder(
            input_ids=canvas.ids[:, first:stop],
            attention_mask=self._visible,
            position_ids=canvas.position[:, first:stop],
            cache=self.cache,
            use_cache=self.cache is not None,
        ).last_hidden_state
        if self.cache is not None:
            # a shifted network predicts the first active column from the one before it, which must run again
            self.cache.keep_before(start if self._predicting is None else max(start - 1, 0))
        if self._predicting is None:
            return hidden[:, start - first : end - first]
        # padding after a row may be predicted from a column that did not run; nobody reads it
        return hidden.take_along_dim((self._predicting[:, start:end] - first).clamp(min=0)[:, :, None], 1)

    def _streamed(self, start: int, end: int) -> torch.Tensor:
        """The first row's answer tokens in the columns [start, end), as they will be returned."""
        answer_column, num_new = int(self.canvas.answer_column[0]), int(self.canvas.num_new[0])
        return self.canvas.answer()[0, max(start - answer_column, 0) : min(end - answer_column, num_new)].cpu()


def _spread(masked: torch.Tensor, flat: torch.Tensor, values_N: torch.Tensor, fill: float) -> torch.Tensor:
    """`(B, K)`: the masked positions' values where they belong, `fill` elsewhere."""
    spread = torch.full((masked.numel(),), fill, dtype=values_N.dtype, device=values_N.device)
    spread[flat] = values_N
    return spread.view_as(masked)


def _head_in_stretches(
    lm_head: torch.nn.Module, hidden_NH: torch.Tensor, mask_token_id: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Float32 logits in pieces of the vocabulary, for [`most_probable`]: first token id and `(N, v)`; [MASK] has −∞.

    On a CPU the pieces of a plain head are small enough to be still in the cache when they are read; all logits at
    once would go through memory several times. On other devices, and where more than a linear layer runs (an adapter,
    quantised weights, hooks), there is one piece.
    """
    is_plain = type(lm_head) is torch.nn.Linear and "forward" not in vars(lm_head)
    if hidden_NH.device.type != "cpu" or not is_plain or lm_head._forward_hooks or lm_head._forward_pre_hooks:
        logits_NV = lm_head(hidden_NH).float()
        logits_NV[:, mask_token_id] = -torch.inf
        yield 0, logits_NV
        return
    size = max(NUM_LOGITS * torch.get_num_threads() // len(hidden_NH) // RUN, SHORTEST) * RUN
    for first in range(0, lm_head.out_features, size):
        piece = slice(first, first + size)
        bias = None if lm_head.bias is None else lm_head.bias[piece]
        logits = F.linear(hidden_NH, lm_head.weight[piece], bias).float()
        if first <= mask_token_id < first + size:
            logits[:, mask_token_id - first] = -torch.inf
        yield first, logits
