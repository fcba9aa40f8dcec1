"""A teacher that is run once: divergences over its likeliest tokens, what is kept, and training without it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import torch
from datasets import concatenate_datasets, load_from_disk
from test_autoregressive_teachers import causal_model
from tiny import Hellinger, tiny_model, tiny_trainer
from torch.testing import assert_close
from transformers import AutoTokenizer, TrainerCallback

from tide_hf.commands import cache as command
from tide_hf.commands.cache import CacheArguments
from tide_hf.commands.prepare import parse_prepare_arguments, run_preparation
from tide_hf.data import PreparationRecord
from tide_hf.data.teacher_cache import CACHE_COLUMNS
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.losses import DIVERGENCES, token_divergence, top_k_divergence, top_k_log_probs

ROOT = Path(__file__).parent.parent
PAIRS = ("12", "34", "56", "78", "89", "01")
TOKEN_DIVERGENCES = [cls() for cls in DIVERGENCES.values() if cls.pairs == "token"] + [Hellinger(2.0)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the datasets library."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


# -- the loss ---------------------------------------------------------------------------------------------------------


def naive_top_k(divergence, student, teacher, k, temperature, size, lambda_N=None):
    """From the equations, position by position, in probabilities and Python's own sums."""
    values = []
    for n in range(len(student)):
        p_student = (student[n, :size] / temperature).softmax(-1)
        p_teacher = (teacher[n, :size] / temperature).softmax(-1)
        top = sorted(range(size), key=lambda v: -float(p_teacher[v]))[:k]
        rest = [v for v in range(size) if v not in top]
        outcomes = []
        for p in (p_student, p_teacher):
            masses = [p[v] for v in top] + ([sum(p[v] for v in rest)] if rest else [])
            outcomes.append(torch.stack(masses))
        log_student, log_target = outcomes[0].log(), outcomes[1].log().detach()
        if lambda_N is not None:
            mixed = outcomes[0].detach() ** (1 - lambda_N[n]) * outcomes[1].detach() ** lambda_N[n]
            log_target = (mixed / mixed.sum()).log()
        values.append(temperature**2 * divergence.values(log_student[None], log_target[None])[0])
    return torch.stack(values)


@pytest.mark.parametrize("divergence", TOKEN_DIVERGENCES, ids=lambda divergence: divergence.name)
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("tidal", [False, True])
def test_loss_over_the_likeliest_tokens(divergence, k, tidal):
    """Catches a wrong outcome, a mass that is lost, a temperature or λ that is left out, and a wrong gradient."""
    student, teacher, size, temperature = draw(5, 10), draw(5, 12, seed=1), 8, 2.0
    lambda_N = torch.rand(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) if tidal else None
    ids = teacher[:, :size].topk(k).indices
    log_target = top_k_log_probs(teacher, ids, temperature=temperature, shared_vocab_size=size)
    mine, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    found = top_k_divergence(
        divergence, mine, ids, log_target, temperature=temperature, shared_vocab_size=size, lambda_N=lambda_N
    )
    expected = naive_top_k(divergence, other, teacher, k, temperature, size, lambda_N)
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found.sum().backward()
    expected.sum().backward()
    assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", TOKEN_DIVERGENCES, ids=lambda divergence: divergence.name)
@pytest.mark.parametrize("tidal", [False, True])
def test_all_tokens_give_the_whole_divergence(divergence, tidal):
    """Catches a cached loss that is another one even where nothing is left out."""
    student, teacher, size = draw(6, 9), draw(6, 9, seed=1), 9
    lambda_N = torch.linspace(0, 1, 6, dtype=torch.float64) if tidal else None
    settings = {"temperature": 1.5, "lambda_N": lambda_N}
    ids = teacher.topk(size).indices
    log_target = top_k_log_probs(teacher, ids, temperature=1.5)
    found = top_k_divergence(divergence, student, ids, log_target, **settings)
    assert_close(found, token_divergence(divergence, student, teacher, **settings), rtol=1e-12, atol=1e-13)


