"""On-policy distillation: how the student writes, the states it is trained at, the loss, what changes nothing."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from naive_sampler import published_split
from test_trainer import losses_of, naive_logits, weights_of
from tiny import BLOCK, MASK, tiny_model, tiny_trainer
from torch.testing import assert_close

from tide_hf import TIDEConfig
from tide_hf.data import RowPreparation, align_written, prompt_of
from tide_hf.data.loading import MixtureConfig, MixturePart, load_mixture
from tide_hf.data.written import Prompt
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.diffusion import Written, row_uniforms
from tide_hf.models.row_noise import RowDraws, uniforms
from tide_hf.training.rollouts import TOKENS, Rollout, Writing, key_of, random_state, visited_states, written_row

WRITING = Writing(
    seed=3, temperature=1.5, steps=None, max_new_tokens=None, max_length=16, num_tokens=15, block_size=BLOCK
)
PROMPTS = [Prompt([5, 1, 2, 3], [7]), Prompt([5, 4], [7]), Prompt([5, 9, 9, 1, 2, 8, 8], [7]), Prompt([6] * 9, [7])]
KEYS = [11, -12, 2**62 + 5, 14]
ON_POLICY = {"preset": "kl", "on_policy_fraction": 1.0, "temperature": 1.0}


def student(seed=0, **changes):
    model = tiny_model(seed, **{"initializer_range": 0.5, **changes})
    model.generation_config.mask_token_id = model.config.mask_token_id
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def naive_writing(model, prompt, row_key, number, writing, limit):
    """One row, no cache and no batch: the answer, the step of each token, and the steps of each block."""
    mask_id, eos = model.config.mask_token_id, model.config.eos_token_id
    ids, length, key = list(prompt), len(prompt), key_of(TOKENS, writing.seed, row_key, number)
    step_of, num_steps, entropy_of = {}, [], {}
    for block in range(length // BLOCK, -(-(length + limit) // BLOCK)):
        start, end = block * BLOCK, (block + 1) * BLOCK
        ids += [mask_id] * (end - len(ids))
        masked = list(range(max(start, length), min(end, length + limit)))
        step, quota = 0, published_split(len(masked), writing.steps or BLOCK)
        column = torch.arange(end) // BLOCK
        while masked:
            step += 1
            visible = (column[:, None] >= column[None, :])[None, None]
            logits = model(torch.tensor([ids]), attention_mask=visible).logits[0]
            logits[:, mask_id] = -torch.inf
            confidence, token, entropy = {}, {}, {}
            for position in masked:
                drawn = (logits[position, : writing.num_tokens] / writing.temperature).softmax(-1)
                at = torch.tensor([[position]])
                coarse, fine = (float(uniforms(torch.tensor([key]), 2 * step + part, at)) for part in (0, 1))
                below, index, left = float(drawn[0]), 0, coarse + fine / 2**24
                while below <= left:
                    index += 1
                    below += float(drawn[index])
                token[position], confidence[position] = index, float(logits[position].softmax(-1)[index])
                entropy[position] = -sum(p * np.log(p) for p in logits[position].softmax(-1).tolist() if p)
            order = (
                masked if writing.order == "left_to_right" else sorted(masked, key=lambda place: -confidence[place])
            )
            for position in list(order)[: quota[step - 1]]:
                ids[position], step_of[position] = token[position], step
                entropy_of[position] = entropy[position]
                masked.remove(position)
        num_steps.append(step)
        if eos in ids[length:]:
            break
    new = ids[length : length + limit]
    new = new[: new.index(eos) + 1] if eos in new else new
    return (
        new,
        [step_of[length + place] for place in range(len(new))],
        num_steps,
        np.mean([entropy_of[length + place] for place in range(len(new))]),
    )


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"steps": 2}, {"max_new_tokens": 5}, {"order": "left_to_right"}])
def test_writing_equals_a_naive_sampler(changes):
    """Catches a wrong reveal step, a draw of another position or pass, a block or a limit that is off by one: tokens
    and steps against one row at a time without cache."""
    model, writing = student(), dataclasses.replace(WRITING, **changes)
    rollouts = writing(model, PROMPTS, KEYS, number=2)
    assert any(one.is_ended for one in rollouts) and any(len(one.num_steps) > 1 for one in rollouts)
    for prompt, key, rollout in zip(PROMPTS, KEYS, rollouts, strict=True):
        limit = min(16 - len(prompt.ids), writing.max_new_tokens or 16)
        answer, steps, num_steps, entropy = naive_writing(model, prompt.ids, key, 2, writing, limit)
        assert (rollout.answer, rollout.steps, rollout.num_steps) == (answer, steps, num_steps)
        assert rollout.entropy == pytest.approx(entropy)
        assert rollout.is_ended == (answer[-1] == model.config.eos_token_id)
        assert rollout.width % BLOCK == 0 and 0 <= rollout.width - len(prompt.ids) - len(answer) < BLOCK


@pytest.mark.parametrize("kind", ["block", "full"])
def test_an_answer_does_not_depend_on_its_batch(kind):
    """Catches draws of a common generator, and a length limit taken from the longest prompt of a batch."""
    changes, writing = {}, WRITING
    if kind == "full":
        changes, writing = {"diffusion_type": "full"}, dataclasses.replace(WRITING, block_size=None, max_new_tokens=6)
    model = student(**changes)
    together = writing(model, PROMPTS, KEYS, 0)
    alone = [one for prompt, key in zip(PROMPTS, KEYS, strict=True) for one in writing(model, [prompt], [key], 0)]
    assert together == alone
    assert together != writing(model, PROMPTS, KEYS, 1)
    assert model.training is student().training


def test_row_draws_follow_their_probabilities():
    """Catches a draw that is shifted by one token or never takes the first or last; impossible tokens stay so."""
    probability = torch.tensor([0.5, 0.0, 0.125, 0.25, 0.125, 0.0])
    number = 20_000
    draws = RowDraws(torch.tensor([123, 456]))
    tokens = draws.tokens(probability.expand(number, -1), torch.arange(number) % 2, torch.arange(number), draw=1)
    share = torch.bincount(tokens, minlength=6) / number
    assert share[1] == share[5] == 0
    assert (share - probability).abs().max() < 4 * 0.5 / number**0.5


# -- states -----------------------------------------------------------------------------------------------------------


def a_rollout(**changes):
    values = {
        "row_key": 7, "number": 0, "prompt": [1, 2], "teacher_prompt": [1], "answer": [3, 4, 5, 6, 7, 8],
        "steps": [2, 1, 1, 4, 2, 3], "num_steps": [2, 4], "is_ended": False, "width": 8,
    }  # fmt: skip
    return Rollout(**{**values, **changes})


def state_of(rollout, seed, use):
    """The state of an answer, which must not depend on the others of its batch."""
    longer = a_rollout(row_key=99, num_steps=[2, 4, 4], answer=[1] * 10, steps=[1] * 10)
    return visited_states([longer, rollout], seed, use, block_size=4)[1]


def test_visited_states_are_those_of_the_sampler():
    """Catches a step that is never or always chosen, and a state that shows what was revealed at the step itself."""
    seen = {0: set(), 1: set()}
    for key in range(200):
        state = state_of(a_rollout(row_key=key), seed=1, use=0)
        seen[0].add(tuple(state[:2]))
        seen[1].add(tuple(state[2:]))
    assert seen[0] == {(True, True), (True, False)}
    assert seen[1] == {(True,) * 4, (False, True, True, True), (False, True, False, True), (False, True, False, False)}
    one = [state_of(a_rollout(), seed=1, use=use) for use in range(20)]
    assert len({tuple(state) for state in one}) > 3
    assert one == [state_of(a_rollout(), seed=1, use=use) for use in range(20)]


def test_random_states_are_the_forward_process():
    """Catches masks of `random_mask` that do not follow the schedule, or are the same at every use."""
    states = [random_state(a_rollout(), 1, use, "linear", 1e-3) for use in range(2000)]
    counts = np.bincount([sum(state) for state in states], minlength=7) / len(states)
    assert np.abs(counts - 1 / 7).max() < 0.03  # t uniform: every number of masks is equally likely


# -- the loss ---------------------------------------------------------------------------------------------------------


def recorded(trainer, index=slice(0, 8)):
    """The noised batch of a step, and the rollouts in it."""
    rows = [trainer.train_dataset[place] for place in range(16)][index]
    trainer.state.max_steps, trainer.state.epoch, trainer._pass = 10, 0.0, 0
    batches, _ = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, torch.device("cpu"))
    return rows, batches[0], trainer._rollouts.batches[0]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "calm"])
@pytest.mark.parametrize("comp_demo", [False, True])
def test_gold_answers_under_random_masks_give_the_usual_loss(tmp_path, divergence, comp_demo):
    """Catches another layout, pairing or divisor than those of prepared rows: the oracle of on-policy training."""
    shared = {"teacher": tiny_model(1), "divergence": divergence, "comp_demo": comp_demo, "ce_weight": 0.0}
    usual = tiny_trainer(tmp_path, preset="kl", **shared)
    trainer = tiny_trainer(tmp_path, preset="kl", on_policy_fraction=1.0, **shared)
    usual.state.max_steps = trainer.state.max_steps = 10
    rows = [usual.train_dataset[place] for place in range(8)]
    batch = usual.data_collator(rows)
    noised = usual._noise(batch, 0)
    gold = []
    for row in rows:
        prompt = prompt_of(row)
        answer = row["input_ids"][len(prompt.ids) :]
        gold.append(
            a_rollout(
                row_key=row["row_key"], prompt=prompt.ids, teacher_prompt=prompt.teacher_ids, answer=answer, width=16
            )
        )
    plan = trainer.plan
    mask_id = plan.student.mask_token_id
    written = trainer.data_collator([written_row(one, plan.preparation, mask_id, plan.teacher) for one in gold])
    draws = row_uniforms(usual.args.seed, 0, batch["row_key"].tolist(), 16)
    masked = torch.zeros(8, 16, dtype=torch.bool)
    masked[noised.row, noised.student.position_ids.flatten()[noised.student.asked]] = True
    on_policy = trainer.noising(written, draws, given=Written(torch.ones(8, dtype=torch.bool), masked))
    assert (on_policy.counts.tokens, on_policy.counts.pairs) == (0, 0)
    expected, got = usual.compute_loss(usual.model, noised), trainer.compute_loss(trainer.model, on_policy)
    assert_close(got, expected, rtol=1e-10, atol=0)
    assert expected != 0


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_loss_equals_a_naive_one_over_recorded_rollouts(tmp_path, fraction):
    """Catches a loss on what follows an answer, on shown or untrained tokens, CE on what the student wrote, and
    weights other than f and 1−f: loss and gradient in float64, row by row and position by position."""
    model, teacher = student(), tiny_model(1, hidden=48)
    options = {**ON_POLICY, "on_policy_fraction": fraction, "distill_weight": 3.0}
    trainer = tiny_trainer(tmp_path, model=model, teacher=teacher, **options)
    rows, noised, rollouts = recorded(trainer)
    assert any(one.is_ended and one.width > len(one.prompt) + len(one.answer) for one in rollouts)
    model.zero_grad()
    loss = trainer.compute_loss(model, noised)
    loss.backward()
    got = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()

    mask_id, by_key = model.config.mask_token_id, {one.row_key: one for one in rollouts}
    divergences, kl, ce, num_trained = [], [], [], 0
    for row in rows:
        one = by_key.get(row["row_key"])
        if one is None:
            clean, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            u_time, u_mask, _ = row_uniforms(trainer.args.seed, 0, [row["row_key"]], len(clean))
            t = 1e-3 + (1 - 1e-3) * u_time[0]
            asked = (u_mask[0] < t) & (labels != -100)
            num_trained += int((labels != -100).sum())
        else:
            clean = torch.tensor(one.prompt + one.answer + [mask_id] * (one.width - len(one.prompt + one.answer)))
            asked = torch.zeros(len(clean), dtype=torch.bool)
            state = state_of(one, trainer.args.seed, 0)
            asked[len(one.prompt) : len(one.prompt) + len(state)] = torch.tensor(state)
        shown = torch.where(asked, mask_id, clean)
        z, zt = naive_logits(model, shown, clean, 4), naive_logits(teacher, shown, clean, 4).detach()
        for place in asked.nonzero().flatten():
            log_s, log_t = F.log_softmax(z[place], -1), F.log_softmax(zt[place], -1)
            (kl if one is None else divergences).append((log_t.exp() * (log_t - log_s)).sum())
            if one is None:
                ce.append(-log_s[clean[place]] / t.double())
    share = float(torch.tensor(1.0) / len(divergences))  # float32, as counts are
    expected = 3 * fraction * share * sum(divergences)
    if fraction < 1:
        expected = expected + (1 - fraction) * (sum(ce) / num_trained + 3 * sum(kl) / len(kl))
    expected.backward()
    tolerance = 1e-10 if fraction == 1 else 1e-6  # times of prepared rows are float32
    assert_close(loss.detach(), expected.detach(), rtol=tolerance, atol=0)
    for name, value in model.named_parameters():
        assert_close(got[name], value.grad, rtol=1e-4, atol=1e-6 * float(value.grad.abs().max()), msg=name)


# -- what changes nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_accumulation_changes_nothing(tmp_path, fraction):
    """Catches answers, states or counts that depend on how the rows of a step are divided."""
    runs = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        trainer = tiny_trainer(
            tmp_path,
            model=student(),
            teacher=tiny_model(1),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            rollout_reuse=2,
            **{**ON_POLICY, "on_policy_fraction": fraction},
        )
        trainer.train()
        runs.append(trainer)
    for run in runs[1:]:
        assert_close(losses_of(run), losses_of(runs[0]), rtol=1e-6, atol=1e-6)
        assert_close(weights_of(run), weights_of(runs[0]), rtol=1e-6, atol=1e-7)


def test_answers_are_reused_at_other_states(tmp_path):
    """Catches a buffer that is written anew at every step, and one whose states repeat."""
    trainer = tiny_trainer(tmp_path, model=student(), teacher=tiny_model(1), rollout_reuse=2, **ON_POLICY)
    _, first, kept = recorded(trainer)
    _, second, again = recorded(trainer, slice(8, 16))
    assert again is kept and len(first.row) and len(second.row)
    assert not torch.equal(first.student.input_ids[0], second.student.input_ids[0])
    _, _, new = recorded(trainer, slice(8, 16))
    assert {one.row_key for one in new}.isdisjoint(one.row_key for one in kept)


def test_resume_inside_a_buffer_goes_on_exactly(tmp_path):
    """Catches answers that are written anew after a resume, with weights that have changed since."""
    options = {**ON_POLICY, "max_steps": 6, "rollout_reuse": 4, "save_strategy": "steps", "save_steps": 3}
    whole = tiny_trainer(tmp_path / "whole", model=student(), teacher=tiny_model(1), **options)
    whole.train()
    resumed = tiny_trainer(tmp_path / "whole", model=student(), teacher=tiny_model(1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_close(weights_of(resumed), weights_of(whole), rtol=0, atol=0)
    assert losses_of(resumed) == losses_of(whole)
    file = tmp_path / "whole" / "checkpoint-3" / "rollouts_0.pt"
    torch.save({**torch.load(file), "num_processes": 2}, file)
    with pytest.raises(ValueError, match="saved by 2 processes"):
        resumed.train(resume_from_checkpoint=str(file.parent))


def test_evaluation_stays_on_the_data(tmp_path):
    """Catches an evaluation that the student's own answers enter, or whose divergence is scaled by the fraction."""
    runs = [
        tiny_trainer(tmp_path, teacher=tiny_model(1), preset="kl", temperature=1.0, on_policy_fraction=fraction)
        for fraction in (0.0, 0.5, 1.0)
    ]
    metrics = [run.evaluate(sorting_rows(5, seed=9)) for run in runs]
    for name in ("eval_ce", "eval_distill", "eval_loss"):
        assert metrics[0][name] == metrics[1][name] == metrics[2][name] > 0


