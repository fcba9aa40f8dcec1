"""Autoregressive teachers: what is one, what its class does to the logits, and a check that all of it was done here.

Shapes: R hidden states, K hidden, U vocabulary of the teacher.
"""

from collections.abc import Callable

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..diffusion import LayoutSpec, NetworkInputs, causal_layout

# what follows the output embedding in a transformers class: field of the config -> a function of logits and its value;
# a name may mean the opposite elsewhere, so it counts only for model_types that begin as listed (any, if none is)
TRANSFORMS: tuple[tuple[str, tuple[str, ...], Callable], ...] = (
    ("final_logit_softcapping", (), lambda logits, cap: torch.tanh(logits / cap) * cap),
    ("logits_soft_cap", ("recurrent_gemma",), lambda logits, cap: torch.tanh(logits / cap) * cap),
    ("output_logit_soft_cap", ("xlstm",), lambda logits, cap: torch.tanh(logits / cap) * cap),
    ("logit_scale", ("cohere",), lambda logits, scale: logits * scale),
    ("logits_scaling", ("hyperclovax",), lambda logits, scale: logits * scale),
    ("logits_scaling", ("granite", "minicpm3"), lambda logits, scale: logits / scale),
)
AUTOREGRESSIVE = LayoutSpec(None, None, clean_copy=False, shifted=True, autoregressive=True)
# lengths of the two rows that a teacher is tried on, and how far its logits may be from its own forward's, relative to
# their standard deviation: an error of the transforms is larger, except for soft caps far above all logits
TRIAL_LENGTHS = (5, 9)
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}
HALF_PRECISION_TOLERANCE = 0.15


def is_autoregressive(config) -> bool:
    """Whether a model predicts the next token, by the model_type of its `config`.

    A class says nothing: students of this library are subclasses of autoregressive ones.
    """
    return not hasattr(type(config), "teacher_family") and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def reason_to_refuse(config) -> str | None:
    """Why an autoregressive model of this `config` cannot teach; None if it can, as far as the config tells."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    names = [names] if isinstance(names, str) else names
    if getattr(config, "is_encoder_decoder", False):
        return "It is an encoder-decoder; a teacher reads prompt and answer as one text. Name a decoder-only model."
    if all(name.endswith("ForConditionalGeneration") for name in names) or not hasattr(config, "vocab_size"):
        return (
            f"Its class ({', '.join(names)}) also reads images or sound. Load its language model alone, by its own "
            "class (as Gemma3ForCausalLM for Gemma 3), and give the instance."
        )
    if hasattr(config, "is_decoder") and not config.is_decoder and config.model_type.endswith(("bert", "roberta")):
        return "It is bidirectional (is_decoder=False), so it has no next-token predictions."
    return None


def transformed_logits(config, logits_RU: torch.Tensor) -> torch.Tensor:
    """What the class of an autoregressive model makes of its output embedding's logits.

    Args:
        config (`PretrainedConfig`): the model's.
        logits_RU (`torch.Tensor` of shape `(R, U)`): of the output embedding.

    Returns:
        `torch.Tensor` of shape `(R, U)`: soft-capped (Gemma 2 to 4, RecurrentGemma, xLSTM) or scaled (Cohere, Granite,
        HyperCLOVA X, MiniCPM3); for most models the logits as they are.
    """
    for field, families, transform in TRANSFORMS:
        value = getattr(config, field, None)
        if value is not None and (not families or config.model_type.startswith(families)):
            logits_RU = transform(logits_RU, value)
    return logits_RU


@torch.no_grad()
def check_logits(teacher) -> None:
    """Compares an autoregressive teacher's logits on two short rows of different lengths with its own forward's.

    The first row is padded by the second one, so this also refuses a network that sees what stands behind a token.

    Args:
        teacher ([`Teacher`]): on its device.

    Raises:
        ValueError: naming the class, if they differ.
    """
    model, (short, long) = teacher.model, TRIAL_LENGTHS
    ids = torch.arange(2 * long).view(2, long) * 7 % min(model.config.vocab_size, 1000)
    valid = torch.arange(long) < torch.tensor([[short], [long]])
    asked = valid.clone()
    asked[:, 0] = False
    layout = causal_layout(ids, valid, asked)
    inputs = NetworkInputs(layout.input_ids, layout.position_ids, layout.stream, layout.block, layout.asked, None)
    found = teacher.logits(teacher.hidden(inputs)).float().cpu()
    device = teacher.device(found.device)
    alone = [
        model(input_ids=ids[row, None, :length].to(device), use_cache=False).logits[0, :-1]
        for row, length in enumerate(TRIAL_LENGTHS)
    ]
    expected = torch.cat(alone).float().cpu()
    error = (found - expected).abs().mean() / expected.std().clamp(min=1e-9)
    if not error <= TOLERANCE.get(model.dtype, HALF_PRECISION_TOLERANCE):
        raise ValueError(
            f"The logits of {type(model).__name__} (model_type={model.config.model_type!r}) are not those of its "
            f"output embedding: on a trial row they differ by {error:.2g} of their standard deviation. Its class "
            "changes them in a way that is not known here (tide_hf.teachers.autoregressive.TRANSFORMS lists the known "
            "ones), or lets a token see what follows it, so it cannot be a teacher."
        )
