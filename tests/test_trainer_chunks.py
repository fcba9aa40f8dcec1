"""The step across two tokenizers against a straightforward one: chunk completion, pairing, CompDemo over chunks."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from test_trainer import naive_logits
from tiny import tiny_model, tiny_trainer
from torch.testing import assert_close

from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.diffusion import row_uniforms

PAIRS = ("12", "34", "56", "78", "89", "01")
LOW, HIGH = 1e-7, 1 - 2.0**-23
TEMPERATURE = 2.0


def clipped(probability: torch.Tensor) -> torch.Tensor:
    return probability.clamp(LOW, HIGH)


def chunk_loss(preset: str, p_s, p_t, t: float, lam: float):
    """One chunk's term, from the equations."""
    if preset == "calm":
        return -(p_t * p_s.log() + (1 - p_t) * (1 - p_s).log())
    if preset == "tide-cross":
        return -(p_s * p_t.log() + (1 - p_s) * (1 - p_t).log())
    strength = lam * (1 - t)
    q = clipped(((1 - strength) * p_s + strength * p_t).detach())
    return math.exp(-((t - 0.5) ** 2) / (2 * 0.15**2)) * -(q * p_s.log() + (1 - q) * (1 - p_s).log())


@pytest.mark.parametrize("preset", ["calm", "tide-cross", "tide-shared"])
@pytest.mark.parametrize(("merged", "weighting"), [("student", "paper"), ("student", "exact"), ("teacher", "paper")])
def test_chunk_step_equals_a_straightforward_one(tmp_path, preset, merged, weighting):
    """Catches chunks masked on one side only, paired with another chunk, or counted by tokens: loss and gradient of a
    whole step against loops over rows and chunks, full-length inputs and two teacher passes."""
    pairs, digits = build_tokenizer(PAIRS), build_tokenizer()
    tokenizers = (pairs, digits) if merged == "student" else (digits, pairs)
    student = tiny_model(0, vocab_size=len(tokenizers[0]))
    teacher = tiny_model(1, hidden=48, vocab_size=len(tokenizers[1]))
    trainer = tiny_trainer(
        tmp_path,
        model=student,
        teacher=teacher,
        preset=preset,
        chunk_weighting=weighting,
        max_steps=1,
        trainer_kwargs={"processing_class": tokenizers[0], "teacher_processing_class": tokenizers[1]},
    )
    rows = [trainer.train_dataset[index] for index in range(8)]
    assert any(row["chunk_ids"].count(c) != row["teacher_chunk_ids"].count(c) for row in rows for c in range(4))
    trainer.state.max_steps, trainer.state.global_step, trainer.state.epoch = 10, 3, 0.0
    (noised,), _ = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, torch.device("cpu"))
    student.zero_grad()
    loss = trainer.compute_loss(student, noised)
    loss.backward()
    got = {name: value.grad.clone() for name, value in student.named_parameters()}

    lam = 0.1 + 0.8 * 0.5 * (1 - math.cos(math.pi * 0.3))
    mask_id = student.config.mask_token_id
    ce_terms, chunk_terms, num_trained = [], [], 0
    student.zero_grad()
    for row in rows:
        clean, labels, chunk = (torch.tensor(row[name]) for name in ("input_ids", "labels", "chunk_ids"))
        teacher_clean = torch.tensor(row["teacher_input_ids"])
        teacher_chunk = torch.tensor(row["teacher_chunk_ids"])
        u_time, u_mask, u_demo = row_uniforms(
            trainer.args.seed, 0, [row["row_key"]], max(len(r["labels"]) for r in rows)
        )
        t = float(1e-3 + (1 - 1e-3) * u_time[0])
        masked = (u_mask[0][: len(clean)] < t) & (labels != -100)
        hit = sorted({int(c) for c in chunk[masked] if c >= 0})
        for c in hit:
            masked |= (chunk == c) & (labels != -100)
        num_trained += int((labels != -100).sum())
        z = naive_logits(student, torch.where(masked, mask_id, clean), clean, 4)
        log_p = F.log_softmax(z, -1).gather(-1, clean[:, None]).squeeze(-1)
        for i in masked.nonzero().flatten():
            in_chunk = int(((chunk == chunk[i]) & (labels != -100)).sum()) if chunk[i] >= 0 else 1
            # linear schedule: −α′ = 1, and a chunk of k tokens is masked with probability 1 − (1 − t)^k
            probability = t if weighting == "paper" else 1 - (1 - t) ** in_chunk
            ce_terms.append(-log_p[i] / probability)
        part_a = {c for c in hit if preset == "tide-shared" and u_demo[0][c] < 0.5}
        for part in (part_a, set(hit) - part_a):
            hidden = torch.tensor([int(c) in part for c in teacher_chunk])
            with torch.no_grad():
                z_t = naive_logits(teacher, torch.where(hidden, mask_id, teacher_clean), teacher_clean, 4)
            log_q = F.log_softmax(z_t, -1).gather(-1, teacher_clean[:, None]).squeeze(-1)
            for c in part:
                p_s = clipped((log_p[chunk == c].sum() / TEMPERATURE).exp())
                p_t = clipped((log_q[teacher_chunk == c].sum() / TEMPERATURE).exp())
                chunk_terms.append(chunk_loss(preset, p_s, p_t, t, lam))
    assert chunk_terms
    expected = sum(ce_terms) / num_trained + sum(chunk_terms) / len(chunk_terms)
    expected.backward()
    assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=0)
    for name, value in student.named_parameters():
        assert_close(got[name], value.grad, rtol=1e-4, atol=1e-6 * float(value.grad.abs().max()), msg=name)


