"""What a run feeds its networks, resolved once from configurations and tokenizers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..alignment import resolve_alignment
from ..data import PreparationRecord, RowPreparation
from ..data.teacher_cache import TeacherCache
from ..diffusion import LayoutSpec
from ..teachers import contract_for, is_autoregressive, refuse_unknown, resolve_mask_token_id
from .checks import check_block_size, require_vocabulary
from .presets import with_teacher


@dataclass(frozen=True)
class RunPlan:
    """The decisions that trainers, the preparation of rows, and the card share.

    Args:
        alignment (`str`): `"token"` (one shared tokenizer) or `"chunk"` (two).
        shared_vocab_size (`int`): first ids that mean the same on both sides.
        block_size (`int`): tokens per block of the student, 1 if it has no blocks.
        schedule (`str`): α(t) of the run.
        student ([`~tide_hf.diffusion.LayoutSpec`], *optional*): how it is fed; None for uniform-state models, which
            have no mask token and are run on whole rows.
        teacher ([`~tide_hf.diffusion.LayoutSpec`], *optional*): how it is fed, if there is one.
        preparation ([`~tide_hf.data.RowPreparation`]): how rows are prepared.
        objective (*optional*): what is optimised ([`~tide_hf.Objective`], or IDLM's); None if rows are only prepared.
        cache ([`~tide_hf.data.teacher_cache.TeacherCache`], *optional*): of the teacher's predictions that the rows
            carry, if training uses them.
    """

    alignment: str
    shared_vocab_size: int
    block_size: int
    schedule: str
    student: LayoutSpec | None
    teacher: LayoutSpec | None
    preparation: RowPreparation
    objective: object | None = None
    cache: TeacherCache | None = None

    def to_dict(self) -> dict:
        """Plain values, for logs and cards, without the objective, which is shown separately."""
        settings = PreparationRecord.of(self.preparation).settings
        rows = {name: value for name, value in settings.items() if value is not None and not isinstance(value, dict)}
        layouts = {"student": self.student, "teacher": self.teacher}
        return {
            "schedule": self.schedule,
            "shared_vocab_size": self.shared_vocab_size,
            **rows,
            **{f"{name}_layout": asdict(spec) for name, spec in layouts.items() if spec is not None},
            **({} if self.cache is None else {"teacher_cache": self.cache.describe()}),
        }


def resolve_plan(
    args,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_config: Callable[[], PreTrainedConfig] | None = None,
    decide: Callable[[str, str], object] | None = None,
    cache: TeacherCache | None = None,
) -> RunPlan:
    """Decides what a run feeds its networks.

    Args:
        args ([`DiffusionTrainingArguments`]): or any object with the fields that the preparation of rows reads.
        config (`PreTrainedConfig`), tokenizer (`PreTrainedTokenizerBase`): the student's. What the run decides about
            chat templates is written into the tokenizers.
        teacher_tokenizer (`PreTrainedTokenizerBase`, *optional*): the student's by default.
        teacher_config (`Callable`, *optional*): returns the teacher's configuration; called only if the objective
            needs a teacher, since it may load weights.
        decide (`Callable`, *optional*): `(alignment, schedule) -> objective`.
        cache ([`~tide_hf.data.teacher_cache.TeacherCache`], *optional*): of predictions that the rows carry. It says
            how the teacher was fed, and what the two tokenizers share, where there is no `teacher_config`.

    Raises:
        ValueError: for a block size that does not divide the row length, tokenizers that do not belong to their
            models, an alignment they do not allow, a missing mask token, or an objective without its teacher.
    """
    require_vocabulary("student", tokenizer, config)
    has_mask, schedule = config.diffusion_type != "uniform", getattr(config, "noise_schedule", "linear")
    mask_token_id, block_size = None, getattr(config, "block_size", None) or 1
    if has_mask:
        schedule = getattr(args, "schedule", None) or schedule
        mask_token_id = resolve_mask_token_id(args.mask_token_id, config, tokenizer, "student")
        block_size = _block_size(args, config)
    if cache is not None and teacher_config is None:
        alignment, shared = cache.alignment, cache.shared_vocab_size
    else:
        alignment, shared = resolve_alignment(
            getattr(args, "alignment", "token"), tokenizer, teacher_tokenizer or tokenizer
        )
    objective = None if decide is None else decide(alignment, schedule)
    teacher, side, sizes = None, None, [config.vocab_size]
    if teacher_config is not None and (decide is None or objective.distills):
        teacher_settings = teacher_config()
        teacher_tokenizer = teacher_tokenizer or tokenizer
        mask = _teacher_mask(args, teacher_settings, teacher_tokenizer)
        side = teacher_tokenizer, mask
        sizes.append(teacher_settings.vocab_size)
        if decide is not None:
            teacher = contract_for(teacher_settings, mask, args.teacher_context, block_size)
    elif cache is not None and objective.distills:
        teacher = LayoutSpec(**cache.layout)
    if teacher is not None:
        objective = with_teacher(objective, args, teacher.autoregressive)
    student = None
    if has_mask:
        full = config.diffusion_type == "full"
        size = None if full else block_size
        student = LayoutSpec(mask_token_id, size, not full, config.shifted_logits, config.causal_blocks)
    return RunPlan(
        alignment=alignment,
        shared_vocab_size=_shared_vocab_size(getattr(args, "shared_vocab_size", None), shared, min(sizes)),
        block_size=block_size,
        schedule=schedule,
        student=student,
        teacher=teacher,
        preparation=RowPreparation.for_run(args, block_size, alignment, (tokenizer, mask_token_id), side),
        objective=objective,
        cache=cache if teacher is not None else None,
    )


def _teacher_mask(args, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the teacher's [MASK]; None for an autoregressive one, which is given clean rows, without any mask."""
    refuse_unknown(config)
    if not is_autoregressive(config):
        require_vocabulary("teacher", tokenizer, config)
        return resolve_mask_token_id(args.teacher_mask_token_id, config, tokenizer, "teacher")
    require_vocabulary("teacher", tokenizer, config, unused=tokenizer.mask_token_id)
    if args.teacher_mask_token_id is not None:
        raise ValueError(
            f"teacher_mask_token_id={args.teacher_mask_token_id} has no meaning for an autoregressive teacher "
            f"({config.model_type}), which reads clean text: leave it out."
        )
    return None


def _block_size(args, config: PreTrainedConfig) -> int:
    """The given one, or the student's own, which only matters to a student that is fed blocks."""
    if args.block_size is not None or config.diffusion_type == "block":
        check_block_size(args.block_size or config.block_size, args.max_length)
    return args.block_size or config.block_size


def _shared_vocab_size(given: int | None, found: int, num_ids: int) -> int:
    """At most the ids of the smaller network, which may have fewer than the tokenizers."""
    if given is not None and given > num_ids:
        raise ValueError(f"shared_vocab_size={given} is more than the {num_ids} ids of a network.")
    return min(given or found, num_ids)