def test_what_is_logged(tmp_path):
    """Catches terms of rows that were not there, and a length, a share of ends or of time that is not one."""
    trainer = tiny_trainer(tmp_path, model=student(), teacher=tiny_model(1), logging_steps=4, **ON_POLICY)
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["on_policy"] == pytest.approx(log["loss"], rel=1e-6)
    assert not {"ce", "distill"} & log.keys()
    assert 0 < log["rollout_time_share"] < 1 and 0 < log["rollout_ended"] <= 1
    assert 1 <= log["rollout_tokens"] <= 8 and log["rollout_tokens_per_second"] > 0


@pytest.mark.parametrize("as_messages", [False, True])
@pytest.mark.parametrize("streams", [False, True])
def test_prompts_alone_train_like_rows_with_answers(tmp_path, as_messages, streams):
    """Catches a stand-in that leaks into a prompt, and prompts that are refused or dropped."""
    whole = sorting_rows(16, seed=3)
    prompts = Dataset.from_list([{"prompt": row["messages"][:1]} for row in whole])
    if not as_messages:
        prompts = Dataset.from_list([{"prompt": f"<user>{row['messages'][0]['content']}<assistant>"} for row in whole])
    prompts = prompts.to_iterable_dataset() if streams else prompts
    trainer = tiny_trainer(tmp_path, rows=prompts, model=student(), teacher=tiny_model(1), max_steps=2, **ON_POLICY)
    reference = tiny_trainer(tmp_path, rows=whole, model=student(), teacher=tiny_model(1), max_steps=2, **ON_POLICY)
    for run in (trainer, reference):
        run.train()
    written = {tuple(one.prompt) for one in trainer._rollouts.batches[0]}
    assert written <= {tuple(prompt_of(row).ids) for row in reference.train_dataset}
    assert len(written) == 8 and all(loss > 0 for loss in losses_of(trainer))


