"""Exporting a student for inference engines, which serve the same network under another name.

SDAR is Qwen3 decoded by block diffusion, with same-position logits, in blocks counted from position 0: exactly what a
Qwen3 student is. Engines select their code by `architectures` and `model_type`, and have SDAR's mask id built in. A
fine-tuned SDAR is exported too: its own folder holds code that needs a newer transformers than engines may have.
"""

import json
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.peft_utils import find_adapter_config_file

from ..models import SDARConfig, TIDEQwen3Config
from ..models.older_readers import WritesForOlderReaders

FORMATS = ("sdar",)
# in the code of SGLang and LMDeploy; config.json does not change it
SDAR_MASK_TOKEN_ID = 151_669
NETWORK_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
)
OTHER_FAMILIES = {
    **dict.fromkeys(
        ("tide_qwen2", "a2d-qwen2"), "Qwen2's attention has biases and no query and key norms, and SDAR's the reverse"
    ),
    **dict.fromkeys(("tide_llama", "a2d-llama"), "Llama's attention has no query and key norms, and SDAR's has them"),
    "Dream": "its logits are shifted by one position and its attention has biases; SDAR has neither",
    "wedlm": "its blocks are causal inside, and SDAR's are not",
}
# an engine may have an older transformers than this library: only what every version has
CONFIGURATION_CODE = '''"""SDAR's configuration: that of Qwen3, under the name that engines look up."""

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):
    model_type = "sdar"
'''
NOTES = """# Serving

A block-diffusion student of tide_hf, relabelled as SDAR (same network, same tensor names) for engines that serve SDAR.
Blocks of {block_size} tokens from position 0, mask token id {mask_token_id}. The commands follow the engines' sources
and documentation; they were not run when this folder was written.

SGLang (one pipeline stage; `sglang_dllm.yaml` sets the block size, 4 without it):

    python -m sglang.launch_server --model-path {folder} --trust-remote-code \\
        --dllm-algorithm LowConfidence --dllm-algorithm-config {folder}/sglang_dllm.yaml

LMDeploy:

    lmdeploy serve api_server {folder} --backend pytorch --dllm-block-length {block_size} \\
        --dllm-unmasking-strategy low_confidence_dynamic --dllm-denoising-steps {block_size} \\
        --dllm-confidence-threshold {threshold:g}

- `--trust-remote-code` is for `configuration_sdar.py`, three lines that name Qwen3's configuration `sdar`.
- The mask token's text in a prompt becomes the mask token: keep it out of user input.
- Weights: {total:,} bytes, {head:,} of them the head, which is stored because engines look it up by name{tied}.
"""


