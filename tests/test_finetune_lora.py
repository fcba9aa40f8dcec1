"""The LoRA recipe: the embedded example, and a run on given names, through the command line."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from embedded import adapter
from embedded.adapter import adapter_table, run_adapter_demo
from embedded.harness import Result
from embedded.networks import Network
from peft import AutoPeftModelForCausalLM
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from tide_hf.commands.distill import parse_arguments
from tide_hf.demo.sorting import build_tokenizer, sorting_rows

ROOT = Path(__file__).parents[1]


def recipe(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "recipes/finetune_lora.py", *flags]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_the_example_measures_what_it_saved(tmp_path, monkeypatch):
    """Catches figures of networks in memory, an adapter that is not on its base, and a merge that changes answers."""
    measured = []

    def decode_and_match(model, tokenizer, rows):
        first, answer = rows[0]["messages"]
        measured.append(
            (model.name_or_path, type(model).__name__, answer["content"] == "".join(sorted(first["content"])))
        )
        return 0.25, 1.0

    monkeypatch.setattr(adapter, "decode_and_match", decode_and_match)
    tiny = Network(hidden=16, layers=1, heads=2, steps=2)
    results = run_adapter_demo(tmp_path, base=tiny, adapter=tiny, num_held_out=4)
    assert {result.network: list(result.metrics) for result in results} == {
        name: ["ascending", "descending"] for name in ("base", "adapter", "merged")
    }
    base, merged = str(tmp_path / "base"), str(tmp_path / "merged")
    names = [
        (base, "TIDEQwen3ForBlockDiffusion"),
        (base, "PeftModelForCausalLM"),
        (merged, "TIDEQwen3ForBlockDiffusion"),
    ]
    assert measured == [(*name, ascending) for name in names for ascending in (True, False)]
    ids = torch.tensor([build_tokenizer().encode("<user>739152<assistant>")])
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    of_merged = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(adapted(ids).logits, of_merged, rtol=0, atol=1e-5)
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(base)(ids).logits, of_merged)


def test_table_is_of_all_seeds():
    """Catches a table of the last seed, or a spread of one."""
    runs = [Result("sorting", "base", seed, {"ascending": a, "descending": 0.0}) for seed, a in enumerate((0.5, 1.0))]
    assert adapter_table(runs).splitlines()[1] == "base  75.0 % ± 35.4  0.0 % ± 0.0"
    assert "±" not in adapter_table(runs[:1])


@pytest.mark.slow
def test_embedded_example(tmp_path):
    """Catches an example that no longer learns: the adapter sorts the other way round, its base does not."""
    done = recipe("--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {name: [float(value) for value in re.findall(r"([\d.]+) %", line)]
            for line in done.stdout.splitlines() if line.strip()
            for name in [line.split()[0]] if name in ("base", "adapter", "merged")}  # fmt: skip
    assert rows["base"][0] > 90 and rows["base"][1] < 5
    assert rows["adapter"][1] > 80 and rows["merged"] == rows["adapter"]


@pytest.mark.slow
def test_own_student_and_data(tmp_path):
    """Catches flags of TRL's scripts that do not reach the adapter, and a run that asks for a teacher."""
    tiny_model(0, dtype=torch.float32).save_pretrained(tmp_path / "student")
    build_tokenizer().save_pretrained(tmp_path / "student")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in sorting_rows(8, seed=1)))
    flags = {
        "model_name_or_path": tmp_path / "student", "dataset_name": rows, "output_dir": tmp_path / "out",
        "max_steps": 2, "max_length": 16, "learning_rate": 1e-2, "report_to": "none", "lora_r": 3, "lora_alpha": 6,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = recipe(*words, "--use_cpu", "--use_peft", HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["base_model_name_or_path"]) == (3, 6, str(tmp_path / "student"))
    assert set(saved["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    weights = dict(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        (["--lora_r", "4", "--learning_rate", "1e-3"], "1", "--learning_rate, --lora_r are not used"),
        ([], "2", "runs in one process"),
    ],
)
def test_embedded_example_refuses_what_it_would_ignore(flags, world_size, message, monkeypatch):
    """Catches a setting that is silently not used, and one example per process, all writing into one folder."""
    monkeypatch.setattr(adapter, "run_jobs", lambda *args: pytest.fail("the example was started"))
    arguments = parse_arguments("outputs", flags)
    monkeypatch.setattr("tide_hf.commands.distill.parse_arguments", lambda output_dir: arguments)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(ROOT / "recipes" / "finetune_lora.py"), run_name="__main__")