def test_mixtures_of_prompts_alone(tmp_path):
    """Catches prompts of a mixture that are dropped beside rows with answers, or text that is answered by messages."""
    prompts = [f"<user>{digits}<assistant>" for digits in ("12", "31", "45", "65")]
    Dataset.from_list([{"prompt": prompt} for prompt in prompts]).to_json(tmp_path / "text.jsonl")
    asked = [{"prompt": [{"role": "user", "content": digits}]} for digits in ("78", "98", "20", "51")]
    Dataset.from_list(asked).to_json(tmp_path / "messages.jsonl")
    sorting_rows(4, seed=1).to_json(tmp_path / "answered.jsonl")
    parts = [MixturePart(path=str(tmp_path / f"{name}.jsonl")) for name in ("text", "messages", "answered")]
    for chosen, count in ((parts[:1], 4), (parts[:2], 8), (parts, 12)):
        rows = load_mixture(MixtureConfig(datasets=chosen), prompts_alone=True)["train"]
        trainer = tiny_trainer(tmp_path, rows=rows, model=student(), teacher=tiny_model(1), max_steps=1, **ON_POLICY)
        assert len(trainer.train_dataset) == count
        trainer.train()
    for chosen in (parts[:1], parts):
        with pytest.raises(ValueError, match=r"or the student \(on_policy_fraction=1\)"):
            load_mixture(MixtureConfig(datasets=chosen))
    preferred = Dataset.from_list([{"prompt": "12", "chosen": "12", "rejected": "21"}])
    preferred.to_json(tmp_path / "preferred.jsonl")
    with pytest.raises(ValueError, match="For preference data"):
        mixture = MixtureConfig(datasets=[MixturePart(path=str(tmp_path / "preferred.jsonl")), parts[2]])
        load_mixture(mixture, prompts_alone=True)
    with pytest.raises(ValueError, match="The eval dataset holds prompts alone, and evaluation compares with answers"):
        tiny_trainer(
            tmp_path, teacher=tiny_model(1), trainer_kwargs={"eval_dataset": Dataset.from_list(asked)}, **ON_POLICY
        )


