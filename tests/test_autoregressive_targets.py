"""Where an autoregressive teacher is a target, by enumeration; suffix masks; and runs with such teachers."""

import itertools
import logging

import pytest
import torch
from test_autoregressive_teachers import causal_model, trainer_for
from test_trainer import losses_of, weights_of
from tiny import tiny_model, tiny_trainer
from torch.testing import assert_close

from tide_hf.diffusion import LayoutSpec, Noising
from tide_hf.losses import DIVERGENCES
from tide_hf.teachers.autoregressive import AUTOREGRESSIVE
from tide_hf.training.objective import Objective, TeacherStates

# -- two words, all masks ---------------------------------------------------------------------------------------------

A, B, MASK, BOS = range(4)
MASKS = list(itertools.product((False, True), repeat=3))
STATES = list(itertools.product((A, B, MASK), repeat=3))


def two_words() -> tuple[dict, tuple, list]:
    """AAA and BBB under every mask, t = ½: a collated batch, its draws, and the state of each row."""
    rows = [(word, masked) for word in (A, B) for masked in MASKS]
    ids = torch.tensor([[BOS, word, word, word] for word, _ in rows])
    masked = torch.tensor([[False, *masked] for _, masked in rows])
    batch = {
        "input_ids": ids,
        "labels": torch.where(ids == BOS, -100, ids),
        "attention_mask": torch.ones_like(ids),
        "chunk_ids": (torch.arange(4) - 1).expand_as(ids),
        "row_key": torch.arange(len(ids)),
    }
    batch |= {f"teacher_{name}": batch[name] for name in ("input_ids", "attention_mask", "chunk_ids")}
    draws = torch.full((len(ids),), 0.4995), torch.where(masked, 0.0, 0.99), torch.zeros(len(ids), 4)
    states = [tuple(MASK if hide else word for hide in masked) for word, masked in rows]
    return batch, draws, states


