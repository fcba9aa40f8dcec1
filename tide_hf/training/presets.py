"""Presets, and how a configuration becomes the one frozen record of what a run optimises.

A preset stands for a different divergence in each of the two pipelines, and the two tokenizers decide which pipeline
it is: fields of TIDEConfig that are None are filled in here, once both tokenizers are known.
"""

from dataclasses import fields, replace
from functools import partial

from transformers.utils import logging

from ..alignment import ALIGNMENTS
from ..losses import DIVERGENCES, Divergence, expected_tidal_strength
from ..models.masked_diffusion import masked_probability
from .objective import NO_DIVERGENCE, Objective
from .rollout_fields import LEFT_TO_RIGHT, VISITED

logger = logging.get_logger(__name__)
TIDAL_FIELDS = (
    *("lambda_init", "lambda_max", "lambda_growth", "lambda_axes", "timestep_weight", "tidal_normalization"),
    "allow_reverse_tidal",
)

# preset -> fields; a pair is (shared tokenizer, two tokenizers). Source: TIDE 2604.26951, tables of hyperparameters.
PRESETS = {
    "tide-shared": {"divergence": ("forward_kl", "calm"), "tidal": True, "comp_demo": True},
    "tide-cross": {"divergence": ("reverse_kl", "reverse_calm")},
    "kl": {"divergence": ("forward_kl", None)},
    "reverse-kl": {"divergence": ("reverse_kl", None)},
    "calm": {"divergence": ("calm", "calm")},
    # for autoregressive teachers; at T ≠ 1 the mean of their predictions is not the student's target
    "ar-kl": {"divergence": ("forward_kl", None), "temperature": 1.0},
    "ar-calm": {"divergence": ("calm", "calm"), "temperature": 1.0},
    "ce": {"divergence": (NO_DIVERGENCE, NO_DIVERGENCE)},
}
AR_TARGETS_DEFAULT, SUFFIX_FRACTION_DEFAULT = "all", 0.5
PRESET_DEFAULTS = {
    "tidal": False,
    "comp_demo": False,
    "ce_weight": 1.0,
    "distill_weight": 1.0,
    "temperature": 2.0,
    "lambda_init": 0.1,
    "lambda_max": 0.9,
    "lambda_growth": "cosine",
    "lambda_axes": "both",
    "timestep_weight": "midrange",
    "tidal_normalization": "none",
    "demo_ratio": 0.5,
}


def resolve_objective(config, alignment: str, schedule: str = "linear", given: Divergence | None = None) -> Objective:
    """Fills in every None of a configuration from its preset, for one pipeline.

    Args:
        config ([`TIDEConfig`]): given fields win over the preset's.
        alignment (`str`): `"token"` (shared tokenizer) or `"chunk"` (two tokenizers).
        schedule (`str`): the student's own `noise_schedule`, used if the configuration gives none.
        given ([`~tide_hf.losses.Divergence`], *optional*): the user's own divergence. It replaces the preset's, and
            TIDAL is then off unless the configuration asks for it.

    Raises:
        ValueError: for fields that do not go together, with the reason.
    """
    preset = dict(PRESETS[config.preset]) if config.preset else {"divergence": (None, None)}
    preset["divergence"] = preset["divergence"][ALIGNMENTS.index(alignment)]
    if given is not None:
        preset |= {"divergence": given.name, "tidal": False}
    values = {**PRESET_DEFAULTS, **preset}
    values |= {name: getattr(config, name) for name in values if getattr(config, name) is not None}
    values["divergence"] = divergence = _divergence(config, alignment, values["divergence"], given)
    if divergence is None:
        values |= {"tidal": False, "comp_demo": False}
    if values["tidal"]:
        _check_tidal(divergence, config.allow_reverse_tidal)
    objective = Objective(
        preset=config.preset,
        alignment=alignment,
        schedule=config.schedule or schedule,
        ce_weighting=config.ce_weighting,
        chunk_weighting=config.chunk_weighting,
        loss_normalization=config.loss_normalization,
        on_policy_fraction=config.on_policy_fraction,
        suffix_mask_fraction=config.suffix_mask_fraction or 0.0,
        **values,
    )
    _check_on_policy(objective)
    _check_weights(objective)
    _warn_about_unread(config, objective)
    if objective.tidal and objective.tidal_normalization == "expected":
        strength = expected_tidal_strength(
            partial(masked_probability, schedule=objective.schedule),
            lambda_init=objective.lambda_init,
            lambda_max=objective.lambda_max,
            growth=objective.lambda_growth,
            axes=objective.lambda_axes,
            weight=objective.timestep_weight,
            time_epsilon=config.time_epsilon,
        )
        objective = replace(objective, tidal_scale=1 / strength)
    return objective


