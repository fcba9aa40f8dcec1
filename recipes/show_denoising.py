"""Watch a student denoise an answer, one line per network call; ▒ is a token that is still masked.

Greedy decoding in blocks: first one token per call, then every token whose probability is at least 0.9. Takes seconds
on a CPU, with the student of recipes/dense_teacher.py (shown in the README) or any other that has a chat template:

    python recipes/show_denoising.py
    python recipes/show_denoising.py MODEL "What is a diffusion language model?" 64
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="outputs/dense_teacher", help="Hub name or folder of a student.")
    parser.add_argument("question", nargs="?", default="739152", help="What the user says.")
    parser.add_argument("num_tokens", nargs="?", type=int, default=8, help="Tokens to generate.")
    arguments = parser.parse_args()
    from embedded.decoding import DenoisingLines

    from tide_hf.commands.chat import load_chat_model
    from tide_hf.commands.refusals import refusing

    class WholeAnswer(DenoisingLines):
        def put_draft(self, value, **kwargs):
            ids = [*self._finished.tolist(), *value.flatten().tolist()]
            print(f"  {self._text(ids + [tokenizer.mask_token_id] * (arguments.num_tokens - len(ids)))}")

    with refusing():
        model, tokenizer = load_chat_model(arguments.model)
    chat = [{"role": "user", "content": arguments.question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for title, settings in {"one token per call": {}, "threshold 0.9": {"confidence_threshold": 0.9}}.items():
        print(title)
        streamer = WholeAnswer(tokenizer, mask_as="▒")
        model.generate(**prompt.to(model.device), max_new_tokens=arguments.num_tokens, streamer=streamer, **settings)


if __name__ == "__main__":
    main()