def test_prompts_alone_need_a_student_that_answers_all(tmp_path):
    """Catches rows without answers that are dropped one by one, or trained on a stand-in."""
    prompts = Dataset.from_list([{"prompt": "12"}] * 8)
    with pytest.raises(ValueError, match=r"or the student \(on_policy_fraction=1\)"):
        tiny_trainer(tmp_path, rows=prompts, teacher=tiny_model(1), preset="kl", on_policy_fraction=0.5)


def test_answers_grow(tmp_path):
    """Catches a limit that starts at its end, never reaches it, or is not read."""
    options = {"rollout_initial_tokens": 2, "rollout_max_new_tokens": 6, **ON_POLICY}
    trainer = tiny_trainer(tmp_path, model=student(), teacher=tiny_model(1), **options)
    trainer.state.max_steps, found = 8, []
    for trainer.state.global_step in (0, 4, 8):
        found.append(trainer._writing().max_new_tokens)
    assert found == [2, 4, 6]
    trainer.state.global_step = 0
    _, _, rollouts = recorded(trainer)
    assert {len(one.answer) for one in rollouts} <= {1, 2}


# -- across tokenizers ------------------------------------------------------------------------------------------------


def preparation(**changes):
    values = {
        "tokenizer": build_tokenizer(("12", "23", "34")), "teacher_tokenizer": build_tokenizer(), "max_length": 16,
        "teacher_max_length": 16, "block_size": 4, "eos_fill": "none", "alignment": "chunk",
    }  # fmt: skip
    return RowPreparation(**{**values, **changes})


