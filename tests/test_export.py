"""Export for serving: the folder against our own student, the fields engines read, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tide_hf import export_for_serving
from tide_hf.demo.sorting import CHAT_TEMPLATE, with_special_tokens
from tide_hf.models import (
    A2DLlamaConfig,
    A2DQwen2Config,
    A2DQwen3Config,
    DreamConfig,
    SDARConfig,
    SDARForCausalLM,
    TIDELlamaConfig,
    TIDEQwen2Config,
    WeDLMConfig,
    block_visibility,
)

ROOT = Path(__file__).parents[1]
MASK, VOCAB, BLOCK = 151_669, 151_936, 8
EOS = 151_645
# Qwen3's numbers for the special tokens, and digits for text
IDS = {"<pad>": 151_643, "<user>": 151_644, "<eos>": EOS, "<assistant>": 151_646, "<mask>": MASK}


def build_tokenizer(mask: int = MASK):
    vocab = {digit: index for index, digit in enumerate("0123456789")} | IDS | {"<mask>": mask}
    return with_special_tokens(Tokenizer(WordLevel(vocab, unk_token="<pad>")))


def student(**overrides):
    """A tiny student of Qwen3's vocabulary, tied as Qwen3-0.6B is."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 16,
        "block_size": BLOCK,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": 151_643,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "max_position_embeddings": 40_960,
        **overrides,
    }
    return tiny_model(0, **{"dtype": torch.float32, **values})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A student and its exported folder."""
    folder = tmp_path_factory.mktemp("export") / "served"
    model = student().eval()
    assert export_for_serving(model, folder, tokenizer=build_tokenizer()) == folder
    return model, folder


def block_inputs() -> dict:
    """Three blocks of tokens, the last one masked, under the block-causal mask of generation."""
    ids = torch.cat([torch.arange(2 * BLOCK) * 7919 % 151_643, torch.full((BLOCK,), MASK)])[None]
    clean, block = torch.zeros_like(ids), torch.arange(3 * BLOCK)[None] // BLOCK
    return {"input_ids": ids, "attention_mask": block_visibility(clean, block, clean, block)}


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(**block_inputs()).logits


def test_logits_are_the_students(exported):
    """Catches a relabelling that changes what is computed: as plain Qwen3 and as our SDAR, on the engines' mask."""
    model, folder = exported
    expected = logits_of(model)
    as_qwen3, info = Qwen3ForCausalLM.from_pretrained(
        folder, config=Qwen3Config.from_pretrained(folder), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    as_sdar, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(as_sdar) is SDARForCausalLM and not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(logits_of(as_qwen3), expected, rtol=0, atol=0)
    assert_close(logits_of(as_sdar), expected, rtol=0, atol=0)
    full = torch.ones_like(block_inputs()["attention_mask"])
    assert not torch.equal(model(block_inputs()["input_ids"], attention_mask=full).logits, expected), "mask matters"


def test_a_fine_tuned_sdar_is_exported_too(tmp_path):
    """Catches an SDAR that was trained here and can be served only where a new transformers is."""
    model = student(config_class=SDARConfig).eval()
    folder = export_for_serving(model, tmp_path, tokenizer=build_tokenizer())
    again = Qwen3ForCausalLM.from_pretrained(folder, config=Qwen3Config.from_pretrained(folder))
    assert_close(logits_of(again), logits_of(model), rtol=0, atol=0)


def test_config_has_what_engines_read(exported):
    """Catches a field whose absence makes an engine refuse the folder, or take a default that is not ours."""
    _, folder = exported
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
        "block_size": BLOCK,
        "mask_token_id": MASK,
        "attention_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "rope_theta": 500_000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
        "pad_token_id": 151_643,
        "eos_token_id": EOS,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    assert {name: config.get(name, "absent") for name in expected} == expected
    assert "bos_token_id" in config and "diffusion_type" not in config
    code = sorted(file.name for file in folder.glob("*.py"))
    assert code == ["configuration_sdar.py"], "engines may have an older transformers than this library's code needs"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (EOS, 151_643)
    assert not {"mask_token_id", "block_size"} & set(generation), "engines know neither"


def test_head_is_written_out(exported):
    """Catches a tied head that SGLang asks for by name and does not find, or one that shares the embedding's file."""
    model, folder = exported
    (weights,) = folder.glob("*.safetensors")
    assert not list(folder.glob("*.bin"))
    with safe_open(weights, "pt") as file:
        names = set(file.keys())
        assert torch.equal(file.get_tensor("lm_head.weight"), model.model.embed_tokens.weight)
    reference = Qwen3ForCausalLM(Qwen3Config(**{**model.config.to_dict(), "tie_word_embeddings": False}))
    assert names == set(reference.state_dict())
    assert model.lm_head.weight is model.model.embed_tokens.weight, "the caller's student is as it was"


def test_tokenizer_goes_along(exported):
    """Catches a folder that a server starts on and cannot put a conversation into."""
    _, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.mask_token_id == MASK and tokenizer.chat_template == CHAT_TEMPLATE


def test_engine_settings_and_launch_lines(exported):
    """Catches an engine that decodes SDAR's four tokens a block, and launch lines for another folder."""
    _, folder = exported
    assert yaml.safe_load((folder / "sglang_dllm.yaml").read_text()) == {"block_size": BLOCK, "threshold": 0.9}
    notes = (folder / "SERVING.md").read_text().replace("\\\n", "")
    sglang, lmdeploy = [line.split() for line in notes.splitlines() if line.startswith("    ")]
    assert sglang[sglang.index("--model-path") + 1] == lmdeploy[3] == str(folder)
    assert sglang[sglang.index("--dllm-algorithm-config") + 1] == str(folder / "sglang_dllm.yaml")
    flags = {"block-length": "8", "denoising-steps": "8", "confidence-threshold": "0.9"}
    assert {name: lmdeploy[lmdeploy.index(f"--dllm-{name}") + 1] for name in flags} == flags
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    written = int(notes.split("Weights: ")[1].split()[0].replace(",", ""))
    assert total - 10_000 < written < total, "the rest is the file's header"


def test_configuration_loads_without_this_library(exported):
    """Catches a configuration file that only works where tide_hf is installed, or that loses a field."""
    _, folder = exported
    script = (
        "import sys; sys.modules['tide_hf'] = None\n"
        "from transformers import AutoConfig\n"
        f"config = AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "print(config.model_type, config.mask_token_id, config.block_size, config.rope_parameters['rope_theta'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)
    assert done.stdout.split() == ["sdar", str(MASK), str(BLOCK), "500000.0"], done.stderr[-2000:]


def test_untied_head_and_dtype_are_kept(tmp_path):
    """Catches an export that replaces a head of its own by the embedding, or writes another precision."""
    model = student(tie_word_embeddings=False, dtype=torch.bfloat16)
    export_for_serving(model, tmp_path / "served", tokenizer=build_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_published_student_by_name(tmp_path):
    """Catches a published student, whose config leaves the mask to the tokenizer, refused or exported without one."""
    model = student(config_class=A2DQwen3Config, mask_token_id=None)
    model.save_pretrained(tmp_path / "student")
    build_tokenizer().save_pretrained(tmp_path / "student")
    export_for_serving(str(tmp_path / "student"), tmp_path / "served")
    assert AutoConfig.from_pretrained(tmp_path / "served").mask_token_id == MASK
    assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "served")), logits_of(model))


def test_adapters_are_merged_by_name_and_refused_as_instances(tmp_path):
    """Catches an adapter that is silently left out of the exported weights, and a caller's model changed."""
    model = student()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    build_tokenizer().save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for instance in (adapted, loaded):
        with pytest.raises(ValueError, match="carries an adapter, which engines do not know: merge it first"):
            export_for_serving(instance, tmp_path / "served", tokenizer=build_tokenizer())
    export_for_serving(str(tmp_path / "adapter"), tmp_path / "served")
    served = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "served"))
    assert_close(served, logits_of(adapted), rtol=1e-4, atol=1e-4)
    assert (served - logits_of(model)).abs().max() > 0.1