def distance_reached(targets: str, progress: float = 0.0) -> float:
    """Total variation from the data of a sampler that reveals one token at a time, in random order, from the table
    that minimises CE and the divergence to the exact autoregressive distribution."""
    batch, draws, states = two_words()
    student = LayoutSpec(MASK, None, clean_copy=False)
    noised = Noising(student, AUTOREGRESSIVE, exact_targets=targets == "exact")(batch, draws)
    objective = Objective(
        **dict.fromkeys(("lambda_init", "lambda_max", "demo_ratio"), 0.0),
        **dict.fromkeys(("lambda_growth", "lambda_axes", "timestep_weight", "tidal_normalization"), ""),
        **{"preset": None, "alignment": "token", "divergence": DIVERGENCES["forward_kl"](), "tidal": False},
        **{"comp_demo": False, "ce_weight": 1.0, "distill_weight": 3.0, "temperature": 1.0, "schedule": "linear"},
        **{"ce_weighting": "schedule", "chunk_weighting": "exact", "loss_normalization": "token"},
        ar_targets=targets,
    )
    # p(first) = ½; every other token repeats the first
    first = noised.teacher.position_ids.flatten()[noised.teacher.asked] == 0
    repeated = torch.where(torch.arange(4) == noised.teacher.targets[:, None], 0.0, -60.0).double()
    even = torch.tensor([0.0, 0.0, -60.0, -60.0], dtype=torch.float64)
    teacher = TeacherStates(torch.where(first[:, None], even, repeated), lambda hidden: hidden, 4)
    position = noised.student.position_ids.flatten()[noised.student.asked] - 1
    state = torch.tensor([STATES.index(states[row]) for row in noised.row])
    table = torch.zeros(len(STATES), 3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=400, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        eye = torch.eye(4, dtype=torch.float64)
        loss, _ = objective(table[state, position], eye, noised, 0.0, teacher, progress)
        loss.backward()
        return loss

    optimizer.step(closure)
    chances = table.detach().softmax(-1)
    reached = {(MASK,) * 3: 1.0}
    for hidden in (3, 2, 1):
        following = dict.fromkeys(itertools.product((A, B, MASK), repeat=3), 0.0)
        for before, chance in reached.items():
            for place in [place for place in range(3) if before[place] == MASK]:
                for token in (A, B):
                    after = (*before[:place], token, *before[place + 1 :])
                    following[after] += chance / hidden * float(chances[STATES.index(before), place, token])
        reached = {state: chance for state, chance in following.items() if chance}
    data = {(A,) * 3: 0.5, (B,) * 3: 0.5}
    return 0.5 * sum(abs(reached.get(word, 0) - data.get(word, 0)) for word in {*reached, *data})


def test_exact_targets_end_at_the_data():
    """Catches a target where the student sees a token to its right: its minimiser is not the data. All targets end
    far from it, annealed ones at the data, once their training is over."""
    assert distance_reached("exact") < 1e-3
    assert distance_reached("all") > 0.1
    assert distance_reached("annealed", 1.0) < 1e-3
    assert distance_reached("annealed", 0.0) == pytest.approx(distance_reached("all"), abs=1e-6)


# -- suffix masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [4, 3, None])
@pytest.mark.parametrize("chunks", ["none", "single", "across"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_suffix_masks_are_unbiased(block_size, chunks, padding):
    """Catches a weight that is not one over the probability of being masked: over all cuts of all blocks, which are
    equally likely, every trained-on token counts once; and masks that are no suffixes."""
    labels = torch.tensor([-100, -100, 3, 4, 5, 6, 7, 8, 9, -100, 3])
    length, size = len(labels), block_size or len(labels)
    chunk_ids = {
        "none": torch.full((length,), -1),
        "single": torch.tensor([-1, -1, *range(7), -1, 7]),
        "across": torch.tensor([-1, -1, 0, 0, 0, 1, 1, 1, 1, -1, 2]),
    }[chunks]
    in_block = [int((labels[start : start + size] != -100).sum()) for start in range(0, length, size)]
    cuts = list(itertools.product(*[[(cut + 0.5) / count for cut in range(count)] or [0.5] for count in in_block]))
    pad = (2, 0) if padding == "left" else (0, 2)
    padded = {
        name: torch.nn.functional.pad(values, pad, value=fill).expand(len(cuts), -1)
        for name, values, fill in (
            ("input_ids", torch.arange(length), 0),
            ("labels", labels, -100),
            ("attention_mask", torch.ones(length, dtype=torch.long), 0),
            ("chunk_ids", chunk_ids, -1),
        )
    }
    teacher_side = {f"teacher_{name}": padded[name] for name in ("input_ids", "attention_mask", "chunk_ids")}
    batch = {**padded, **teacher_side, "row_key": torch.arange(len(cuts))}
    student = LayoutSpec(20, block_size, clean_copy=block_size is not None)
    noising = Noising(student, AUTOREGRESSIVE, suffix_mask_fraction=1.0)
    uniform = torch.zeros(len(cuts), length + 2)
    uniform[:, : len(in_block)] = torch.tensor(cuts)
    no_masks = torch.zeros(len(cuts)), torch.ones(len(cuts), length + 2), torch.zeros(len(cuts), length + 2)
    noised = noising(batch, no_masks, suffix_uniforms=(torch.zeros(len(cuts)), uniform))
    position = noised.student.position_ids.flatten()[noised.student.asked]
    total = torch.zeros(length).index_add_(0, position, noised.suffix_weight)
    assert_close(total / len(cuts), (labels != -100).float(), rtol=1e-5, atol=0)
    masked = torch.zeros(len(cuts), length, dtype=torch.bool)
    masked[noised.row, position] = True
    assert_close(noised.t, (masked.sum(1) / (labels != -100).sum()).float())
    for row in masked:
        for start in range(0, length, size):
            here = row[start : start + size][labels[start : start + size] != -100].tolist()
            # a chunk that ends in the next block may be completed by it
            assert chunks == "across" or (here == sorted(here) and (not here or here[-1]))
    assert chunks != "single" or noised.pairs.is_exact.any()


def test_suffix_masks_without_a_teacher(tmp_path):
    """Catches a setting of plain training that only distillation reads, and one that changes evaluation or the rows
    it was not drawn for."""
    for fraction in (0.0, 0.5, 1.0):
        trainer = tiny_trainer(tmp_path, suffix_mask_fraction=fraction)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(16)])
        noised, plain = trainer._noise(batch, 0), trainer._noise(batch, None)
        assert plain.suffix_weight is None
        chosen = torch.zeros(16, dtype=torch.bool)
        if fraction:
            chosen[noised.row[noised.suffix_weight > 0]] = True
        assert int(chosen.sum()) in {0.0: (0,), 0.5: range(2, 15), 1.0: (16,)}[fraction]
        if fraction == 0:
            before = noised
        else:
            assert_close(noised.t[~chosen], before.t[~chosen])
    trainer.train()
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["token", "chunk"])
def test_accumulation_and_resume_change_nothing(tmp_path, alignment):
    """Catches terms divided by the counts of a micro-batch, progress that is lost on resume, and draws that depend on
    the batch: 8×1 = 2×4 = four steps in two runs."""
    fields = {"ar_targets": "annealed", "suffix_mask_fraction": 0.5, "max_grad_norm": 0.0, "optim": "sgd"}
    trainers = []
    for size in (8, 2):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trainer = trainer_for(tmp_path / str(size), alignment, save_strategy="steps", save_steps=2, **split, **fields)
        trainer.train()
        trainers.append(trainer)
    again = trainer_for(tmp_path / "8", alignment, save_strategy="no", **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "8" / "checkpoint-2"))
    for other in (trainers[1], again):
        for name, value in weights_of(trainers[0]).items():
            assert_close(weights_of(other)[name], value, rtol=0, atol=1e-7, msg=name)
    shares = [[entry["target_share"] for entry in t.state.log_history if "target_share" in entry] for t in trainers]
    assert shares[0] == pytest.approx(shares[1]) and 0 < shares[0][0] < 1