@pytest.mark.parametrize("preset", ["calm", "tide-cross", "tide-shared"])
def test_chunk_evaluation_equals_the_step_on_the_same_noise(tmp_path, preset):
    """Catches an evaluation that pairs rows' chunks wrongly, or weighs completed positions as another row's."""
    pairs, digits = build_tokenizer(PAIRS), build_tokenizer()
    trainer = tiny_trainer(
        tmp_path,
        model=tiny_model(0, vocab_size=len(pairs)),
        teacher=tiny_model(1),
        preset=preset,
        chunk_weighting="exact",
        trainer_kwargs={
            "processing_class": pairs,
            "teacher_processing_class": digits,
            "eval_dataset": sorting_rows(6, seed=5),
        },
    )
    metrics = trainer.evaluate()
    batch = trainer._noise(trainer.data_collator([trainer.eval_dataset[index] for index in range(6)]), None)
    trainer.plan = dataclasses.replace(
        trainer.plan, objective=trainer.objective.evaluated
    )  # a chunk holds one student token: completion masks nothing more
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["calm", "tide-cross", "tide-shared"])
def test_one_tokenizer_on_both_sides_trains_through_chunks(tmp_path, preset):
    """Catches the chunk pipeline failing, or computing something else, where every chunk is one token."""
    losses, columns = [], []
    for alignment in ("chunk", "token"):
        trainer = tiny_trainer(
            tmp_path / alignment,
            model=tiny_model(0),
            teacher=tiny_model(1),
            preset=preset,
            divergence={"tide-cross": "reverse_calm", "tide-shared": "calm"}.get(preset),
            alignment=alignment,
            eos_fill="none",
        )
        assert trainer.objective.alignment == alignment
        columns.append(trainer.train_dataset.to_list())
        trainer.train()
        losses.append([(entry["ce"], entry["distill"]) for entry in trainer.state.log_history if "ce" in entry])
    assert columns[0] == columns[1] and max(columns[0][0]["chunk_ids"]) == 6
    assert losses[0] == losses[1] and all(distill != 0 for _, distill in losses[0])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_trainer_leaves_rows_with_a_mask_token_out(tmp_path, side):
    """Catches [MASK] in the data reaching a network as noise: the trainer must tell the preparation its mask ids."""
    tokenizers = {"student": build_tokenizer(), "teacher": build_tokenizer(PAIRS)}
    other = "teacher" if side == "student" else "student"
    tokenizers[other].add_special_tokens({"mask_token": "<masked>"})
    rows = sorting_rows(8, seed=1).to_list()
    rows[2]["messages"][1]["content"] += "<mask>"
    trainer = tiny_trainer(
        tmp_path,
        rows=Dataset.from_list(rows),
        model=tiny_model(0, vocab_size=32, mask_token_id=tokenizers["student"].mask_token_id),
        teacher=tiny_model(1, vocab_size=32, mask_token_id=tokenizers["teacher"].mask_token_id),
        preset="calm",
        trainer_kwargs={
            "processing_class": tokenizers["student"],
            "teacher_processing_class": tokenizers["teacher"],
        },
    )
    dropped = trainer.preparation_reports["train"].dropped
    assert dropped == {f"the {side}'s mask token '<mask>' is part of the text": 1}


def test_trainer_trains_on_the_turns_it_is_told(tmp_path):
    """Catches trained_turns of the configuration that never reaches the rows."""
    (row,) = sorting_rows(1, seed=1).to_list()
    rows = Dataset.from_list([{"messages": row["messages"] * 2}])
    counts = [
        tiny_trainer(tmp_path / turns, rows=rows, trained_turns=turns, eos_fill="none", max_length=32)
        .preparation_reports["train"]
        .num_trained_tokens
        for turns in ("all", "last")
    ]
    assert counts == [14, 7]
