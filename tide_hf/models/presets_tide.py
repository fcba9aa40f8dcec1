"""The samplers of the field by name: what `decoding` fills in.

This file travels with checkpoints: it imports Python's standard library alone.
"""

_SDAR = {
    "step_quota": "of_block",
    "confidence_threshold": 0.85,
    "threshold_inclusive": False,
    "confidence_from": "sampling",
    "denoise_whole_blocks": True,
}
_LLADA2 = _SDAR | {"confidence_threshold": 0.95}
# name of a published sampler -> the settings that reproduce it, apart from the number of steps, block size and grid
PRESETS = {
    "llada": {"step_quota": "remainder_first"},
    "dream": {"step_quota": "remainder_last", "remasking": "entropy", "confidence_from": "sampling"},
    "sdar": _SDAR,
    "llada2": _LLADA2,
    "llada2.1": _LLADA2 | {"editing_threshold": 0.9, "max_editing_steps": 16},
    "fast-dllm": {"confidence_threshold": 0.9},
    "wedlm": {"block_grid": "prompt_aligned"},
}
# every preset fills these, with None where it does not name them: it replaces another sampler as a whole
PRESET_FIELDS = tuple(dict.fromkeys(("entropy_bound", *(name for preset in PRESETS.values() for name in preset))))


def fill_in(places: list[dict], read: tuple[str, ...]) -> tuple[list[dict], set[str]]:
    """Spells out the `decoding` nearest to the call; what its own place says explicitly stays.

    Args:
        places (`list[dict]`): what each place says, from the farthest to the nearest.
        read (`tuple[str, ...]`): settings that the method reads; others are not filled in.

    Returns:
        the places with what was filled in, and the names of the settings that the preset gave a value.
    """
    for index in reversed(range(len(places))):
        if "decoding" in places[index] and "decoding" in read:
            preset = PRESETS.get(places[index]["decoding"])
            if preset is None:  # switched off by a keyword, or a name that validation refuses
                break
            filled = {name: preset.get(name) for name in PRESET_FIELDS if name in read}
            told = {name for name in preset if name in read and not any(name in place for place in places[index:])}
            return [*places[:index], filled | places[index], *places[index + 1 :]], told
    return places, set()
