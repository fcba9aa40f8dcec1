"""Distil diffusion language models across architectures, attention and tokenizers.

Importing the package registers the models with transformers' Auto classes and does nothing else; the names below are
loaded when they are first used.
"""

import importlib

from . import models

__version__ = "0.1.0"

_LAZY = {
    "Divergence": "losses",
    "TIDEConfig": "training",
    "TIDETrainer": "training",
    "IDLMConfig": "few_step",
    "IDLMTrainer": "few_step",
    "Objective": "training",
    "NonFiniteError": "training.nonfinite",
    "TIDELlamaConfig": "models",
    "TIDELlamaForBlockDiffusion": "models",
    "TIDEQwen2Config": "models",
    "TIDEQwen2ForBlockDiffusion": "models",
    "TIDEQwen3Config": "models",
    "TIDEQwen3ForBlockDiffusion": "models",
    "TIDEGenerationConfig": "models",
    "TIDEUniformQwen3Config": "models",
    "TIDEUniformQwen3ForDiffusion": "models",
    "UniformIDLMTrainer": "few_step",
    "export_for_serving": "serving",
    "convert_to_diffusion": "models",
}
__all__ = ["models", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
