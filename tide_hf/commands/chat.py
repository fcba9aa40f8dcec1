"""`tide-hf chat MODEL`: talk to a diffusion LM in a terminal and watch its answers being denoised."""

import argparse
import sys
from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextDiffusionStreamer,
    TextStreamer,
)

from ..alignment import read_template, resolve_template_kwargs
from ..hub import require_available
from ..models.presets_tide import PRESETS
from .refusals import refusing, require_dtype

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."
# flags that are settings of `generate`
DECODING = (
    "max_new_tokens",
    "decoding",
    "steps_per_block",
    "confidence_threshold",
    "entropy_bound",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
)


def main(arguments: list[str] | None = None) -> None:
    """The console command.

    Args:
        arguments (`list[str]`, *optional*): of the command line; `sys.argv` by default.
    """
    options = _parser().parse_args(arguments)
    with refusing("tide-hf: "):
        model, tokenizer = load_chat_model(
            options.model,
            device=options.device,
            dtype=options.dtype,
            chat_template=read_template(options.chat_template),
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
        template_kwargs = resolve_template_kwargs(options.chat_template_kwargs, [tokenizer])
        given = {name: getattr(options, name) for name in DECODING}
        settings = {name: value for name, value in given.items() if value is not None}
        # a wrong setting or template is refused now, not at the first question
        model._generation_settings("generate", None, settings)
        probe = [*_beginning(options.system), {"role": "user", "content": "?"}]
        tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True, **template_kwargs)
        generator = None
        if options.seed is not None:
            generator = torch.Generator(model.device).manual_seed(options.seed)
        settings |= {"generator": generator, "template_kwargs": template_kwargs}
        chat(model, tokenizer, system=options.system, **settings)


def load_chat_model(
    name: str, device: str | None = None, dtype: str = "auto", chat_template: str | None = None, **kwargs
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a diffusion LM and its tokenizer, and checks that they have what a chat needs.

    Args:
        name (`str`): a repository on the Hub or a folder.
        device (`str`, *optional*): by default the accelerator if there is one, else the CPU.
        dtype (`str`): as in `from_pretrained`; by default the checkpoint's own.
        chat_template (`str`, *optional*): used instead of the tokenizer's.
        kwargs: passed to `from_pretrained` (revision, trust_remote_code).

    Returns:
        the model, in evaluation mode on its device, and the tokenizer.

    Raises:
        NotAvailableError: if the name is neither a folder of a model nor on the Hub.
        ValueError: if the model is not a diffusion LM of this library, if there is no chat template or no mask token,
            or for a dtype or device that does not exist here.
    """
    require_available([name], [])
    device = _device(device)
    require_dtype(dtype)
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
    settings = model.generation_config
    if settings.mask_token_id is None:
        known = (tokenizer.mask_token_id, model.config.known_mask_token_id)
        settings.mask_token_id = next((index for index in known if index is not None), None)
        if settings.mask_token_id is None:
            raise ValueError(f"{name} has no mask token, neither in its config nor in its tokenizer.")
    return model.to(device).eval(), tokenizer


def _device(name: str | None) -> torch.device:
    """A device by name, or the one to use by default."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    usable = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    count = torch.accelerator.device_count()
    if device is None or device.type not in usable or (device.type != "cpu" and (device.index or 0) >= count):
        raise ValueError(f"device={name!r} is not a device of this machine, which has {', '.join(usable)}.")
    return device


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    read: Callable[[str], str] = input,
    system: str | None = None,
    generator: torch.Generator | None = None,
    template_kwargs: dict | None = None,
    **settings,
) -> list[dict]:
    """Holds a conversation of several turns and prints the answers as they are denoised.

    In a terminal the current block is shown and overwritten while it is denoised; elsewhere each block is printed once
    it is finished.

    Args:
        model (`PreTrainedModel`): a student.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        read (`Callable[[str], str]`): prompt -> the user's next line; `EOFError` ends the chat.
        system (`str`, *optional*): a system message to begin with.
        generator (`torch.Generator`, *optional*): source of all random draws.
        template_kwargs (`dict`, *optional*): settings of the chat template; those of the training are already stored
            in the checkpoint's template.
        settings: passed to `generate`.

    Returns:
        `list[dict]`: the conversation so far, as `messages`, when it ends.
    """
    messages = _beginning(system)
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
            messages = _beginning(system)
        elif line.startswith("/"):
            print(HELP)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            answer = _answer(model, tokenizer, asked, template_kwargs or {}, generator=generator, **settings)
            if answer is not None:
                messages = [*asked, {"role": "assistant", "content": answer}]


def _beginning(system: str | None) -> list[dict]:
    """What a conversation starts with."""
    return [] if system is None else [{"role": "system", "content": system}]


def _answer(model, tokenizer, messages: list[dict], template_kwargs: dict, **settings) -> str | None:
    """Generates and prints one answer; None if the user stops it."""
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **template_kwargs
    ).to(model.device)
    streamer_class = TextDiffusionStreamer if sys.stdout.isatty() else TextStreamer
    streamer = streamer_class(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        sequences = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], streamer=streamer, **settings
        )
    except KeyboardInterrupt:
        streamer.end()
        print("(stopped; this question is forgotten)")
        return None
    return tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tide-hf", description="Diffusion language models in a terminal.")
    command = parser.add_subparsers(required=True).add_parser("chat", description=f"Talk to a diffusion LM. {HELP}")
    command.add_argument("model", help="a repository on the Hub or a folder")
    command.add_argument("--max_new_tokens", type=int, help="maximum number of tokens per answer")
    command.add_argument("--decoding", choices=list(PRESETS), help="decode as a published sampler")
    command.add_argument("--steps_per_block", type=int, help="forward passes per block; by default one per token")
    command.add_argument(
        "--confidence_threshold", type=float, help="reveal every token with at least this probability (0 to 1)"
    )
    command.add_argument(
        "--entropy_bound",
        type=float,
        help="reveal tokens as long as the bound on their joint entropy stays below this (nats)",
    )
    command.add_argument(
        "--do_sample",
        action=argparse.BooleanOptionalAction,
        help="sample tokens, at temperature 1 unless one is given, or take the most probable ones",
    )
    command.add_argument(
        "--temperature",
        type=float,
        help="sampling temperature; 0, the usual default, takes the most probable tokens",
    )
    command.add_argument(
        "--top_p", type=float, help="sample among the most probable tokens with this total probability"
    )
    command.add_argument("--top_k", type=int, help="sample among this many most probable tokens; 0 turns it off")
    command.add_argument("--seed", type=int, help="seed of all random draws")
    command.add_argument("--system", help="a system message to begin with")
    command.add_argument("--chat_template", help="a .jinja file or a template to use instead of the checkpoint's")
    command.add_argument(
        "--chat_template_kwargs",
        help='settings of the template as JSON, such as {"enable_thinking": true}; by default those of the training',
    )
    command.add_argument("--device", help="cpu, cuda, mps, …; by default the accelerator, if there is one")
    command.add_argument("--dtype", default="auto", help="bfloat16, float32, …; by default the checkpoint's own")
    command.add_argument("--revision", help="branch, tag or commit on the Hub")
    command.add_argument("--trust_remote_code", action="store_true", help="run model code from the repository")
    return parser


if __name__ == "__main__":
    main()
