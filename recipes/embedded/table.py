"""The table of embedded comparisons: which recipe runs which."""

from collections.abc import Callable

from .comparison import Task
from .few_step import FewStepTask
from .objective_tasks import (
    copying_answers_task,
    copying_objectives_task,
    python_stdlib_objectives_task,
    sorting_across_objectives_task,
    sorting_clean_task,
    sorting_objectives_task,
    sorting_on_policy_task,
    sorting_weak_teachers_task,
)
from .tasks import (
    copying_task,
    python_stdlib_task,
    rows_task,
    sorting_across_tokenizers_task,
    sorting_few_step_task,
    sorting_task,
)

# recipe -> its comparisons by name, as --dataset_name gives it; without a name the first is run
COMPARISONS: dict[str, dict[str, Callable[[], Task]]] = {
    "dense_teacher": {"sorting": sorting_task, "python_stdlib": python_stdlib_task},
    "moe_teacher": {"sorting_across_tokenizers": sorting_across_tokenizers_task},
    "on_policy": {"sorting_on_policy": sorting_on_policy_task},
    "teacher_answers": {"copying_answers": copying_answers_task},
    "autoregressive_teacher": {"sorting_clean": sorting_clean_task},
    "compare_objectives": {
        "sorting_objectives": sorting_objectives_task,
        "sorting_weak_teachers": sorting_weak_teachers_task,
        "sorting_across_objectives": sorting_across_objectives_task,
        "copying_objectives": copying_objectives_task,
        "python_stdlib_objectives": python_stdlib_objectives_task,
    },
}
# the student of the first is the one that recipes/few_step.py leaves in its output folder
FEW_STEP: dict[str, Callable[[], FewStepTask]] = {"copying": copying_task, "sorting": sorting_few_step_task}


def dense_task(name: str | None) -> Task:
    """The comparison of the dense recipe that is asked for.

    Args:
        name (`str`, *optional*): one of its comparisons, or a user's own file of conversations.
    """
    named = COMPARISONS["dense_teacher"]
    name = name or next(iter(named))
    return named[name]() if name in named else rows_task(name)


def embedded_task(recipe: str, name: str | None) -> Task:
    """The comparison of a recipe that takes no rows of a user's.

    Args:
        recipe (`str`): its name.
        name (`str`, *optional*): one of its comparisons; the first by default.

    Raises:
        ValueError: for any other name.
    """
    named = COMPARISONS[recipe]
    name = name or next(iter(named))
    if name not in named:
        raise ValueError(
            f"This recipe embeds the comparison {', '.join(named)} and --dataset_name {name} names another. To distil "
            "your own models on it, give --model_name_or_path and --teacher_model_name_or_path."
        )
    return named[name]()


def find_comparison(name: str) -> tuple[Task, str, str]:
    """The task of a report, and how it is run.

    Args:
        name (`str`): `task` of the report.

    Returns:
        the task, the name of its recipe, and the command.
    """
    for recipe, named in COMPARISONS.items():
        command = f"accelerate launch recipes/{recipe}.py"
        if name in named:
            is_default = name == next(iter(named))
            return named[name](), recipe, command if is_default else f"{command} --dataset_name {name}"
    recipe = "dense_teacher"
    return rows_task(name), recipe, f"accelerate launch recipes/{recipe}.py --dataset_name {name}"
