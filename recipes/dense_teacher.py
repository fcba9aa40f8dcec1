"""Distil a dense diffusion teacher into a small block-diffusion student (shared tokenizer, preset tide-shared).

Method: TIDE (arXiv 2604.26951): TIDAL, whose targets move from the student's to the teacher's distribution over
training progress and diffusion time, and CompDemo, two complementary teacher views.

Embedded comparison, on a CPU, nothing downloaded (sort six digits; about 4 minutes on 2 cores):

    accelerate launch recipes/dense_teacher.py
    accelerate launch recipes/dense_teacher.py --seeds 1

The same on real input: functions of the running Python's standard library, or your own JSONL of messages:

    accelerate launch recipes/dense_teacher.py --dataset_name python_stdlib
    accelerate launch recipes/dense_teacher.py --dataset_name my_conversations.jsonl

The paper's run, WeDLM-8B-Instruct -> Qwen3-0.6B (8 GPUs of 80 GB):

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/dense_teacher.py \
        --config recipes/configs/wedlm_to_qwen3.yaml

Your own models and data; every TIDEConfig field is a flag:

    accelerate launch recipes/dense_teacher.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name NAME_OR_FILE --output_dir outputs/mine --preset tide-shared
"""


def main() -> None:
    from embedded.command import run_embedded
    from embedded.table import dense_task

    from tide_hf.commands.distill import parse_arguments, run_distillation

    arguments = parse_arguments("outputs/dense_teacher")
    if arguments.model.model_name_or_path is None:
        run_embedded(arguments, dense_task)
    else:
        run_distillation(arguments)


if __name__ == "__main__":
    main()