def test_defaults_follow_the_teacher(tmp_path):
    """Catches defaults of a diffusion teacher kept for an autoregressive one, and the reverse."""
    found = [trainer_for(tmp_path, **fields).objective for fields in ({}, {"preset": "kl"}, {"ar_targets": "exact"})]
    assert [o.temperature for o in found] == [1.0] * 3
    assert [(o.ar_targets, o.suffix_mask_fraction) for o in found] == [("all", 0.0), ("all", 0.0), ("exact", 0.5)]
    given = trainer_for(tmp_path, ar_targets="exact", suffix_mask_fraction=0.0, temperature=3.0).objective
    assert (given.suffix_mask_fraction, given.temperature) == (0.0, 3.0)
    diffusion = tiny_trainer(tmp_path, teacher=tiny_model(1), preset="kl").objective
    assert (diffusion.temperature, diffusion.ar_targets, diffusion.suffix_mask_fraction) == (2.0, None, 0.0)


REFUSED = {
    "comp_demo=True reveals": {"preset": "tide-shared"},
    "teacher_context='native'": {"teacher_context": "native"},
    "teacher_mask_token_id=3 has no meaning": {"teacher_mask_token_id": 3},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_of_diffusion_teachers_are_refused(tmp_path, message):
    """Catches a setting that is accepted and has no effect."""
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, **REFUSED[message])


@pytest.mark.parametrize("fields", [{"preset": "ar-kl"}, {"preset": "kl", "ar_targets": "exact"}])
def test_settings_of_autoregressive_teachers_are_refused(tmp_path, fields):
    """Catches a run that reports targets of an autoregressive teacher, and has a diffusion LM."""
    with pytest.raises(ValueError, match="this one is a diffusion LM"):
        tiny_trainer(tmp_path, teacher=tiny_model(1), **fields)


def test_reverse_divergence_warns(tmp_path, caplog):
    """Catches a biased objective that is chosen without a word."""
    with caplog.at_level(logging.WARNING):
        trainer_for(tmp_path, preset="reverse-kl")
    assert "only a forward divergence" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer_for(tmp_path)
    assert "only a forward divergence" not in caplog.text


@pytest.mark.parametrize("alignment", ["token", "chunk"])
def test_evaluation_and_card(tmp_path, alignment):
    """Catches an evaluation that a suffix mask, or the progress of annealing, changes; and targets beyond the
    teacher's vocabulary."""
    results = []
    for targets, fraction in (("all", 0.0), ("annealed", 0.5)):
        trainer = trainer_for(tmp_path, alignment, ar_targets=targets, suffix_mask_fraction=fraction)
        trainer.state.max_steps, trainer.state.global_step = 10, 5
        results.append(trainer.evaluate(trainer.train_dataset))
    assert results[0]["eval_distill"] > 0
    for name in ("eval_loss", "eval_ce", "eval_distill"):
        assert results[0][name] == pytest.approx(results[1][name])
    assert trainer.plan.teacher.autoregressive and trainer.plan.to_dict()["teacher_layout"]["autoregressive"]


def test_full_sequence_student(tmp_path):
    """Catches exactness counted in blocks that a full-sequence student does not have: a token anywhere to the right
    that it sees makes a target inexact."""
    model = tiny_model(0, diffusion_type="full")
    trainer = trainer_for(tmp_path, model=model, ar_targets="exact", suffix_mask_fraction=0.0, eos_fill="none")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    noised = trainer._noise(batch, 0)
    masked = torch.zeros_like(batch["labels"], dtype=torch.bool)
    position = noised.student.position_ids.flatten()[noised.student.asked]
    masked[noised.row, position] = True
    num_paired = len(noised.pairs.student_chunk)
    paired = {*zip(noised.row[:num_paired].tolist(), position[:num_paired].tolist(), strict=True)}
    expected = {(r, i) for r, row in enumerate(masked.tolist()) for i in range(len(row)) if all(row[i:])}
    assert paired == expected and expected


def test_teacher_learns_nothing(tmp_path):
    """Catches a teacher that is trained along."""
    teacher = causal_model("gemma2", vocab_size=14)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer_for(tmp_path, teacher=teacher).train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