def export_for_serving(
    model: str | PreTrainedModel,
    output_dir: str | Path,
    tokenizer=None,
    format: str = "sdar",
    confidence_threshold: float = 0.9,
) -> Path:
    """Writes a Qwen3 block-diffusion student as a folder that SGLang and LMDeploy serve.

    Args:
        model (`str` or `PreTrainedModel`): the student: an instance, a Hub name or a folder. An adapter given by name
            is merged into its base.
        output_dir (`str` or `Path`): where to write; not the student's own folder.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the one stored with the student by default.
        format (`str`): `"sdar"`.
        confidence_threshold (`float`): in (0, 1], for the engines' settings; a token is revealed when its probability
            reaches it.

    Returns:
        `Path`: the folder: safetensors, configuration, tokenizer, `sglang_dllm.yaml` and `SERVING.md`.

    Raises:
        ValueError: for a student that engines would compute differently, with every reason; for an unknown format or a
            threshold outside (0, 1]; for an adapter given as an instance.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if not 0 < confidence_threshold <= 1:
        raise ValueError(f"confidence_threshold must lie in (0, 1], got {confidence_threshold}.")
    output_dir, source = Path(output_dir), model if isinstance(model, str) else model.name_or_path
    if source and Path(source).resolve() == output_dir.resolve():
        raise ValueError(f"{output_dir} holds the student itself, which the export would overwrite: choose another.")
    model = _merged(model)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(source)
    reasons = _reasons_against(model, tokenizer)
    if reasons:
        raise ValueError("This student cannot be served as SDAR: " + "; ".join(reasons) + ".")
    served = _relabelled(model, tokenizer)
    served.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    _name_as_sdar(output_dir)
    (output_dir / "configuration_sdar.py").write_text(CONFIGURATION_CODE)
    (output_dir / "sglang_dllm.yaml").write_text(
        f"block_size: {served.config.block_size}\nthreshold: {confidence_threshold:g}\n"
    )
    (output_dir / "SERVING.md").write_text(_notes(model, served, output_dir, confidence_threshold))
    return output_dir


def _merged(model: str | PreTrainedModel) -> PreTrainedModel:
    """The student, loaded if it is a name; an adapter given by name is merged into its base."""
    if isinstance(model, str):
        if find_adapter_config_file(model) is None:
            return AutoModelForCausalLM.from_pretrained(model)
        return AutoPeftModelForCausalLM.from_pretrained(model).merge_and_unload()
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "The student carries an adapter, which engines do not know: merge it first "
            "(model = model.merge_and_unload()), or give the adapter's folder by name."
        )
    return model


def _reasons_against(model: PreTrainedModel, tokenizer) -> list[str]:
    """Everything about a student that SDAR's engines would compute differently."""
    config = model.config
    if not isinstance(config, TIDEQwen3Config | SDARConfig):
        known = OTHER_FAMILIES.get(config.model_type, "only Qwen3 students and SDAR itself have SDAR's network")
        return [f"its model_type is {config.model_type!r}, and {known}"]
    reasons = []
    if config.diffusion_type != "block":
        reasons.append(f"its diffusion_type is {config.diffusion_type!r}, and engines decode block after block")
    mask_ids = {"its config": config.known_mask_token_id, "its tokenizer": tokenizer.mask_token_id}
    said = {who: index for who, index in mask_ids.items() if index is not None}
    wrong = {who: index for who, index in said.items() if index != SDAR_MASK_TOKEN_ID}
    if wrong or not said:
        listed = " and ".join(f"{index} by {who}" for who, index in wrong.items()) or "missing"
        reasons.append(
            f"its mask token id is {listed}, and engines have {SDAR_MASK_TOKEN_ID} built in "
            "(<|mask|> added to Qwen3's tokenizer)"
        )
    if config.vocab_size <= SDAR_MASK_TOKEN_ID:
        reasons.append(f"its vocabulary has {config.vocab_size} rows, none for the mask id {SDAR_MASK_TOKEN_ID}")
    if config.attention_bias:
        reasons.append("its attention has biases (attention_bias), and SDAR's has none")
    if config.use_sliding_window or set(config.layer_types) != {"full_attention"}:
        reasons.append("it attends in a sliding window, and SDAR everywhere")
    if config.rope_parameters.get("rope_type", "default") != "default":
        reasons.append(f"its rotary embedding is scaled ({config.rope_parameters['rope_type']}), and SDAR's is not")
    if config.hidden_act != "silu":
        reasons.append(f"its activation is {config.hidden_act}, and SDAR's is silu")
    if getattr(model, "is_quantized", False):
        reasons.append("its weights are quantised; load it without quantization_config")
    return reasons


class ServedConfig(WritesForOlderReaders, Qwen3Config):
    """SDAR's configuration as engines read it: without the code and the fields that a student is saved with."""

    model_type = "sdar"


def _relabelled(student: PreTrainedModel, tokenizer) -> Qwen3ForCausalLM:
    """Qwen3 with the student's own tensors; only the head is copied, since it may be tied."""
    config = student.config
    ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        candidates = (getattr(owner, name, None) for owner in (student.generation_config, config, tokenizer))
        ids[name] = next((index for index in candidates if index is not None), None)
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = tokenizer.eos_token_id
    values = {name: getattr(config, name) for name in NETWORK_FIELDS} | ids
    served_config = ServedConfig(
        **values, block_size=config.block_size, mask_token_id=SDAR_MASK_TOKEN_ID, tie_word_embeddings=False
    )
    served_config._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        served = Qwen3ForCausalLM(served_config)
    tensors = student.state_dict()
    tensors["lm_head.weight"] = student.lm_head.weight.detach().clone()
    served.load_state_dict(tensors, assign=True)  # strict: engines look the tensors up by these names
    served.generation_config = GenerationConfig(**ids)
    return served


def _name_as_sdar(folder: Path) -> None:
    """Names in config.json SDAR's class, and the file that makes it readable where transformers does not know SDAR."""
    path = folder / "config.json"
    names = {"architectures": ["SDARForCausalLM"], "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | names, indent=2) + "\n")


def _notes(student: PreTrainedModel, served: Qwen3ForCausalLM, folder: Path, threshold: float) -> str:
    """SERVING.md."""
    head = served.lm_head.weight.nbytes
    return NOTES.format(
        block_size=served.config.block_size,
        mask_token_id=SDAR_MASK_TOKEN_ID,
        folder=folder,
        threshold=threshold,
        total=sum(parameter.nbytes for parameter in served.parameters()),
        head=head,
        tied=" (tied to the embedding in the student)" if student.config.tie_word_embeddings else "",
    )
