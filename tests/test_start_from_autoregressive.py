"""From an autoregressive model to a distilled student, through the recipes that people run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from embedded.from_autoregressive import AUTOREGRESSIVE, run_from_autoregressive
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tide_hf.demo.sorting import build_tokenizer, sorting_rows

ROOT = Path(__file__).parent.parent


def recipe(name: str, *flags, cwd: Path) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(cwd / "cache"),
    }
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_one_person_runs_the_whole_chain(tmp_path):
    """Catches a link whose output the next one does not take, and one that passes its input on untrained."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = {"vocab_size": 15, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": tokenizer.eos_token_id}
    Qwen2ForCausalLM(Qwen2Config(**shape, **heads)).save_pretrained(tmp_path / "ar")
    tokenizer.save_pretrained(tmp_path / "ar")
    tiny_model(seed=1, dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    rows = "".join(json.dumps(row) + "\n" for row in sorting_rows(16, seed=1))
    (tmp_path / "rows.jsonl").write_text(rows)
    training = ["--dataset_name", "rows.jsonl", "--max_steps", "2", "--max_length", "16", "--use_cpu"]
    training += ["--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--report_to", "none"]
    for name, flags in (
        ("convert_ar", ["ar", "start", "--block_size", "4"]),
        ("sft_student", ["--model_name_or_path", "start", "--output_dir", "sft", *training]),
        (
            "dense_teacher",
            [
                "--model_name_or_path",
                "sft",
                "--teacher_model_name_or_path",
                "teacher",
                "--output_dir",
                "out",
                *training,
            ],
        ),
    ):
        done = recipe(name, *flags, cwd=tmp_path)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
    stages = [weights(tmp_path / name) for name in ("start", "sft", "out")]
    for before, after in pairwise(stages):
        assert before.keys() == after.keys()
        assert sum(not torch.equal(before[name], after[name]) for name in before) > 10
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert student.config.model_type == "tide_qwen2" and student.config.block_size == 4
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.mask_token_id == student.config.mask_token_id
    assert loaded.chat_template == tokenizer.chat_template
    assert student.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape[1] > 3


@pytest.mark.slow
def test_embedded_run_learns_from_its_start(tmp_path):
    """Catches an embedded run whose numbers are not of the student it saves, and a start that is worth nothing."""
    network = replace(AUTOREGRESSIVE, steps=300)
    measured = run_from_autoregressive(tmp_path, network, denoising_steps=60, num_held_out=100)
    results = {result.network: result.metrics["exact_match"] for result in measured}
    assert results["autoregressive"] > 0.9 and results["converted"] < 0.1
    assert results["converted and trained"] > max(0.4, results["from random weights"] + 0.1)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "TIDEQwen3ForBlockDiffusion"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "kl"], "trains without a teacher"),
        (["--teacher_model_name_or_path", "x"], "trains without a teacher"),
        (["--max_steps", "3"], "--max_steps is not used by the embedded comparison"),
    ],
)
def test_sft_refuses_what_it_would_ignore(flags, message, tmp_path):
    """Catches a setting of the user that the run silently does not follow."""
    done = recipe("sft_student", *flags, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr.splitlines()[-1], done.stderr[-2000:]