def test_written_answers_are_aligned_like_prepared_ones():
    """Catches chunks that are shifted, miss the end, or pair other bytes, against the preparation of the same text."""
    prepare = preparation()
    for raw in sorting_rows(20, seed=4):
        row, _ = prepare.prepare(raw)
        prompt = prompt_of(row)
        answer = row["input_ids"][len(prompt.ids) :]
        teacher_ids, chunks, teacher_chunks = align_written(prepare, answer, is_ended=True)
        assert teacher_ids == row["teacher_input_ids"][len(prompt.teacher_ids) :]
        assert chunks == row["chunk_ids"][len(prompt.ids) :]
        assert teacher_chunks == row["teacher_chunk_ids"][len(prompt.teacher_ids) :]
        cut = align_written(prepare, answer[:-1], is_ended=False)
        assert cut == (teacher_ids[:-1], chunks[:-1], teacher_chunks[:-1])


def test_the_teachers_mask_in_an_answer_is_not_read_as_noise():
    """Catches a [MASK] of the teacher's that the student wrote as text and that the teacher is asked to predict."""
    prepare = preparation(tokenizer=build_tokenizer(), alignment="token", teacher_mask_token_id=MASK)
    assert align_written(prepare, [1, MASK, 2], False)[1:] == ([-1, -1, -1], [-1, -1, -1])


