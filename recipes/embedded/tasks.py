"""The embedded comparisons and their settings."""

import hashlib
from dataclasses import replace
from functools import partial

from datasets import Dataset

from tide_hf.data.loading import as_messages, load_rows
from tide_hf.demo.sorting import build_tokenizer, held_out_rows, sorting_rows

from .comparison import START, Task, TaskData
from .networks import Network
from .python_stdlib import build_tokenizer as build_bpe_tokenizer
from .python_stdlib import dataset_texts, stdlib_datasets

WRONG_DIGITS = 0.2
# chosen on the validation modules of the standard library
TEXT_VOCAB_SIZE, TEXT_CHARACTERS = 512, 240
TEXT_TRAINING = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "adam_beta2": 0.98,
    "train_sampling_strategy": "group_by_length",
}

# name -> TIDEConfig fields; tide_raw is the paper's, in tide a weight of 1 means what it means for KL
BASELINES = {"ce": {"preset": "ce"}, "kl": {"preset": "kl"}, "kl_weight_3": {"preset": "kl", "distill_weight": 3.0}}
TIDE_RAW = {"tide_raw": {"preset": "tide-shared"}}
TIDE = {"tide": {"preset": "tide-shared", "tidal_normalization": "expected"}}
# tide_cross is the paper's Reverse CALM; in bernoulli_reverse_kl its missing entropy term is added
ACROSS_TOKENIZERS = {
    START: {"preset": "ce"},
    "ce": {"preset": "ce"},
    "calm": {"preset": "calm"},
    "tide_cross": {"preset": "tide-cross"},
    "bernoulli_reverse_kl": {"preset": "tide-cross", "divergence": "bernoulli_reverse_kl"},
    "tide_shared_raw": {"preset": "tide-shared"},
    "tide_shared": {"preset": "tide-shared", "tidal_normalization": "expected"},
}
MERGED_PAIRS = ("12", "23", "34", "45", "56", "67", "78", "89")


def load_sorting(seed: int, num_teacher_rows: int, num_student_rows: int, num_held_out: int) -> TaskData:
    """Clean rows for the teacher, few dirty rows for the student, held-out prompts that are in neither."""
    return TaskData(
        tokenizer=build_tokenizer(),
        teacher_rows=sorting_rows(num_teacher_rows, seed=2 * seed),
        student_rows=sorting_rows(num_student_rows, seed=2 * seed + 1, wrong=WRONG_DIGITS),
        held_out_rows=held_out_rows(num_held_out),
    )


def sorting_task(steps: int = 600, num_student_rows: int = 300, num_held_out: int = 400) -> Task:
    """Sort six digits: the student's few examples have 20 % wrong digits, the teacher's are clean."""
    teacher = Network(hidden=64, layers=2, heads=4, steps=steps)
    return Task(
        name="sorting",
        load=partial(
            load_sorting,
            num_teacher_rows=steps * teacher.batch_size,
            num_student_rows=num_student_rows,
            num_held_out=num_held_out,
        ),
        decodes=True,
        max_length=16,
        block_size=4,
        teacher=teacher,
        student=Network(hidden=48, layers=2, heads=4, steps=steps),
        num_student_rows=num_student_rows,
        objectives={**BASELINES, **TIDE_RAW, **TIDE},
    )


def load_sorting_across_tokenizers(seed: int, **sizes) -> TaskData:
    """[`load_sorting`], the student reading some pairs of digits as one token; the teacher reads digits."""
    return replace(
        load_sorting(seed, **sizes), tokenizer=build_tokenizer(MERGED_PAIRS), teacher_tokenizer=build_tokenizer()
    )