# -- refusals ---------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 20_480}
SMALL = {"vocab_size": 64, "eos_token_id": 1, "pad_token_id": 0, "mask_token_id": 9}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"diffusion_type": "full"}, "its diffusion_type is 'full'"),
        ({"mask_token_id": 151_665}, "its mask token id is 151665 by its config, and engines have 151669"),
        (SMALL, "its vocabulary has 64 rows, none for the mask id 151669"),
        ({"attention_bias": True}, "its attention has biases"),
        ({"rope_parameters": YARN}, r"its rotary embedding is scaled \(yarn\)"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"config_class": A2DQwen2Config}, "model_type is 'a2d-qwen2', and Qwen2's attention has biases"),
        ({"config_class": TIDEQwen2Config}, "model_type is 'tide_qwen2', and Qwen2's attention has biases"),
        ({"config_class": TIDELlamaConfig}, "model_type is 'tide_llama', and Llama's attention has no query"),
        ({"config_class": A2DLlamaConfig}, "model_type is 'a2d-llama', and Llama's attention has no query"),
        ({"config_class": DreamConfig}, "model_type is 'Dream', and its logits are shifted"),
        ({"config_class": WeDLMConfig}, "causal inside"),
    ],
)
def test_students_that_do_not_fit_are_refused(tmp_path, overrides, message):
    """Catches a student that engines would load and run wrongly."""
    with pytest.raises(ValueError, match=f"cannot be served as SDAR: .*{message}"):
        export_for_serving(student(**overrides), tmp_path / "served", tokenizer=build_tokenizer())
    assert not (tmp_path / "served").exists()