@pytest.mark.parametrize("comp_demo", [False, True])
def test_two_tokenizers_train(tmp_path, comp_demo):
    """Catches an alignment that does not survive a step: CALM on answers of a student with another tokenizer."""
    tokenizer = build_tokenizer(("12", "23", "34"))
    model = tiny_model(vocab_size=len(tokenizer), initializer_range=0.5)
    trainer = tiny_trainer(
        tmp_path,
        model=model,
        teacher=tiny_model(1),
        preset="calm",
        comp_demo=comp_demo,
        on_policy_fraction=1.0,
        trainer_kwargs={"processing_class": tokenizer, "teacher_processing_class": build_tokenizer()},
    )
    trainer.train()
    losses = losses_of(trainer)
    assert all(loss > 0 for loss in losses) and losses[-1] != losses[0]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "ce", "on_policy_fraction": 0.5}, "on_policy_fraction=0.5 compares"),
        ({"preset": "tide-shared", "on_policy_fraction": 0.5}, "TIDAL's weights depend on the diffusion time"),
        ({"preset": "kl", "on_policy_fraction": 1.5}, "on_policy_fraction=1.5 is out of range"),
        ({"preset": "kl", "rollout_reuse": 2}, "rollout_reuse=2: only read where"),
        ({"preset": "kl", "on_policy_fraction": 1.0, "rollout_temperature": 0.0}, "rollout_temperature=0.0"),
        ({"preset": "kl", "on_policy_fraction": 1.0, "rollout_initial_tokens": 4}, "rollout_max_new_tokens=None"),
        ({"preset": "kl", "on_policy_fraction": 1.0, "rollout_states": "seen"}, "visited, random_mask"),
    ],
)
def test_refusals_name_the_field(tmp_path, options, words):
    """Catches a setting that is accepted and has no effect, or fails somewhere else."""
    with pytest.raises(ValueError, match=words):
        tiny_trainer(tmp_path, teacher=tiny_model(1), **options)


