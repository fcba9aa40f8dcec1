"""Loading a teacher: precision, mask id, and a guard against silently corrupted weights."""

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available, logging

from .contract import family_of, refuse_unknown

logger = logging.get_logger(__name__)
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def load_teacher(name_or_path: str, dtype: str = "auto", load_in_4bit: bool = False, **init_kwargs) -> PreTrainedModel:
    """Loads a teacher through AutoModelForCausalLM, from the library's own classes, never from remote code.

    Args:
        name_or_path (`str`): Hub name or folder.
        dtype (`str`): `"auto"` (as saved), `"float32"`, `"bfloat16"` or `"float16"`.
        load_in_4bit (`bool`): NF4 through bitsandbytes. Packed experts of a mixture stay as they are (a warning says
            how many weights).
        init_kwargs: further `from_pretrained` arguments (revision, device_map, attn_implementation, …).

    Returns:
        `PreTrainedModel`, in eval mode.

    Raises:
        ImportError: `load_in_4bit` without bitsandbytes.
        ValueError: for an unknown family (before its weights are fetched), a checkpoint whose keys are not the
            model's, or rotary frequencies that are not what the config says.
    """
    if load_in_4bit:
        init_kwargs["quantization_config"] = quantization_4bit()
    _check_family(name_or_path, {name: init_kwargs[name] for name in HUB_ARGUMENTS if name in init_kwargs})
    model, info = AutoModelForCausalLM.from_pretrained(
        name_or_path, dtype=dtype, trust_remote_code=False, output_loading_info=True, **init_kwargs
    )
    _check_keys(name_or_path, model, info)
    check_rotary_frequencies(model)
    if load_in_4bit:
        _warn_about_packed_experts(model)
    return model


def quantization_4bit():
    """The `BitsAndBytesConfig` of a teacher in NF4; raises ImportError without bitsandbytes."""
    if not is_bitsandbytes_available():
        raise ImportError("teacher_load_in_4bit needs bitsandbytes: pip install 'tide-hf[quant]'.")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _check_family(name_or_path: str, hub_arguments: dict) -> None:
    """Refuses a checkpoint that cannot teach, from its config.json alone."""
    try:
        model_type = PreTrainedConfig.get_config_dict(name_or_path, **hub_arguments)[0].get("model_type")
    except OSError:  # an adapter has no config.json; of anything else from_pretrained tells more
        return
    if model_type is None:
        return
    config = PreTrainedConfig()
    config.model_type = model_type
    if model_type in CONFIG_MAPPING:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **hub_arguments)
    refuse_unknown(config)


def _check_keys(name_or_path: str, model: PreTrainedModel, info: dict) -> None:
    """Refuses a model with weights drawn at random, and a checkpoint with weights that the model does not have."""
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        listed = "; ".join(
            f"{len(keys)} {kind} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for kind, keys in wrong.items()
            if keys
        )
        raise ValueError(
            f"The keys of {name_or_path} are not those of {type(model).__name__}: {listed}. Missing ones would "
            "be random weights: this is not the published model that its config.json describes."
        )


def _warn_about_packed_experts(model: PreTrainedModel) -> None:
    """Says what stays in full precision: bitsandbytes replaces nn.Linear, and packed experts are plain parameters."""
    packed = sum(weight.numel() for weight in model.parameters() if weight.ndim == 3)
    if packed:
        logger.warning(
            f"teacher_load_in_4bit: the packed experts of {type(model).__name__} ({packed:,} weights, "
            f"{2 * packed / 2**30:.1f} GiB in bfloat16) are not nn.Linear modules and stay in {model.dtype}; only "
            "its other linear layers are in 4 bits. To save memory, off-load with teacher_model_init_kwargs="
            "{'device_map': 'auto', 'max_memory': …}."
        )


def check_rotary_frequencies(model: PreTrainedModel) -> None:
    """Compares every plain rotary embedding's frequencies with θ^(−2i/d), d the rotated part of a head.

    The frequencies are not in the checkpoint: a model class that does not re-create them loads without a complaint,
    and computes with uninitialised memory.

    Args:
        model (`PreTrainedModel`): just loaded.

    Raises:
        ValueError: naming the module, if they differ.
    """
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if (
            not hasattr(module, "inv_freq")
            or rope.get("rope_type", "default") != "default"
            or "rope_theta" not in rope
        ):
            continue
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=module.inv_freq.device) / size
        # casting a whole model rounds the frequencies too, which is not an error
        tolerance = 1e-3 if module.inv_freq.dtype == torch.float32 else 1e-2
        if module.inv_freq.shape != exponent.shape or not torch.allclose(
            module.inv_freq.float(), rope["rope_theta"] ** -exponent, rtol=tolerance, atol=0
        ):
            raise ValueError(
                f"{name}: the rotary frequencies of the loaded model are not those of rope_theta="
                f"{rope['rope_theta']:g} on {size} of {head_dim} dimensions. Its code did not initialise them, "
                "so its logits would be wrong."
            )


def resolve_mask_token_id(given: int | None, config, tokenizer, who: str) -> int:
    """The id of a model's [MASK]: the user's, else its config's, else its tokenizer's, else its family's.

    Args:
        given (`int`, *optional*): the user's choice.
        config (`PretrainedConfig`): the model's.
        tokenizer (*optional*): its tokenizer.
        who (`str`): "student" or "teacher", for messages.

    Raises:
        ValueError: if none of them has one, or if it lies outside the vocabulary.
    """
    family = family_of(config)
    sources = {
        "the user": given,
        "its config": getattr(config, "mask_token_id", None),
        "its tokenizer": getattr(tokenizer, "mask_token_id", None),
        "its family": family.mask_token_id if family else None,
    }
    said = {source: index for source, index in sources.items() if index is not None}
    if "its config" in said:
        said.pop("its family", None)  # only a default for what config.json leaves out
    if not said:
        prefix = "" if who == "student" else "teacher_"
        raise ValueError(
            f"The {who} has no mask token: neither its config nor its tokenizer names one. Add it with "
            f"tokenizer.add_special_tokens({{'mask_token': '<|mask|>'}}), or set {prefix}mask_token_id."
        )
    index = next(iter(said.values()))
    if given is None and len(set(said.values())) > 1:
        listed = ", ".join(f"{value} by {source}" for source, value in said.items())
        logger.warning(f"The {who}'s mask token is {listed}; using {index}.")
    if not 0 <= index < config.vocab_size:
        raise ValueError(f"The {who}'s mask token id {index} lies outside its vocabulary of {config.vocab_size} rows.")
    return index
