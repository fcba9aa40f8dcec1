"""Parity with the recorded cases: losses and gradients, masks, alignments, and whole steps through Noising.

What a recorded case does differently on purpose (its own weights, λ beyond the end of training, constant zeros without
a graph) is passed in or met here, so that the package does not repeat it.
"""

import math

import numpy as np
import torch
from golden_cases import assert_golden, golden
from weighted_losses import (
    calm_loss,
    forward_kl_loss,
    reverse_calm_loss,
    reverse_kl_loss,
    tidal_chunk_loss,
    tidal_loss,
)

from tide_hf.alignment import Answer, align_equal_tokens, cut_equal_bytes
from tide_hf.data import DistillationCollator
from tide_hf.diffusion import LayoutSpec, Noising
from tide_hf.losses import (
    DIVERGENCES,
    chunk_log_likelihood,
    denoising_loss,
    tidal_lambda,
    timestep_weight,
    true_token_log_probs,
)
from tide_hf.models import (
    CLEAN_STREAM,
    NOISED_STREAM,
    block_visibility,
    loss_weight,
    masked_probability,
)
from tide_hf.training.objective import Objective, TeacherStates

AXES = {"both": "both", "training_only": "progress", "timestep_only": "time"}


def unclamped_lambda(case) -> float:
    """λ(s) as recorded: progress beyond 1 is kept, and a run without steps counts as one step."""
    s = case["global_step"] / max(case["max_steps"], 1)
    growth = 0.5 * (1 - math.cos(math.pi * s)) if case["lambda_decay"] == "cosine" else s
    return case["lambda_init"] + (case["lambda_max"] - case["lambda_init"]) * growth


def row_lambda(case, t_B: torch.Tensor) -> torch.Tensor:
    """λ of each row."""
    return tidal_lambda(unclamped_lambda(case), case["lambda_max"], t_B, AXES[case["axis_mode"]])


# ---- tokens ----


@golden("kl")
def test_golden_kl(case):
    """Catches a wrong direction, T², vocabulary cut, or divisor of the plain divergences."""
    masked = case.flag("masked_mask")
    teacher = case.array("teacher_logits")[masked]
    divergence = {"kl": forward_kl_loss, "reverse_kl": reverse_kl_loss}[case["mode"]]

    def compute(logits):
        loss = divergence(
            logits[masked],
            teacher,
            num_items=masked.sum(),
            temperature=case["temperature"],
            shared_vocab_size=case["shared_vocab_size"],
        )
        return [case["kl_weight"] * loss]

    assert_golden(case, compute)


@golden("tidal_logit")
def test_golden_tidal_logit(case):
    """Catches a target that is not detached or mixed the wrong way round, and a weight that enters the divisor."""
    masked, t_B = case.flag("masked_mask"), case.array("t")
    row = masked.nonzero()[:, 0]
    weights_N = timestep_weight(t_B, case["timestep_weight"])[row]
    if case.has("token_weights"):
        weights_N = weights_N * case.array("token_weights")[masked]
    teacher = case.array("teacher_logits")[masked]

    def compute(logits):
        loss = tidal_loss(
            logits[masked],
            teacher,
            row_lambda(case, t_B)[row],
            num_items=masked.sum(),
            temperature=case["temperature"],
            weights_N=weights_N,
            shared_vocab_size=case["shared_vocab_size"],
        )
        return [loss]

    assert_golden(case, compute)


@golden("weighted_ce")
def test_golden_weighted_ce(case):
    """Catches a divisor that counts masked instead of trained-on tokens, and mixed-up normalisations."""
    masked, trained = case.flag("masked_mask"), case.array("labels") != -100
    num_rows, row = len(masked), masked.nonzero()[:, 0]
    num_items = {
        "token": trained.sum(),
        "sequence": num_rows * trained.sum(1).clamp(min=1)[row],
        "batch": num_rows,
    }[case["loss_norm_type"]]

    def compute(logits):
        targets, weights = case.array("input_ids")[masked], case.array("loss_weights")[masked]
        return [denoising_loss(logits[masked], targets, weights, num_items=num_items)]

    assert_golden(case, compute)


