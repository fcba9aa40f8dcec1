"""Fine-tune a student with LoRA (or DoRA, or QLoRA), and merge the adapter.

Method: the denoising loss of the student's own pre-training, on an adapter of its linear layers; the base is frozen.

Embedded example, on a CPU, nothing downloaded (a base learns to sort six digits, an adapter to sort them in descending
order; exact match before, after, and merged; about 40 seconds a seed on 2 shared cores):

    python recipes/finetune_lora.py
    python recipes/finetune_lora.py --seeds 3

Your own student, or a published diffusion LM (LLaDA, LLaDA-MoE, LLaDA2, SDAR, Dream, WeDLM), and your data; every
flag of TRL's ModelConfig and every TIDEConfig field:

    accelerate launch recipes/finetune_lora.py --model_name_or_path STUDENT --dataset_name NAME_OR_FILE \
        --output_dir outputs/adapter --lora_r 16 --learning_rate 1e-4 --bf16

`--use_dora` for DoRA; `--load_in_4bit` for QLoRA (pip install "tide-hf[quant]"); `--lora_target_modules q_proj v_proj`
for these layers instead of all linear ones. With `--teacher_model_name_or_path` and `--preset tide-shared` (or kl, …)
the adapter is distilled instead. An adapter has the block size of its base. To merge:

    import tide_hf
    from peft import AutoPeftModelForCausalLM

    AutoPeftModelForCausalLM.from_pretrained("outputs/adapter").merge_and_unload().save_pretrained("outputs/merged")
"""


def main() -> None:
    from embedded.adapter import show_adapter

    from tide_hf import TIDEConfig
    from tide_hf.commands.distill import parse_arguments, run_distillation

    arguments = parse_arguments("outputs/finetune_lora")
    if arguments.model.model_name_or_path is None:
        show_adapter(arguments)
        return
    arguments.model.use_peft = True
    undecided = "preset" not in arguments.given and arguments.training.preset == TIDEConfig.preset
    if undecided and arguments.script.teacher_model_name_or_path is None:
        arguments.training.preset = "ce"
    run_distillation(arguments)


if __name__ == "__main__":
    main()