def with_teacher(objective: Objective, config, autoregressive: bool) -> Objective:
    """An objective once the kind of its teacher is known.

    Args:
        objective ([`Objective`]): of [`resolve_objective`]; it distils.
        config ([`TIDEConfig`]): the configuration it was made from.
        autoregressive (`bool`): whether the teacher is; otherwise it is a diffusion LM.

    Raises:
        ValueError: for fields that mean nothing for such a teacher.
    """
    if not autoregressive:
        if config.ar_targets is not None or str(config.preset).startswith("ar-"):
            raise ValueError(
                f"preset={config.preset!r} and ar_targets={config.ar_targets!r} are for an autoregressive teacher, "
                "and this one is a diffusion LM: choose preset='kl' (shared tokenizer) or 'calm', without ar_targets."
            )
        return objective
    if objective.comp_demo:
        raise ValueError(
            "comp_demo=True reveals part of the masked positions to the teacher, and an autoregressive teacher reads "
            f"the clean text, where nothing is masked (preset={config.preset!r}): choose preset='ar-kl' (shared "
            "tokenizer) or 'ar-calm', or set comp_demo=False."
        )
    _check_own_states(objective, config)
    if config.teacher_context != "paper":
        raise ValueError(
            f"teacher_context={config.teacher_context!r} says how a diffusion teacher is fed; an autoregressive one "
            "reads the clean text in any case: leave it out."
        )
    if objective.divergence.direction != "forward":
        logger.warning(
            f"divergence={objective.divergence.name!r} with an autoregressive teacher: only a forward divergence is "
            "smallest at the mean of the teacher's predictions over the tokens that the student does not see. "
            "Consider preset='ar-kl' or 'ar-calm'."
        )
    ar_targets = config.ar_targets or AR_TARGETS_DEFAULT
    fraction = objective.suffix_mask_fraction
    if config.suffix_mask_fraction is None:
        fraction = SUFFIX_FRACTION_DEFAULT if ar_targets == "exact" else 0.0
    temperature = objective.temperature if config.temperature is not None else 1.0
    return replace(objective, ar_targets=ar_targets, suffix_mask_fraction=fraction, temperature=temperature)


def _divergence(config, alignment: str, name: str | None, given: Divergence | None) -> Divergence | None:
    """The divergence of a run with its parameters; None if nothing is distilled.

    Raises:
        ValueError: if there is none to choose, it does not suit the pipeline, or two are given.
    """
    suitable = [key for key, cls in DIVERGENCES.items() if alignment == "token" or cls.pairs == "chunk"]
    if name is None:
        why = "no preset is given"
        if config.preset:
            why = f"preset {config.preset!r} compares vocabularies token by token"
        raise ValueError(
            f"{why}, so the {alignment} pipeline needs divergence set: one of "
            f"{', '.join([*suitable, NO_DIVERGENCE] if alignment == 'token' else suitable)}."
        )
    if given is not None and config.divergence is not None:
        raise ValueError(
            f"objective={given} and divergence={config.divergence!r} both choose the divergence: give only one."
        )
    if name == NO_DIVERGENCE:
        return None
    cls = type(given) if given is not None else DIVERGENCES[name]
    if alignment == "chunk" and cls.pairs == "token":
        raise ValueError(
            f"divergence={cls.name!r} compares token distributions, which needs one shared vocabulary; teacher and "
            f"student have different tokenizers here. Use one of {', '.join(suitable)}."
        )
    if given is not None:
        return given
    parameters = {field.name: getattr(config, f"{name}_{field.name}") for field in fields(cls)}
    return cls(**{key: value for key, value in parameters.items() if value is not None})


