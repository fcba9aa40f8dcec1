"""Distil a diffusion LM into a student that needs fewer denoising steps.

Method: inverse distillation (IDLM, arXiv 2602.19066), masked diffusion: a fake network learns to denoise what the
student writes, and the student moves towards text that the teacher finds likelier than the fake does. Teacher, fake
and student start from one checkpoint, of a full-sequence or a block-diffusion model.

Embedded comparison, on a CPU, nothing downloaded: a teacher, students taught on its answers, and an IDLM student, each
decoded in few and in many steps; three seeds in about fifteen minutes on 2 cores. If recipes/dense_teacher.py has run,
its sorting teachers are used again.

    accelerate launch recipes/few_step.py
    accelerate launch recipes/few_step.py --seeds 1

Your own model and data; every IDLMConfig field is a flag. The published settings (batch 512, learning rate 1e-6,
moving average 0.9999) are for long runs: a short one needs more.

    accelerate launch recipes/few_step.py --model_name_or_path MODEL --dataset_name NAME_OR_FILE \\
        --output_dir outputs/mine --num_steps 8 --max_length 1024

Three networks in about the memory of one, as adapters on a base that is the teacher:

    --use_peft --lora_r 64 --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
"""


def main() -> None:
    from embedded.command import show_few_step

    from tide_hf import IDLMConfig
    from tide_hf.commands.distill import parse_arguments, run_inverse_distillation

    arguments = parse_arguments("outputs/few_step", config_class=IDLMConfig)
    if arguments.model.model_name_or_path is None:
        show_few_step(arguments)
    else:
        run_inverse_distillation(arguments)


if __name__ == "__main__":
    main()
