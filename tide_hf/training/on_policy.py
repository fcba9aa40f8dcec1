"""How TIDETrainer trains on what the student writes: when it writes, what is kept, and what is logged."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from ..data import Prompt, holds_prompts_alone, is_prepared, prompt_of, with_stand_ins
from ..diffusion import NoisedBatch, Written
from .rollouts import Rollout, Writing, is_on_policy, random_state, visited_states, written_row


@dataclass
class Rollouts:
    """The answers that the student wrote last, by micro-batch, and how often they were trained on.

    Args:
        batches (`list[list[Rollout]]`): the answers.
        use (`int`): optimizer steps that trained on them; 0 if the next step writes new ones.
        time, seconds (`float`): when the log began, and seconds since then in which answers were written.
        counts (`list[float]`): since then: answers, their tokens, how many had an end, and the sum of their entropies.
    """

    batches: list[list[Rollout]] = field(default_factory=list)
    use: int = 0
    time: float = 0.0
    seconds: float = 0.0
    counts: list[float] = field(default_factory=lambda: [0] * 4)

    def start_log(self) -> None:
        """Begins to count."""
        self.time, self.seconds, self.counts = time.perf_counter(), 0.0, [0] * 4


class OnPolicyMixin:
    """The rows that the student of [`~tide_hf.TIDETrainer`] writes itself; comes before its base."""

    def _prepare(self, name, dataset, args, reports):
        """Takes prompts without answers to train on, where the student answers all of them."""
        if dataset is not None and args.on_policy_fraction == 1 and not is_prepared(dataset):
            if name == "train":
                dataset = with_stand_ins(dataset)
            elif holds_prompts_alone(dataset):
                raise ValueError(
                    f"The {name} dataset holds prompts alone, and evaluation compares with answers: give rows that "
                    "have them, or leave eval_dataset and eval_strategy out."
                )
        return super()._prepare(name, dataset, args, reports)

    def _start_on_policy(self) -> None:
        """Refuses what could not be honoured, and makes what a run needs to write."""
        self._rollouts, self._copy = Rollouts(), None
        if not self.objective.on_policy_fraction:
            return
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        is_zero3 = plugin is not None and plugin.zero_stage == 3
        if is_zero3 or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise ValueError(
                "on_policy_fraction needs the student's whole weights to write with, which DeepSpeed's ZeRO-3 and "
                "the first FSDP do not give: shard with FSDP2 (fsdp_config={'fsdp_version': 2, …}) or ZeRO-2."
            )
        if self.plan.student.block_size is None and self.args.rollout_max_new_tokens is None:
            raise ValueError(
                "on_policy_fraction with a full-sequence student needs rollout_max_new_tokens: it writes an answer "
                "of that length at once."
            )
        if self.is_fsdp_enabled:
            # the student's parameters are sharded in training: each process writes with a copy of its own
            self._copy = copy.deepcopy(self.model).requires_grad_(False).to(self.args.device)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _noised_batches(self, batches: list[dict]) -> list[NoisedBatch]:
        """The micro-batches of an optimizer step, noised; with what the student wrote in place of some rows."""
        fraction, rollouts = self.objective.on_policy_fraction, self._rollouts
        if not fraction:
            return [self._noise(batch, self._pass) for batch in batches]
        rest, prompts = zip(*(self._divided(batch) for batch in batches), strict=True)
        if rollouts.use == 0:
            rollouts.batches = self._write(prompts)
        written = rollouts.batches[: len(batches)] + [[] for _ in batches[len(rollouts.batches) :]]
        # the last step of a pass may have fewer micro-batches than the one that the answers were written in
        written[-1] = [*chain(written[-1], *rollouts.batches[len(batches) :])]
        use, rollouts.use = rollouts.use, (rollouts.use + 1) % self.args.rollout_reuse
        return [self._mixed(*pair, use) for pair in zip(rest, written, strict=True)]

    def _divided(self, batch: dict) -> tuple[list[dict], list[tuple[int, Prompt]]]:
        """The rows of a micro-batch that are trained on as they are, and keys and prompts of those to be written."""
        rest, prompts = [], []
        for row in _rows_of(batch):
            key = row["row_key"]
            # 0 is the key of rows without weight
            prompt = (
                prompt_of(row) if key and is_on_policy(key, self.args.seed, self.args.on_policy_fraction) else None
            )
            if prompt is None:
                rest.append(row)
            else:
                prompts.append((key, prompt))
        return rest, prompts

    def _mixed(self, rows: list[dict], rollouts: list[Rollout], use: int) -> NoisedBatch:
        """One micro-batch of prepared rows and of rows that the student wrote."""
        plan, args = self.plan, self.args
        written = [written_row(one, plan.preparation, plan.student.mask_token_id, plan.teacher) for one in rollouts]
        batch = self.data_collator([*rows, *written] or [self.data_collator.empty_row()])
        masked = torch.zeros_like(batch["labels"], dtype=torch.bool)
        is_written = torch.zeros(len(masked), dtype=torch.bool)
        if args.rollout_states == "visited":
            states = visited_states(rollouts, args.seed, use, plan.student.block_size)
        else:
            states = [random_state(one, args.seed, use, plan.schedule, args.time_epsilon) for one in rollouts]
        for row, (one, state) in enumerate(zip(rollouts, states, strict=True), len(rows)):
            masked[row, len(one.prompt) : len(one.prompt) + len(state)] = torch.tensor(state)
            is_written[row] = True
        return self._noise(batch, self._pass, given=Written(is_written, masked))

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write(self, batches: Sequence[list[tuple[int, Prompt]]]) -> list[list[Rollout]]:
        """An answer to each prompt, by micro-batch."""
        started, network, writing, written = time.perf_counter(), self._writer(), self._writing(), []
        for batch in batches:
            keys, prompts = zip(*batch, strict=True) if batch else ((), ())
            with self.compute_loss_context_manager():
                written.append(writing(network, prompts, keys, self._pass) if batch else [])
        stats, answers = self._rollouts, [*chain(*written)]
        stats.seconds += time.perf_counter() - started
        measured = [(1, len(one.answer), one.is_ended, one.entropy) for one in answers]
        new = [sum(values) for values in zip(*measured, strict=True)] or [0] * 4
        stats.counts = [count + more for count, more in zip(stats.counts, new, strict=True)]
        return written

    def _writing(self) -> Writing:
        """How the student writes at this step."""
        args, plan = self.args, self.plan
        most, first = args.rollout_max_new_tokens, args.rollout_initial_tokens
        if first is not None:
            most = round(first + (most - first) * min(self.state.global_step / max(self.state.max_steps, 1), 1))
        return Writing(
            seed=args.seed,
            temperature=args.rollout_temperature,
            steps=args.rollout_steps,
            order=args.rollout_order,
            max_new_tokens=most,
            max_length=args.max_length,
            num_tokens=plan.shared_vocab_size if plan.alignment == "token" else len(plan.preparation.tokenizer),
            block_size=plan.student.block_size,
        )

    @torch.no_grad()
    def _writer(self):
        """The student with whole parameters."""
        network = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        if self._copy is None:
            return network
        sharded = dict(network.named_parameters())
        for name, mine in self._copy.named_parameters():
            theirs = sharded[name]
            mine.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
        return self._copy

    # -- checkpoints and logs -----------------------------------------------------------------------------------------

    def _rollouts_file(self, folder: str) -> Path:
        return Path(folder) / f"rollouts_{self.accelerator.process_index}.pt"

    def _save_rng_state(self, output_dir):
        """Also saves answers that the next step trains on: they were written with earlier weights."""
        super()._save_rng_state(output_dir)
        if self._rollouts.use:
            batches = [[one.to_dict() for one in batch] for batch in self._rollouts.batches]
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            saved = {"use": self._rollouts.use, "batches": batches, "num_processes": self.accelerator.num_processes}
            torch.save(saved, self._rollouts_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Also loads these answers, before the first step is noised."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._rollouts_file(checkpoint).is_file():
            saved = torch.load(self._rollouts_file(checkpoint), weights_only=True)
            if saved["num_processes"] != self.accelerator.num_processes:
                raise ValueError(
                    f"{checkpoint} was saved by {saved['num_processes']} processes between two steps that train on "
                    f"the same answers, and cannot be resumed by {self.accelerator.num_processes}: start as many, or "
                    "resume from a checkpoint at a multiple of rollout_reuse."
                )
            self._rollouts.use = saved["use"]
            self._rollouts.batches = [[Rollout(**one) for one in batch] for batch in saved["batches"]]

    def _rollout_logs(self) -> dict[str, float]:
        """What was written since the last log, over all processes; nothing where the student does not write."""
        rollouts = self._rollouts
        if not self.objective.on_policy_fraction:
            return {}
        wall = time.perf_counter() - rollouts.time
        values = torch.tensor([rollouts.seconds, wall, *rollouts.counts], device=self.args.device)
        seconds, wall, rows, tokens, ended, entropy = self.accelerator.reduce(values, reduction="sum").tolist()
        rollouts.start_log()
        logs = {"rollout_time_share": seconds / max(wall, 1e-9)}
        if rows:
            num_processes = self.accelerator.num_processes
            logs["rollout_tokens_per_second"] = tokens / max(seconds / num_processes, 1e-9)
            logs |= {"rollout_tokens": tokens / rows, "rollout_ended": ended / rows}
            logs["rollout_entropy"] = entropy / rows
        return logs


def _rows_of(batch: dict[str, torch.Tensor]) -> list[dict]:
    """The rows of a collated batch, without padding."""
    sizes = batch["attention_mask"].sum(1).tolist()
    teacher_sizes = batch["teacher_attention_mask"].sum(1).tolist()
    rows = []
    for index, (size, teacher_size) in enumerate(zip(sizes, teacher_sizes, strict=True)):
        row = {name: batch[name][index, :size].tolist() for name in ("input_ids", "labels", "chunk_ids")}
        for name in ("teacher_input_ids", "teacher_chunk_ids"):
            row[name] = batch[name][index, :teacher_size].tolist()
        rows.append({"row_key": int(batch["row_key"][index]), **row})
    return rows
