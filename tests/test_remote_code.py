"""A saved student where tide_hf is not installed: the files that travel with it are all it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.models import (
    MODELS,
    A2DQwen2Config,
    DreamConfig,
    LLaDA2MoeConfig,
    LLaDAConfig,
    TIDELlamaConfig,
    TIDEQwen2Config,
    TIDEQwen3Config,
    WeDLMConfig,
)

IDS = [[3, 1, 4, 1, 5, 9, 2]]
SCRIPT = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tide_hf":
            raise ImportError("tide_hf is not installed")

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

folder, again, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
trusted = {"trust_remote_code": True}

def outcome(model):
    return {
        "class": type(model).__name__,
        "logits": model.eval()(ids).logits.tolist(),
        "new": model.generate(ids, max_new_tokens=4).tolist(),
        "loss": model(ids, labels=ids).loss.item(),
    }

found = [outcome(auto.from_pretrained(folder, **trusted)) for auto in (AutoModel, AutoModelForMaskedLM)]
model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
found.append(outcome(model))
model.save_pretrained(again)
tokenizer.save_pretrained(again)
found.append(outcome(AutoModelForCausalLM.from_pretrained(again, **trusted)))
write = pipeline("text-generation", model=again, device="cpu", **trusted)
chat = write([{"role": "user", "content": "310254"}], max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]
plain = write("310254", max_new_tokens=4, do_sample=False)[0]["generated_text"]
fill = pipeline("fill-mask", model=again, device="cpu", **trusted)("31<mask>254")[0]["token"]
result = {"found": found, "chat": chat["role"], "plain": plain, "fill": fill, "tide": "tide_hf" in sys.modules}
print(json.dumps(result))
"""


def without_tide_hf(folder: Path, again: Path, cache: Path) -> dict:
    """What a Python that cannot import tide_hf makes of a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", SCRIPT, str(folder), str(again), json.dumps(IDS)]
    done = subprocess.run(command, env=environment, cwd=cache.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "config_class",
    [
        *(TIDEQwen3Config, TIDEQwen2Config, TIDELlamaConfig, A2DQwen2Config),
        *(LLaDA2MoeConfig, LLaDAConfig, DreamConfig, WeDLMConfig),
    ],
    ids=lambda config_class: config_class.model_type,
)
def test_checkpoint_works_without_the_library(config_class, tmp_path):
    """Catches a checkpoint only its authors can load: a missing Auto class, file or import, or another network."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1}
    shape = experts if config_class is LLaDA2MoeConfig else {}
    model, tokenizer = tiny_model(config_class=config_class, dtype=torch.float32, **shape).eval(), build_tokenizer()
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    ids = torch.tensor(IDS)
    result = without_tide_hf(tmp_path / "student", tmp_path / "again", tmp_path / "modules")
    assert not result["tide"]
    assert len(result["found"]) == 4
    for found in result["found"]:
        assert found["class"] == MODELS[config_class].__name__
        torch.testing.assert_close(torch.tensor(found["logits"]), model(ids).logits, rtol=0, atol=1e-6)
        assert found["new"] == model.generate(ids, max_new_tokens=4).tolist()
        assert found["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    assert result["chat"] == "assistant" and result["plain"].startswith("310254")
    holed = tokenizer("31<mask>254", return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert result["fill"] == model(holed).logits[0, 2].argmax()
    files = {path.name for path in (tmp_path / "student").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == files
    maps = [json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("student", "again")]
    assert maps[0] == maps[1] and len(maps[0]) == 4
    # and back where the library is installed
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) is MODELS[config_class]


def test_registered_code_wins_over_the_code_of_the_repo(tmp_path):
    """Catches a run of somebody's files, or a question on the terminal, where the library itself is there."""
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        path.write_text("raise RuntimeError('remote code was run')\n")
    for trust in (True, False, None):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(loaded) is MODELS[TIDEQwen3Config]
        assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)) is TIDEQwen3Config


def test_code_does_not_depend_on_the_class_of_the_instance(tmp_path):
    """Catches FSDP2, which gives the model a class of its own in torch's module: its file would be shipped."""
    model = tiny_model(dtype=torch.float32)
    model.__class__ = type("FSDP" + type(model).__name__, (type(model),), {"__module__": torch.nn.Module.__module__})
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"]["AutoModelForCausalLM"] == "modeling_tide.TIDEQwen3ForBlockDiffusion"
    assert written["architectures"] == ["TIDEQwen3ForBlockDiffusion"]
    assert {"configuration_tide.py", "modeling_tide.py"} <= {path.name for path in tmp_path.glob("*.py")}
    assert not (tmp_path / "module.py").exists()
