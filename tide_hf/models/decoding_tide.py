"""Denoises the blocks of a canvas in order, over one cache that is only ever extended (BD3LM 2503.09573, algorithm 2).

This file travels with checkpoints: it imports its siblings, torch and transformers.

Shapes: B rows, R rows in all (2B with guidance), K columns being denoised, N active positions among them (those
whose token is proposed: masked ones, and those that may be edited), H hidden, V vocabulary.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain, repeat, zip_longest

import torch
import torch.nn.functional as F
from transformers.generation import MaxTimeCriteria, StoppingCriteriaList

from .caches_tide import new_cache
from .canvas_tide import Canvas
from .editing_tide import TokenEdits
from .masked_diffusion import predicting_columns
from .reveal_rules_tide import MaskedPositions, RevealRule, rule_of
from .row_noise import RowDraws
from .sampling_tide import RUN, Rules, Scoring, most_probable, propose_tokens

NUM_LOGITS = 1 << 18  # as many float32 logits as the cache of a CPU core holds, 1 MB
SHORTEST = 8  # least runs per piece of the vocabulary: with fewer, a piece costs more than it saves


class Decoder:
    """Runs the windows of a canvas in order.

    Args:
        model (`MaskedDiffusionMixin`): its `run_decoder` and `lm_head` are called.
        canvas ([`Canvas`]): what is denoised, in place.
        settings ([`TIDEGenerationConfig`]): with every default filled in.
        generator (`torch.Generator` or [`RowDraws`], *optional*): source of all random draws; with the second, which
            draws tokens alone, they do not depend on the other rows of the batch.
        streamer (*optional*): gets each finished window through `put`, its states through `put_draft` if it has that.
        rules ([`~sampling_tide.Rules`], *optional*): transformers' processors, warpers and criteria.
        reveal_rule ([`RevealRule`], *optional*): instead of the one that the settings choose.
    """

    def __init__(
        self,
        model,
        canvas: Canvas,
        settings,
        generator=None,
        streamer=None,
        rules: Rules | None = None,
        reveal_rule: RevealRule | None = None,
    ):
        self.model, self.canvas, self.settings = model, canvas, settings
        self.generator, self.streamer = generator, streamer
        self.reveal_rule = rule_of(settings) if reveal_rule is None else reveal_rule
        self.scoring = _scoring(settings, self.reveal_rule, canvas.ids.device)
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
        """Reveals the masked positions of one window and, with an editing threshold, changes those it has revealed.

        With an exact rule and no editing the host knows how many positions each step reveals, and never waits for the
        device.
        """
        canvas, rule, edits, num_left = self.canvas, self.reveal_rule, None, None
        masked, valid = canvas.masked[:, start:end], canvas.valid[: len(canvas.masked), start:end]
        # a row's block is as long as its own columns: in a batch padding may follow the last one of a short text
        num_masked, sizes = torch.stack([masked.sum(-1), valid.sum(-1)]).tolist()
        if self.settings.editing_threshold is not None:
            edits = TokenEdits(masked, self.settings.editing_threshold, self.settings.max_editing_steps)
        elif rule.is_exact:
            num_left = sum(num_masked)
        for step, (quota, num_revealed) in enumerate(self._quotas(num_masked, sizes), 1):
            masked = canvas.masked[:, start:end]
            active = masked if edits is None else edits.active(masked)
            num_active = int(active.sum()) if num_left is None else num_left
            if not num_active:
                break
            # flat indices of the active positions, as nonzero() would give them; that would make the host wait for
            # their number, which it may know: a stable sort puts them first, row by row and from left to right
            flat = (~active).flatten().byte().argsort(stable=True)[:num_active]
            tokens_N, found = self._propose(start, end, flat, step)
            tokens = _spread(active, flat, tokens_N)
            found = {name: _spread(active, flat, values_N) for name, values_N in found.items()}
            chosen = rule.reveal(MaskedPositions(masked, quota, self.generator, **found)) & masked
            if num_left is None and not bool(chosen.any()) and bool(masked.any()):
                raise ValueError(
                    f"{type(rule).__name__}.reveal chose none of the masked positions: it would never end."
                )
            if edits is not None:
                chosen |= edits.changed(masked, canvas.ids[: len(masked), start:end], tokens, found["confidence"])
            canvas.reveal(start, end, chosen, tokens, step, found.get("entropy"))
            num_left = None if num_left is None else num_left - num_revealed
            self._show_draft(start, end)

    def _show_draft(self, start: int, end: int) -> None:
        """Streams the answer tokens in the columns [start, end) as they stand, if the streamer takes drafts."""
        if hasattr(self.streamer, "put_draft"):
            first_new = int(self.canvas.answer_column[0])
            draft = slice(max(start, first_new), min(end, first_new + self.canvas.num_answer))
            self.streamer.put_draft(self.canvas.ids[:1, draft].cpu())

    def _quotas(self, num_masked: list[int], sizes: list[int]) -> Iterator[tuple[torch.Tensor, int]]:
        """The rule's number for each pass and row, `(B,)`, and its sum over the rows; zeros after the last."""
        counted = zip(num_masked, sizes, strict=True)
        rows = [self.reveal_rule.quotas(count, size, self.generator) for count, size in counted]
        steps = [*zip_longest(*rows, fillvalue=0), (0,) * len(rows)]
        quotas = list(zip(torch.tensor(steps, device=self.canvas.ids.device), map(sum, steps), strict=True))
        return chain(quotas, repeat(quotas[-1]))

    def _propose(
        self, start: int, end: int, flat: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A token for each active position, `(N,)`, and the statistics asked for, `(N,)` each."""
        settings = self.settings
        row, column = flat // (end - start), flat % (end - start)
        hidden = self._forward(start, end)
        is_guided = settings.guidance_scale not in (None, 1)
        if not (is_guided or self.temperature or self.processors) and self.scoring.is_confidence:
            pieces = _head_in_stretches(self.model.lm_head, hidden[row, column], settings.mask_token_id)
            tokens, probability_N = most_probable(pieces)
            return tokens, {"confidence": probability_N}
        logits_NV = self._logits(hidden, start, row, column)
        generator = self.generator
        if isinstance(generator, RowDraws):
            position = self.canvas.position[row, start + column]
            generator = partial(generator.tokens, row_N=row, position_N=position, draw=step)
        return propose_tokens(logits_NV, self.temperature, self.warpers, generator, self.scoring)

    def _logits(self, hidden: torch.Tensor, start: int, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Float32 logits `(N, V)` of the active positions, guided and processed; [MASK] has −∞."""
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
            visible = canvas.visible(first, num_seen, self.model.config.causal_blocks)[:, :, : stop - first]
            # without a mask, attention takes its fastest path and does not copy the keys that query heads share
            self._span, self._visible = (first, stop), None if bool(visible.all()) else visible
        self.forward_passes += 1
        ids, position = canvas.ids[:, first:stop], canvas.position[:, first:stop]
        if self.model.config.causal_blocks:
            order = canvas.masks_last(first, start, stop, self.settings.mask_token_id)
            ids, position = ids.gather(1, order), position.gather(1, order)
        hidden = self.model.run_decoder(
            input_ids=ids,
            attention_mask=self._visible,
            position_ids=position,
            cache=self.cache,
            use_cache=self.cache is not None,
        ).last_hidden_state
        if self.model.config.causal_blocks:
            hidden = hidden.take_along_dim(order.argsort(1)[:, :, None], 1)
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


def _scoring(settings, rule: RevealRule, device: torch.device) -> Scoring:
    """What the rule, and editing, must know of the proposed tokens."""
    statistics = {*rule.statistics} if settings.editing_threshold is None else {*rule.statistics, "confidence"}
    suppressed = settings.suppress_confidence_tokens
    return Scoring(
        statistics=tuple(statistics),
        of_sampling=settings.confidence_from == "sampling",
        suppressed=torch.tensor(suppressed, device=device) if suppressed else None,
    )


def _spread(active: torch.Tensor, flat: torch.Tensor, values_N: torch.Tensor) -> torch.Tensor:
    """`(B, K)`: the active positions' values where they belong, 0 elsewhere."""
    spread = torch.zeros(active.numel(), dtype=values_N.dtype, device=values_N.device)
    spread[flat] = values_N
    return spread.view_as(active)


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
