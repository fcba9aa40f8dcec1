"""An autoregressive language model, or a community diffusion LM, as a student of this library.

The student's network is the source's: same weights, same tokenizer. What changes is which positions see which, and the
mask token. This file imports its siblings, torch and transformers alone.
"""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .generation_tide import TIDEGenerationConfig
from .modeling_tide import TIDELlamaForBlockDiffusion, TIDEQwen2ForBlockDiffusion, TIDEQwen3ForBlockDiffusion

MASK_TOKEN = "<|mask|>"
# model_type of the source -> class of the student
STUDENTS = {
    "qwen3": TIDEQwen3ForBlockDiffusion,
    "qwen2": TIDEQwen2ForBlockDiffusion,
    "llama": TIDELlamaForBlockDiffusion,
    "a2d-qwen3": TIDEQwen3ForBlockDiffusion,
    "a2d-qwen2": TIDEQwen2ForBlockDiffusion,
    "a2d-llama": TIDELlamaForBlockDiffusion,
}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# fields of the source's configuration that the student's has values of its own for
NOT_CARRIED = ("architectures", "auto_map", "is_causal", "model_type", "transformers_version")


def convert_to_diffusion(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    diffusion_type: str | None = None,
    block_size: int | None = None,
    noise_schedule: str | None = None,
    mask_token: str = MASK_TOKEN,
    **init_kwargs,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Turns a Qwen3, Qwen2 or Llama model into a student, which still has to be trained to denoise.

    The mask token is the tokenizer's own if it has one, else `mask_token`: an existing entry, or a new one in a spare
    row of the embedding matrix, or, if the matrix is full, a reserved special token. The vocabulary grows only if
    there is none of these. An autoregressive model has never read the mask token's row, which is set to the mean of
    the others. Chat template, tied embeddings, dtype, biases and rotary settings are kept; sampling settings, which
    were tuned for autoregressive decoding, are not.

    Args:
        model (`str` or `PreTrainedModel`): Hub name, folder or instance (not changed).
        tokenizer (*optional*): its tokenizer (not changed); loaded from `model` by default.
        diffusion_type (`str`, *optional*), block_size (`int`, *optional*), noise_schedule (`str`, *optional*): of the
            student, see [`~tide_hf.models.configuration_tide.DiffusionConfig`]; `"block"`, 32 and `"linear"` by
            default, or the values of the source's config if it is a diffusion LM.
        mask_token (`str`): text of the mask token.
        init_kwargs: `from_pretrained` arguments (revision, dtype, device_map, attn_implementation, …).

    Returns:
        the student and its tokenizer.

    Raises:
        ValueError: for an architecture that cannot be a student, sliding windows, quantised weights, or a mask token
            that contradicts the model's config.
    """
    model, tokenizer = _source(model, tokenizer, init_kwargs)
    student_class = _student_class(model.config)
    num_known = len(tokenizer)
    _name_mask_token(tokenizer, model.config, mask_token)

    given = {"diffusion_type": diffusion_type, "block_size": block_size, "noise_schedule": noise_schedule}
    given = {name: value for name, value in given.items() if value is not None}
    carried = {name: value for name, value in model.config.to_dict().items() if name not in NOT_CARRIED}
    config = student_class.config_class(**carried | given | {"mask_token_id": tokenizer.mask_token_id})
    config._attn_implementation = model.config._attn_implementation
    student = _with_weights(student_class, config, model)
    student.name_or_path = student.config.name_or_path = model.name_or_path
    _make_mask_row(student, num_known, never_read=not hasattr(model.config, "diffusion_type"))
    student.generation_config = _generation_config(config, model.generation_config, tokenizer)
    return student.train(model.training), tokenizer


def _source(model, tokenizer, init_kwargs: dict) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, loaded if it is a name, and a tokenizer of its own to add a mask token to."""
    if isinstance(model, str):
        hub = {name: value for name, value in init_kwargs.items() if name in HUB_ARGUMENTS}
        _student_class(AutoConfig.from_pretrained(model, **hub))  # refuses before the weights are fetched
        tokenizer = AutoTokenizer.from_pretrained(model, **hub) if tokenizer is None else tokenizer
        model = AutoModelForCausalLM.from_pretrained(model, **init_kwargs)
    elif init_kwargs:
        raise ValueError(f"{', '.join(init_kwargs)}: these are for loading a model by name, and this is an instance.")
    if tokenizer is None:
        return model, AutoTokenizer.from_pretrained(model.name_or_path)
    return model, copy.deepcopy(tokenizer)


def _student_class(config) -> type[PreTrainedModel]:
    """The student's class for a source's configuration; ValueError with the reason if there is none."""
    if config.model_type not in STUDENTS:
        raise ValueError(
            f"model_type={config.model_type!r} cannot be made a student; convert_to_diffusion takes "
            f"{', '.join(STUDENTS)}."
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"Some layers of this {config.model_type} attend to a window of {config.sliding_window} tokens, where a "
            "student would attend to everything its block-diffusion mask shows. Convert a model without sliding "
            "windows, or accept that by setting every entry of its config's layer_types to 'full_attention'."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("The weights are quantised; convert the unquantised model and quantise the student.")
    return STUDENTS[config.model_type]


def _name_mask_token(tokenizer, config, mask_token: str) -> None:
    """Gives the tokenizer a mask token; a new row of the embeddings is the last resort."""
    if tokenizer.mask_token_id is None:
        if mask_token not in tokenizer.get_vocab() and len(tokenizer) >= config.vocab_size:
            reserved = [token for token in tokenizer.get_added_vocab() if "reserved_special_token" in token]
            mask_token = min(reserved, key=tokenizer.convert_tokens_to_ids, default=mask_token)
        tokenizer.add_special_tokens({"mask_token": mask_token})
    said = getattr(config, "mask_token_id", None)
    if said not in (None, tokenizer.mask_token_id):
        raise ValueError(
            f"The model's config says mask_token_id={said}, and the tokenizer's {tokenizer.mask_token!r} is "
            f"{tokenizer.mask_token_id}: give the tokenizer that the model was trained with."
        )


def _with_weights(student_class, config, model) -> PreTrainedModel:
    """A student with copies of a model's weights, in its dtype and on its device."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student, info = student_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=model.dtype, output_loading_info=True
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"The weights of this {type(model).__name__} are not those of a {config.model_type} network: "
            f"{', '.join(map(str, wrong[:3]))}{', …' if len(wrong) > 3 else ''}. Merge adapters before converting."
        )
    return student.to(model.device)


@torch.no_grad()
def _make_mask_row(student, num_known: int, never_read: bool) -> None:
    """Grows the embeddings if the mask id needs it, and sets every untrained row to the mean of the trained ones.

    Args:
        student (`PreTrainedModel`): changed in place.
        num_known (`int`): tokens of the source's tokenizer; rows beyond these are padding that no text has ever used.
        never_read (`bool`): whether the mask token's row is untrained too, wherever it lies.
    """
    mask_token_id, num_rows = student.config.mask_token_id, student.config.vocab_size
    if mask_token_id >= num_rows:
        student.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    new_rows = {*range(num_rows, student.config.vocab_size), *([mask_token_id] if never_read else [])}
    trained = torch.tensor([row for row in range(min(num_known, num_rows)) if row not in new_rows])
    for embeddings in (student.get_input_embeddings(), student.get_output_embeddings()):
        weight = embeddings.weight
        mean = weight[trained.to(weight.device)].float().mean(0).to(weight.dtype)
        for row in new_rows:
            weight[row] = mean


def _generation_config(config, source, tokenizer) -> TIDEGenerationConfig:
    """Token ids for decoding: the source's and the tokenizer's ends of text; padding that is not None if possible."""
    ends = []
    for end in (source.eos_token_id, tokenizer.eos_token_id):
        ends += end if isinstance(end, list) else [end]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    settings = TIDEGenerationConfig.from_model_config(config)
    settings.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    pads = (tokenizer.pad_token_id, source.pad_token_id, tokenizer.eos_token_id)
    settings.pad_token_id = next((pad for pad in pads if pad is not None), None)
    return settings
