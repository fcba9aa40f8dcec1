"""How TIDETrainer trains on a teacher's predictions that the rows carry: no teacher is loaded."""

import hashlib
import json
import math
from dataclasses import asdict
from functools import partial

from datasets import Dataset
from transformers import AutoConfig

from ..data import PreparationRecord, tokenizer_fingerprint
from ..data.teacher_cache import CACHE_COLUMNS, config_fingerprint, has_predictions, passes, without_predictions
from ..diffusion.cached import COUNTS
from ..hub import find_source
from .plan import RunPlan, resolve_plan


def noise_of(objective, schedule: str, time_epsilon: float, block_size: int | None) -> dict:
    """What a diffusion teacher's predictions depend on beside the rows, its layout and the seed.

    Args:
        objective ([`~tide_hf.Objective`]): of the run.
        schedule (`str`), time_epsilon (`float`): of the run.
        block_size (`int`, *optional*): of the student's layout.
    """
    fraction = objective.suffix_mask_fraction
    return {
        "schedule": schedule,
        "time_epsilon": time_epsilon,
        "comp_demo": objective.comp_demo,
        "demo_ratio": objective.demo_ratio if objective.comp_demo else None,
        "suffix_mask_fraction": fraction,
        "block_size": block_size if fraction else None,
    }


def loading_of(args) -> dict:
    """How a run loads its teacher; further arguments as a fingerprint, since they may name paths.

    Args:
        args ([`TIDEConfig`]): or any object with its fields.
    """
    further = args.teacher_model_init_kwargs
    further = json.loads(further) if isinstance(further, str) else further
    content = json.dumps(further, sort_keys=True, default=str).encode()
    return {
        "teacher_dtype": args.teacher_dtype,
        "teacher_load_in_4bit": args.teacher_load_in_4bit,
        "teacher_model_init_kwargs": hashlib.sha256(content).hexdigest()[:16] if further else None,
    }


def identity_of(name: str, config) -> dict:
    """Which teacher it is: fields of a [`~tide_hf.data.teacher_cache.TeacherCache`].

    Args:
        name (`str`): Hub name or folder.
        config (`PreTrainedConfig`): its configuration.
    """
    revision = getattr(config, "_commit_hash", None)
    source = find_source(name)
    named = {"teacher": source.name, "on_hub": source.on_hub, "revision": revision}
    return {**named, "config": config_fingerprint(config)}


def record_of_predictions(train_dataset, teacher) -> PreparationRecord | None:
    """The record of training rows that carry a teacher's predictions; None if they carry none.

    Args:
        train_dataset (*optional*), teacher (*optional*): as the trainer was given them.

    Raises:
        ValueError: if a model is given beside them, or they do not say whose they are.
    """
    if not has_predictions(train_dataset):
        return None
    record = PreparationRecord.read(train_dataset)
    if record is None or record.cache is None:
        raise ValueError(
            f"The train dataset has the column {COUNTS}, and no record of the teacher whose predictions it carries. "
            f"Prepare it again with --teacher_cache, or remove the columns {', '.join(CACHE_COLUMNS)}."
        )
    if teacher is not None and not isinstance(teacher, str):
        raise ValueError(
            f"The train dataset carries the predictions of {record.cache.teacher}, and a loaded teacher is given "
            "beside them, which would not be asked: leave teacher out (or give its name, to have it compared), or "
            f"remove the columns {', '.join(CACHE_COLUMNS)}."
        )
    return record


