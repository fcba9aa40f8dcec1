"""Every objective of the library on one task, at the same steps, from a diffusion and an autoregressive teacher.

Embedded comparisons, on a CPU, nothing downloaded (the first takes 39 CPU minutes; the others were not run to their
end here):

    accelerate launch recipes/compare_objectives.py
    accelerate launch recipes/compare_objectives.py --dataset_name sorting_weak_teachers
    accelerate launch recipes/compare_objectives.py --dataset_name sorting_across_objectives
    accelerate launch recipes/compare_objectives.py --dataset_name copying_objectives
    accelerate launch recipes/compare_objectives.py --dataset_name python_stdlib_objectives
"""

import sys


def main() -> None:
    from functools import partial

    from embedded.command import run_embedded
    from embedded.table import embedded_task

    from tide_hf.commands.distill import parse_arguments

    arguments = parse_arguments("outputs/compare_objectives")
    if arguments.model.model_name_or_path is not None:
        sys.exit("This recipe compares embedded models; train your own with recipes/dense_teacher.py or another one.")
    run_embedded(arguments, partial(embedded_task, "compare_objectives"))


if __name__ == "__main__":
    main()