def test_a_full_sequence_student_needs_a_length(tmp_path):
    """Catches a whole-sequence answer whose length, and so whose state, would depend on the batch."""
    with pytest.raises(ValueError, match="needs rollout_max_new_tokens"):
        tiny_trainer(tmp_path, model=student(diffusion_type="full"), teacher=tiny_model(1), **ON_POLICY)
    trainer = tiny_trainer(
        tmp_path, model=student(diffusion_type="full"), teacher=tiny_model(1), rollout_max_new_tokens=6, **ON_POLICY
    )
    trainer.train()
    assert all(loss > 0 for loss in losses_of(trainer))


def test_fields_have_one_definition():
    """Catches a field of the table that the configuration does not have."""
    config = TIDEConfig(output_dir="unused", preset="kl", on_policy_fraction=0.25, rollout_steps=2, use_cpu=True)
    assert (config.on_policy_fraction, config.rollout_steps, config.rollout_reuse) == (0.25, 2, 1)


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [0, 1])
def test_number_of_processes_changes_nothing(tmp_path, adapter):
    """Catches answers that depend on the process, a hang where processes write answers of unequal lengths, and a copy
    that lags behind the sharded student."""
    results = []
    for index, (world_size, accumulation, sharding) in enumerate([(1, 1, "none"), (2, 2, "none"), (2, 1, "fsdp2")]):
        output = tmp_path / str(index)
        output.mkdir()
        script = [str(Path(__file__).parent / "on_policy_run.py"), str(output)]
        script += [str(world_size), str(accumulation), sharding, str(adapter)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world_size)]
        launcher += ["--master_port", str(29800 + 10 * index + adapter)]
        subprocess.run([*(launcher if world_size > 1 else [sys.executable]), *script], check=True, timeout=300)
        results.append(torch.load(output / "result.pt", weights_only=False))
    reference, *others = results
    for result in others:
        assert_close(result["weights"], reference["weights"], rtol=1e-6, atol=1e-7)
        for ours, theirs in zip(result["losses"], reference["losses"], strict=True):
            for name in ("loss", "on_policy", "ce", "distill", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
            for name in ("rollout_tokens", "rollout_ended"):
                assert ours.get(name) == theirs.get(name), name