class CachedTeacherMixin:
    """The rows of [`~tide_hf.TIDETrainer`] that carry a teacher's predictions; comes before its base."""

    def _resolve(self, model, args, tokenizers: tuple, teacher: str | None, teacher_config, decide) -> RunPlan:
        """The plan; `teacher_config` is not called where training rows carry its predictions."""
        record, cache = self._teacher_record, None if self._teacher_record is None else self._teacher_record.cache
        if cache is not None:
            teacher_config = None if teacher is None else partial(AutoConfig.from_pretrained, teacher)
        plan = resolve_plan(args, model.config, *tokenizers, teacher_config, decide, cache)
        if plan.cache is not None:
            check_predictions(record, plan, args, teacher)
            known = record.settings["teacher_tokenizer"]["fingerprint"]
            if tokenizers[1] is not None and tokenizer_fingerprint(tokenizers[1]) != known:
                raise ValueError(
                    "teacher_processing_class is not the tokenizer that the rows were prepared with for the teacher "
                    "whose predictions they carry: leave it out."
                )
        return plan

    def _noise_seed(self) -> int:
        """The run's, or that of the noise which predictions were made for."""
        cache = self.plan.cache
        return self.args.seed if cache is None or cache.noise is None else cache.noise["seed"]

    def _teacher_sources(self) -> list[tuple[str, str | None]]:
        """Also names a teacher that is not loaded."""
        cache = self.plan.cache
        if cache is None:
            return super()._teacher_sources()
        return [(cache.teacher if cache.on_hub else f"./{cache.teacher}", cache.revision)]  # or it were taken for one

    def _prepare(self, name, dataset, args, reports):
        """Keeps the predictions where they are used, as arrays."""
        cache, found = self.plan.cache, PreparationRecord.read(dataset) if has_predictions(dataset) else None
        dataset = super()._prepare(name, dataset, args, reports)
        if cache is None or dataset is None:
            return without_predictions(dataset) if has_predictions(dataset) else dataset
        if found is None or found.cache != cache:
            other = "none" if found is None or found.cache is None else found.cache.describe()
            raise ValueError(
                f"This run has no teacher in memory: the training rows carry {cache.describe()}. The {name} dataset "
                f"carries {other}. Prepare both together with --teacher_cache, or leave the {name} dataset out."
            )
        if not isinstance(dataset, Dataset):
            return dataset
        kept = [column for column in dataset.column_names if column in CACHE_COLUMNS]
        return dataset.with_format("numpy", columns=kept, output_all_columns=True)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Refuses more passes over the rows than there are predictions for."""
        cache = self.plan.cache
        if cache is not None and cache.noise is not None and self._train_stream is None:
            steps = math.ceil(len(train_dataloader) / self.args.gradient_accumulation_steps)
            needed = math.ceil(max_steps / steps)
            if needed > cache.num_passes:
                raise ValueError(
                    f"The rows carry a diffusion teacher's predictions for {passes(cache.num_passes)}, and this run "
                    f"makes {needed} ({max_steps} steps, {steps} a pass): train less, or prepare them with "
                    f"--cache_passes {needed}."
                )
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)


def check_predictions(record: PreparationRecord, plan, args, name: str | None) -> None:
    """Refuses predictions that are not what the run would have asked its teacher for.

    Args:
        record ([`~tide_hf.data.PreparationRecord`]): of the training rows.
        plan ([`~tide_hf.training.plan.RunPlan`]): of the run, whose objective distils.
        args ([`TIDEConfig`]): of the run.
        name (`str`, *optional*): the teacher's, if one is named.

    Raises:
        ValueError: with everything that differs.
    """
    cache, objective = record.cache, plan.objective
    if objective.on_policy_fraction:
        raise ValueError(
            f"on_policy_fraction={objective.on_policy_fraction} asks the teacher about answers that the student has "
            "yet to write, and the rows carry predictions about their own: give a teacher, and rows without "
            "predictions, or set on_policy_fraction=0."
        )
    run = {
        "alignment": plan.alignment if args.alignment == "auto" else args.alignment,
        "shared_vocab_size": plan.shared_vocab_size,
        "context": args.teacher_context,
        "layout": asdict(plan.teacher),
    }
    if name is not None:
        run |= identity_of(name, AutoConfig.from_pretrained(name))
    if cache.noise is not None:
        run |= noise_of(objective, plan.schedule, args.time_epsilon, plan.student.block_size)
    different = cache.differences(run)
    prepared = {name: record.settings[name] for name in ("teacher_max_length", "teacher_mask_token_id")}
    for field, value in {**prepared, **cache.loading}.items():
        given = loading_of(args)[field] if field in cache.loading else getattr(args, field)
        if given not in (None, "auto", False, value):
            different.append(f"{field}: prepared with {value}, this run has {given}")
    if objective.by_token and not cache.top_k:
        different.append("likeliest tokens: none kept, and this run compares distributions (--cache_top_k)")
    elif objective.by_token and cache.temperature != objective.temperature:
        different.append(f"temperature: predicted with {cache.temperature:g}, this run has {objective.temperature:g}")
    if different:
        raise ValueError(
            f"The train dataset carries predictions that this run does not ask for ({cache.describe()}). "
            f"{'; '.join(different)}. Change the run, or prepare the rows again with --teacher_cache."
        )
