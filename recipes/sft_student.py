"""Teach a student to denoise: block or full-sequence diffusion SFT, the distillation trainer without a teacher.

Method: masked diffusion (MDLM, arXiv 2406.07524) in blocks (BD3LM, arXiv 2503.09573), preset ce. Whether blocks or
whole sequences are denoised is set in the student's own config (recipes/convert_ar.py --diffusion_type).

Embedded default, on a CPU, nothing downloaded (sort six digits; about half a minute on 2 cores): an autoregressive
model is trained, converted, and trained to denoise, next to a student that starts from random weights.

    accelerate launch --num_processes 1 recipes/sft_student.py

Your own start and data; every TIDEConfig field is a flag:

    python recipes/convert_ar.py Qwen/Qwen3-0.6B outputs/start
    accelerate launch recipes/sft_student.py --model_name_or_path outputs/start --dataset_name NAME_OR_FILE \
        --output_dir outputs/sft --learning_rate 1e-4 --num_train_epochs 3 --bf16

The start may also be a published diffusion LM, which is trained as its authors trained it, in blocks or as one
sequence: --model_name_or_path GSAI-ML/LLaDA-8B-Instruct (or LLaDA-MoE, LLaDA2, SDAR, Dream, WeDLM).

An adapter instead of the whole student: --use_peft --lora_target_modules q_proj k_proj v_proj o_proj
"""

import sys


def main() -> None:
    from embedded.from_autoregressive import show_from_autoregressive

    from tide_hf.commands.distill import parse_arguments, run_distillation

    command_line = sys.argv[1:]
    if not any(flag.split("=")[0].replace("-", "_") == "__preset" for flag in command_line):
        command_line = [*command_line, "--preset", "ce"]
    arguments = parse_arguments("outputs/sft_student", command_line)
    if arguments.training.preset != "ce" or arguments.script.teacher_model_name_or_path is not None:
        sys.exit("This recipe trains without a teacher (preset ce); to distil, use recipes/dense_teacher.py.")
    if arguments.model.model_name_or_path is not None:
        run_distillation(arguments)
    else:
        show_from_autoregressive(arguments)


if __name__ == "__main__":
    main()
