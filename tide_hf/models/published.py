"""What the configurations of published checkpoints share: their own field names, nulls, and settings nobody uses.

This file travels with checkpoints: it imports its siblings and transformers alone.
"""

from dataclasses import fields
from typing import Any, ClassVar

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .older_readers import WritesForOlderReaders

MERGED = ["mlp.experts.gate_proj", "mlp.experts.up_proj"]


class PublishedConfig(WritesForOlderReaders):
    """Stands before a transformers configuration in the bases, and reads config.json as its authors wrote it.

    Attributes:
        published_names (`dict[str, str]`): their field name -> the base configuration's. Both are written on save.
        required_values (`dict[str, Any]`): fields of theirs that the base class has no counterpart for, and the one
            value under which it computes the same.
    """

    published_names: ClassVar[dict[str, str]] = {}
    required_values: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Drops each `null` that the base class would take for a value, and the attention implementation that the
        file asks for (its authors' machine's), which gives way to the user's."""
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
            value = kwargs.get(name)
            if value is not None and value != required:
                raise ValueError(
                    f"config.json says {name}={value!r}; no published {self.model_type} checkpoint has that, and "
                    f"this class, which computes with {name}={required!r}, would load it and be wrong."
                )
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The base's fields and, beside them, the published names."""
        values = super().to_dict()
        return values | {published: values[name] for published, name in self.published_names.items()}


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
    """`mlp.experts.{gate,up}_proj`, all experts of a layer in one tensor, as training code of others keeps them.

    `mlp.experts.down_proj` has transformers' name already.
    """
    return [
        WeightConverter(
            source_patterns=MERGED, target_patterns="mlp.experts.gate_up_proj", operations=[Concatenate(dim=1)]
        )
    ]


def register_key_layout(model_class: type, mapping: list) -> None:
    """Checkpoint keys of a class, applied at load and inverted at save.

    By class name, since one model_type may stand for two architectures.
    """
    register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)