def _warn_about_unread(config, objective: Objective) -> None:
    """Warns of fields that were given but that this objective does not use."""
    parameters = {f"{name}_{field.name}": name for name, cls in DIVERGENCES.items() for field in fields(cls)}
    used = objective.divergence.name if objective.divergence is not None else NO_DIVERGENCE
    read = {
        **{field: name == used for field, name in parameters.items()},
        "demo_ratio": objective.comp_demo,
        "temperature": objective.distills,
        **dict.fromkeys(("tidal", "comp_demo"), objective.distills),
        **dict.fromkeys(TIDAL_FIELDS, objective.tidal),
    }
    unread = [f"{name}={getattr(config, name)}" for name, is_read in read.items() if not is_read]
    unread = [text for text in unread if not text.endswith(("=None", "=False"))]
    if unread:
        logger.warning(
            f"These fields are given but not used, because the objective has no such part (divergence={used!r}, "
            f"distill_weight={objective.distill_weight}, tidal={objective.tidal}, comp_demo={objective.comp_demo}): "
            f"{', '.join(unread)}."
        )


def _check_on_policy(objective: Objective) -> None:
    """Answers that the student wrote are compared with a teacher, at states without a diffusion time."""
    given = f"on_policy_fraction={objective.on_policy_fraction}"
    if objective.on_policy_fraction and not objective.distills:
        raise ValueError(
            f"{given} compares what the student writes with a teacher, and this objective (preset="
            f"{objective.preset!r}, distill_weight={objective.distill_weight}) has none: choose preset='kl' (shared "
            "tokenizer) or 'calm', or set on_policy_fraction=0."
        )
    if objective.on_policy_fraction and objective.tidal:
        raise ValueError(
            f"{given} with tidal=True: TIDAL's weights depend on the diffusion time of a row, which the states of a "
            "sampler do not have. Choose preset='kl' (shared tokenizer) or 'calm', or set tidal=False."
        )


def _check_own_states(objective: Objective, config) -> None:
    """An autoregressive teacher judges the student's own states only where nothing stands right of what is masked,
    and beside the data: alone it confirms what the student writes already."""
    if not objective.on_policy_fraction:
        return
    given = f"on_policy_fraction={objective.on_policy_fraction} with an autoregressive teacher"
    if config.rollout_order != LEFT_TO_RIGHT or config.rollout_states != VISITED:
        raise ValueError(
            f"{given} and rollout_order={config.rollout_order!r}, rollout_states={config.rollout_states!r}: its "
            "predictions are right only where no token stands to the right of the masked ones. Set "
            "rollout_order='left_to_right' and leave rollout_states out, or use a diffusion teacher."
        )
    if objective.on_policy_fraction == 1 or objective.ce_weight == 0:
        raise ValueError(
            f"{given} and ce_weight={objective.ce_weight}: without the data's own answers beside them, the student's "
            "answers confirm themselves. Set on_policy_fraction=0.5 and ce_weight=1."
        )


def _check_weights(objective: Objective) -> None:
    """Something must be learned."""
    axes = objective.lambda_axes
    is_still = objective.lambda_max == 0 and (objective.lambda_init == 0 or axes == "time")
    if objective.distills and objective.tidal and is_still:
        raise ValueError(
            f"lambda_init={objective.lambda_init} and lambda_max=0 with lambda_axes={axes!r} make TIDAL's target the "
            "student itself at every step, so the teacher would have no effect: raise lambda_max."
        )
    if objective.ce_weight == 0 and not objective.distills:
        name = NO_DIVERGENCE if objective.divergence is None else objective.divergence.name
        raise ValueError(
            f"ce_weight=0 and no distillation term (divergence={name!r}, distill_weight={objective.distill_weight}) "
            "leave nothing to train: set one of the weights."
        )


def _check_tidal(divergence: Divergence, allow_reverse: bool) -> None:
    """TIDAL goes with forward divergences."""
    if divergence.direction == "forward" or (allow_reverse and divergence.name == "reverse_calm"):
        return
    raise ValueError(
        f"tidal=True goes with forward divergences only, and {divergence.name!r} is {divergence.direction}: late in "
        "training and at large t the (1−λ) share of the target suppresses the self-selection that reverse divergences "
        "rely on. Use divergence='forward_kl' (shared tokenizer) or 'calm' (two tokenizers)"
        + (", or allow_reverse_tidal=True for the ablation." if divergence.name == "reverse_calm" else ".")
    )