def test_fewer_tokens_never_raise_the_divergence():
    """Catches a tail that is not merged but dropped or renormalised away: the bound would not grow with k."""
    student, teacher = draw(50, 20), draw(50, 20, seed=1)
    bounds = []
    for k in (1, 2, 4, 8, 16, 20):
        ids = teacher.topk(k).indices
        log_target = top_k_log_probs(teacher, ids)
        bounds.append(top_k_divergence(DIVERGENCES["forward_kl"](), student, ids, log_target))
    for smaller, larger in pairwise(bounds):
        assert (smaller <= larger + 1e-12).all()
    assert (bounds[0] < bounds[-1] - 1e-3).all()


def test_certain_teacher_leaves_finite_gradients():
    """Catches log(1 − Σ p), which is −∞ where the likeliest token holds all of float32's digits."""
    teacher = torch.tensor([[60.0, 0.0, -1.0, 2.0]])
    student = torch.tensor([[0.0, 80.0, -1.0, 2.0]], requires_grad=True)
    ids = teacher.topk(1).indices
    log_target = top_k_log_probs(teacher, ids)
    assert torch.isfinite(log_target).all() and log_target[0, 1] < -50
    top_k_divergence(DIVERGENCES["forward_kl"](), student, ids, log_target).sum().backward()
    assert torch.isfinite(student.grad).all() and student.grad.abs().sum() > 0.5


# -- what is kept, and training on it ---------------------------------------------------------------------------------


def saved(model, tokenizer, folder) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def names(tmp_path):
    """Folders of a student, teachers of both kinds and of another tokenizer, and the rows."""
    shared, other = build_tokenizer(), build_tokenizer(PAIRS)
    size = {"vocab_size": len(other), "mask_token_id": other.mask_token_id}
    rows = sorting_rows(20, seed=3, wrong=0.3)
    rows.to_json(tmp_path / "rows.jsonl")
    ids = {name: getattr(shared, f"{name}_token_id") for name in ("pad", "eos")}
    ids = {f"{name}_token_id": value for name, value in ids.items()} | {"bos_token_id": None}
    other_ids = {"pad_token_id": other.pad_token_id, "eos_token_id": other.eos_token_id, "bos_token_id": None}
    return {
        "rows": str(tmp_path / "rows.jsonl"),
        "student": saved(tiny_model(seed=5), shared, tmp_path / "student"),
        "diffusion": saved(tiny_model(seed=1), shared, tmp_path / "diffusion"),
        "diffusion-across": saved(tiny_model(seed=2, **size), other, tmp_path / "diffusion-across"),
        "ar": saved(causal_model(vocab_size=len(shared), **ids), shared, tmp_path / "ar"),
        "ar-across": saved(causal_model(vocab_size=len(other), **other_ids), other, tmp_path / "ar-across"),
    }


def prepare(names, teacher: str, folder, *flags):
    """Prepared rows with the predictions of a teacher."""
    words = ["--model_name_or_path", names["student"], "--teacher_model_name_or_path", names[teacher]]
    words += ["--dataset_name", names["rows"], "--max_length", "16", "--output_dir", str(folder)]
    return run_preparation(parse_prepare_arguments([*words, "--teacher_cache", *map(str, flags)]))["train"]


