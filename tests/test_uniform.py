"""Uniform-state diffusion: schedule, divergence, reverse step, model, and its inverse distillation."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import references
import torch
from embedded import uniform_state as demo
from peft import LoraConfig
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from uniform_run import tiny_trainer, tiny_uniform, weights

from tide_hf import IDLMConfig, IDLMTrainer, TIDEConfig, TIDETrainer, TIDEUniformQwen3Config, UniformIDLMTrainer
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.diffusion import gaussian_schedule
from tide_hf.few_step.noising import Draws
from tide_hf.few_step.uniform import UniformNoising, UniformStep
from tide_hf.hub import check_card
from tide_hf.models import TIDEUniformQwen3ForDiffusion, reverse_step, uniform_divergence

V = 6


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- schedule, divergence, reverse step ----


@pytest.mark.parametrize("num_tokens", [2, 15, 30_000])
def test_discrete_schedule_equals_a_naive_integral(num_tokens):
    """Catches a wrong power of Φ, the chance of a hit by accident left in, and too coarse a table."""
    schedule = gaussian_schedule(num_tokens)
    for alpha in (0.002, 0.1, 0.5, 0.9, 0.998):
        gamma = schedule.gamma(torch.tensor(alpha)).item()
        assert references.gaussian_alpha(gamma, num_tokens) == pytest.approx(alpha, abs=2e-6)
        assert schedule.alpha(torch.tensor(gamma)).item() == pytest.approx(alpha, abs=1e-7)
    ends = schedule.alpha(schedule.gamma(torch.tensor([0.0, 1.0])))
    assert ends.tolist() == pytest.approx([1e-3, 1 - 1e-3], abs=1e-9), "clamped, never beyond the table"


def test_discrete_schedule_is_how_often_the_token_stays_largest():
    """Catches a schedule that fits the formula and not the noise that is drawn."""
    num_tokens, alpha, num_rows = 15, 0.4, 200_000
    gamma = gaussian_schedule(num_tokens).gamma(torch.tensor(alpha))
    latent = gamma.sigmoid().sqrt() * draw(num_rows, num_tokens)
    latent[:, 3] += (-gamma).sigmoid().sqrt()
    share = torch.bincount(latent.argmax(1), minlength=num_tokens) / num_rows
    expected = torch.full((num_tokens,), (1 - alpha) / num_tokens)
    expected[3] += alpha
    assert_close(share.double(), expected.double(), atol=4 * 0.5 / num_rows**0.5, rtol=0)


def test_divergence_equals_its_equation():
    """Catches a sign, V or α lost, in value and in the gradients of both sides."""
    q_logits, f_logits = draw(4, V).requires_grad_(), draw(4, V, seed=1).requires_grad_()
    noised, alpha = torch.tensor([0, 5, 2, 2]), torch.tensor([0.01, 0.3, 0.7, 0.99]).double()
    q, f = q_logits.softmax(-1), f_logits.softmax(-1)
    ours = uniform_divergence(q, f, noised, alpha, 1.7)
    expected = torch.stack(
        [references.uniform_divergence(q[i], f[i], int(noised[i]), alpha[i], 1.7) for i in range(4)]
    )
    assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert (ours > 0).all()
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    for gradient, wanted in zip(
        torch.autograd.grad(ours @ weights, (q_logits, f_logits), retain_graph=True),
        torch.autograd.grad(expected @ weights, (q_logits, f_logits)),
        strict=True,
    ):
        assert_close(gradient, wanted, rtol=1e-7, atol=1e-10)
    q = q.detach()
    assert uniform_divergence(q, q, noised, alpha, 1.0).abs().max() < 1e-12


def test_divergence_integrates_to_the_entropy():
    """Catches a bound that is none: for one token its integral is H(p) with the best f, what is known beside z: p."""
    p = draw(V).softmax(0)
    u, weight = (torch.linspace(-18, 18, 4001, dtype=torch.float64), 36 / 4000)
    alpha = torch.sigmoid(u)  # the integral over α through its logit, where it is smooth
    density = alpha * (1 - alpha)
    total = 0.0
    for x in range(V):
        for z in range(V):
            shown = torch.stack([alpha * (z == v) + (1 - alpha) / V for v in range(V)], 1)  # P(z | clean v)
            one_hot = torch.eye(V, dtype=torch.float64)[x].expand(len(u), V)
            values = uniform_divergence(one_hot, p.expand_as(one_hot), torch.full((len(u),), z), alpha, 1.0)
            total += p[x] * (shown[:, x] * values * density).sum() * weight
    assert total.item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)


def test_reverse_step_is_bayes_rule():
    """Catches a step that forgets the token it comes from, or leaves noise in after the last one."""
    predicted, noised = draw(3, V).softmax(-1), torch.tensor([1, 4, 0])
    for alpha, next_alpha in ((0.0, 0.5), (0.3, 0.6), (0.8, 1.0)):
        ours = reverse_step(predicted, noised, alpha, next_alpha)
        for row, law in enumerate(ours):
            expected = references.uniform_step(predicted[row].tolist(), int(noised[row]), alpha, next_alpha)
            assert law.tolist() == pytest.approx(expected, rel=1e-12)
    assert_close(reverse_step(predicted, noised, 0.0, 1.0), predicted)


# ---- the model ----


def test_model_sees_both_sides_soft_inputs_and_noise_levels():
    """Catches a causal mask, one-hots that differ from ids, padding that is seen, and a noise level without effect."""
    model = tiny_uniform().eval()
    ids, level = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.5]])
    logits = model(ids, noise_level=level).logits
    soft = torch.nn.functional.one_hot(ids, model.config.vocab_size).double()
    assert_close(model(token_probabilities=soft, noise_level=level).logits, logits)
    later = ids.clone()
    later[0, 4] = 9
    assert (model(later, noise_level=level).logits[0, 0] - logits[0, 0]).abs().max() > 1e-3
    assert (model(ids, noise_level=level * 0.9).logits - logits).abs().max() > 1e-3
    padded = model(
        torch.cat([torch.tensor([[7, 7]]), ids], 1),
        torch.tensor([[0, 0, 1, 1, 1, 1, 1]]),
        torch.cat([torch.zeros(1, 2), level], 1),
    ).logits[:, 2:]
    assert_close(padded, logits)
    with pytest.raises(ValueError, match="noise level"):
        model(ids)
    with pytest.raises(ValueError, match="either"):
        model(ids, token_probabilities=soft, noise_level=level)


def test_loss_of_labels_noises_and_scores_the_answer_alone():
    """Catches prompts that are noised, said to be noised or scored, a wrong rate, and a divisor not the one given."""
    model, tokens_seen, features_seen = tiny_uniform().eval(), [], []
    model.eval_num_times = 1
    ids = torch.randint(0, 10, (64, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = -100
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: tokens_seen.append(args[0]))
    model.noise_embedding.register_forward_hook(lambda module, args, out: features_seen.append(args[0]))
    output = model(ids, labels=labels)
    noised, level = tokens_seen[0], features_seen[0][..., 1].acos() / math.pi  # the features are cos(π k level)
    assert (noised[:, :6] == ids[:, :6]).all() and (level[:, :6] == 0).all()
    assert (level[:, 6:] == level[:, 6:7]).all() and 0 < level[:, 6].min() < 0.1 < 0.9 < level[:, 6].max() < 1
    assert 0.35 < (noised[:, 6:] != ids[:, 6:]).float().mean() < 0.6
    expected, eye = 0.0, torch.eye(model.config.vocab_size, dtype=torch.float64)
    for row in range(64):
        for i in range(6, 12):
            predicted = output.logits[row, i].softmax(0)
            alpha = 1 - level[row, i]
            value = references.uniform_divergence(eye[ids[row, i]], predicted, int(noised[row, i]), alpha, 1.0)
            expected += value.item() / (64 * 6)
    assert output.loss.item() == pytest.approx(expected, rel=1e-3)
    assert_close(model(ids, labels=labels, num_items_in_batch=7).loss * 7, output.loss * 64 * 6)
    assert output.loss == model(ids, labels=labels).loss, "evaluation draws the same noise again"


def test_generation_keeps_the_prompt_and_samples_the_denoiser():
    """Catches prompts that change, an answer without padding after its end, and steps that ignore the network."""
    model = tiny_uniform().eval()
    prompt = torch.tensor([[11, 3, 1, 12]]).repeat(4000, 1)
    draws = torch.Generator().manual_seed(0)
    out = model.generate(prompt, max_new_tokens=1, num_steps=1, greedy_tail=False, generator=draws)
    assert (out[:, :4] == prompt).all()
    level, vocab = torch.tensor([[0, 0, 0, 0, 1.0]]), model.config.vocab_size
    # one step: a clean token drawn from what the network says to each random start, all equally likely
    starts = torch.cat([prompt[:1].repeat(vocab, 1), torch.arange(vocab)[:, None]], 1)
    with torch.no_grad():
        expected = model(starts, noise_level=level.repeat(vocab, 1)).logits[:, -1].softmax(-1).mean(0)
    share = torch.bincount(out[:, 4], minlength=vocab).double() / 4000
    assert_close(share, expected, atol=4 * 0.5 / 4000**0.5, rtol=0)
    greedy = [model.generate(prompt[:50], max_new_tokens=8, num_steps=3, generator=draws) for _ in range(2)]
    assert (greedy[0] != greedy[1]).any(), "the first steps are drawn"
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    long = model.generate(prompt[:200], max_new_tokens=8, num_steps=2, generator=draws)[:, 4:]
    ended = [row for row in long.tolist() if eos in row[:-1]]
    assert ended and all(set(row[row.index(eos) + 1 :]) == {pad} for row in ended)
    with pytest.raises(ValueError, match="num_steps"):
        model.generate(prompt, num_steps=0)


@pytest.mark.slow
def test_model_loads_where_the_package_is_not_installed(tmp_path):
    """Catches a checkpoint that misses one of the files its code imports."""
    model = tiny_uniform(dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    script = (
        "import sys, json, torch\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'tide_hf':\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "print(json.dumps(model(torch.tensor([[1, 2]]), noise_level=torch.ones(1, 2)).logits.tolist()))\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    logits = json.loads(done.stdout.splitlines()[-1])
    assert_close(torch.tensor(logits), model(torch.tensor([[1, 2]]), noise_level=torch.ones(1, 2)).logits)


# ---- inverse distillation ----


def batch_of(num_rows=3, length=7):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 10, (num_rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 5:] = -100  # padding
    mask = (torch.arange(length) < 5).long() | (labels >= 0)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "row_key": torch.arange(num_rows)}


def networks():
    student, teacher, fake = (tiny_uniform(seed) for seed in range(3))
    return student, teacher.requires_grad_(False), fake


@pytest.mark.parametrize("temperature", [0.3, 0.02])
def test_losses_and_gradients_equal_the_naive_ones(temperature):
    """Catches a gradient that stops at x_t, one that reaches teacher or fake, wrong noise levels, scored prompts."""
    student, teacher, fake = networks()
    batch = UniformNoising()(batch_of(), Draws.of_rows(0, 0, [5, 2, 9], 7, 1))
    batch = replace(batch, num_rows=torch.tensor(4.0))
    step = UniformStep(student.config.vocab_size, temperature)
    noise = step._noise(batch).double()
    schedule, expected_fake, expected_student = gaussian_schedule(student.config.vocab_size), 0.0, 0.0
    for row in range(3):
        kept = batch.attention_mask[row].bool()
        alphas = [float(alpha[row]) for alpha in (batch.student_alpha, batch.alpha)]
        terms = references.uniform_inverse_losses(
            [lambda p, level, n=n: n(token_probabilities=p[None], noise_level=level[None]).logits[0]
             for n in (student, teacher, fake)],
            batch.input_ids[row][kept].tolist(),
            batch.trained[row][kept].tolist(),
            alphas,
            [schedule.gamma(torch.tensor(alpha)).item() for alpha in alphas],
            [noise[0, row][kept], noise[1, row][kept]],
            temperature,
        )  # fmt: skip
        expected_fake, expected_student = expected_fake + terms[0] / 4, expected_student + terms[1] / 4
    wanted = torch.autograd.grad(expected_student, list(student.parameters()))
    wanted_fake = torch.autograd.grad(expected_fake, list(fake.parameters()))
    loss = step.student_loss(student, teacher, fake, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected_student.item(), rel=1e-4)
    assert all(value.grad is None for network in (teacher, fake) for value in network.parameters())
    assert all(value.requires_grad for value in fake.parameters())
    for value, gradient in zip(student.parameters(), wanted, strict=True):
        assert_close(value.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    student.zero_grad()
    loss = step.fake_loss(student, fake, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected_fake.item(), rel=1e-4)
    assert all(value.grad is None for value in student.parameters())
    for value, gradient in zip(fake.parameters(), wanted_fake, strict=True):
        assert_close(value.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    by_row = step.student_loss(student, teacher, fake, batch, by_row=True)
    assert by_row.shape == (3,) and by_row.sum().item() == pytest.approx(expected_student.item(), rel=1e-4)


def test_gradient_goes_through_the_inputs_of_the_frozen_networks():
    """Catches the masked case's gradient, which stops at x_t, taken over here."""
    student, teacher, fake = networks()
    batch = UniformNoising()(batch_of(), Draws.of_rows(0, 0, [5, 2, 9], 7, 1))
    step = UniformStep(student.config.vocab_size, 0.3)
    whole = torch.autograd.grad(step.student_loss(student, teacher, fake, batch), student.lm_head.weight)[0]
    noised = step._noised
    step._noised = lambda clean, *rest: noised(clean.detach(), *rest)
    stopped = torch.autograd.grad(step.student_loss(student, teacher, fake, batch), student.lm_head.weight)[0]
    assert (whole - stopped).norm() > 0.05 * whole.norm()


