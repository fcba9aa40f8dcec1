"""Runs a teacher once over prepared rows and keeps its predictions: in parts, by any number of processes."""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, concatenate_datasets, load_from_disk
from datasets.utils.tqdm import tqdm

from ..data import DistillationCollator, PreparationRecord
from ..data.teacher_cache import CACHE_COLUMNS, TeacherCache
from ..diffusion import Noising
from ..diffusion.cached import TOP_IDS, TOP_LOG_PROBS
from ..teachers import Teacher, check_logits
from ..teachers.predictions import SKIPPED, TeacherPredictions
from ..training.cached_teacher import identity_of, loading_of, noise_of
from ..training.plan import RunPlan
from .answer_arguments import TeacherModel, launched
from .part_folder import PartFolder, wait_until

TOP_K = 16


@dataclass
class CacheArguments:
    """Whether and how a teacher's predictions are kept. Its fields are flags of [`parse_prepare_arguments`]."""

    teacher_cache: bool = field(
        default=False,
        metadata={
            "help": "Run the teacher over the prepared rows once and keep what the objective (--preset, …) needs of "
            "its predictions, so that training needs no teacher: of an autoregressive one for any noise, of a "
            "diffusion one for the noise of --seed and --cache_passes."
        },
    )
    cache_top_k: int | None = field(
        default=None,
        metadata={
            "help": f"Likeliest tokens kept of each prediction, where distributions are compared; {TOP_K} by default."
        },
    )
    cache_passes: int | None = field(
        default=None,
        metadata={"help": "Passes over the rows that a diffusion teacher is run for; num_train_epochs by default."},
    )
    cache_batch_size: int = field(default=8, metadata={"help": "Rows that the teacher reads together."})
    cache_rows_per_part: int = field(
        default=1000, metadata={"help": "Rows predicted at a time, the most that an interruption loses per process."}
    )

    def __post_init__(self):
        given = [knob.name for knob in fields(self) if getattr(self, knob.name) != knob.default]
        if given and not self.teacher_cache:
            raise ValueError(
                f"{', '.join(given)}: how a teacher's predictions are kept, and teacher_cache is not given: set "
                "it, or leave the rest out."
            )
        for name, least in (("cache_top_k", 0), ("cache_passes", 1), ("cache_batch_size", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.cache_rows_per_part < 1:
            raise ValueError(f"cache_rows_per_part={self.cache_rows_per_part} must be at least 1.")


def describe_predictions(teacher: TeacherModel, plan: RunPlan, settings, how: CacheArguments) -> TeacherCache:
    """The record of what would be kept.

    Args:
        teacher ([`TeacherModel`]): whose predictions.
        plan ([`~tide_hf.training.plan.RunPlan`]): of a training run with it.
        settings: those of the run: any object with the fields of a [`TIDEConfig`].
        how ([`CacheArguments`]): what to keep.

    Raises:
        ValueError: for an objective without teacher, on the student's own answers, or one that the settings of the
            cache do not suit.
    """
    objective = plan.objective
    if plan.teacher is None:
        raise ValueError(
            f"--teacher_cache keeps what an objective needs of a teacher, and this one (preset={objective.preset!r}) "
            "needs none: set --preset to the one you will train with."
        )
    if objective.on_policy_fraction:
        raise ValueError(
            "--teacher_cache keeps predictions about the rows, and on_policy_fraction="
            f"{objective.on_policy_fraction} asks about answers that the student has yet to write: leave one out."
        )
    autoregressive = plan.teacher.autoregressive
    if autoregressive and how.cache_passes is not None:
        raise ValueError(
            f"cache_passes={how.cache_passes} has no meaning for an autoregressive teacher, whose predictions hold "
            "for any noise: leave it out."
        )
    top_k = (TOP_K if objective.by_token else 0) if how.cache_top_k is None else how.cache_top_k
    if top_k and plan.alignment == "chunk":
        raise ValueError(f"cache_top_k={top_k}: two tokenizers share no tokens to compare. Leave it out.")
    if objective.by_token and not top_k > 0:
        raise ValueError(
            f"cache_top_k=0 keeps no distributions, and divergence={objective.divergence.name!r} compares them: raise "
            "it, or choose preset='calm'."
        )
    noise = None
    if not autoregressive:
        noise = noise_of(objective, plan.schedule, settings.time_epsilon, plan.student.block_size)
        noise = {"seed": settings.seed, **noise}
    config, precision = teacher.config(), "4 bits" if teacher.load_in_4bit else teacher.dtype
    if precision == "auto":
        precision = str(config.dtype or torch.float32).removeprefix("torch.")
    return TeacherCache(
        **identity_of(teacher.name, config),
        kind="autoregressive" if autoregressive else "diffusion",
        precision=precision,
        loading=loading_of(settings),
        context=settings.teacher_context,
        layout=asdict(plan.teacher),
        alignment=plan.alignment,
        shared_vocab_size=plan.shared_vocab_size,
        top_k=min(top_k, plan.shared_vocab_size),
        temperature=objective.temperature,
        noise=noise,
        num_passes=0 if autoregressive else how.cache_passes or math.ceil(settings.num_train_epochs),
    )


def add_predictions(
    rows: DatasetDict,
    cache: TeacherCache,
    plan: RunPlan,
    teacher: TeacherModel,
    how: CacheArguments,
    result: PartFolder,
    train_split: str,
) -> None:
    """Adds a teacher's predictions to prepared rows, and saves both.

    Called again after an interruption it goes on from the finished parts. Processes that accelerate or torchrun
    started share the parts.

    Args:
        rows (`DatasetDict`): prepared rows of each split.
        cache ([`~tide_hf.data.teacher_cache.TeacherCache`]): what to keep.
        plan ([`~tide_hf.training.plan.RunPlan`]): of the run.
        teacher ([`TeacherModel`]), how ([`CacheArguments`]): who predicts, and in which portions.
        result ([`PartFolder`]): opened.
        train_split (`str`): the split that is trained on; the others are only evaluated.
    """
    rank, num_processes = launched()
    size = how.cache_rows_per_part
    parts = [
        (result.work / f"{name}-{start // size:05d}", name, start)
        for name, table in rows.items()
        for start in range(0, len(table), size)
    ]
    mine = [part for part in parts[rank::num_processes] if not part[0].is_dir()]
    if mine and not result.is_finished():
        predict = _Predictions(cache, plan, teacher, train_split)
        for folder, name, start in tqdm(mine, desc="Predicting", unit=" parts"):
            table = rows[name].select(range(start, min(start + size, len(rows[name]))))
            _write_part(folder, predict(table, name, how.cache_batch_size), cache)
    if rank:
        return
    wait_until(lambda: all(folder.is_dir() for folder, _, _ in parts))  # those of the other processes
    of_split = {name: [path for path, split, _ in parts if split == name] for name in rows}
    staging = result.work / "whole"
    shutil.rmtree(staging, ignore_errors=True)
    DatasetDict({name: _joined(rows[name], name, of_split[name], cache) for name in rows}).save_to_disk(staging)
    result.finish(staging)


def plan_of(settings: dict, cache: TeacherCache, source: dict, splits: list[str]) -> dict:
    """Everything that rows with predictions depend on, for a [`PartFolder`].

    Args:
        settings (`dict`): of their [`~tide_hf.data.PreparationRecord`].
        cache ([`~tide_hf.data.teacher_cache.TeacherCache`]): of the predictions.
        source (`dict`), splits (`list[str]`): the raw rows.
    """
    plan = {**settings, **{f"cache.{name}": value for name, value in asdict(cache).items()}}
    return json.loads(json.dumps({**plan, "source": source, "splits": splits}))


class _Predictions:
    """A loaded teacher and the noise that its predictions are for."""

    def __init__(self, cache: TeacherCache, plan: RunPlan, teacher: TeacherModel, train_split: str):
        self.cache, self.train_split = cache, train_split
        network = Teacher(teacher.load_to_predict(), plan.teacher)
        if plan.teacher.autoregressive:
            check_logits(network)
        self.predictions = TeacherPredictions(network, cache.shared_vocab_size, cache.top_k, cache.temperature)
        objective = plan.objective
        self.noising = Noising(
            student=plan.student,
            teacher=plan.teacher,
            schedule=plan.schedule,
            time_epsilon=(cache.noise or {}).get("time_epsilon", Noising.time_epsilon),
            comp_demo=objective.comp_demo,
            demo_ratio=objective.demo_ratio,
            suffix_mask_fraction=objective.suffix_mask_fraction,
        )
        self.collator = DistillationCollator(0, 0, None, network.model.config.vocab_size)

    def __call__(self, table: Dataset, split: str, batch_size: int) -> list[dict[str, np.ndarray]]:
        """The columns of each row of a table."""
        sizes = [len(ids) for ids in table["teacher_input_ids"]]
        order = sorted(range(len(table)), key=lambda index: -sizes[index])  # of similar length together
        found = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = self.collator([table[index] for index in chosen])
            found.update(zip(chosen, self._of_batch(batch, split), strict=True))
        return [found[index] for index in range(len(table))]

    def _of_batch(self, batch: dict, split: str) -> list[dict[str, np.ndarray]]:
        if self.cache.noise is None:
            return self.predictions.of_clean_rows(batch)
        epochs = [SKIPPED, *range(self.cache.num_passes)] if split == self.train_split else [None]
        return self.predictions.of_noised_rows(batch, self.noising, self.cache.noise["seed"], epochs)


def _write_part(folder: Path, columns: list[dict[str, np.ndarray]], cache: TeacherCache) -> None:
    """Saves the predictions of one part; the folder gets its final name once all of it is written."""
    names = [name for name in CACHE_COLUMNS if cache.top_k or name not in (TOP_IDS, TOP_LOG_PROBS)]
    features = Features({name: CACHE_COLUMNS[name] for name in names})
    kinds = {name: np.dtype(feature.feature.dtype) for name, feature in features.items()}
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    table = {name: [row[name].astype(kind) for row in columns] for name, kind in kinds.items()}
    Dataset.from_dict(table, features=features).save_to_disk(unfinished)
    os.replace(unfinished, folder)


def _joined(rows: Dataset, name: str, parts: list[Path], cache: TeacherCache) -> Dataset:
    """A split with the predictions of its parts beside it."""
    predicted = concatenate_datasets([load_from_disk(part) for part in parts])
    whole = concatenate_datasets([rows, predicted], axis=1)
    whole = replace(PreparationRecord.read(rows), cache=cache).attach(whole)
    return Dataset(whole.data, info=whole.info, split=name)
