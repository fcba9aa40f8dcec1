"""The trainer's step against a naive derivation from logits of all masked positions: every objective and pipeline."""

import dataclasses

import pytest
import references
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_trainer
from torch.testing import assert_close

from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.training.base import run_packed

PAIRS = ("12", "34", "56", "78", "89", "01")
OBJECTIVES = [
    {"divergence": "none"},
    *[{"divergence": name} for name in ("forward_kl", "reverse_kl", "jsd", "calm", "bernoulli_reverse_kl")],
    {"divergence": "reverse_calm", "comp_demo": True},
    {"divergence": "forward_kl", "tidal": True, "comp_demo": True, "tidal_normalization": "expected"},
    {"divergence": "calm", "tidal": True, "comp_demo": True},
    {"divergence": "reverse_calm", "tidal": True, "allow_reverse_tidal": True},
]
TOKEN_ONLY = ("forward_kl", "reverse_kl", "jsd")
CASES = [
    (fields, alignment)
    for fields in OBJECTIVES
    for alignment in ("token", "chunk")
    if not (alignment == "chunk" and fields["divergence"] in TOKEN_ONLY)
]


def rows_of_different_lengths() -> Dataset:
    """Answers of one to six digits, so that a batch has padding on both sides."""
    rows = sorting_rows(8, seed=3, wrong=0.3).to_list()
    for index, row in enumerate(rows):
        for message in row["messages"]:
            message["content"] = message["content"][: 1 + index % 6]
    return Dataset.from_list(rows)


def trainer_for(tmp_path, fields, alignment, dtype=torch.float64, **model_fields):
    tokenizers = build_tokenizer(PAIRS if alignment == "chunk" else ()), build_tokenizer()
    return tiny_trainer(
        tmp_path,
        rows=rows_of_different_lengths(),
        model=tiny_model(0, vocab_size=len(tokenizers[0]), dtype=dtype, **model_fields),
        teacher=tiny_model(1, hidden=48, dtype=dtype),
        preset="tide-shared",
        trainer_kwargs={"processing_class": tokenizers[0], "teacher_processing_class": tokenizers[1]},
        **{"tidal": False, "comp_demo": False, "alignment": alignment, **fields},
    )


def noised(trainer, masks: str) -> dict:
    """All rows under random noise, with everything masked, one position alone, or none."""
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    assert not batch["attention_mask"].all(), "rows of one length have no padding"
    time, mask, demo = (
        torch.rand(8, *shape, generator=torch.Generator().manual_seed(5)) for shape in ((), (40,), (40,))
    )
    if masks == "all":
        time, mask = torch.full_like(time, 0.999), torch.zeros_like(mask)
    elif masks != "random":
        mask = torch.ones_like(mask)
        if masks == "one":
            time[3], mask[3, int((batch["labels"][3] != -100).nonzero()[1])] = 0.5, 0.0
    width = batch["labels"].shape[1]
    return trainer.noising(batch, (time, mask[:, :width], demo[:, :width]))


def definition(trainer, batch):
    """Loss and terms from logits of all masked positions, by loops over positions and chunks."""
    objective, teacher_logits = trainer.objective, None
    if objective.distills:
        teacher_logits = trainer.signal.logits(trainer.signal.hidden(batch.teacher)).double()

    def head_fn(hidden_BPH, weight_VH):
        logits_NV = (hidden_BPH.flatten(0, 1)[batch.student.asked] @ weight_VH.T).double()
        terms = {"ce": naive_denoising(objective, logits_NV, batch)}
        loss = objective.ce_weight * terms["ce"]
        if objective.distills:
            terms["distill"] = naive_distillation(trainer, logits_NV, teacher_logits, batch)
            loss = loss + objective.distill_weight * terms["distill"]
        return loss, terms

    outputs = run_packed(trainer.model, batch.student, head_fn)
    return outputs.loss, outputs.terms


def naive_denoising(objective, logits_NV, batch):
    """Σ w(t) · (−log p(x0)) over what the run divides by; w of a position that may have been masked with its chunk."""
    total = logits_NV.sum() * 0
    for position, (logits, target, row) in enumerate(
        zip(logits_NV, batch.student.targets.tolist(), batch.row.tolist(), strict=True)
    ):
        weight = references.chunk_loss_weight(float(batch.t[row]), int(batch.chunk_tokens[position]), "linear")
        divisor = {
            "token": float(batch.counts.tokens),
            "batch": float(batch.counts.rows),
            "sequence": float(batch.counts.rows) * float(batch.row_tokens[row]),
        }[objective.loss_normalization]
        total = total - weight * torch.log_softmax(logits, -1)[target] / divisor
    return total