def test_student_stands_still_where_fake_equals_teacher():
    """Catches a student that moves although it makes just what the teacher expects."""
    student, teacher, _ = networks()
    batch = UniformNoising()(batch_of(), Draws.of_rows(0, 0, [5, 2, 9], 7, 1))
    loss = UniformStep(student.config.vocab_size, 0.3).student_loss(student, teacher, copy.deepcopy(teacher), batch)
    loss.backward()
    assert loss == 0 and max(value.grad.abs().max() for value in student.parameters()) < 1e-9


def test_student_grid_is_where_the_sampler_starts_its_steps():
    """Catches a student that learns at other noise levels than it is run at."""
    batch, draws = batch_of(), Draws.of_rows(0, 0, [5, 2, 9], 7, 1)
    alpha = torch.cat([UniformNoising(4)(batch, Draws(**{**vars(draws), "student_time": torch.tensor([u] * 3)}))
                       .student_alpha[:1] for u in (0.0, 0.26, 0.51, 0.99)])  # fmt: skip
    assert_close(alpha, torch.tensor([0.75, 0.5, 0.25, 1e-3]))


@pytest.mark.slow
def test_trainer_trains_resumes_and_saves_what_loads(tmp_path):
    """Catches a resume that draws other noise or loses the fake, and a checkpoint that generates otherwise."""
    options = {"save_strategy": "steps", "save_steps": 2, "eval_dataset": sorting_rows(5, seed=9)}
    start = weights(tiny_trainer(tmp_path / "none"))
    whole = tiny_trainer(tmp_path / "whole", **options)
    whole.train()
    assert (weights(whole) - start).abs().max() > 1e-4 < (weights(whole, "fake") - start).abs().max()
    assert (weights(whole, "teacher") == start).all()
    again = tiny_trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name in ("model", "fake"):
        assert_close(weights(again, name), weights(whole, name), rtol=0, atol=1e-9)
    metrics = again.evaluate()
    assert (
        metrics == pytest.approx({**metrics, **whole.evaluate()}, rel=1e-6, abs=1e9) and metrics["eval_fake_loss"] > 0
    )
    whole.save_model()
    model, tokenizer = AutoModel.from_pretrained(tmp_path / "whole"), AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert isinstance(model, TIDEUniformQwen3ForDiffusion) and model.config.num_steps == 2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "310254"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=7).shape == (1, 15)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "uniform-state diffusion" in card and "mask token" not in card and "2506.10892" in card
    assert not [line for line in check_card(tmp_path / "whole" / "README.md") if "diffusion" in line]