class Losses(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.found.append({name: logs[name] for name in ("loss", "ce", "distill", "grad_norm") if name in logs})


def train(names, folder, rows, teacher=None, tokenizer=None, **fields):
    """What a short run logs, and its weights."""
    losses = Losses()
    trainer = tiny_trainer(
        folder,
        rows=rows,
        model=tiny_model(seed=5),
        teacher=teacher,
        trainer_kwargs={"callbacks": [losses], "teacher_processing_class": tokenizer},
        max_steps=fields.pop("max_steps", 5),
        **fields,
    )
    trainer.train()
    return losses.found, dict(trainer.model.named_parameters())


CASES = {
    "kl": ("diffusion", {"preset": "kl"}),
    "tide": ("diffusion", {"preset": "tide-shared"}),
    "suffix masks": ("diffusion", {"preset": "kl", "suffix_mask_fraction": 0.5}),
    "across": ("diffusion-across", {"preset": "tide-cross"}),
    "tide across": ("diffusion-across", {"preset": "tide-shared"}),
    "ar": ("ar", {"preset": "ar-kl"}),
    "ar exact": ("ar", {"preset": "ar-kl", "ar_targets": "exact"}),
    "ar across": ("ar-across", {"preset": "ar-calm"}),
    "ar chunks of one token": ("ar", {"preset": "ar-calm"}),
}


FAST = ("kl", "across", "ar", "ar exact")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_training_on_the_cache_is_training_with_the_teacher(names, tmp_path, name):
    """Catches predictions at wrong positions, of wrong noise or of another pass, of either kind of teacher.

    All tokens are kept, so that only the rounding of what is stored is left; two passes over two and a half batches.
    """
    teacher, fields = CASES[name]
    flags = [word for field, value in fields.items() for word in (f"--{field}", value)]
    passes = [] if teacher.startswith("ar") else ["--cache_passes", 2]
    all_tokens = [] if teacher.endswith("across") or fields["preset"] == "ar-calm" else ["--cache_top_k", 99]
    cached = prepare(names, teacher, tmp_path / "cached", *flags, *passes, *all_tokens, "--seed", 11)
    tokenizer = AutoTokenizer.from_pretrained(names[teacher])
    raw = cached.remove_columns([column for column in CACHE_COLUMNS if column in cached.column_names])
    fields = {**fields, "seed": 11}
    expected = train(names, tmp_path / "with", raw, names[teacher], tokenizer, **fields)
    found = train(names, tmp_path / "without", cached, **fields)
    assert len(found[0]) == 5 and all(entry["distill"] != 0 for entry in found[0])
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if all_tokens else {"rtol": 2e-6, "atol": 2e-6}
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert mine["ce"] == pytest.approx(theirs["ce"], rel=tolerance["rtol"])
        assert mine["distill"] == pytest.approx(theirs["distill"], rel=tolerance["rtol"], abs=tolerance["atol"])


def test_evaluation_on_the_cache(names, tmp_path):
    """Catches an evaluation split whose noise is not that of evaluation."""
    rows = datasets.DatasetDict({"train": sorting_rows(16, seed=3), "test": sorting_rows(10, seed=4)})
    rows.save_to_disk(tmp_path / "both")
    names["rows"] = str(tmp_path / "both")
    flags = ("--preset", "kl", "--cache_top_k", 99, "--cache_passes", 1)
    words = ["--model_name_or_path", names["student"], "--teacher_model_name_or_path", names["diffusion"]]
    words += ["--dataset_name", names["rows"], "--max_length", "16", "--output_dir", str(tmp_path / "cached")]
    cached = run_preparation(parse_prepare_arguments([*words, "--teacher_cache", *map(str, flags)]))
    assert {len(counts) for counts in cached["train"]["teacher_counts"]} == {2}
    assert {len(counts) for counts in cached["test"]["teacher_counts"]} == {1}
    metrics = {}
    for name, teacher in (("with", names["diffusion"]), ("without", None)):
        data = cached
        if teacher is not None:
            data = {split: table.remove_columns(list(CACHE_COLUMNS)) for split, table in cached.items()}
        trainer = tiny_trainer(
            tmp_path / name,
            rows=data["train"],
            model=tiny_model(seed=5),
            teacher=teacher,
            preset="kl",
            trainer_kwargs={"eval_dataset": data["test"]},
        )
        metrics[name] = trainer.evaluate()
    assert metrics["without"]["eval_ce"] == metrics["with"]["eval_ce"]
    assert metrics["without"]["eval_distill"] == pytest.approx(metrics["with"]["eval_distill"], rel=2e-3)
    with pytest.raises(ValueError, match="were not made for this noise"):
        trainer.evaluate(cached["train"])


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("kl", {"preset": "tide-shared"}, "comp_demo: predicted with False, this run has True"),
        ("kl", {"temperature": 1.0}, "temperature: predicted with 2, this run has 1"),
        ("kl", {"schedule": "cosine"}, "schedule: predicted with linear, this run has cosine"),
        ("kl", {"suffix_mask_fraction": 0.5}, "suffix_mask_fraction: predicted with 0.0, this run has 0.5"),
        ("kl", {"time_epsilon": 0.01}, "time_epsilon"),
        ("kl", {"teacher_context": "native"}, "teacher_context: predicted with paper, this run has native"),
        ("kl", {"alignment": "chunk"}, "alignment: predicted with token, this run has chunk"),
        ("kl", {"shared_vocab_size": 20}, "shared_vocab_size"),
        ("kl", {"teacher_max_length": 8}, "teacher_max_length: prepared with 16, this run has 8"),
        ("kl", {"teacher_mask_token_id": 3}, "teacher_mask_token_id"),
        ("kl", {"on_policy_fraction": 0.5}, "answers that the student has"),
        ("kl", {"teacher_dtype": "float32"}, "teacher_dtype: prepared with auto, this run has float32"),
        ("kl", {"teacher_model_init_kwargs": {"attn_implementation": "eager"}}, "teacher_model_init_kwargs"),
        ("kl", {"max_steps": 4}, r"1 pass over the rows, and this run makes 2 \(4 steps, 3 a pass\)"),
        ("ar chunks of one token", {"preset": "ar-kl"}, "likeliest tokens: none kept"),
    ],
)
def test_refuses_another_run(names, tmp_path, name, fields, words):
    """Catches a run that would train on predictions which are not those that it asks for."""
    teacher, flags = CASES[name]
    passes = [] if teacher == "ar" else ["--cache_passes", 1]
    cached = prepare(names, teacher, tmp_path / "cached", "--preset", flags["preset"], *passes)
    with pytest.raises(ValueError, match=words):
        train(names, tmp_path / "run", cached, **{"max_steps": 3, **flags, **fields})


