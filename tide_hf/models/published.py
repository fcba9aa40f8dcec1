"""What the configurations of published checkpoints share: field names of their own, nulls, and unused settings.

This file travels with checkpoints: it imports its siblings and transformers alone.
"""

import json
from dataclasses import fields
from typing import Any, ClassVar

from transformers import GenerationConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.utils import logging

from .configuration_tide import refuse_sliding_windows
from .older_readers import WritesForOlderReaders

logger = logging.get_logger(__name__)

MERGED = ["mlp.experts.gate_proj", "mlp.experts.up_proj"]


# fields of any config.json that change no result, that transformers reads elsewhere, or that this library reads itself
HARMLESS = frozenset(
    {
        "architectures",
        "auto_map",
        "debug",
        "flash_attention",
        "fuse_cross_entropy",
        "id2label",
        "init_cutoff_factor",
        "init_device",
        "init_fn",
        "init_std",
        "initializer_range",
        "label2id",
        "max_window_layers",
        "objective",
        "name_or_path",
        "num_labels",
        "original_max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "partial_rotary_factor",
        "precision",
        "pretraining_tp",
        "quantization_config",
        "return_dict",
        "rope_scaling",
        "rope_theta",
        "rotary_dim",
        "router_aux_loss_coef",
        "sliding_window",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


class PublishedConfig(WritesForOlderReaders):
    """Reads config.json as its authors wrote it; stands before a transformers configuration in the bases.

    Attributes:
        published_names (`dict[str, str]`): their field name -> the base configuration's. Both are written on save.
        required_values (`dict[str, Any]`): fields, theirs or the base class's, and the one value for which this class
            computes what theirs does.
        harmless (`frozenset[str]`): further fields of theirs that change no result.
        spelled_out (`dict[str, Any]`): fields whose absence their class takes for another value than this class does;
            config.json always holds them.
        not_written (`frozenset[str]`): fields of the base configuration that their class computes from others, and
            refuses to be given; config.json holds the others alone.

    Raises:
        ValueError: for another value of a required field, and for layers that attend to a sliding window.
    """

    published_names: ClassVar[dict[str, str]] = {}
    required_values: ClassVar[dict[str, Any]] = {}
    harmless: ClassVar[frozenset[str]] = frozenset()
    spelled_out: ClassVar[dict[str, Any]] = {}
    not_written: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers, but for what the file's authors did not mean as a setting.

        In `config_dict`, each `null` that the base class would take for a value is dropped, and so is the attention
        implementation, which suited the authors' machine: the user chooses it.
        """
        nullable = {field.name for field in fields(cls) if "None" in str(field.type)}
        given = {
            name: value
            for name, value in config_dict.items()
            if (value is not None or name in nullable) and name not in ("model_type", "attn_implementation")
        }
        return super().from_dict(given, **kwargs)

    def __post_init__(self, **kwargs):
        for published, name in self.published_names.items():
            value = kwargs.pop(published, None)
            if value is not None:
                setattr(self, name, value)
        for name, required in self.required_values.items():
            value = kwargs.get(name, getattr(self, name, None))
            if value is not None and value != required:
                raise ValueError(
                    f"config.json says {name}={value!r}; no published {self.model_type} checkpoint has that, and this "
                    f"class computes with {name}={required!r}: it would load the model and give wrong results."
                )
        generation = GenerationConfig._get_default_generation_params()
        aliases = {*self.attribute_map, *self.attribute_map.values()}
        known = {*HARMLESS, *self.harmless, *self.required_values, *generation, *aliases}
        unknown = sorted(name for name in kwargs if name not in known and not name.startswith("_"))
        if unknown:
            logger.warning_once(
                f"config.json of this {self.model_type} has fields that {type(self).__name__} does not know: "
                f"{', '.join(unknown)}. They are kept and have no effect here: if one of them changes what the model "
                "computes, its results will differ."
            )
        super().__post_init__(**self.spelled_out | kwargs)
        refuse_sliding_windows(self)

    def to_dict(self) -> dict[str, Any]:
        """The base's fields and, beside them, the published names."""
        return super().to_dict() | {published: getattr(self, name) for published, name in self.published_names.items()}

    def to_json_string(self, use_diff: bool = True, **kwargs) -> str:
        """What config.json holds, for readers of the published class too; `use_diff`, `kwargs` as in transformers."""
        values = json.loads(super().to_json_string(use_diff=use_diff, **kwargs))
        written = {name: value for name, value in values.items() if name not in self.not_written}
        return json.dumps(written, indent=2, sort_keys=True) + "\n"


def packed_experts() -> list[WeightConverter]:
    """`mlp.experts.E.{gate,up,down}_proj.weight` of a checkpoint <-> the packed parameters of transformers 5."""
    return [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def merged_experts() -> list[WeightConverter]:
    """`mlp.experts.{gate,up}_proj`, all experts of a layer in one tensor, as other training code keeps them.

    `mlp.experts.down_proj` already has transformers' name.
    """
    return [
        WeightConverter(
            source_patterns=MERGED, target_patterns="mlp.experts.gate_up_proj", operations=[Concatenate(dim=1)]
        )
    ]


def register_key_layout(model_class: type, mapping: list) -> None:
    """Registers the `mapping` of a `model_class`'s checkpoint keys, applied at load and inverted at save.

    It is registered by class name, since one model_type may stand for two architectures.
    """
    register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)
