"""Distil a diffusion teacher on the student's own states: the student writes the answers, the teacher judges them.

Method: on-policy distillation, for diffusion LMs OPDLM (arXiv 2606.06712): the student writes an answer to each prompt
with its own sampler; at a random step of each block, student and teacher are compared at the positions that were not
revealed yet. The answers of the data are not read: dirty ones do no harm.

Embedded comparison, on a CPU, nothing downloaded (sort six digits from dirty answers; about 6 minutes on 2 cores):

    accelerate launch recipes/on_policy.py
    accelerate launch recipes/on_policy.py --seeds 1

Your own models and data; every TIDEConfig field is a flag. on_policy_fraction is the share of rows that the student
answers itself; with rollout_reuse several steps train on the same answers, which costs less:

    accelerate launch recipes/on_policy.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name NAME_OR_FILE --output_dir outputs/mine --preset kl --temperature 1 --on_policy_fraction 1 \
        --rollout_max_new_tokens 256 --rollout_reuse 4

Evaluate while it runs (--eval_strategy steps --eval_steps 100): what a student writes can get worse late in training.
"""


def main() -> None:
    from functools import partial

    from embedded.command import run_embedded
    from embedded.table import embedded_task

    from tide_hf.commands.distill import parse_arguments, run_distillation

    arguments = parse_arguments("outputs/on_policy")
    if arguments.model.model_name_or_path is None:
        run_embedded(arguments, partial(embedded_task, "on_policy"))
    else:
        run_distillation(arguments)


if __name__ == "__main__":
    main()