def naive_distillation(trainer, student_NV, teacher_logits, batch):
    """The divergence of the pairs, or of the chunks, as references.py derives it."""
    objective, pairs, kind = trainer.objective, batch.pairs, trainer.objective.divergence.name
    num_paired, num_chunks = len(pairs.student_chunk), len(pairs.chunk_row)
    rows = batch.row[:num_paired].tolist() if objective.by_token else pairs.chunk_row.tolist()
    t = [float(batch.t[row]) for row in rows]
    weights, strength = [1.0] * len(rows), None
    if objective.tidal:
        weights = [references.timestep_weight(t_b, "midrange") * objective.tidal_scale for t_b in t]
        progress = references.lambda_progress(3, 10, 0.1, 0.9, "cosine")
        strength = [references.tidal_lambda(progress, 0.9, t_b, "both") for t_b in t]
    if not rows:
        return student_NV.sum() * 0
    student = student_NV[:num_paired]
    if objective.by_token:
        arguments = {"num_items": num_paired, "temperature": 2.0, "size": trainer.plan.shared_vocab_size}
        if objective.tidal:
            return references.tidal_logit(student, teacher_logits, strength, weights, **arguments)
        return references.token_divergence(kind, student, teacher_logits, weights, **arguments)
    likelihoods = [
        references.chunk_log_likelihoods(logits, inputs.targets[: len(logits)], chunk, num_chunks)
        for logits, inputs, chunk in (
            (student, batch.student, pairs.student_chunk),
            (teacher_logits, batch.teacher, pairs.teacher_chunk),
        )
    ]
    if objective.tidal:
        kind = "tidal_reverse" if kind == "reverse_calm" else "tidal"
    return references.chunk_objective(kind, *likelihoods, weights, num_chunks, 2.0, strength)


@pytest.mark.parametrize("masks", ["random", "all", "one", "none"])
@pytest.mark.parametrize(("fields", "alignment"), CASES, ids=lambda value: str(value))
def test_every_objective_from_hidden_states(tmp_path, fields, alignment, masks):
    """Catches a weight, count, λ, ω, scale or pairing that the step takes from elsewhere than the equations: loss,
    terms and every gradient, with a head of its own and with one tied to the embeddings."""
    for tied in (False, True):
        trainer = trainer_for(tmp_path / str(tied), fields, alignment, tie_word_embeddings=tied)
        trainer.state.max_steps, trainer.state.global_step = 10, 3
        batch = noised(trainer, masks)
        num_masked = {"all": int(batch.counts.tokens), "one": 1, "none": 0}.get(masks)
        if num_masked is not None and alignment == "token":
            assert len(batch.student.asked) == num_masked
        trainer.model.zero_grad()
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        loss.backward()
        got = {name: value.grad.clone() for name, value in trainer.model.named_parameters()}
        trainer.model.zero_grad()
        expected, terms = definition(trainer, batch)
        expected.backward()
        # times, and the weights made of them, are float32
        assert_close(loss, expected, rtol=1e-6, atol=1e-14)
        for name, term in terms.items():
            assert_close(outputs.terms[name].sum(), term, rtol=1e-6, atol=1e-14)
        for name, value in trainer.model.named_parameters():
            assert_close(got[name], value.grad, rtol=0, atol=1e-6 * max(float(value.grad.abs().max()), 1e-3), msg=name)
        assert masks == "none" or loss != 0


@pytest.mark.parametrize("normalization", ["sequence", "batch"])
def test_normalization_from_hidden_states(tmp_path, normalization):
    """Catches a divisor per position that the weights lose."""
    trainer = trainer_for(tmp_path, {"divergence": "forward_kl", "loss_normalization": normalization}, "token")
    trainer.state.max_steps, trainer.state.global_step = 10, 3
    batch = noised(trainer, "random")
    loss = trainer.compute_loss(trainer.model, batch)
    assert_close(loss, definition(trainer, batch)[0], rtol=1e-6, atol=0)
    objective = dataclasses.replace(trainer.objective, loss_normalization="token")
    trainer.plan = dataclasses.replace(trainer.plan, objective=objective)
    assert abs(trainer.compute_loss(trainer.model, batch) - loss) > 1e-3 * loss


@pytest.mark.parametrize(("fields", "alignment"), [CASES[1], CASES[-1]], ids=["shared", "cross"])
def test_half_precision(tmp_path, fields, alignment):
    """Catches losses summed, or softmaxes taken, in bfloat16: the step is as exact as its rounded logits."""
    trainer = trainer_for(tmp_path, fields, alignment, dtype=torch.bfloat16)
    trainer.state.max_steps, trainer.state.global_step = 10, 3
    batch = noised(trainer, "random")
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.dtype == torch.float32
    assert_close(loss, definition(trainer, batch)[0].float(), rtol=1e-3, atol=0)
    loss.backward()
    assert all(value.grad.isfinite().all() for value in trainer.model.parameters())
