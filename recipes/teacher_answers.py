"""Train a student on answers that a teacher wrote: sequence-level distillation.

Method: recipes/prepare_data.py --teacher_answers has a teacher, autoregressive or diffusion, with any tokenizer, write
its own answers to the prompts of a dataset once; the student is trained on them with any preset. Greedy answers keep
one of several right ones, drawn answers keep the choice.

Embedded comparison, on a CPU, nothing downloaded (copy a word in lower case or in capitals; 14 CPU minutes;
recipes/compare_objectives.py shows what it does against dirty answers):

    accelerate launch recipes/teacher_answers.py

Your own models and data take two commands:

    python recipes/prepare_data.py --model_name_or_path STUDENT --teacher_model_name_or_path Qwen/Qwen3-8B \
        --dataset_name NAME_OR_FILE --teacher_answers sample --num_answers 4 --output_dir prepared
    accelerate launch recipes/teacher_answers.py --model_name_or_path STUDENT --dataset_name prepared --preset ce \
        --output_dir outputs/mine
"""


def main() -> None:
    from functools import partial

    from embedded.command import run_embedded
    from embedded.table import embedded_task

    from tide_hf.commands.distill import parse_arguments, run_distillation

    arguments = parse_arguments("outputs/teacher_answers")
    if arguments.model.model_name_or_path is None:
        run_embedded(arguments, partial(embedded_task, "teacher_answers"))
    else:
        run_distillation(arguments)


if __name__ == "__main__":
    main()
