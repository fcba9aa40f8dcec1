"""The fields of TIDEConfig that say how a student writes answers to be trained on: name, type, default, help."""

from typing import Literal

VISITED, RANDOM_MASK = STATES = ("visited", "random_mask")
CONFIDENCE, LEFT_TO_RIGHT = ORDERS = ("confidence", "left_to_right")
# name -> (type, default, help)
ROLLOUT_FIELDS = {
    "on_policy_fraction": (
        float,
        0.0,
        "Share f of the rows, chosen by their keys, that are prompts to which the student writes the answer itself. "
        "It is compared with the teacher at states that its own sampler visited, without a loss on the tokens "
        "written; the other rows keep the preset's loss. The two means are weighted f and 1−f. With 1 the "
        "dataset may hold prompts alone, in a column prompt. Source: OPDLM (arXiv 2606.06712).",
    ),
    "rollout_temperature": (float, 1.0, "On-policy: temperature > 0 at which the student draws tokens."),
    "rollout_steps": (
        int | None,
        None,
        "On-policy: steps in which the student writes a block; by default one per token.",
    ),
    "rollout_order": (
        Literal[ORDERS],
        CONFIDENCE,
        "On-policy: which positions of a block the student reveals first: those it is surest of, or from left to "
        "right, the only order in which an autoregressive teacher's predictions are right.",
    ),
    "rollout_max_new_tokens": (
        int | None,
        None,
        "On-policy: most tokens of an answer; by default as many as max_length leaves after the prompt. Must be given "
        "for a full-sequence student, which writes an answer of this length at once.",
    ),
    "rollout_initial_tokens": (
        int | None,
        None,
        "On-policy: most tokens of an answer at the start of training; grows linearly to rollout_max_new_tokens at "
        "its end.",
    ),
    "rollout_reuse": (
        int,
        1,
        "On-policy: optimizer steps that train on the same answers, at other states of them. The steps in between "
        "read new rows as well, whose prompts are passed over.",
    ),
    "rollout_states": (
        Literal[STATES],
        VISITED,
        "On-policy: what of an answer is masked: visited, what the sampler had not revealed before a random step of "
        "each block; or random_mask, the forward process, for comparison.",
    ),
}
ROLLOUT_RANGES = {
    "on_policy_fraction": (0.0, 1.0, True),
    "rollout_temperature": (0.0, float("inf"), False),
    **dict.fromkeys(("rollout_steps", "rollout_max_new_tokens", "rollout_initial_tokens"), (1, float("inf"), True)),
    "rollout_reuse": (1, float("inf"), True),
}


def check_rollout_fields(config) -> None:
    """Refuses fields that contradict each other.

    Args:
        config ([`TIDEConfig`]): of the run.

    Raises:
        ValueError: naming the fields, and what to do.
    """
    given = [name for name, (_, default, _) in ROLLOUT_FIELDS.items() if getattr(config, name) != default]
    if given and not config.on_policy_fraction:
        raise ValueError(
            f"{', '.join(f'{name}={getattr(config, name)!r}' for name in given)}: only read where the student writes "
            "answers, and on_policy_fraction is 0. Set on_policy_fraction, or leave it out."
        )
    first, most = config.rollout_initial_tokens, config.rollout_max_new_tokens
    if first is not None and (most is None or first > most):
        raise ValueError(
            f"rollout_initial_tokens={first} grows to rollout_max_new_tokens={most}: give both, the first not larger "
            "than the second."
        )
