"""The embedded tasks and their settings. A new one is a function here, or in a module with its data, and an entry in
`table`."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from datasets import Dataset

from tide_hf.data.loading import as_messages, load_rows
from tide_hf.demo import copying
from tide_hf.demo.sorting import build_tokenizer, held_out_rows, sorting_rows

from .comparison import START, CardFacts, Task, TaskData
from .few_step import FewStepTask, cosine_schedule
from .networks import Network
from .python_stdlib import build_tokenizer as build_bpe_tokenizer
from .python_stdlib import dataset_texts, stdlib_datasets

NO_LANGUAGE, UNKNOWN_LANGUAGE = "zxx", "und"  # ISO 639-2: no linguistic content; undetermined
WRONG_DIGITS = 0.2
# chosen on the validation modules of the standard library
TEXT_VOCAB_SIZE, TEXT_CHARACTERS = 512, 240
TEXT_TRAINING = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "adam_beta2": 0.98,
    "train_sampling_strategy": "group_by_length",
}

# name -> TIDEConfig fields; tide_raw is the paper's, tide is scaled so that its weight is comparable to KL's
BASELINES = {"ce": {"preset": "ce"}, "kl": {"preset": "kl"}, "kl_weight_3": {"preset": "kl", "distill_weight": 3.0}}
TIDE_RAW = {"tide_raw": {"preset": "tide-shared"}}
TIDE = {"tide": {"preset": "tide-shared", "tidal_normalization": "expected"}}
# tide_cross is the paper's Reverse CALM; bernoulli_reverse_kl adds its missing entropy term
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


# -- sorting ----------------------------------------------------------------------------------------------------------


def load_sorting(
    seed: int, num_teacher_rows: int, num_student_rows: int, num_held_out: int, wrong: float = WRONG_DIGITS
) -> TaskData:
    """Clean rows for the teacher, rows with wrong digits for the student, held-out prompts that are in neither."""
    return TaskData(
        tokenizer=build_tokenizer(),
        teacher_rows=sorting_rows(num_teacher_rows, seed=2 * seed),
        student_rows=sorting_rows(num_student_rows, seed=2 * seed + 1, wrong=wrong),
        held_out_rows=held_out_rows(num_held_out),
    )


def sorting_task(steps: int = 600, num_student_rows: int = 300, num_held_out: int = 400) -> Task:
    """Sort six digits: 20 % of the digits in the student's few answers are wrong, the teacher's rows are clean."""
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
        card=CardFacts(example_prompt="739152", language=NO_LANGUAGE),
    )


def load_sorting_across_tokenizers(seed: int, **sizes) -> TaskData:
    """[`load_sorting`], but the student reads some pairs of digits as one token; the teacher reads digits."""
    return replace(
        load_sorting(seed, **sizes), tokenizer=build_tokenizer(MERGED_PAIRS), teacher_tokenizer=build_tokenizer()
    )


def sorting_across_tokenizers_task(steps: int = 600, num_student_rows: int = 1500, num_held_out: int = 400) -> Task:
    """Sort six digits across tokenizers: a mixture-of-experts teacher of LLaDA2's class, trained on clean rows, and a
    dense student with its own tokenizer and 20 % wrong digits."""
    task = sorting_task(steps, num_student_rows, num_held_out)
    return replace(
        task,
        name="sorting_across_tokenizers",
        load=partial(load_sorting_across_tokenizers, **task.load.keywords),
        teacher=replace(task.teacher, hidden=72, layers=3, experts=8),
        objectives=ACROSS_TOKENIZERS,
        card=replace(task.card, alignment="chunk"),
        training={"teacher_context": "native"},
        noise_levels=(0.5,),
        distilled="tide_cross",
    )


def sorting_few_step_task(steps: int = 100, num_held_out: int = 200) -> FewStepTask:
    """Sort six digits in blocks of four, from the dense recipe's teacher: one right answer, few steps are enough."""
    dense = sorting_task()
    sizes = {"num_student_rows": steps * dense.teacher.batch_size, "num_held_out": num_held_out, "wrong": 0.0}
    return FewStepTask(
        name=dense.name,
        load=partial(load_sorting, **{**dense.load.keywords, **sizes}),
        right_answers=_sorted_digits,
        steps=(1, 2, 4),
        max_length=dense.max_length,
        teacher=dense.teacher,
        student=replace(dense.teacher, steps=steps, learning_rate=1e-3),
        num_taught=50 * dense.teacher.batch_size,
        block_size=dense.block_size,
        teacher_recipe="dense_teacher",
        idlm={"num_steps": 1, "fake_steps_per_student_step": 3},
    )


