"""How a run was made: command line, source commit, versions, machine; without local paths and secrets."""

import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "huggingface-hub", "peft", "trl")
SECRET_FLAG = re.compile(r"--?[\w-]*(token|secret|password|api_key)", re.IGNORECASE)
SECRET = re.compile(r"\b(hf|api_org|ghp|sk)_[A-Za-z0-9_]{16,}|\bsk-[A-Za-z0-9-]{20,}")
# training arguments that name places of the machine or of its user, and do not change the run
PLACES = re.compile(r"(^hub_|^push_to_hub|_dir$|^run_name$|^report_to$|_token$|^trackio|^project$|^resume_from)")


def command_line(argv: list[str] | None = None, environment: dict | None = None) -> str | None:
    """The command that started this process, in a form that works elsewhere; None if it was not started by a script.

    Of an absolute path the last part is kept, of the script its path relative to the current folder. Tokens are left
    out. If `accelerate launch` started the process, the command says so.

    Args:
        argv (`list[str]`, *optional*): words of the command; this process's by default.
        environment (`dict`, *optional*): environment variables; this process's by default.
    """
    argv = sys.argv if argv is None else argv
    environment = os.environ if environment is None else environment
    script = Path(argv[0])
    if script.suffix != ".py" or "site-packages" in script.parts:
        return None
    if script.is_absolute():
        inside = script.is_relative_to(Path.cwd())
        script = script.relative_to(Path.cwd()) if inside else Path(script.name)
    launcher = ["python"]
    if "ACCELERATE_MIXED_PRECISION" in environment:
        processes = environment.get("WORLD_SIZE", "1")
        launcher = ["accelerate", "launch", *(["--num_processes", processes] if processes != "1" else [])]
    return shlex.join([*launcher, script.as_posix(), *_without_secrets(argv[1:])])


def _without_secrets(words: list[str]) -> list[str]:
    """Words of a command line without tokens, and with the last part of each absolute path."""
    kept, follows_secret = [], False
    for word in words:
        is_flag = word.startswith("-")
        if SECRET_FLAG.match(word) and is_flag:
            follows_secret = "=" not in word
        elif not (follows_secret and not is_flag):
            follows_secret = False
            flag, equals, value = word.partition("=") if is_flag else ("", "", word)
            value = Path(value).name if value.startswith(("/", "~")) else value
            kept.append(SECRET.sub("", f"{flag}{equals}{value}"))
    return kept


def source_commit(package: str = "tide_hf") -> str | None:
    """The commit of the checkout that a package was imported from; None if git does not track the package.

    Args:
        package (`str`): name of an imported package. "with local changes" follows the commit if its files differ.
    """
    folder = Path(sys.modules[package].__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not of a project that the environment lies in
        changed = " with local changes" if git("status", "--porcelain", "--untracked-files=no", ".") else ""
        return git("rev-parse", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Package -> version, for Python, this library and what it builds on."""
    found = {"python": platform.python_version()}
    for name in ("tide-hf", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(num_processes: int = 1) -> str:
    """What a run ran on, without the machine's name.

    Args:
        num_processes (`int`): of the run, one for each device.
    """
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return f"{num_processes} × {device}" if num_processes > 1 else device


def changed_arguments(args) -> dict:
    """Training arguments that differ from their defaults and do not name places.

    Args:
        args (`TrainingArguments`): of the run. Defaults are read from its fields: a second instance would reset
            accelerate's state.
    """
    changed = {}
    for field in fields(args):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(args, field.name)
        value = value.value if isinstance(value, Enum) else value
        plain = isinstance(value, (bool, int, float, str, list, dict)) and value not in ("", [], {})
        plain = plain and not (value is False and default is None)
        if plain and field.init and value != default and not PLACES.search(field.name) and not leaks(value):
            changed[field.name] = value
    return changed


def leaks(value: object) -> bool:
    """Whether the text of a value holds an access token or a local path.

    Args:
        value: any plain value.
    """
    text = str(value)
    return SECRET.search(text) is not None or re.search(r"(^|[\s'\"])[/~]\w", text) is not None