def test_compares_a_teacher_that_is_named(names, tmp_path):
    """Catches predictions of one teacher that train in the name of another, and a teacher that is loaded in vain."""
    loaded = {"teacher_dtype": "float32", "teacher_model_init_kwargs": '{"attn_implementation": "eager"}'}
    flags = [word for name, value in loaded.items() for word in (f"--{name}", value)]
    cached = prepare(names, "diffusion", tmp_path / "cached", "--preset", "kl", "--cache_passes", 2, *flags)
    loaded["teacher_model_init_kwargs"] = {"attn_implementation": "eager"}
    run = {"preset": "kl", "max_steps": 2, **loaded}
    Path(names["diffusion"], "model.safetensors").unlink()  # its config is enough
    train(names, tmp_path / "same", cached, names["diffusion"], **run)
    with pytest.raises(ValueError, match="teacher: predicted with diffusion, this run has student"):
        train(names, tmp_path / "other", cached, names["student"], **run)
    with pytest.raises(ValueError, match="teacher_processing_class is not the tokenizer"):
        train(names, tmp_path / "read", cached, None, build_tokenizer(PAIRS), **run)
    with pytest.raises(ValueError, match="leave teacher out"):
        train(names, tmp_path / "loaded", cached, tiny_model(seed=1), **run)
    config = json.loads(Path(names["diffusion"], "config.json").read_text())
    Path(names["diffusion"], "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match="config of the teacher"):
        train(names, tmp_path / "changed", cached, names["diffusion"], **run)


def test_refuses_rows_without_predictions_beside_those_with(names, tmp_path):
    """Catches an evaluation that would need a teacher which is not there, and predictions of unknown origin."""
    cached = prepare(names, "ar", tmp_path / "cached", "--preset", "ar-kl")
    raw = sorting_rows(4, seed=9)
    with pytest.raises(ValueError, match="The eval dataset carries none"):
        tiny_trainer(tmp_path / "run", rows=cached, preset="ar-kl", trainer_kwargs={"eval_dataset": raw})
    record = replace(PreparationRecord.read(cached), cache=None)
    with pytest.raises(ValueError, match="no record of the teacher"):
        tiny_trainer(tmp_path / "run", rows=record.attach(cached), preset="ar-kl")


def test_rows_train_without_their_predictions_too(names, tmp_path):
    """Catches columns that are in the way of an objective without a teacher."""
    cached = prepare(names, "ar", tmp_path / "cached", "--preset", "ar-kl")
    trainer = tiny_trainer(tmp_path / "run", rows=cached, preset="ce")
    assert not {*CACHE_COLUMNS} & {*trainer.train_dataset.column_names}
    trainer.train()


@pytest.mark.slow
def test_several_students_from_one_cache(names, tmp_path):
    """Catches a cache that is bound to one student's size, objective, seed or number of passes."""
    cached = prepare(names, "ar", tmp_path / "cached", "--preset", "ar-kl")
    for number, fields in enumerate(
        (
            {"preset": "ar-kl", "seed": 1},
            {"preset": "ar-kl", "ar_targets": "exact", "divergence": "jsd", "num_train_epochs": 4, "max_steps": -1},
            {"preset": "ar-calm", "distill_weight": 2.0},
        )
    ):
        trainer = tiny_trainer(
            tmp_path / str(number), rows=cached, model=tiny_model(hidden=16 * (number + 1)), **fields
        )
        trainer.train()
        assert all("distill" in entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.slow
def test_streamed_rows_and_rows_from_the_hub(names, tmp_path):
    """Catches predictions that Parquet or a stream loses or rounds."""
    from test_prepare_data import through_parquet

    cached = prepare(names, "diffusion", tmp_path / "cached", "--preset", "kl", "--cache_passes", 2)
    expected = train(names, tmp_path / "table", cached, preset="kl", train_sampling_strategy="sequential")[0]
    streamed = through_parquet(cached, tmp_path / "hub", streaming=True)
    found = train(names, tmp_path / "stream", streamed, preset="kl")[0]
    assert [entry["distill"] for entry in found] == [entry["distill"] for entry in expected]
    with pytest.raises(ValueError, match="predictions for 2 passes"):
        train(names, tmp_path / "longer", streamed, preset="kl", max_steps=7)


@pytest.mark.slow
def test_resumes_within_a_pass(names, tmp_path):
    """Catches a resumed run that takes the predictions of another pass."""
    cached = prepare(names, "diffusion", tmp_path / "cached", "--preset", "kl", "--cache_passes", 2)
    fields = {"preset": "kl", "max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    whole = train(names, tmp_path / "run", cached, **fields)[1]
    trainer = tiny_trainer(tmp_path / "run", rows=cached, model=tiny_model(seed=5), **fields)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for name, weight in trainer.model.named_parameters():
        assert_close(weight, whole[name], rtol=0, atol=0)


# -- preparing --------------------------------------------------------------------------------------------------------


def test_parts_are_resumed_and_shared(names, tmp_path, monkeypatch):
    """Catches parts that are lost, made twice, or depend on the number of parts, processes or rows of a batch."""
    flags = ("--preset", "kl", "--cache_passes", 2, "--cache_top_k", 5)
    whole = prepare(names, "diffusion", tmp_path / "whole", *flags)
    small = (*flags, "--cache_rows_per_part", 6, "--cache_batch_size", 4)
    writes, write = [], command._write_part

    def interrupted(folder, *args):
        if len(writes) == 2:
            raise KeyboardInterrupt
        writes.append(folder.name)
        write(folder, *args)

    monkeypatch.setattr(command, "_write_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(names, "diffusion", tmp_path / "parts", *small)
    writes.clear()
    resumed = prepare(names, "diffusion", tmp_path / "parts", *small)
    assert writes == ["train-00002", "train-00003"] and not (tmp_path / "parts.parts").exists()
    assert resumed.column_names == whole.column_names and resumed.features == whole.features
    for name in ("teacher_counts", "teacher_top_ids", "row_key"):
        assert resumed[name][:] == whole[name][:]
    for mine, theirs in zip(resumed["teacher_log_probs"], whole["teacher_log_probs"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    again = prepare(names, "diffusion", tmp_path / "parts", *small)
    assert len(again) == len(whole) and len(writes) == 2
    with pytest.raises(SystemExit, match=r"cache\.top_k: written with 5, this run has 6"):
        prepare(names, "diffusion", tmp_path / "parts", *flags[:-1], 6)


@pytest.mark.slow
def test_processes_share_the_parts(names, tmp_path):
    """Catches processes of one launch that wait for each other forever, or write different predictions."""
    words = ["--model_name_or_path", names["student"], "--teacher_model_name_or_path", names["ar"]]
    words += ["--dataset_name", names["rows"], "--max_length", "16", "--preset", "ar-kl", "--teacher_cache"]
    words += ["--cache_rows_per_part", "6", "--output_dir", str(tmp_path / "shared")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command_line = [sys.executable, str(ROOT / "recipes" / "prepare_data.py"), *words]
    runs = [
        subprocess.Popen(command_line, env={**environment, "RANK": str(rank), "WORLD_SIZE": "2"}, cwd=tmp_path)
        for rank in (1, 0)
    ]
    assert [run.wait(300) for run in runs] == [0, 0]
    alone = prepare(names, "ar", tmp_path / "alone", "--preset", "ar-kl")
    shared = load_from_disk(tmp_path / "shared")["train"]
    assert shared["teacher_top_ids"][:] == alone["teacher_top_ids"][:]
    assert PreparationRecord.read(shared) == PreparationRecord.read(alone)


@pytest.mark.parametrize(
    ("teacher", "flags", "words"),
    [
        ("diffusion", ["--preset", "ce"], "needs none: set --preset"),
        ("diffusion", ["--preset", "kl", "--on_policy_fraction", "0.5"], "has yet to write"),
        ("diffusion", ["--preset", "kl", "--cache_top_k", "0"], "keeps no distributions"),
        ("diffusion-across", ["--preset", "tide-cross", "--cache_top_k", "4"], "share no tokens"),
        ("diffusion-across", ["--preset", "ar-calm"], "are for an autoregressive teacher"),
        ("ar", ["--preset", "ar-kl", "--cache_passes", "2"], "hold for any noise"),
        ("ar", ["--preset", "tide-shared"], "an autoregressive teacher reads"),
    ],
)
def test_refuses_what_cannot_be_kept(names, tmp_path, teacher, flags, words):
    """Catches a cache that no run could use, written all the same."""
    with pytest.raises(SystemExit, match=words):
        prepare(names, teacher, tmp_path / "cached", *flags)
    assert not (tmp_path / "cached").exists()


@pytest.mark.parametrize(
    "values", [{"cache_top_k": 4}, {"teacher_cache": True, "cache_passes": 0}, {"cache_batch_size": 2}]
)
def test_refuses_arguments_that_would_not_be_read(values):
    """Catches a setting of the cache that is accepted where none is made, and numbers out of range."""
    with pytest.raises(ValueError, match=list(values)[-1]):
        CacheArguments(**values)


def test_the_cache_says_whose_it_is(names, tmp_path):
    """Catches a record or a card that does not name the teacher, what is kept and the noise."""
    cached = prepare(names, "diffusion", tmp_path / "cached", "--preset", "kl", "--cache_passes", 2, "--seed", 9)
    said = PreparationRecord.read(cached).cache.describe()
    assert said == (
        "predictions of diffusion (diffusion, float64): the log-probability of each true token and the 15 "
        "likeliest tokens (T = 2), for 2 passes over the rows, noise of seed 9"
    )
    trainer = tiny_trainer(tmp_path / "run", rows=cached, preset="kl", max_steps=1)
    trainer.train()
    trainer.save_model()
    card = Path(tmp_path / "run" / "README.md").read_text()
    assert said in card and "`diffusion`" in card
    merged = concatenate_datasets([cached, cached])
    assert PreparationRecord.read(merged).cache == PreparationRecord.read(cached).cache


@pytest.mark.slow
def test_number_of_processes_changes_nothing(names, tmp_path):
    """Catches predictions that follow the process or the padding of a short last batch instead of the row."""
    prepare(names, "diffusion", tmp_path / "cached", "--preset", "kl", "--cache_passes", 2)
    results = []
    for world_size in (1, 2):
        output = tmp_path / str(world_size)
        output.mkdir()
        script = [str(ROOT / "tests" / "cached_run.py"), str(tmp_path / "cached"), str(output), str(world_size)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29883"]
        subprocess.run([*(launcher if world_size > 1 else [sys.executable]), *script], check=True, timeout=300)
        results.append(torch.load(output / "result.pt", weights_only=True))
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
