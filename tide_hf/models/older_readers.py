"""config.json in a form that both transformers 4 and transformers 5 read.

transformers 4 looks for the rotary settings at the top level (`rope_theta`, `rope_scaling`, `partial_rotary_factor`)
and for `torch_dtype`; where it finds only `rope_parameters` and `dtype` it silently takes its defaults. This file
travels with checkpoints: it imports Python's standard library alone.
"""

import json
from typing import Any


class WritesForOlderReaders:
    """Writes both names into config.json; stands before a transformers configuration in the bases."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers.

        Raises:
            ValueError: for older names in `config_dict` that contradict its `rope_parameters`: one reader would follow
                the former, another the latter.
        """
        wrong = _contradictions(config_dict)
        if wrong:
            raise ValueError(
                f"config.json says {', '.join(f'{name}={config_dict[name]!r}' for name in wrong)} and "
                f"rope_parameters={config_dict['rope_parameters']!r}: transformers 4 reads the first, transformers 5 "
                "the second. Make them agree, or remove one of the two."
            )
        return super().from_dict(config_dict, **kwargs)

    def to_json_string(self, use_diff: bool = True, **kwargs) -> str:
        """As in transformers, `use_diff` and `kwargs` included, with the older names next to the newer ones."""
        values = json.loads(super().to_json_string(use_diff=use_diff, **kwargs))
        values |= older_names(values.get("rope_parameters") or {}, values.get("max_position_embeddings"))
        if values.get("dtype") is not None:
            values["torch_dtype"] = values["dtype"]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def older_names(rope_parameters: dict[str, Any], max_position_embeddings: int | None) -> dict[str, Any]:
    """transformers 4's top-level fields for `rope_parameters`; transformers 5 reads the same from both.

    yarn's `original_max_position_embeddings` is left out where it equals `max_position_embeddings`, which both take by
    default: some releases of transformers 4 take the quotient of the two for the factor.
    """
    own = {name: rope_parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope_parameters}
    if rope_parameters.get("rope_type", "default") == "default":
        return own
    scaling = {name: value for name, value in rope_parameters.items() if name not in own}
    original = scaling.get("original_max_position_embeddings")
    if scaling["rope_type"] == "yarn" and original == max_position_embeddings:
        del scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "longrope" and original is not None:
        own["original_max_position_embeddings"] = original  # where transformers 4 looks for it
    return own | {"rope_scaling": scaling}


def _contradictions(config_dict: dict[str, Any]) -> list[str]:
    """The older names whose values `rope_parameters` contradicts."""
    new = config_dict.get("rope_parameters")
    if not new:
        return []
    old = {name: config_dict.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    wrong = [name for name, value in old.items() if None not in (value, new.get(name)) and value != new[name]]
    if config_dict.get("rope_scaling"):
        scaling = {
            "rope_type" if name == "type" else name: value for name, value in config_dict["rope_scaling"].items()
        }
        expected = older_names(new, config_dict.get("max_position_embeddings")).get("rope_scaling", {})
        if any(scaling.get(name) != new.get(name) for name in {*scaling, *expected}):
            wrong.append("rope_scaling")
    return wrong
