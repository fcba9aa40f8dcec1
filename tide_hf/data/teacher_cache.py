"""What a prepared dataset says of the teacher's predictions that its rows carry, so that training needs no teacher.

The columns hold, one prediction after the other, the log-probability of the true token (`teacher_log_probs`) and,
where both sides share a tokenizer, the k likeliest tokens (`teacher_top_ids`) with their log-probabilities and that of
all others (`teacher_top_log_probs`). `teacher_counts` tells how many predictions there are for each noise: of an
autoregressive teacher, which no noise concerns, one number; of a diffusion teacher one for the noise of evaluation and
one for each pass over the rows. See [`~tide_hf.diffusion.cached`].
"""

import hashlib
import json
from dataclasses import dataclass

from datasets import Dataset, IterableDataset, List, Value

from ..diffusion.cached import COUNTS, LOG_PROBS, TOP_IDS, TOP_LOG_PROBS

CACHE_COLUMNS = {
    COUNTS: List(Value("int32")),
    LOG_PROBS: List(Value("float32")),
    TOP_IDS: List(Value("int32")),
    TOP_LOG_PROBS: List(Value("float16")),
}
# field -> its name in messages
COMPARED = {
    "teacher": "teacher",
    "revision": "commit of the teacher",
    "config": "config of the teacher",
    "alignment": "alignment",
    "shared_vocab_size": "shared_vocab_size",
    "layout": "how the teacher is fed",
    "context": "teacher_context",
}


@dataclass(frozen=True)
class TeacherCache:
    """Whose predictions they are, and of what.

    Args:
        teacher (`str`), on_hub (`bool`), revision (`str`, *optional*): Hub name or last part of a folder, whether it
            is the former, and commit.
        config (`str`): fingerprint of its configuration, see [`config_fingerprint`].
        kind (`str`): `"autoregressive"` or `"diffusion"`.
        precision (`str`): in which it was run.
        loading (`dict`): the arguments that it was loaded with.
        context (`str`): `teacher_context`.
        layout (`dict`): fields of its [`~tide_hf.diffusion.LayoutSpec`].
        alignment (`str`), shared_vocab_size (`int`): of the two tokenizers.
        top_k (`int`): likeliest tokens of each prediction; 0 if there is only that of the true one.
        temperature (`float`): of these log-probabilities; that of the true token has none.
        noise (`dict`, *optional*): of a diffusion teacher: `seed`, `schedule`, `time_epsilon`, `comp_demo`,
            `demo_ratio`, `suffix_mask_fraction` and, with that, the student's `block_size`.
        num_passes (`int`): passes over the training rows that the predictions are for; 0 if for any number.
    """

    teacher: str
    on_hub: bool
    revision: str | None
    config: str
    kind: str
    precision: str
    loading: dict
    context: str
    layout: dict
    alignment: str
    shared_vocab_size: int
    top_k: int
    temperature: float
    noise: dict | None
    num_passes: int

    def differences(self, run: dict) -> list[str]:
        """One phrase for each setting in which a run differs.

        Args:
            run (`dict`): of the run, as far as it is known: fields of this record, and those of `noise`.
        """
        mine = {**{name: getattr(self, name) for name in COMPARED}, **(self.noise or {})}
        return [
            f"{COMPARED.get(name, name)}: predicted with {mine[name]}, this run has {value}"
            for name, value in run.items()
            if name in mine and mine[name] != value
        ]

    def describe(self) -> str:
        """One sentence."""
        revision = f" at commit {self.revision}" if self.revision else ""
        kept = "the log-probability of each true token"
        if self.top_k:
            kept += f" and the {self.top_k} likeliest tokens (T = {self.temperature:g})"
        of = "for any noise"
        if self.noise is not None:
            of = f"for {passes(self.num_passes)}, noise of seed {self.noise['seed']}"
        return f"predictions of {self.teacher}{revision} ({self.kind}, {self.precision}): {kept}, {of}"


def passes(number: int) -> str:
    """`number` passes over the rows, in words."""
    return f"{number} {'pass' if number == 1 else 'passes'} over the rows"


def config_fingerprint(config) -> str:
    """16 hexadecimal digits for the network that a `config` describes, wherever it lies and in whatever precision."""
    settings = config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config"):
        settings.pop(name, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def has_predictions(dataset) -> bool:
    """Whether the rows of a `dataset` carry a teacher's predictions."""
    return dataset is not None and COUNTS in (dataset.column_names or ())


def without_predictions(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The rows of a `dataset` without those columns."""
    return dataset.remove_columns([name for name in CACHE_COLUMNS if name in dataset.column_names])


def num_bytes(dataset: Dataset) -> int:
    """Bytes of the predictions that the rows of a `dataset` carry."""
    return sum(dataset.data.column(name).nbytes for name in CACHE_COLUMNS if name in dataset.column_names)
