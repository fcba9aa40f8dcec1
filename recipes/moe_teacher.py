"""Distil a mixture-of-experts diffusion teacher into a small student with another tokenizer (preset tide-cross).

Method: TIDE (arXiv 2604.26951), cross-tokenizer pipeline: teacher and student are compared by the likelihoods they
give to chunks, the shortest spans of equal bytes; Reverse CALM, with CALM and chunk TIDAL + CompDemo as baselines.

Embedded comparison, on a CPU, nothing downloaded (sort six digits, a LLaDA2-class teacher that reads digits, a dense
student that reads some pairs of them as one token; about five minutes on 2 cores):

    accelerate launch recipes/moe_teacher.py
    accelerate launch recipes/moe_teacher.py --seeds 1

The paper's run, LLaDA2.0-mini (16 B) -> Qwen3-0.6B (8 GPUs of 80 GB); its data are prepared once beforehand, so that
the processes of the run need not wait for it:

    python recipes/prepare_data.py --config recipes/configs/llada2_to_qwen3.yaml --output_dir prepared/llada2_to_qwen3
    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/moe_teacher.py \
        --config recipes/configs/llada2_to_qwen3.yaml --dataset_name prepared/llada2_to_qwen3

Your own models and data; every TIDEConfig field is a flag:

    accelerate launch recipes/moe_teacher.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name NAME_OR_FILE --output_dir outputs/mine --preset tide-cross
"""


def main() -> None:
    from functools import partial

    from embedded.command import run_embedded
    from embedded.table import embedded_task

    from tide_hf.commands.distill import parse_arguments, run_distillation

    arguments = parse_arguments("outputs/moe_teacher")
    if arguments.model.model_name_or_path is None:
        run_embedded(arguments, partial(embedded_task, "moe_teacher"))
    else:
        run_distillation(arguments)


if __name__ == "__main__":
    main()