def _sorted_digits(prompt: str) -> tuple[str]:
    return ("".join(sorted(prompt)),)


# -- copying ----------------------------------------------------------------------------------------------------------


def load_copying(seed: int, num_teacher_rows: int, num_student_rows: int, num_held_out: int) -> TaskData:
    """Words and their copies."""
    return TaskData(
        tokenizer=copying.build_case_tokenizer(),
        teacher_rows=copying.copying_rows(num_teacher_rows, seed=2 * seed),
        student_rows=copying.copying_rows(num_student_rows, seed=2 * seed + 1),
        held_out_rows=copying.copying_rows(num_held_out, seed=copying.HELD_OUT_SEED),
    )


def copying_task(teacher_steps: int = 2000, student_steps: int = 100, num_held_out: int = 100) -> FewStepTask:
    """Copy 32 letters, all in lower case or all in capitals, the whole answer at once.

    The teacher's steps are the fewest of 600, 1,000, 1,500 and 2,000 after which the teachers of three seeds answer
    nine in ten of 40 validation prompts correctly.
    """
    teacher = Network(hidden=64, layers=2, heads=4, steps=teacher_steps)
    return FewStepTask(
        name="copying",
        load=partial(
            load_copying,
            num_teacher_rows=teacher_steps * teacher.batch_size,
            num_student_rows=student_steps * teacher.batch_size,
            num_held_out=num_held_out,
        ),
        right_answers=copying.both_cases,
        steps=(1, 2, 4, 8, 16, 32, 33),
        max_length=80,
        teacher=teacher,
        # learning rate, ratio and clipping were chosen on validation prompts
        student=replace(teacher, steps=student_steps, learning_rate=1e-3),
        num_taught=20 * teacher.batch_size,
        eos_fill="none",
        teacher_training=cosine_schedule(teacher),
        idlm={"num_steps": 4, "fake_steps_per_student_step": 3},
    )


# -- text -------------------------------------------------------------------------------------------------------------


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
        raise ValueError(
            f"{path} has {len(rows)} conversations: too few to hold a tenth out and train on the rest. Add more rows."
        )
    return _text_data(train, test, num_student_rows)


def python_stdlib_task(num_student_rows: int = 300) -> Task:
    """Write the body of a standard-library function from its signature and docstring."""
    card = CardFacts(example_prompt="def double(x):", language="en")
    return _text_task("python_stdlib", load_python_stdlib, num_student_rows, card)


def rows_task(path: str, num_student_rows: int = 300) -> Task:
    """The settings of [`python_stdlib_task`] on a user's own conversations."""
    card = CardFacts(example_prompt="What is 17 + 25?", language=UNKNOWN_LANGUAGE)
    return _text_task(path, partial(load_own_rows, path=path), num_student_rows, card)


def _text_task(name: str, load: Callable, num_student_rows: int, card: CardFacts) -> Task:
    training = {"batch_size": 8, "weight_decay": 0.01}
    return Task(
        name=name,
        load=partial(load, num_student_rows=num_student_rows),
        decodes=False,
        max_length=128,
        block_size=16,
        teacher=Network(hidden=128, layers=3, heads=4, steps=2500, learning_rate=2e-3, **training),
        student=Network(hidden=96, layers=2, heads=4, steps=1000, learning_rate=3e-3, **training),
        num_student_rows=num_student_rows,
        objectives={
            name: fields if name == "ce" else {**fields, "temperature": 1.0}
            for name, fields in {**BASELINES, **TIDE}.items()
        },
        card=card,
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
