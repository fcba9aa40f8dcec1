"""`tide-hf chat MODEL`: talk to a diffusion LM in a terminal and watch its answers being denoised."""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextDiffusionStreamer, TextStreamer

from ..alignment import read_template, resolve_template_kwargs

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


def main(arguments: list[str] | None = None) -> None:
    """The console command.

    Args:
        arguments (`list[str]`, *optional*): of the command line; `sys.argv` by default.
    """
    options = _parser().parse_args(arguments)
    try:
        model, tokenizer = load_chat_model(
            options.model,
            device=options.device,
            dtype=options.dtype,
            chat_template=read_template(options.chat_template),
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
        template_kwargs = resolve_template_kwargs(options.chat_template_kwargs, [tokenizer])
        settings = {
            name: getattr(options, name)
            for name in (
                "max_new_tokens",
                "steps_per_block",
                "confidence_threshold",
                "entropy_bound",
                "do_sample",
                "temperature",
                "top_p",
                "top_k",
            )
            if getattr(options, name) is not None
        }
        model._generation_settings("generate", None, settings)  # refuses before the first question what it would then
        generator = None
        if options.seed is not None:
            generator = torch.Generator(model.device).manual_seed(options.seed)
        settings |= {"generator": generator, "template_kwargs": template_kwargs}
        chat(model, tokenizer, system=options.system, **settings)
    except (OSError, ValueError) as error:
        sys.exit(f"tide-hf: {error}")


def load_chat_model(
    name: str, device: str | None = None, dtype: str = "auto", chat_template: str | None = None, **kwargs
):
    """A diffusion LM and its tokenizer, checked for what a chat needs.

    Args:
        name (`str`): a repository on the Hub or a folder.
        device (`str`, *optional*): the first accelerator where there is one, else the CPU, by default.
        dtype (`str`): as in `from_pretrained`; the checkpoint's by default.
        chat_template (`str`, *optional*): in place of the tokenizer's.
        kwargs: passed to `from_pretrained` (revision, trust_remote_code).

    Raises:
        ValueError: the model is no diffusion LM of this library, there is no chat template, or no mask token.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    if not hasattr(model, "infill"):
        raise ValueError(
            f"{name} is a {type(model).__name__}, which does not decode by diffusion: expected a student of tide_hf."
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{name} has no chat template, which a conversation needs: give one with --chat_template, or use "
            "model.generate on plain text."
        )
    if model.generation_config.mask_token_id is None:
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{name} names no mask token, neither in its config nor in its tokenizer.")
        model.generation_config.mask_token_id = tokenizer.mask_token_id
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else accelerator.type
    return model.to(device).eval(), tokenizer


def chat(
    model,
    tokenizer,
    read=input,
    system: str | None = None,
    generator=None,
    template_kwargs: dict | None = None,
    **settings,
) -> list[dict]:
    """A conversation of several turns; answers are printed as they are denoised.

    In a terminal the block being denoised is shown and overwritten; elsewhere each block is printed once finished.

    Args:
        model: a student.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        read (`Callable[[str], str]`): gives the user's next line for a prompt; `EOFError` ends the chat.
        system (`str`, *optional*): a system message in front.
        generator (`torch.Generator`, *optional*): source of all random draws.
        template_kwargs (`dict`, *optional*): settings of the chat template; those of the training stand in the
            checkpoint's template already.
        settings: passed to `generate`.

    Returns:
        `list[dict]`: the conversation at its end, as `messages`.
    """
    beginning = [] if system is None else [{"role": "system", "content": system}]
    messages, streamer_class = list(beginning), TextDiffusionStreamer if sys.stdout.isatty() else TextStreamer
    print(HELP)
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return messages
        if line == "/exit":
            return messages
        if line == "/reset":
            messages = list(beginning)
        elif line.startswith("/"):
            print(HELP)
        elif line:
            messages.append({"role": "user", "content": line})
            inputs = tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
                **(template_kwargs or {}),
            ).to(model.device)
            streamer = streamer_class(tokenizer, skip_prompt=True, skip_special_tokens=True)
            try:
                sequences = model.generate(
                    inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    streamer=streamer,
                    generator=generator,
                    **settings,
                )
            except KeyboardInterrupt:
                streamer.end()
                print("(stopped; this question is forgotten)")
                messages.pop()
                continue
            answer = tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tide-hf", description="Diffusion language models in a terminal.")
    command = parser.add_subparsers(required=True).add_parser("chat", description=f"Talk to a diffusion LM. {HELP}")
    command.add_argument("model", help="a repository on the Hub or a folder")
    command.add_argument("--max_new_tokens", type=int, help="tokens per answer at most")
    command.add_argument("--steps_per_block", type=int, help="forward passes per block; one per token by default")
    command.add_argument(
        "--confidence_threshold", type=float, help="reveal every token at least this probable (0 to 1)"
    )
    command.add_argument(
        "--entropy_bound", type=float, help="reveal tokens while their joint entropy allows it (nats)"
    )
    command.add_argument(
        "--do_sample",
        action=argparse.BooleanOptionalAction,
        help="draw tokens, at temperature 1 where none is given; or take the most probable ones",
    )
    command.add_argument(
        "--temperature",
        type=float,
        help="to draw tokens at; 0 takes the most probable, and is the usual default",
    )
    command.add_argument("--top_p", type=float, help="sample among the most probable tokens of this total probability")
    command.add_argument("--top_k", type=int, help="sample among this many tokens; 0 is off")
    command.add_argument("--seed", type=int, help="of all random draws")
    command.add_argument("--system", help="a system message")
    command.add_argument("--chat_template", help="in place of the checkpoint's: a .jinja file or the template itself")
    command.add_argument(
        "--chat_template_kwargs",
        help='settings of the template as JSON, such as {"enable_thinking": true}; those of the training by default',
    )
    command.add_argument("--device", help="cpu, cuda, mps, …; the first accelerator by default")
    command.add_argument("--dtype", default="auto", help="bfloat16, float32, …; the checkpoint's by default")
    command.add_argument("--revision", help="branch, tag or commit on the Hub")
    command.add_argument("--trust_remote_code", action="store_true", help="run model code from the repository")
    return parser


if __name__ == "__main__":
    main()
