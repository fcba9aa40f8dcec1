"""On-policy distillation from an autoregressive teacher: left to right, beside the data, at the positions it knows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_autoregressive_teachers import causal_model, naive_step, trainer_for
from test_on_policy import recorded, student
from test_trainer import naive_logits
from tiny import BLOCK, tiny_model
from torch.testing import assert_close

from tide_hf.data import align_written
from tide_hf.demo.sorting import build_tokenizer
from tide_hf.training.rollouts import visited_states

ON_POLICY = {"on_policy_fraction": 0.5, "rollout_order": "left_to_right"}


def naive_written(trainer, rollouts):
    """The mean divergence over what the student wrote, by loops over rows, positions and chunks."""
    model, teacher, plan = trainer.model, trainer.teacher, trainer.plan
    mask_id, values = model.config.mask_token_id, []
    for one, state in zip(rollouts, visited_states(rollouts, trainer.args.seed, 0, BLOCK), strict=True):
        answer_masked = list(state)
        # in a block nothing that is shown stands right of what is masked
        for place, block in enumerate(one.blocks(BLOCK)):
            later = [p for p, other in enumerate(one.blocks(BLOCK)) if other == block and p > place]
            assert not answer_masked[place] or all(answer_masked[p] for p in later)
        teacher_answer, chunks, teacher_chunks = align_written(plan.preparation, one.answer, one.is_ended)
        member = {c: [i for i, chunk in enumerate(chunks) if chunk == c] for c in set(chunks) - {-1}}
        hit = {c for c, places in member.items() if any(answer_masked[i] for i in places)}
        for c in hit:
            for i in member[c]:
                answer_masked[i] = True
        start, width = len(one.prompt), one.width
        clean = torch.tensor(one.prompt + one.answer + [mask_id] * (width - start - len(one.answer)))
        noised = clean.clone()
        noised[[start + i for i, is_masked in enumerate(answer_masked) if is_masked]] = mask_id
        log_s = naive_logits(model, noised, clean, BLOCK).log_softmax(-1)
        teacher_ids = one.teacher_prompt + teacher_answer
        with torch.no_grad():
            log_t = teacher(input_ids=torch.tensor(teacher_ids)[None]).logits[0]
        first = len(one.teacher_prompt)
        end = max((i for i, token in enumerate(teacher_ids) if token != teacher_ids[-1]), default=-1) + 1
        blocks = one.blocks(BLOCK)
        for c in sorted(hit):
            places, theirs = member[c], [first + j for j, chunk in enumerate(teacher_chunks) if chunk == c]
            seen_after = any(
                not answer_masked[j] for i in places for j in range(i + 1, len(blocks)) if blocks[j] == blocks[i]
            )
            if not theirs or seen_after or max(theirs) > end:
                continue
            if trainer.objective.by_token:
                p = log_t[theirs[0] - 1][:14].log_softmax(-1)
                q = log_s[start + places[0]][:14].log_softmax(-1)
                values.append((p.exp() * (p - q)).sum())
            else:
                p = sum(log_t[j - 1].log_softmax(-1)[teacher_ids[j]] for j in theirs).exp().clamp(1e-7, 1 - 2.0**-23)
                q = sum(log_s[start + i, one.answer[i]] for i in places).exp().clamp(1e-7, 1 - 2.0**-23)
                values.append(-(p * q.log() + (1 - p) * (1 - q).log()))
    return sum(values) / len(values), len(values)


@pytest.mark.parametrize("alignment", ["token", "chunk"])
@pytest.mark.parametrize("targets", ["all", "exact"])
@pytest.mark.parametrize("steps", [None, 2])
def test_loss_equals_a_naive_one_over_recorded_rollouts(tmp_path, alignment, targets, steps):
    """Catches a target at what stands behind an answer or left of a shown token, a teacher that reads [MASK], weights
    other than f and 1−f, and rows of the data that are counted with the written ones: loss and gradient."""
    tokenizer = build_tokenizer(("12", "34", "56", "78", "89", "01")) if alignment == "chunk" else build_tokenizer()
    trainer = trainer_for(
        tmp_path,
        alignment,
        model=student(vocab_size=len(tokenizer)),
        teacher=causal_model(vocab_size=14, initializer_range=0.5),
        ar_targets=targets,
        suffix_mask_fraction=0.5,
        rollout_steps=steps,
        **ON_POLICY,
    )
    rows, noised, rollouts = recorded(trainer)
    assert 0 < len(rollouts) < len(rows)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, noised)
    loss.backward()
    got = {name: value.grad.clone() for name, value in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    written = {one.row_key for one in rollouts}
    rest, _ = naive_step(trainer, [row for row in rows if row["row_key"] not in written], 0.0)
    own, num_compared = naive_written(trainer, rollouts)
    expected = 0.5 * own + 0.5 * rest
    expected.backward()
    assert num_compared > 3
    assert_close(loss.detach(), expected.detach(), rtol=1e-6, atol=0)
    for name, value in trainer.model.named_parameters():
        assert_close(got[name], value.grad, rtol=0, atol=1e-6 * max(float(value.grad.abs().max()), 1e-3), msg=name)


def test_a_run_reports_the_entropy_of_what_it_writes(tmp_path):
    """Catches a collapse that no log would show: the mean entropy, in nats, of what tokens were drawn from."""
    trainer = trainer_for(tmp_path, max_steps=2, **ON_POLICY)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rollout_entropy" in entry]
    assert len(logs) == 2
    for entry in logs[-1:]:
        own = [one.entropy for one in trainer._rollouts.batches[0]]
        assert entry["rollout_entropy"] == pytest.approx(sum(own) / len(own), rel=1e-5)
        assert 0 < entry["rollout_entropy"] < 3.2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rollout_order": "confidence"}, "rollout_order='left_to_right'"),
        ({"rollout_states": "random_mask"}, "leave rollout_states out"),
        ({"on_policy_fraction": 1.0}, "confirm themselves"),
        ({"ce_weight": 0.0}, "confirm themselves"),
        ({"on_policy_fraction": 0.0}, "only read where the student writes"),
    ],
)
def test_refuses_what_destroys_students(tmp_path, fields, words):
    """Catches an order, a state or a share with which an autoregressive teacher confirms what the student writes."""
    with pytest.raises(ValueError, match=words):
        trainer_for(tmp_path, **{**ON_POLICY, **fields})


def test_a_diffusion_teacher_takes_either_order(tmp_path):
    """Catches an order that is refused where every state is right."""
    model = student()
    for order in ("confidence", "left_to_right"):
        fields = {"preset": "kl", "on_policy_fraction": 1.0, "rollout_order": order, "max_steps": 1}
        trainer = trainer_for(tmp_path, model=model, teacher=tiny_model(1), **fields)
        assert trainer._writing().order == order
        trainer.train()


def test_the_card_says_what_was_done(tmp_path):
    """Catches a card that is silent about the kind of teacher, the share of own states and their order."""
    trainer = trainer_for(tmp_path, max_steps=1, **ON_POLICY)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "distilled from the autoregressive model" in card
    assert "To 50% of the rows the student wrote the answer itself (in the order left to right)" in card


@pytest.mark.slow
def test_number_of_processes_changes_nothing(tmp_path):
    """Catches answers or targets that depend on the process."""
    results = []
    for world_size in (1, 2):
        output = tmp_path / str(world_size)
        output.mkdir()
        script = [
            str(Path(__file__).parent / "on_policy_run.py"),
            str(output),
            str(world_size),
            "1",
            "none",
            "0",
            "ar",
        ]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29871"]
        subprocess.run([*(launcher if world_size > 1 else [sys.executable]), *script], check=True, timeout=300)
        results.append(torch.load(output / "result.pt", weights_only=False))
    assert_close(results[1]["weights"], results[0]["weights"], rtol=1e-6, atol=1e-7)