@golden("weighted_ce", loss_weight_type="scheduler")
def test_golden_loss_weight(case):
    """Catches a weight of the wrong schedule; the recorded one adds 1e-6 to its divisor and forms 1 − α in float32."""
    t_B, recorded = case.array("t").double(), case.array("loss_weights").double()
    masked_B = masked_probability(t_B, case["scheduler"])
    ours = loss_weight(t_B, case["scheduler"]) * masked_B / (masked_B + 1e-6)
    torch.testing.assert_close(ours[:, None].expand_as(recorded), recorded, rtol=1e-4, atol=1e-5)


# ---- masks and alignments ----


@golden("block_mask")
def test_golden_block_mask(case):
    """Catches a noised query that sees the clean copy of its own block, which leaks the answer."""
    length = case["n"]
    block = (torch.arange(length) // case["block_size"]).repeat(2)[None]
    streams = [NOISED_STREAM, CLEAN_STREAM] if case["concat_order"] == "xt_x0" else [CLEAN_STREAM, NOISED_STREAM]
    stream = torch.tensor(streams).repeat_interleave(length)[None]
    visible = block_visibility(stream, block, stream, block)
    assert torch.equal(visible[0, 0], case.flag("mask"))


@golden("position_align")
def test_golden_position_align(case):
    """Catches pairs of different tokens, pairs shifted by one, and answers located inside the prompt."""
    answers_a, answers_b = [], []
    for message, place_a, place_b in zip(case["messages"], case["locations_a"], case["locations_b"], strict=True):
        selected = case["roles"] is None or message["role"] in case["roles"]
        if selected and place_a is not None and place_b is not None:
            answers_a.append(Answer(*place_a, place_a[0]))
            answers_b.append(Answer(*place_b, place_b[0]))
    chunks_a, chunks_b = align_equal_tokens(
        case.array("ids_a").numpy(),
        case.array("offsets_a").numpy(),
        answers_a,
        case.array("ids_b").numpy(),
        case.array("offsets_b").numpy(),
        answers_b,
    )
    place_of = {chunk: index for index, chunk in enumerate(chunks_b.tolist()) if chunk >= 0}
    pairs = [(index, place_of.pop(chunk)) for index, chunk in enumerate(chunks_a.tolist()) if chunk >= 0]
    assert not place_of, "a teacher token without a partner"
    expected = list(zip(case.array("span_align_a").tolist(), case.array("span_align_b").tolist(), strict=True))
    assert pairs == expected


@golden("chunk_align", bytes_equal=True)
def test_golden_chunk_align(case):
    """Catches chunks that are not the shortest, tokens left out, and boundaries of one side only."""
    nbytes, teacher_nbytes = case.array("student_token_nbytes").numpy(), case.array("teacher_token_nbytes").numpy()
    expected, teacher_expected = np.full(len(nbytes), -1), np.full(len(teacher_nbytes), -1)
    for number, (first, behind, student_first, student_behind) in enumerate(case.array("chunks").tolist()):
        expected[student_first:student_behind] = teacher_expected[first:behind] = number
    chunks, teacher_chunks = cut_equal_bytes(nbytes, teacher_nbytes)
    assert chunks.tolist() == expected.tolist() and teacher_chunks.tolist() == teacher_expected.tolist()


# ---- chunks ----


def active_chunk_ids(membership_BLC: torch.Tensor, active_BC: torch.Tensor) -> torch.Tensor:
    """(B·L,): number among the active chunks of the batch of each token, −1 for the others."""
    number_BC = torch.where(active_BC, active_BC.flatten().cumsum(0).view_as(active_BC) - 1, -1)
    inside_BL = membership_BLC.any(-1)
    assert (membership_BLC.sum(-1) <= 1).all(), "a token in two chunks cannot be said by chunk numbers"
    return torch.where(inside_BL, (membership_BLC * number_BC[:, None]).sum(-1), -1).flatten()


def active_likelihoods(case, side: str, logits_BLV: torch.Tensor) -> torch.Tensor:
    """ℓ of the active chunks from the logits of one side, all its tokens passed in."""
    active_BC = case.flag("chunk_mask")
    chunk_ids = active_chunk_ids(case.flag(f"alignment_{side}"), active_BC)
    log_probs = true_token_log_probs(logits_BLV.flatten(0, 1), case.array(f"{side}_input_ids").flatten())
    return chunk_log_likelihood(log_probs, chunk_ids, int(active_BC.sum()))


@golden("chunk_likelihood")
def test_golden_chunk_likelihood(case):
    """Catches temperature on the logits instead of on the chunk, wrong clamps, and log(1−p) lost near p = 1."""
    active_BC = case.flag("chunk_mask")
    chunk_loss = {"forward": calm_loss, "reverse": reverse_calm_loss}[case["direction"]]
    weights = case.array("chunk_weights")[active_BC] if case.has("chunk_weights") else 1.0

    def compute(logits):
        loss = chunk_loss(
            active_likelihoods(case, "student", logits),
            active_likelihoods(case, "teacher", case.array("teacher_logits").to(logits.dtype)),
            num_items=active_BC.sum(),
            temperature=case["temperature"],
            weights_C=weights,
        )
        return [loss]

    assert_golden(case, compute)


@golden("tidal_chunk")
def test_golden_tidal_chunk(case):
    """Catches a mixed label that carries gradient, is formed in logs, or takes λ from another row."""
    active_BC, t_B = case.flag("chunk_mask"), case.array("t")
    row = active_BC.nonzero()[:, 0]

    def compute(logits):
        loss = tidal_chunk_loss(
            active_likelihoods(case, "student", logits),
            active_likelihoods(case, "teacher", case.array("teacher_logits").to(logits.dtype)),
            row_lambda(case, t_B)[row],
            num_items=active_BC.sum(),
            temperature=case["temperature"],
            weights_C=timestep_weight(t_B, case["timestep_weight"])[row],
            reverse=case["direction"] == "reverse",
        )
        return [loss]

    assert_golden(case, compute)


# ---- whole steps ----


def widen(values_BX: torch.Tensor, width: int) -> torch.Tensor:
    """Draws padded to the columns Noising takes; the added ones belong to nothing."""
    return torch.nn.functional.pad(values_BX, (0, width - values_BX.shape[1]))


def chunk_columns(membership_BLC: torch.Tensor) -> torch.Tensor:
    """Column number of each token's chunk, −1 for none."""
    columns = torch.arange(membership_BLC.shape[-1])
    return torch.where(membership_BLC.any(-1), (membership_BLC * columns).sum(-1), -1)


class Step:
    """One recorded training step, run through the collator, Noising and Objective."""

    def __init__(self, case):
        self.case = case
        self.cross = case["pipeline"] == "cross_tokenizer"
        self.student_ids = case.array("student_input_ids" if self.cross else "input_ids")
        self.labels = case.array("labels")
        self.length = self.student_ids.shape[1]
        shared = case["pipeline"] == "shared_tokenizer"
        self.teacher_ids = self.student_ids if shared else case.array("teacher_input_ids")
        padded = case.has("teacher_attention_mask")
        self.teacher_valid = case.flag("teacher_attention_mask") if padded else self.teacher_ids >= 0
        self.chunk_ids, self.teacher_chunk_ids = self._chunks()
        # the recorded teacher of the cross pipeline sees the noised sequence alone, whole and bidirectional
        self.noising = Noising(
            student=LayoutSpec(case["student_mask_token_id"], case["block_size"]),
            teacher=LayoutSpec(
                case["teacher_mask_token_id"], None if self.cross else case["block_size"], clean_copy=not self.cross
            ),
            time_epsilon=case["time_epsilon"],
            comp_demo=case["complementary_demo"],
            demo_ratio=case["demo_ratio"],
            pack=False,
        )
        demo = case.array("rand_demo") if case.has("rand_demo") else torch.zeros(len(self.labels), 0)
        width = max(self.length, demo.shape[1])
        uniforms = (case.array("rand_t"), case.array("rand_mask"), widen(demo, width))
        self.batch = self._collate()
        self.out = self.noising(self.batch, uniforms)
        self.views = 2 if case["complementary_demo"] else 1

    def _chunks(self):
        """Chunk numbers of both sides, (B, L) and (B, L_T)."""
        case = self.case
        if self.cross:
            return tuple(chunk_columns(case.flag(f"alignment_{side}")) for side in ("student", "teacher"))
        if case["pipeline"] == "shared_tokenizer":
            positions = torch.arange(self.length).expand_as(self.student_ids)
            return positions, positions
        # an aligned pair is numbered by its student position: the recorded CompDemo draws have one column per student
        # position, so the draw of chunk number i is the draw of that token
        student = torch.full_like(self.student_ids, -1)
        teacher = torch.full_like(self.teacher_ids, -1)
        pairs = (case.array(name) for name in ("align_student", "align_teacher", "n_aligned"))
        for row, (places, teacher_places, count) in enumerate(zip(*pairs, strict=True)):
            student[row, places[:count]] = places[:count]
            teacher[row, teacher_places[:count]] = places[:count]
        return student, teacher

    def _collate(self):
        """Rows put through the real collator.

        The recorded student has no padding mask (every column is attended, and counted as its label says), so no
        student column is padding. The teacher's padded columns are cut off its rows: the collator pads them again.
        """
        rows = []
        for index in range(len(self.labels)):
            valid = self.teacher_valid[index]
            assert valid.sort(descending=True).values.equal(valid), "recorded padding is on the right"
            rows.append(
                {
                    "row_key": index,
                    "input_ids": self.student_ids[index].tolist(),
                    "labels": self.labels[index].tolist(),
                    "chunk_ids": self.chunk_ids[index].tolist(),
                    "teacher_input_ids": self.teacher_ids[index][valid].tolist(),
                    "teacher_chunk_ids": self.teacher_chunk_ids[index][valid].tolist(),
                }
            )
        batch = DistillationCollator(pad_token_id=0)(rows)
        # columns that are padding in every row were recorded too
        missing = self.teacher_ids.shape[1] - batch["teacher_input_ids"].shape[1]
        for name, value in (("teacher_input_ids", 0), ("teacher_chunk_ids", -1), ("teacher_attention_mask", 0)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=value)
        return batch

    def noised_half(self, doubled: torch.Tensor) -> torch.Tensor:
        """The noised columns of something recorded over the teacher's columns (dimension 1)."""
        if self.cross:
            return doubled
        half = 0 if self.case["concat_order"] == "xt_x0" else 1
        return doubled.unflatten(1, (2, -1))[:, half]

    def teacher_columns(self, view: int) -> torch.Tensor:
        """Columns of our layout [view 1; view 2; x0] in the recorded order of one view."""
        width = self.teacher_ids.shape[1]
        noised = torch.arange(width) + view * width
        if self.cross:
            return noised
        clean = torch.arange(width) + self.views * width
        return torch.cat([noised, clean] if self.case["concat_order"] == "xt_x0" else [clean, noised])


@golden("step_wiring")
def test_golden_step_student_inputs(case):
    """Catches noise drawn at another rate, masked prompts, incomplete chunks and wrong student positions."""
    step = Step(case)
    torch.testing.assert_close(step.out.t, case.array("t"), rtol=0, atol=1e-7)
    assert torch.equal(step.out.student.input_ids, case.array("student_model_input_ids"))
    if case.has("student_position_ids"):
        assert torch.equal(step.out.student.position_ids, case.array("student_position_ids"))
    if case.has("student_attention"):
        stream, block = step.out.student.stream, step.out.student.block
        visible = block_visibility(stream, block, stream, block)[:, 0]
        assert torch.equal(visible, case.flag("student_attention").expand_as(visible))


@golden("step_wiring")
def test_golden_step_teacher_inputs(case):
    """Catches CompDemo views swapped or drawn by another column, and a teacher that sees other tokens or padding."""
    step = Step(case)
    stream, block = step.out.teacher.stream, step.out.teacher.block
    visible = block_visibility(stream, block, stream, block)[:, 0]
    for view in range(step.views):
        columns = step.teacher_columns(view)
        valid = step.teacher_valid.repeat(1, len(columns) // step.teacher_valid.shape[1])
        recorded = case.array(f"teacher_model_input_ids_{view + 1}")
        ids = step.out.teacher.input_ids[:, columns]
        assert torch.equal(ids[valid], recorded[valid])
        if case.has("teacher_position_ids"):
            # recorded positions go on through the padding, ours stop: nobody sees those columns
            positions = step.out.teacher.position_ids[:, columns]
            assert torch.equal(positions[valid], case.array("teacher_position_ids")[valid])
        if case.has("teacher_attention"):
            ours = visible[:, columns][:, :, columns]
            attention = case.flag("teacher_attention").expand_as(ours)
            # padded queries see nothing in the record and each other here, which keeps softmax finite: rows of real
            # queries must agree on every key, padding included
            assert torch.equal(ours[valid], attention[valid])


MODES = {
    "kl": ("forward_kl", False),
    "reverse_kl": ("reverse_kl", False),
    "taid": ("forward_kl", True),
    "alm": ("calm", False),
    "reverse_alm": ("reverse_calm", False),
    "alm_taid": ("calm", True),
    "reverse_alm_taid": ("reverse_calm", True),
}


def objective_of(case) -> Objective:
    """The Objective a recorded step was run with."""
    divergence, tidal = MODES[case["mode"].removesuffix("_aligned")]
    return Objective(
        preset=None,
        alignment="chunk" if case["pipeline"] == "cross_tokenizer" else "token",
        divergence=DIVERGENCES[divergence](),
        tidal=tidal,
        comp_demo=case["complementary_demo"],
        ce_weight=1.0,
        distill_weight=1.0,
        temperature=case["temperature"],
        lambda_init=case.get("lambda_init", 0.1),
        lambda_max=case.get("lambda_max", 0.9),
        lambda_growth=case.get("lambda_decay", "cosine"),
        lambda_axes=AXES[case.get("axis_mode", "both")],
        timestep_weight=case.get("timestep_weight", "midrange"),
        tidal_normalization="none",
        demo_ratio=case["demo_ratio"],
        schedule="linear",
        ce_weighting={"scheduler": "schedule", "uniform": "uniform"}[case["loss_weight_type"]],
        chunk_weighting="paper",
        loss_normalization=case["loss_norm_type"],
    )


def recorded_loss_weight(t: torch.Tensor, schedule: str) -> torch.Tensor:
    """Our weight with 1e-6 added to its divisor, as recorded: up to 1e-3 of it at the smallest t."""
    masked = masked_probability(t, schedule)
    return loss_weight(t, schedule) * masked / (masked + 1e-6)


@golden("step_wiring")
def test_golden_step_losses(case, monkeypatch):
    """Catches pairs, rows, views or counts that do not belong together: each loss is right and the step is wrong.

    The divisor of the cross-entropy is every label that is not −100. The recorded batches have no padding flag on the
    student's side: columns behind an answer carry −100 and count nowhere, exactly as padding does here.
    """
    monkeypatch.setattr("tide_hf.training.objective.loss_weight", recorded_loss_weight)
    step = Step(case)
    # what the teacher returned over our columns; nothing is asked at the clean copy
    views = [step.noised_half(case.array(f"teacher_logits_{view + 1}")) for view in range(step.views)]
    teacher = torch.cat(views, 1)
    columns = step.out.teacher.input_ids.shape[1]
    teacher = torch.nn.functional.pad(teacher, (0, 0, 0, columns - teacher.shape[1]), value=float("nan"))
    teacher_logits = teacher.flatten(0, 1)[step.out.teacher.asked]
    progress = unclamped_lambda(case) if "global_step" in case else 0.0

    def compute(logits):
        # the student's columns are [xt; x0]; logits are recorded for the noised half
        rows, places = step.out.student.asked // (2 * step.length), step.out.student.asked % (2 * step.length)
        # logits as hidden states, behind a head that changes nothing
        states = TeacherStates(teacher_logits, lambda hidden: hidden, case.get("shared_vocab_size"))
        head = torch.eye(logits.shape[-1], dtype=logits.dtype)
        loss, terms = objective_of(case)(logits[rows, places], head, step.out, progress, states)
        return [loss, terms["ce"].sum(), terms["distill"].sum()]

    assert_golden(case, compute, ("loss", "ce_loss", "distill_loss"))
