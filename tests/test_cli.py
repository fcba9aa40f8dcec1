"""`tide-hf chat`: the conversation, its options, and what it says when a model cannot chat."""

import io
import subprocess
import sys

import pytest
import torch
from tiny import tiny_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from tide_hf.commands.chat import chat, load_chat_model, main
from tide_hf.demo.sorting import build_tokenizer


def lines(*given):
    """A `read` that gives these lines; an exception among them is raised."""
    waiting = list(given)

    def read(_prompt):
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    return read


@pytest.fixture
def saved(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_turns_accumulate_and_reset_forgets(capsys):
    """Catches a chat that answers each line on its own, or goes on with what was to be forgotten."""
    model, tokenizer, prompts = tiny_model(), build_tokenizer(), []
    generate = model.generate

    def spy(ids, **kwargs):
        prompts.append(tokenizer.decode(ids[0]))
        return generate(ids, **kwargs)

    model.generate = spy
    messages = chat(model, tokenizer, lines("312", "", "45", "/reset", "/what", "67", "/exit", "89"), max_new_tokens=4)
    assert [message["role"] for message in messages] == ["user", "assistant"] and messages[0]["content"] == "67"
    assert "312" in prompts[1] and "45" in prompts[1], "the first turn was not in the second prompt"
    assert len(prompts) == 3 and "312" not in prompts[2] and "45" not in prompts[2]
    printed = capsys.readouterr().out
    assert messages[1]["content"] in printed and printed.count("/reset forgets") == 2


def test_answer_is_what_generate_gives(capsys):
    """Catches settings that do not reach `generate`, and special tokens in the remembered answer."""
    model, tokenizer = tiny_model(), build_tokenizer()
    settings = {"max_new_tokens": 6, "temperature": 1.5}
    generator = torch.Generator().manual_seed(5)
    answer = chat(model, tokenizer, lines("312"), generator=generator, **settings)[1]["content"]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "312"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    out = model.generate(ids, generator=torch.Generator().manual_seed(5), **settings)
    assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_terminal_shows_the_text_being_denoised(capsys, monkeypatch):
    """Catches a chat that stays silent until a block is finished."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    chat(tiny_model(), build_tokenizer(), lines("312"), max_new_tokens=7)
    assert capsys.readouterr().out.count("\0337") == 7, "one draft per step"


def test_interrupts(capsys):
    """Catches Ctrl-C that leaves a question without an answer in the conversation, or a traceback at the prompt."""
    model, tokenizer = tiny_model(), build_tokenizer()
    generate, calls = model.generate, []

    def interrupted(ids, **kwargs):
        calls.append(ids)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate(ids, **kwargs)

    model.generate = interrupted
    messages = chat(model, tokenizer, lines("312", "45", KeyboardInterrupt()), max_new_tokens=4)
    assert [message["content"] for message in messages if message["role"] == "user"] == ["45"]
    assert "stopped" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["diffusion", "chat template", "mask token"])
def test_a_model_that_cannot_chat_is_refused_in_one_sentence(missing, saved):
    """Catches a traceback, or an autoregressive model whose answers would be nonsense."""
    tokenizer = build_tokenizer()
    if missing == "diffusion":
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
        config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=1, head_dim=8, **sizes)
        Qwen3ForCausalLM(config).save_pretrained(saved)
        (saved / "generation_config.json").unlink(missing_ok=True)
    elif missing == "chat template":
        tokenizer.chat_template = None
        (saved / "chat_template.jinja").unlink(missing_ok=True)
    else:
        tokenizer.mask_token = None
        tiny_model(dtype=torch.float32, mask_token_id=None).save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    with pytest.raises(SystemExit, match=f"^tide-hf: .*{missing}"):
        main(["chat", str(saved), "--device", "cpu"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top_p", "0.9"], "top_p=0.9 narrows what tokens are drawn from"),
        (["--no-do_sample", "--temperature", "0.7"], "do_sample=False takes the most probable token"),
        (["--steps_per_block", "2", "--entropy_bound", "0.9"], "steps_per_block=2 would be ignored"),
        (["--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_that_contradict_are_refused_before_the_first_question(flags, message, saved):
    """Catches a chat that asks for a line and then ends, or answers greedily where drawn answers were asked for."""
    with pytest.raises(SystemExit, match=f"^tide-hf: .*{message}"):
        main(["chat", str(saved), "--device", "cpu", *flags])


def test_flags_reach_generate(saved, monkeypatch):
    """Catches a flag that is parsed and not passed on."""
    seen = []
    monkeypatch.setattr("tide_hf.commands.chat.chat", lambda *args, **kwargs: seen.append(kwargs))
    flags = ["--do_sample", "--top_k", "0", "--top_p", "0.9", "--temperature", "0.5", "--max_new_tokens", "7"]
    flags += ["--decoding", "llada"]
    main(["chat", str(saved), "--device", "cpu", *flags])
    expected = {
        "decoding": "llada",
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.9,
        "temperature": 0.5,
        "max_new_tokens": 7,
    }
    assert seen[0] == {"system": None, "generator": None, "template_kwargs": {}, **expected}


def test_mask_token_of_the_tokenizer_is_used(saved):
    """Catches published students, whose config says no mask id, being refused."""
    tiny_model(dtype=torch.float32, mask_token_id=None).save_pretrained(saved)
    model, tokenizer = load_chat_model(str(saved), device="cpu")
    assert model.generation_config.mask_token_id == tokenizer.mask_token_id


@pytest.mark.slow
def test_the_command_runs(saved):
    """Catches a command that works only when called from Python."""
    options = [
        "--max_new_tokens",
        "6",
        "--steps_per_block",
        "2",
        "--temperature",
        "1",
        "--seed",
        "3",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tide_hf.commands.chat", "chat", str(saved), *options],
        input="312\n/reset\n45\n/exit\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("> ") == 4 and "\033" not in done.stdout


def test_template_and_its_settings_reach_the_prompt(saved, tmp_path, monkeypatch):
    """Catches prompts of a chat that are not those of the training, and flags that change nothing."""
    tokenizer = build_tokenizer()
    template = tokenizer.chat_template
    shouting = template + "{% if enable_thinking is not false %}<assistant>{% endif %}"
    prompts = []

    def generate(self, ids, **kwargs):
        prompts.append(tokenizer.decode(ids[0]))
        return ids

    monkeypatch.setattr("tide_hf.models.generation_tide.BlockDiffusionGenerationMixin.generate", generate)

    def prompt_with(*flags: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("312\n/exit\n"))
        main(["chat", str(saved), "--device", "cpu", *flags])
        return prompts.pop()

    plain = prompt_with()
    path = tmp_path / "mine.jinja"
    path.write_text(shouting, encoding="utf-8")
    assert prompt_with("--chat_template", str(path)) == plain, "published students are prompted without reasoning"
    thinks = ["--chat_template_kwargs", '{"enable_thinking": true}']
    assert prompt_with("--chat_template", shouting, *thinks) == plain + "<assistant>"
    with pytest.raises(SystemExit, match="'enable_thinking', which no chat template"):
        prompt_with(*thinks)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(saved)
    (saved / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(SystemExit, match=r"no chat template.*--chat_template"):
        prompt_with()
    assert prompt_with("--chat_template", template) == plain
