"""Make a diffusion student of an autoregressive model (Qwen3, Qwen2, Llama) or of a community a2d-* checkpoint.

Method: the weights are kept, attention becomes bidirectional inside a block, and a mask token is added, in a spare row
of the embeddings if there is one. The result still has to learn to denoise: continue with recipes/sft_student.py. Runs
on a CPU; needs memory for two copies of the model.

    python recipes/convert_ar.py Qwen/Qwen3-0.6B outputs/qwen3-0.6b-diffusion
    python recipes/convert_ar.py Qwen/Qwen2.5-0.5B-Instruct outputs/qwen2.5-0.5b-mdlm --diffusion_type full

The whole chain for one person, an autoregressive model -> a diffusion LM -> distilled:

    python recipes/convert_ar.py Qwen/Qwen3-0.6B outputs/start
    accelerate launch recipes/sft_student.py --model_name_or_path outputs/start --dataset_name my_conversations.jsonl \
        --output_dir outputs/sft
    accelerate launch recipes/dense_teacher.py --model_name_or_path outputs/sft --output_dir outputs/distilled \
        --teacher_model_name_or_path tencent/WeDLM-8B-Instruct --dataset_name my_conversations.jsonl
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub name or folder of the model to convert.")
    parser.add_argument("output_dir", help="Folder for the student and its tokenizer.")
    parser.add_argument(
        "--diffusion_type", choices=["block", "full"], help="Block or full-sequence diffusion; block by default."
    )
    parser.add_argument("--block_size", type=int, help="Tokens per block; 32 by default.")
    parser.add_argument(
        "--mask_token", default="<|mask|>", help="Text of the mask token, unless the tokenizer has one."
    )
    parser.add_argument("--dtype", default="auto", help="Precision to load and save in; by default the checkpoint's.")
    parser.add_argument("--revision", help="Branch, tag or commit of the model.")
    arguments = parser.parse_args()

    from tide_hf import convert_to_diffusion
    from tide_hf.commands.refusals import refusing, require_dtype, require_folder
    from tide_hf.hub import require_available

    with refusing():
        require_dtype(arguments.dtype)
        require_folder(arguments.output_dir)
        require_available([arguments.model], [])
        student, tokenizer = convert_to_diffusion(
            arguments.model,
            diffusion_type=arguments.diffusion_type,
            block_size=arguments.block_size,
            mask_token=arguments.mask_token,
            dtype=arguments.dtype,
            revision=arguments.revision or "main",
        )
        student.save_pretrained(arguments.output_dir)
        tokenizer.save_pretrained(arguments.output_dir)
    print(
        f"{type(student).__name__}, {student.num_parameters():,} parameters, mask token {tokenizer.mask_token} "
        f"({tokenizer.mask_token_id}), saved to {arguments.output_dir}"
    )


if __name__ == "__main__":
    main()
