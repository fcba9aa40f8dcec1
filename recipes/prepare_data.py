"""Prepare an aligned dataset once, so that training reads it instead of preparing it at every start.

Method: each conversation is rendered with both chat templates and tokenised by both tokenizers; every assistant turn
is located, and the tokens on both sides are numbered by the shortest chunks of equal bytes (one shared tokenizer: by
token). The dataset records what it was made with, and training refuses one that was made for something else.

Hardware: any CPU; only the tokenizers and configs of the two models are read. --dataset_num_proc uses several cores.
After an interruption the same command continues where it stopped.

    python recipes/prepare_data.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name NAME_OR_FILE --max_length 512 --teacher_max_length 1024 --output_dir prepared

A recipe's mixture; and a corpus whose raw rows fit neither memory nor disk (--streaming for a mixture,
--dataset_streaming for one dataset; --rows_per_part rows are held at a time):

    python recipes/prepare_data.py --config recipes/configs/wedlm_to_qwen3.yaml --output_dir prepared --streaming true

Answers that a teacher writes first, instead of the dataset's own (any causal LM of transformers or diffusion LM;
greedy, or drawn: --teacher_answers sample --num_answers 4); the student then trains on them with any preset:

    python recipes/prepare_data.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name NAME_OR_FILE --teacher_answers greedy --max_new_tokens 512 --output_dir prepared

The teacher's predictions, kept so that training needs no teacher (of an autoregressive one for any number of passes,
seeds and students; of a diffusion one for the noise of --seed and --cache_passes). Settings of the objective, such as
--preset and --temperature, must be those of the training; the card and the dataset say whose predictions they are:

    python recipes/prepare_data.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER \
        --dataset_name NAME_OR_FILE --preset ar-kl --teacher_cache --output_dir prepared

Answers and predictions are shared by the processes of an accelerate launch.

Also push it (a private dataset with --hub_private), and train on it:

    python recipes/prepare_data.py … --output_dir prepared --hub_dataset_id NAME/DATASET
    accelerate launch recipes/dense_teacher.py … --dataset_name prepared
"""


def main() -> None:
    from tide_hf.commands.prepare import parse_prepare_arguments, run_preparation

    run_preparation(parse_prepare_arguments())


if __name__ == "__main__":
    main()