@pytest.mark.slow
def test_accumulation_changes_nothing(tmp_path):
    """Catches noise that depends on the batch, and sums divided by the rows of a micro-batch."""
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = tiny_trainer(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            input_temperature=0.3,
        )
        trainer.train()
        runs.append((weights(trainer), weights(trainer, "fake")))
    for one, other in zip(*runs, strict=True):
        assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Catches a fake whose gradients wait for the student's step, noise that depends on the process, two divisors."""
    results = []
    for world_size in (1, 2):
        output = tmp_path / str(world_size)
        output.mkdir()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world_size)]
        script = [str(Path(__file__).parent / "uniform_run.py"), str(output), str(world_size)]
        subprocess.run([*launcher, "--standalone", *script], check=True, timeout=300)
        results.append(torch.load(output / "result.pt", weights_only=True))
    for name, value in results[0].items():
        assert_close(results[1][name], value, rtol=1e-9, atol=1e-12)


def test_adapters_train_over_one_base(tmp_path):
    """Catches a fake frozen for good by the student's step, and a base that moves."""
    trainer = tiny_trainer(tmp_path, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"), max_steps=3)
    base = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    before = weights(trainer, "fake")
    trainer.train()
    assert (weights(trainer, "fake") - before).abs().max() > 1e-5
    assert all((value == base[name]).all() for name, value in trainer.teacher.state_dict().items())


def test_trainers_refuse_the_other_kind_of_diffusion(tmp_path):
    """Catches a uniform-state model trained with masks, and the other way round."""
    common = {"processing_class": build_tokenizer(), "train_dataset": sorting_rows(4, seed=0)}
    settings = {"output_dir": str(tmp_path), "max_length": 16, "use_cpu": True, "report_to": []}
    with pytest.raises(ValueError, match="UniformIDLMTrainer"):
        TIDETrainer(model=tiny_uniform(), args=TIDEConfig(preset="ce", **settings), **common)
    with pytest.raises(ValueError, match="UniformIDLMTrainer"):
        IDLMTrainer(model=tiny_uniform(), args=IDLMConfig(**settings), **common)
    from tiny import tiny_model

    with pytest.raises(ValueError, match="diffusion_type uniform"):
        UniformIDLMTrainer(model=tiny_model(), args=IDLMConfig(**settings), **common)
    assert AutoModelForCausalLM._model_mapping[TIDEUniformQwen3Config] is TIDEUniformQwen3ForDiffusion


# ---- the demonstration ----


def test_measure_counts_answers_that_repeat_one_digit(monkeypatch):
    """Catches fragments, other digits and unfinished answers counted as right, and a spread over wrong answers."""
    tokenizer = build_tokenizer()
    eos = tokenizer.eos_token_id
    answers = [[7, 7, 7, 7, eos], [2, 2, 2, 2, eos], [7, 7, 7, 2, eos], [7, 7, 7, 7, 7], [7, 7, eos, 10, 10]]
    model = tiny_uniform()
    monkeypatch.setattr(
        model, "generate", lambda prompts, **kwargs: torch.cat([prompts[: len(answers)], torch.tensor(answers)], 1)
    )
    measured = demo.measure(model, tokenizer, [3], num_samples=5)
    assert measured == {"3": {"share": 2 / 5, "digits": pytest.approx(2)}}


@pytest.mark.slow
def test_few_step_student_agrees_with_itself_more_often(tmp_path):
    """Catches training that runs and teaches nothing: at the steps it was made for the student beats its teacher."""
    teacher, student = (row.metrics for row in demo.compare(tmp_path, seed=0, num_steps=4, steps=[2, 4, 32]))
    assert teacher["32"]["share"] > 0.9, "the teacher itself can do it, with many steps"
    assert all(student[steps]["share"] > teacher[steps]["share"] + 0.04 for steps in ("2", "4"))
    assert student["4"]["digits"] > 6, "most digits are still there"
