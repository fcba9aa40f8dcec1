"""Run the teacher once: keep its predictions in the dataset, and train any number of students without it.

Method: recipes/prepare_data.py --teacher_cache runs the teacher over the prepared rows and keeps the log-probability
of each true token (for objectives of likelihoods) and the likeliest tokens with theirs (for divergences, over these
and all others as one outcome: a lower bound of the whole). An autoregressive teacher reads clean rows, so that its
predictions hold for every pass, seed and student; a diffusion teacher's hold for the noise they were made for.

Embedded comparison, on a CPU, nothing downloaded (functions of the standard library; 21 CPU minutes):

    accelerate launch recipes/teacher_cache.py

Your own models and data take two commands; every setting of the objective must be the same in both:

    python recipes/prepare_data.py --model_name_or_path STUDENT --teacher_model_name_or_path Qwen/Qwen3-8B \
        --dataset_name NAME_OR_FILE --preset ar-kl --teacher_cache --output_dir prepared
    accelerate launch recipes/teacher_cache.py --model_name_or_path STUDENT --dataset_name prepared --preset ar-kl \
        --output_dir outputs/mine
"""


def main() -> None:
    from embedded.teacher_cache import show_teacher_cache

    from tide_hf.commands.distill import parse_arguments, run_distillation

    arguments = parse_arguments("outputs/teacher_cache")
    if arguments.model.model_name_or_path is None:
        show_teacher_cache(arguments)
    else:
        run_distillation(arguments)


if __name__ == "__main__":
    main()
