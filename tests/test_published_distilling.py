"""Published families as students and as teachers: a distillation step against naive forwards of the published tensors.

Each family is a student once and a teacher once, in every pipeline.
"""

import pytest
import references
import torch
from published import FAMILIES, write_checkpoint
from published_students import BLOCKS, families, naive_masked_logits
from test_step_losses import PAIRS, rows_of_different_lengths
from tiny import tiny_trainer

from tide_hf.demo.sorting import build_tokenizer

TEACHER_OF = {
    "llada-8b": "llada2",
    "llada-moe": "sdar",
    "llada2": "dream",
    "sdar": "wedlm-8b",
    "sdar-moe": "wedlm-7b",
    "dream": "sdar-moe",
    "wedlm-8b": "llada-8b",
    "wedlm-7b": "llada-moe",
}
# the pairs of digits come after all tokens of the plain tokenizer
MASK, SHARED = build_tokenizer().mask_token_id, len(build_tokenizer())
TEMPERATURE = 2.0
OBJECTIVES = {
    "token": {"divergence": "forward_kl", "alignment": "token"},
    "chunk": {"divergence": "calm", "alignment": "chunk"},
}


def distilling(tmp_path, family: str, pipeline: str):
    """The trainer of a family under its teacher, and of both family, config.json and published tensors."""
    tokenizers = {
        "student": build_tokenizer(PAIRS if pipeline == "chunk" else ()),
        "teacher": build_tokenizer(),
    }
    networks = {}
    for role, name in (("student", family), ("teacher", TEACHER_OF[family])):
        special = {field: getattr(tokenizers[role], field) for field in ("mask_token_id", "pad_token_id")}
        networks[role] = name, *write_checkpoint(tmp_path / role, name, **special, **BLOCKS)
    trainer = tiny_trainer(
        tmp_path,
        rows=rows_of_different_lengths(),
        model=str(tmp_path / "student"),
        teacher=str(tmp_path / "teacher"),
        teacher_context="native",
        eos_fill="none",
        tidal=False,
        comp_demo=False,
        temperature=TEMPERATURE,
        trainer_kwargs={
            "processing_class": tokenizers["student"],
            "teacher_processing_class": tokenizers["teacher"],
        },
        **OBJECTIVES[pipeline],
    )
    return trainer, networks


def masked_logits(network, ids, masked) -> dict[int, torch.Tensor]:
    family, config, weights = network
    return naive_masked_logits(family, config, weights, ids, masked, MASK)


def naive_row(networks, row: dict, t: float, draws) -> tuple:
    """Nats of one row without padding, and of its active chunks the logits and tokens of both sides."""
    masked = (draws < t) & (row["labels"] != -100)
    hit = {int(chunk) for chunk in row["chunk_ids"][masked] if chunk >= 0}
    for chunk in hit:
        masked |= (row["chunk_ids"] == chunk) & (row["labels"] != -100)
    logits, nats = masked_logits(networks["student"], row["input_ids"], masked), 0
    for place, values in logits.items():
        chunk = row["chunk_ids"][place]
        size = int(((row["chunk_ids"] == chunk) & (row["labels"] != -100)).sum()) if chunk >= 0 else 1
        weight = references.chunk_loss_weight(t, size, "linear")
        nats = nats - weight * values.log_softmax(-1)[row["input_ids"][place]]
    hidden = torch.tensor([int(chunk) in hit for chunk in row["teacher_chunk_ids"]])
    taught = masked_logits(networks["teacher"], row["teacher_input_ids"], hidden)
    pairs = []
    for chunk in sorted(hit):
        own, other = (row[name] == chunk for name in ("chunk_ids", "teacher_chunk_ids"))
        if (row["labels"][own] != -100).all() and other.any():
            sides = [(own, logits, row["input_ids"]), (other, taught, row["teacher_input_ids"])]
            pairs.append([[(side[p], ids[p]) for p in at.nonzero()[:, 0].tolist()] for at, side, ids in sides])
    return nats, pairs


def naive_step(networks, batch: dict, time, draws, pipeline: str) -> tuple:
    """Both terms of a batch, divided by its trained-on tokens and by its pairs."""
    nats, pairs, num_tokens = 0, [], int((batch["labels"] != -100).sum())
    for number in range(len(time)):
        own, other = batch["attention_mask"][number].bool(), batch["teacher_attention_mask"][number].bool()
        row = {name: batch[name][number][own] for name in ("input_ids", "labels", "chunk_ids")}
        row |= {name: batch[name][number][other] for name in ("teacher_input_ids", "teacher_chunk_ids")}
        t = 1e-3 + (1 - 1e-3) * float(time[number])
        row_nats, row_pairs = naive_row(networks, row, t, draws[number, : len(own)][own])
        nats, pairs = nats + row_nats, pairs + row_pairs
    ones = [1.0] * len(pairs)
    if pipeline == "token":
        student, teacher = (torch.stack([pair[side][0][0] for pair in pairs]) for side in (0, 1))
        found = references.token_divergence("forward_kl", student, teacher, ones, len(pairs), TEMPERATURE, SHARED)
    else:
        student, teacher = (
            [sum(logits.log_softmax(-1)[token] for logits, token in pair[side]) for pair in pairs] for side in (0, 1)
        )
        found = references.chunk_objective("calm", student, teacher, ones, len(pairs), TEMPERATURE)
    return nats / num_tokens, found


@pytest.mark.parametrize("pipeline", list(OBJECTIVES))
@families
def test_a_step_of_a_published_student_under_another_family(family, pipeline, tmp_path):
    """Catches a student or a teacher shown another context than it was trained on, asked at the wrong position, or
    paired with the wrong one: both terms, and the gradient of the published head and embedding."""
    trainer, networks = distilling(tmp_path, family, pipeline)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(8)])
    draw = torch.Generator().manual_seed(5)
    time, masks, demo = torch.rand(8, generator=draw), *torch.rand(2, 8, batch["labels"].shape[1], generator=draw)
    assert not batch["attention_mask"].all() and not batch["teacher_attention_mask"].all()

    names, weights = FAMILIES[family][3], networks["student"][2]
    ends = {name: weights[f"{names[name]}.weight"].double().requires_grad_() for name in ("embed", "head")}
    weights |= {f"{names[name]}.weight": value for name, value in ends.items()}
    ce, distill = naive_step(networks, batch, time, masks, pipeline)
    objective = trainer.objective
    (objective.ce_weight * ce + objective.distill_weight * distill).backward()

    noised = trainer.noising(batch, (time, masks, demo))
    loss, outputs = trainer.compute_loss(trainer.model, noised, return_outputs=True)
    loss.backward()
    assert outputs.terms["ce"].sum().item() == pytest.approx(ce.item(), rel=1e-4)
    assert outputs.terms["distill"].sum().item() == pytest.approx(distill.item(), rel=1e-4) and distill > 1e-2
    for value, module in ((ends["embed"], trainer.model.model.embed_tokens), (ends["head"], trainer.model.lm_head)):
        torch.testing.assert_close(module.weight.grad.double(), value.grad, rtol=1e-3, atol=1e-4)