def sorting_across_tokenizers_task(steps: int = 600, num_student_rows: int = 1500, num_held_out: int = 400) -> Task:
    """Sort six digits across tokenizers: a mixture-of-experts teacher of LLaDA2's class, which learned from clean
    rows, and a dense student with a tokenizer of its own and 20 % wrong digits."""
    task = sorting_task(steps, num_student_rows, num_held_out)
    return replace(
        task,
        name="sorting_across_tokenizers",
        load=partial(load_sorting_across_tokenizers, **task.load.keywords),
        teacher=replace(task.teacher, hidden=72, layers=3, experts=8),
        objectives=ACROSS_TOKENIZERS,
        training={"teacher_context": "native"},
        noise_levels=(0.5,),
        distilled="tide_cross",
    )


def load_python_stdlib(seed: int, num_student_rows: int) -> TaskData:
    """All training functions for the teacher, the first of them for the student, test modules held out."""
    splits = stdlib_datasets(max_characters=TEXT_CHARACTERS)
    return _text_data(splits["train"], splits["test"], num_student_rows)


def load_own_rows(seed: int, path: str, num_student_rows: int) -> TaskData:
    """A user's conversations; a tenth of them, chosen by a hash of the prompt, is held out."""
    rows = as_messages(load_rows(path))
    held_out = [_is_held_out(messages) for messages in rows["messages"]]
    train = rows.select([index for index, flag in enumerate(held_out) if not flag])
    test = rows.select([index for index, flag in enumerate(held_out) if flag])
    if not len(train) or not len(test):
        raise ValueError(f"{path} has {len(rows)} conversations: too few to train on some and hold a tenth out.")
    return _text_data(train, test, num_student_rows)


def python_stdlib_task(num_student_rows: int = 300) -> Task:
    """Write the body of a standard-library function from its signature and docstring."""
    return _text_task("python_stdlib", load_python_stdlib, num_student_rows)


def rows_task(path: str, num_student_rows: int = 300) -> Task:
    """The settings of [`python_stdlib_task`] on a user's own conversations."""
    return _text_task(path, partial(load_own_rows, path=path), num_student_rows)


def dense_task(name: str | None) -> Task:
    """Comparisons of the dense recipe: sorting, `python_stdlib`, or a user's own file of conversations."""
    if name is None:
        return sorting_task()
    return python_stdlib_task() if name == "python_stdlib" else rows_task(name)


def moe_task(name: str | None) -> Task:
    """The comparison of the mixture-of-experts recipe.

    Raises:
        ValueError: if another one is named.
    """
    if name is not None:
        raise ValueError(
            f"This recipe embeds one comparison, and --dataset_name {name} names another: give --model_name_or_path "
            "and --teacher_model_name_or_path to distil your own models on it."
        )
    return sorting_across_tokenizers_task()


def _text_task(name: str, load, num_student_rows: int) -> Task:
    return Task(
        name=name,
        load=partial(load, num_student_rows=num_student_rows),
        decodes=False,
        max_length=128,
        block_size=16,
        teacher=Network(
            hidden=128, layers=3, heads=4, steps=2500, batch_size=8, learning_rate=2e-3, weight_decay=0.01
        ),
        student=Network(hidden=96, layers=2, heads=4, steps=1000, batch_size=8, learning_rate=3e-3, weight_decay=0.01),
        num_student_rows=num_student_rows,
        objectives={
            name: fields if name == "ce" else {**fields, "temperature": 1.0}
            for name, fields in {**BASELINES, **TIDE}.items()
        },
        training=TEXT_TRAINING,
        noise_levels=(0.1, 0.3, 0.5, 0.7, 0.9),
    )


def _text_data(train: Dataset, test: Dataset, num_student_rows: int) -> TaskData:
    return TaskData(
        tokenizer=build_bpe_tokenizer(dataset_texts(train), TEXT_VOCAB_SIZE),
        teacher_rows=train,
        student_rows=train.select(range(min(num_student_rows, len(train)))),
        held_out_rows=test,
    )


def _is_held_out(messages: list[dict]) -> bool:
    return hashlib.sha256(messages[0]["content"].encode()).digest()[0] < 26
