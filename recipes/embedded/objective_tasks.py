"""Comparisons beyond TIDE: answers that a teacher wrote, autoregressive teachers, the student's own states.

Settings are those of the tasks that they extend, or were chosen on validation prompts.
"""

from dataclasses import replace
from functools import partial

from tide_hf.demo import copying

from .autoregressive import AUTOREGRESSIVE
from .comparison import TEACHER, CardFacts, Task, TaskData
from .networks import Network
from .tasks import (
    BASELINES,
    NO_LANGUAGE,
    TIDE,
    load_sorting,
    python_stdlib_task,
    sorting_across_tokenizers_task,
    sorting_task,
)

ON_POLICY = {"preset": "kl", "temperature": 1.0, "on_policy_fraction": 1.0}
# rows of a table -> TIDEConfig fields; "answers" is (who wrote them, how many to each prompt)
ANSWERS = {
    "ce_on_ar_answers": {"preset": "ce", "answers": (AUTOREGRESSIVE, 1)},
    "ce_on_diffusion_answers": {"preset": "ce", "answers": (TEACHER, 1)},
    "ce_on_3_drawn_ar_answers": {"preset": "ce", "answers": (AUTOREGRESSIVE, 3)},
}
AR_TARGETS = {
    "ar_all": {"preset": "ar-kl", "ar_targets": "all"},
    "ar_exact": {"preset": "ar-kl", "ar_targets": "exact"},
    "ar_annealed": {"preset": "ar-kl", "ar_targets": "annealed"},
    "ar_on_policy_half": {"preset": "ar-kl", "on_policy_fraction": 0.5, "rollout_order": "left_to_right"},
}


def sorting_on_policy_task(steps: int = 600, num_student_rows: int = 300, num_held_out: int = 400) -> Task:
    """[`sorting_task`] on the student's own states, against the best of the teacher's on the data."""
    task = sorting_task(steps, num_student_rows, num_held_out)
    objectives = {name: BASELINES[name] for name in ("ce", "kl_weight_3")}
    objectives |= {"on_policy_reuse_4": {**ON_POLICY, "rollout_reuse": 4}, "on_policy": ON_POLICY}
    return replace(task, name="sorting_on_policy", objectives=objectives, distilled="on_policy", equal_time=False)


def sorting_objectives_task(steps: int = 600, num_student_rows: int = 300, num_held_out: int = 400) -> Task:
    """[`sorting_task`] with every objective, from two teachers that both know the task."""
    task = sorting_task(steps, num_student_rows, num_held_out)
    objectives = {
        **{name: BASELINES[name] for name in ("ce", "kl_weight_3")},
        **TIDE,
        **ANSWERS,
        **AR_TARGETS,
        "ar_exact_no_suffix": {**AR_TARGETS["ar_exact"], "suffix_mask_fraction": 0.0},
        "on_policy_reuse_4": {**ON_POLICY, "rollout_reuse": 4},
        "on_policy": ON_POLICY,
    }
    return replace(
        task,
        name="sorting_objectives",
        autoregressive=task.teacher,
        objectives=objectives,
        steps_per_block=(2, 1),
        distilled="on_policy",
    )


def sorting_clean_task(steps: int = 600, num_student_rows: int = 300, num_held_out: int = 400) -> Task:
    """[`sorting_task`] from clean answers: what an autoregressive teacher adds where nothing misleads it."""
    task = sorting_objectives_task(steps, num_student_rows, num_held_out)
    names = ("ce", "kl_weight_3", "ar_all", "ar_annealed", "ar_exact", "ar_exact_no_suffix")
    return replace(
        task,
        name="sorting_clean",
        load=partial(load_sorting, **{**task.load.keywords, "wrong": 0.0}),
        objectives={name: task.objectives[name] for name in names},
        distilled="ar_all",
        equal_time=False,
    )


def sorting_weak_teachers_task(num_held_out: int = 400) -> Task:
    """The same from teachers that answer about nine in ten validation prompts correctly, both kinds alike."""
    task = sorting_objectives_task(num_held_out=num_held_out)
    names = ("ce", "kl_weight_3", "ce_on_ar_answers", "ce_on_diffusion_answers", "ar_all", "ar_exact", "on_policy")
    return replace(
        task,
        name="sorting_weak_teachers",
        teacher=replace(task.teacher, steps=WEAK_STEPS[TEACHER]),
        autoregressive=replace(task.teacher, steps=WEAK_STEPS[AUTOREGRESSIVE]),
        objectives={name: task.objectives[name] for name in names},
        steps_per_block=(),
        equal_time=False,
    )


