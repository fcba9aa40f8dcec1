"""Loading a teacher: precision, mask id, and a guard against silently corrupted weights."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_bitsandbytes_available, logging

from .teacher import FAMILIES

logger = logging.get_logger(__name__)


def load_teacher(name_or_path: str, dtype: str = "auto", load_in_4bit: bool = False, **init_kwargs) -> PreTrainedModel:
    """Loads a teacher through AutoModelForCausalLM, from the library's own classes, never from remote code.

    Args:
        name_or_path (`str`): Hub name or folder.
        dtype (`str`): `"auto"` (as saved), `"float32"`, `"bfloat16"` or `"float16"`.
        load_in_4bit (`bool`): NF4 through bitsandbytes.
        init_kwargs: further `from_pretrained` arguments (revision, device_map, attn_implementation, …).

    Raises:
        ImportError: `load_in_4bit` without bitsandbytes.
        ValueError: if the loaded rotary frequencies are not what the config says.
    """
    if load_in_4bit:
        if not is_bitsandbytes_available():
            raise ImportError("teacher_load_in_4bit needs bitsandbytes: pip install 'tide-hf[quant]'.")
        from transformers import BitsAndBytesConfig

        init_kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, trust_remote_code=False, **init_kwargs)
    check_rotary_frequencies(model)
    return model


def check_rotary_frequencies(model: PreTrainedModel) -> None:
    """Compares every plain rotary embedding's frequencies with θ^(−2i/d).

    They are no weights: a model class that forgets to re-create them loads "clean", all tensors equal, and computes
    with uninitialised memory.

    Raises:
        ValueError: naming the module, if they differ.
    """
    for name, module in model.named_modules():
        rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        if (
            not hasattr(module, "inv_freq")
            or rope.get("rope_type", "default") != "default"
            or "rope_theta" not in rope
        ):
            continue
        size = 2 * module.inv_freq.numel()
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=module.inv_freq.device) / size
        # a model cast as a whole has rounded frequencies, no wrong ones
        tolerance = 1e-3 if module.inv_freq.dtype == torch.float32 else 1e-2
        if not torch.allclose(module.inv_freq.float(), rope["rope_theta"] ** -exponent, rtol=tolerance, atol=0):
            raise ValueError(
                f"{name}: the rotary frequencies of the loaded model are not those of rope_theta="
                f"{rope['rope_theta']:g}. Its code did not initialise them; its logits would be wrong."
            )


def resolve_mask_token_id(given: int | None, config, tokenizer, who: str) -> int:
    """[MASK] of a model: given by the user, else its config, else its tokenizer, else its family.

    Args:
        given (`int`, *optional*): the user's choice.
        config (`PretrainedConfig`): the model's.
        tokenizer (*optional*): its tokenizer.
        who (`str`): "student" or "teacher", for messages.

    Raises:
        ValueError: if nobody says it, or if it lies outside the vocabulary.
    """
    family = FAMILIES.get(config.model_type)
    sources = {
        "the user": given,
        "its config": getattr(config, "mask_token_id", None),
        "its tokenizer": getattr(tokenizer, "mask_token_id", None),
        "its family": family.mask_token_id if family else None,
    }
    said = {source: index for source, index in sources.items() if index is not None}
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
