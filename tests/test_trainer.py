"""TIDETrainer: the step against a straightforward one, accounting, resume, evaluation, saving, refusals."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM, LoraConfig
from tiny import tiny_model, tiny_trainer
from tokenizers import Tokenizer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tide_hf import TIDEConfig, TIDETrainer
from tide_hf.demo.sorting import build_tokenizer, held_out_rows, sorting_rows, with_special_tokens
from tide_hf.diffusion import row_uniforms
from tide_hf.models import WeDLMConfig


def weights_of(trainer) -> dict:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# -- the step ---------------------------------------------------------------------------------------------------------


def naive_visible(length: int, block_size: int) -> torch.Tensor:
    """[xt ; x0] visibility by three loops over the rule in words."""
    visible = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for query in range(2 * length):
        for key in range(2 * length):
            noised_query, noised_key = query < length, key < length
            query_block, key_block = query % length // block_size, key % length // block_size
            if noised_query == noised_key:
                visible[query, key] = query_block == key_block or (not noised_query and key_block < query_block)
            else:
                visible[query, key] = noised_query and not noised_key and key_block < query_block
    return visible


def naive_logits(model, noised, clean, block_size):
    """Logits of the noised half of [xt ; x0], full length, full vocabulary."""
    length = len(clean)
    out = model.model(
        input_ids=torch.cat([noised, clean])[None],
        attention_mask=naive_visible(length, block_size)[None, None],
        position_ids=torch.arange(length).repeat(2)[None],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(out)[0, :length]


@pytest.mark.parametrize("preset", ["ce", "kl", "reverse-kl", "tide-shared"])
def test_step_equals_a_straightforward_one(tmp_path, preset):
    """Catches any error of packing, pairing, selection, counting or weighting: loss and gradient of a whole step
    against both halves whole, full-vocabulary logits, two teacher passes and loops over rows and positions."""
    student, teacher = tiny_model(0), tiny_model(1, hidden=48)
    trainer = tiny_trainer(
        tmp_path,
        model=student,
        teacher=None if preset == "ce" else teacher,
        preset=preset,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        max_steps=1,
    )
    rows = [trainer.train_dataset[index] for index in range(8)]
    trainer.state.max_steps, trainer.state.global_step, trainer.state.epoch = 10, 3, 0.0
    batches = [trainer.data_collator(rows[:4]), trainer.data_collator(rows[4:])]
    noised_batches, _ = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    student.zero_grad()
    losses = [trainer.compute_loss(student, batch) for batch in noised_batches]
    sum(losses).backward()
    got = {name: value.grad.clone() for name, value in student.named_parameters()}

    temperature, lam = 2.0, 0.1 + 0.8 * 0.5 * (1 - torch.cos(torch.tensor(torch.pi * 0.3, dtype=torch.float64)))
    mask_id = student.config.mask_token_id
    ce_terms, distill_terms, num_trained, num_masked = [], [], 0, 0
    student.zero_grad()
    for row in rows:
        clean, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        u_time, u_mask, u_demo = row_uniforms(trainer.args.seed, 0, [row["row_key"]], len(clean))
        t = 1e-3 + (1 - 1e-3) * u_time[0]
        masked = (u_mask[0] < t) & (labels != -100)
        num_trained, num_masked = num_trained + int((labels != -100).sum()), num_masked + int(masked.sum())
        z = naive_logits(student, torch.where(masked, mask_id, clean), clean, 4)
        for i in masked.nonzero().flatten():
            ce_terms.append(-F.log_softmax(z[i], -1)[clean[i]] / t.double())
        if preset == "ce":
            continue
        chunk = torch.tensor(row["chunk_ids"])
        part_a = masked & (u_demo[0][chunk.clamp(min=0)] < 0.5)
        with torch.no_grad():
            if preset == "tide-shared":
                one = naive_logits(teacher, torch.where(masked & ~part_a, mask_id, clean), clean, 4)
                two = naive_logits(teacher, torch.where(part_a, mask_id, clean), clean, 4)
                zt = torch.where(part_a[:, None], two, one)
            else:
                zt = naive_logits(teacher, torch.where(masked, mask_id, clean), clean, 4)
        for i in masked.nonzero().flatten():
            log_s, log_t = F.log_softmax(z[i] / temperature, -1), F.log_softmax(zt[i] / temperature, -1)
            if preset == "kl":
                value = (log_t.exp() * (log_t - log_s)).sum()
            elif preset == "reverse-kl":
                value = (log_s.exp() * (log_s - log_t)).sum()
            else:
                strength = lam * (1 - t.double())
                log_r = F.log_softmax(
                    (1 - strength) * z[i].detach() / temperature + strength * zt[i] / temperature, -1
                )
                omega = torch.exp(-((t.double() - 0.5) ** 2) / (2 * 0.15**2))
                value = omega * (log_r.exp() * (log_r - log_s)).sum()
            distill_terms.append(temperature**2 * value)
    expected = sum(ce_terms) / num_trained + (sum(distill_terms) / num_masked if distill_terms else 0)
    expected.backward()
    # draws, times and weights are float32 on the host, hence not 1e-12
    assert_close(sum(losses).detach(), expected.detach(), rtol=1e-6, atol=0)
    for name, value in student.named_parameters():
        assert_close(got[name], value.grad, rtol=1e-4, atol=1e-6 * float(value.grad.abs().max()), msg=name)


def test_packing_changes_nothing(tmp_path):
    """Catches a packed layout that drops a block somebody sees: the textbook layout gives the same loss."""
    trainer = tiny_trainer(tmp_path, teacher=tiny_model(1))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    packed = trainer._noise(batch, 0)
    trainer.noising = dataclasses.replace(trainer.noising, pack=False)
    whole = trainer._noise(batch, 0)
    assert packed.student.input_ids.shape[1] < whole.student.input_ids.shape[1]
    assert packed.teacher.input_ids.shape[1] < whole.teacher.input_ids.shape[1]
    trainer.state.max_steps = 10
    assert_close(trainer.compute_loss(trainer.model, packed), trainer.compute_loss(trainer.model, whole))


def test_batch_without_masked_position_trains(tmp_path):
    """Catches a crash or NaN where no position of a micro-batch is masked."""
    trainer = tiny_trainer(tmp_path, teacher=tiny_model(1))
    trainer.state.max_steps = 10
    batch = trainer.data_collator([trainer.train_dataset[0]])
    uniforms = (torch.zeros(1), torch.ones(1, 16), torch.ones(1, 16))
    loss = trainer.compute_loss(trainer.model, trainer.noising(batch, uniforms))
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None for parameter in trainer.model.parameters())


# -- accounting -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["token", "sequence", "batch"])
def test_accumulation_changes_nothing(tmp_path, normalization):
    """Catches per-micro-batch means: 8x1, 4x2 and 1x8 rows give the same losses, terms and weights."""
    runs = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        trainer = tiny_trainer(
            tmp_path,
            teacher=tiny_model(1),
            loss_normalization=normalization,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        runs.append(trainer)
    reference = runs[0]
    for run in runs[1:]:
        assert_close(losses_of(run), losses_of(reference), rtol=1e-6, atol=1e-6)
        assert_close(weights_of(run), weights_of(reference), rtol=1e-6, atol=1e-7)
        for ours, theirs in zip(run.state.log_history, reference.state.log_history, strict=True):
            for name in ("ce", "distill", "lambda"):
                if name in theirs:
                    assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def distributed_results(folder, layouts, with_teacher, tied, adapter=0) -> list[dict]:
    """What `distributed_run.py` saves, per (processes, accumulation, sharding)."""
    results = []
    for index, (world_size, accumulation, sharding) in enumerate(layouts):
        output = folder / str(index)
        output.mkdir()
        script = [str(Path(__file__).parent / "distributed_run.py"), str(output)]
        script += [*(str(number) for number in (world_size, accumulation, with_teacher, tied, adapter)), sharding]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world_size)]
        launcher += ["--master_port", str(29600 + 10 * index + with_teacher)]
        subprocess.run([*(launcher if world_size > 1 else [sys.executable]), *script], check=True, timeout=300)
        results.append(torch.load(output / "result.pt", weights_only=False))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("with_teacher", "tied", "adapter"), [(0, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0)])
def test_number_of_processes_changes_nothing(tmp_path, with_teacher, tied, adapter):
    """Catches local counts, masks that depend on the rank, evaluation that counts repeated rows twice, and a head read
    outside the forward that gathers it: in the second layout accelerate's FSDP2 gives each process half of every
    parameter."""
    layouts = [(1, 1, "none"), (2, 1, "fsdp2")]
    if not adapter:
        layouts += [(2, 2, "none"), (4, 1, "none")]
    reference, *results = distributed_results(tmp_path, layouts, with_teacher, tied, adapter)
    for result in results:
        assert_close(result["weights"], reference["weights"], rtol=1e-6, atol=1e-7)
        for ours, theirs in zip(result["losses"], reference["losses"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["ce"] == pytest.approx(theirs["ce"], rel=1e-5)
            # Adam's steps alone do not tell a gradient from its multiple
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-9)
        for name, value in reference["metrics"].items():
            if "runtime" not in name and "second" not in name:
                assert result["metrics"][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("tied", [0, 1])
def test_zero3_changes_nothing(tmp_path, tied):
    """Catches what DeepSpeed's ZeRO-3, in float32, would read before it is gathered."""
    pytest.importorskip("deepspeed")
    layouts = [(1, 1, "none"), (2, 1, "zero3"), (2, 2, "zero3")]
    reference, *results = distributed_results(tmp_path, layouts, 1, tied)
    for result in results:
        for name, value in reference["weights"].items():
            assert_close(result["weights"][name].double(), value, rtol=1e-4, atol=1e-4, msg=name)
        for ours, theirs in zip(result["losses"], reference["losses"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        for name in ("eval_loss", "eval_ce"):
            assert result["metrics"][name] == pytest.approx(reference["metrics"][name], rel=1e-4), name


@pytest.mark.slow
def test_resume_goes_on_exactly(tmp_path):
    """Catches noise from a global generator, lost optimizer state and a restarted λ: a resumed run equals one that
    was never interrupted."""
    options = {"max_steps": 6, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 3}
    whole = tiny_trainer(tmp_path / "whole", teacher=tiny_model(1), **options)
    whole.train()
    resumed = tiny_trainer(tmp_path / "resumed", model=tiny_model(7), teacher=tiny_model(1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_close(weights_of(resumed), weights_of(whole), rtol=0, atol=0)
    for ours, theirs in zip(resumed.state.log_history[3:6], whole.state.log_history[3:6], strict=True):
        assert {name: ours[name] for name in ("loss", "ce", "distill", "lambda")} == {
            name: theirs[name] for name in ("loss", "ce", "distill", "lambda")
        }


def test_noise_differs_by_epoch_and_not_by_order(tmp_path):
    """Catches the same masks in every epoch, and masks that follow the position in the batch."""
    trainer = tiny_trainer(tmp_path)
    rows = [trainer.train_dataset[index] for index in range(4)]
    first = trainer._noise(trainer.data_collator(rows), 0)
    assert not torch.equal(first.t, trainer._noise(trainer.data_collator(rows), 1).t)
    backwards = trainer._noise(trainer.data_collator(rows[::-1]), 0)
    assert torch.equal(first.t, backwards.t.flip(0))
    assert first.counts == backwards.counts


def test_training_draws_new_noise_each_epoch(tmp_path, monkeypatch):
    """Catches a run that keys its noise by a constant: sixteen rows, eight a step, two steps an epoch."""
    trainer = tiny_trainer(tmp_path)
    epochs = []
    noise = trainer._noise
    monkeypatch.setattr(trainer, "_noise", lambda batch, epoch: epochs.append(epoch) or noise(batch, epoch))
    trainer.train()
    assert epochs == [0, 0, 1, 1]


# -- logs, evaluation, saving -----------------------------------------------------------------------------------------


def test_logged_terms_add_up_to_the_loss(tmp_path):
    """Catches terms of the last micro-batch only, or of one process."""
    trainer = tiny_trainer(
        tmp_path, teacher=tiny_model(1), distill_weight=3.0, ce_weight=0.5, logging_steps=2, max_steps=4,
        gradient_accumulation_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry in logs:
        assert entry["loss"] == pytest.approx(0.5 * entry["ce"] + 3.0 * entry["distill"], rel=1e-5)
    assert logs[-1]["lambda"] == pytest.approx(0.9)


def test_evaluation_is_fixed_and_independent_of_the_batch_size(tmp_path):
    """Catches new noise at each evaluation, and means of batch means."""
    rows = sorting_rows(7, seed=5)
    metrics = []
    for batch_size in (7, 3):
        trainer = tiny_trainer(
            tmp_path,
            teacher=tiny_model(1),
            per_device_eval_batch_size=batch_size,
            eval_noise_levels=[0.3, 1.0],
            trainer_kwargs={"eval_dataset": rows},
        )
        metrics += [trainer.evaluate(), trainer.evaluate()]
    names = ("eval_loss", "eval_ce", "eval_distill", "eval_nll_0.3", "eval_nll_1")
    for other in metrics[1:]:
        assert [other[name] for name in names] == pytest.approx([metrics[0][name] for name in names], rel=1e-5)
    assert trainer.model.training


def test_evaluation_equals_the_training_loss_on_the_same_noise(tmp_path):
    """Catches an evaluation that sums or weighs differently from the step it stands for, that of TIDAL at λ = 1."""
    trainer = tiny_trainer(
        tmp_path, teacher=tiny_model(1), trainer_kwargs={"eval_dataset": sorting_rows(6, seed=5)}, ce_weight=0.7
    )
    metrics = trainer.evaluate()
    batch = trainer._noise(trainer.data_collator([trainer.eval_dataset[index] for index in range(6)]), None)
    trainer.plan = dataclasses.replace(trainer.plan, objective=trainer.objective.evaluated)
    assert metrics["eval_loss"] == pytest.approx(trainer.compute_loss(trainer.model, batch).item(), rel=1e-5)


def test_nll_at_full_noise_is_that_of_the_all_masked_row(tmp_path):
    """Catches noise levels that do not reach the masks."""
    trainer = tiny_trainer(tmp_path, eval_noise_levels=[1.0], trainer_kwargs={"eval_dataset": sorting_rows(3, seed=5)})
    got = trainer.evaluate()["eval_nll_1"]
    total, count = 0.0, 0
    for row in trainer.eval_dataset:
        clean, trained = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]) != -100
        with torch.no_grad():
            noised = torch.where(trained, trainer.model.config.mask_token_id, clean)
            z = naive_logits(trainer.model, noised, clean, 4)
        total += float(F.cross_entropy(z[trained], clean[trained], reduction="sum"))
        count += int(trained.sum())
    assert got == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
def test_saving_holds_the_student_alone(tmp_path):
    """Catches a teacher in the checkpoint or the optimizer, and a checkpoint that forgets how it was trained."""
    teacher = tiny_model(1, hidden=48)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = tiny_trainer(tmp_path, teacher=teacher)
    trainer.train()
    trainer.save_model()
    student_ids = {id(parameter) for parameter in trainer.model.parameters()}
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} <= student_ids
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(loaded.state_dict(), weights_of(trainer), rtol=0, atol=0)
    assert loaded.generation_config.block_size == loaded.config.block_size == 4
    assert loaded.generation_config.mask_token_id == build_tokenizer().mask_token_id
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template == build_tokenizer().chat_template


def test_checkpoint_decodes_on_the_grid_it_was_trained_on(tmp_path):
    """Catches a block size or mask token that reaches the step and not the saved generation settings."""
    model = tiny_model(block_size=8, mask_token_id=None)
    trainer = tiny_trainer(tmp_path, model=model, block_size=4)
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.block_size == loaded.generation_config.block_size == 4
    assert loaded.config.mask_token_id == loaded.generation_config.mask_token_id == build_tokenizer().mask_token_id


def test_whole_sequence_students_decode_whole_answers(tmp_path):
    """Catches a block size left in the generation settings, which makes decoding semi-autoregressive."""
    for diffusion_type, expected in (("full", None), ("block", 4)):
        trainer = tiny_trainer(tmp_path, model=tiny_model(diffusion_type=diffusion_type))
        assert trainer.model.generation_config.block_size == expected


@pytest.mark.slow
def test_adapter_trains_alone(tmp_path):
    """Catches an adapter run that moves the base weights, or whose save cannot be loaded."""
    base = tiny_model(0, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = tiny_trainer(
        tmp_path / "out",
        model=model,
        teacher=tiny_model(1, dtype=torch.float32),
        trainer_kwargs={"peft_config": lora},
    )
    trainer.train()
    trainer.save_model()
    after = trainer.model.get_base_model().state_dict()
    for name, value in before.items():
        adapted = name.replace("q_proj.w", "q_proj.base_layer.w").replace("v_proj.w", "v_proj.base_layer.w")
        assert_close(after[adapted], value, rtol=0, atol=0)
    assert any(float(value.abs().max()) > 0 for name, value in after.items() if "lora_B" in name)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([build_tokenizer().encode("<user>739152<assistant>")])
    trainer.model.eval()
    assert_close(loaded(ids).logits, trainer.model(ids).logits)
    assert torch.equal(
        loaded.generate(input_ids=ids, max_new_tokens=8), trainer.model.generate(input_ids=ids, max_new_tokens=8)
    )


def test_wedlm_teacher_in_the_papers_context(tmp_path):
    """Catches a WeDLM teacher that is loaded by other code, fed other blocks, or needs a mask id it does not say."""
    tiny_model(1, config_class=WeDLMConfig, mask_token_id=None, dtype=torch.float32).save_pretrained(
        tmp_path / "wedlm"
    )
    student = tiny_model(0, dtype=torch.float32)
    trainer = tiny_trainer(tmp_path, model=student, teacher=str(tmp_path / "wedlm"),
                           trainer_kwargs={"teacher_processing_class": build_tokenizer()})  # fmt: skip
    assert trainer.signal.contract.block_size == 4 and trainer.signal.contract.clean_copy
    assert trainer.signal.contract.mask_token_id == build_tokenizer().mask_token_id
    trainer.train()
    assert losses_of(trainer)[-1] > 0


def test_rows_prepared_without_a_teacher_are_refused(tmp_path):
    """Catches a distillation that would fail deep in the step on rows without a teacher side."""
    prepared = tiny_trainer(tmp_path).train_dataset
    with pytest.raises(ValueError, match="no teacher side"):
        tiny_trainer(tmp_path, rows=prepared, teacher=tiny_model(1)).train()


# -- refusals ---------------------------------------------------------------------------------------------------------


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The sorting tokenizer with two ids exchanged."""
    tokenizer = build_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["3"], vocab["4"] = vocab["4"], vocab["3"]
    return with_special_tokens(Tokenizer.from_str(json.dumps(state)))


def test_disagreeing_vocabularies_are_refused(tmp_path):
    """Catches token alignment of tokenizers whose ids mean different things."""
    with pytest.raises(ValueError, match="id 3 is '3' for the student and '4' for the teacher"):
        tiny_trainer(tmp_path, teacher=tiny_model(1), alignment="token",
                     trainer_kwargs={"teacher_processing_class": other_tokenizer()})  # fmt: skip
    trainer = tiny_trainer(
        tmp_path, teacher=tiny_model(1), trainer_kwargs={"teacher_processing_class": other_tokenizer()}
    )
    assert trainer.objective.alignment == "chunk" and trainer.objective.divergence.name == "calm"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None, "preset": "tide-shared"}, "needs a teacher; preset='ce' trains without one"),
        ({"max_length": 18}, "block_size=4 does not fit max_length=18"),
        ({"mask_token_id": 400}, "400 lies outside its vocabulary of 15 rows"),
        ({"rows": held_out_rows(4).rename_column("messages", "talk")}, "columns talk; expected 'messages'"),
    ],
)
def test_refusals(tmp_path, options, message):
    """Catches a run that starts although it cannot train."""
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **options)


def test_student_without_mask_token_is_refused(tmp_path):
    """Catches noise made of a token that means something."""
    tokenizer = build_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="The student has no mask token"):
        TIDETrainer(
            tiny_model(mask_token_id=None), args=TIDEConfig(output_dir=str(tmp_path), preset="ce", use_cpu=True),
            train_dataset=sorting_rows(4, seed=0), processing_class=tokenizer,
        )  # fmt: skip


def test_autoregressive_student_is_refused(tmp_path):
    """Catches a causal model that would be trained as if it were a diffusion LM."""
    config = Qwen3Config(vocab_size=15, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, head_dim=16)  # fmt: skip
    with pytest.raises(ValueError, match="is not a diffusion LM that this library knows"):
        tiny_trainer(tmp_path, model=Qwen3ForCausalLM(config))


def test_adapter_on_the_head_is_refused(tmp_path):
    """Catches a LoRA on lm_head whose share the loss, which reads the weight, would not see."""
    lora = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="adapter targets lm_head"):
        tiny_trainer(tmp_path, trainer_kwargs={"peft_config": lora})


@pytest.mark.slow
def test_streaming_trains_like_a_table(tmp_path):
    """Catches a streaming dataset that loses rows or row ids: unshuffled, it gives the same run as the table."""
    rows = sorting_rows(16, seed=3, wrong=0.3)
    options = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    table = tiny_trainer(tmp_path, rows=rows, teacher=tiny_model(1), **options)
    stream = tiny_trainer(tmp_path, rows=rows.to_iterable_dataset(), teacher=tiny_model(1), **options)
    table.train()
    stream.train()
    assert_close(weights_of(stream), weights_of(table), rtol=0, atol=0)