# after so many steps the teachers of three seeds answer 92.6 % and 91.7 % of 300 validation prompts on average
WEAK_STEPS = {TEACHER: 210, AUTOREGRESSIVE: 150}


def sorting_across_objectives_task(steps: int = 600, num_student_rows: int = 1500, num_held_out: int = 400) -> Task:
    """[`sorting_across_tokenizers_task`] with the objectives that compare likelihoods of chunks."""
    task = sorting_across_tokenizers_task(steps, num_student_rows, num_held_out)
    native = task.training  # the context of the diffusion teacher; an autoregressive one has no other
    objectives = {
        "ce": task.objectives["ce"],
        **{name: task.objectives[name] | native for name in ("calm", "tide_cross")},
        **{name: ANSWERS[name] for name in ("ce_on_ar_answers", "ce_on_diffusion_answers")},
        "ar_all": {"preset": "ar-calm", "ar_targets": "all"},
        "ar_exact": {"preset": "ar-calm", "ar_targets": "exact"},
        "on_policy": {"preset": "calm", "temperature": 1.0, "on_policy_fraction": 1.0, **native},
    }
    return replace(
        task,
        name="sorting_across_objectives",
        autoregressive=Network(hidden=64, layers=2, heads=4, steps=steps),
        objectives=objectives,
        training={},
        distilled="on_policy",
    )


# -- copying in blocks ------------------------------------------------------------------------------------------------


def load_short_copying(seed: int, num_teacher_rows: int, num_student_rows: int, num_held_out: int) -> TaskData:
    """Short words and their copies."""
    rows = partial(copying.copying_rows, length=8)
    return TaskData(
        tokenizer=copying.build_case_tokenizer(),
        teacher_rows=rows(num_teacher_rows, seed=2 * seed),
        student_rows=rows(num_student_rows, seed=2 * seed + 1),
        held_out_rows=rows(num_held_out, seed=copying.HELD_OUT_SEED),
    )


def copying_answers_task(steps: int = 600, num_held_out: int = 200) -> Task:
    """Copy 8 letters in blocks of four, all in lower case or all in capitals: who keeps the choice?"""
    teacher = Network(hidden=64, layers=2, heads=4, steps=steps)
    student = replace(teacher, hidden=48, steps=steps // 2)
    sizes = {"num_teacher_rows": steps * teacher.batch_size, "num_held_out": num_held_out}
    return Task(
        name="copying_answers",
        load=partial(load_short_copying, num_student_rows=student.steps * student.batch_size, **sizes),
        decodes=True,
        max_length=32,
        block_size=4,
        teacher=teacher,
        student=student,
        num_student_rows=student.steps * student.batch_size,
        objectives={"ce": BASELINES["ce"], **ANSWERS},
        card=CardFacts(example_prompt="abcdefgh", language=NO_LANGUAGE),
        distilled="ce_on_ar_answers",
        equal_time=False,
        autoregressive=teacher,
        right_answers=copying.both_cases,
        steps_per_block=(2, 1),
    )


def copying_objectives_task(steps: int = 600, num_held_out: int = 200) -> Task:
    """[`copying_answers_task`] with every objective."""
    task = copying_answers_task(steps, num_held_out)
    objectives = {**task.objectives, "kl": BASELINES["kl"], **TIDE, **AR_TARGETS, "on_policy": ON_POLICY}
    return replace(task, name="copying_objectives", objectives=objectives, distilled="on_policy")


# -- text -------------------------------------------------------------------------------------------------------------


def python_stdlib_objectives_task(num_student_rows: int = 300) -> Task:
    """[`python_stdlib_task`] with every objective that suits text."""
    task = python_stdlib_task(num_student_rows)
    own = {**ON_POLICY, "rollout_max_new_tokens": 32, "rollout_reuse": 4}
    objectives = {
        **{name: task.objectives[name] for name in ("ce", "kl_weight_3", "tide")},
        "ce_on_ar_answers": ANSWERS["ce_on_ar_answers"],
        **{name: AR_TARGETS[name] for name in ("ar_all", "ar_exact", "ar_annealed")},
        "on_policy_reuse_4": own,
    }
    return replace(
        task,
        name="python_stdlib_objectives",
        objectives=objectives,
        autoregressive=task.teacher,
        distilled="ar_all",
    )