def test_a_sliding_window_is_refused(tmp_path):
    """Catches a student of windows: its configuration refuses them, and may still be changed afterwards."""
    model = student()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="it attends in a sliding window"):
        export_for_serving(model, tmp_path / "served", tokenizer=build_tokenizer())


def test_every_reason_is_named(tmp_path):
    """Catches reasons that a user meets one after the other."""
    model = student(diffusion_type="full", attention_bias=True, mask_token_id=None)
    with pytest.raises(ValueError, match=r"diffusion_type is 'full'.*151665 by its tokenizer.*has biases"):
        export_for_serving(model, tmp_path, tokenizer=build_tokenizer(mask=151_665))


def test_arguments_are_checked(tmp_path):
    """Catches a format nobody knows, a threshold that reveals nothing, and a student overwritten by its export."""
    model = student()
    with pytest.raises(ValueError, match="format must be one of sdar, got 'gguf'"):
        export_for_serving(model, tmp_path, format="gguf")
    with pytest.raises(ValueError, match=r"confidence_threshold must lie in \(0, 1\]"):
        export_for_serving(model, tmp_path, confidence_threshold=1.5)
    model.save_pretrained(tmp_path / "student")
    build_tokenizer().save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="holds the student itself"):
        export_for_serving(str(tmp_path / "student"), tmp_path / "x" / ".." / "student")


@pytest.mark.slow
def test_recipe(tmp_path):
    """Catches flags that do not reach the export, and a refusal that ends in a traceback."""
    student().save_pretrained(tmp_path / "student")
    build_tokenizer().save_pretrained(tmp_path / "student")

    def recipe(name: str, *flags: str):
        command = [sys.executable, "recipes/export.py", "--model_name_or_path", str(tmp_path / name)]
        command += ["--output_dir", str(tmp_path / "served"), *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    done = recipe("student", "--confidence_threshold", "0.7")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "lmdeploy serve api_server" in done.stdout
    assert yaml.safe_load((tmp_path / "served" / "sglang_dllm.yaml").read_text())["threshold"] == 0.7
    assert logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "served")).isfinite().all()

    student(diffusion_type="full").save_pretrained(tmp_path / "full")
    build_tokenizer().save_pretrained(tmp_path / "full")
    done = recipe("full")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("This student cannot be served as SDAR")
