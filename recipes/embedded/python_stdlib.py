"""The real-input task: write the body of a function of the running Python's own standard library.

The user gives the signature and the first paragraph of the docstring; the assistant answers with the body. Whole
modules are held out for evaluation. Nothing is downloaded, and the numbers belong to one Python version.
"""

import ast
import hashlib
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from copy import copy
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tide_hf.demo.sorting import SPECIAL_TOKENS, with_special_tokens

SPLITS = ("train", "validation", "test")
HELD_OUT_PERCENT = 10  # of the modules, for validation and for test each
SPLIT_SEED = 109  # chosen by sizes alone: first seeds put the largest packages, or one dominant one, into evaluation
TEST_FOLDERS = {"test", "tests", "idle_test"}
DOCSTRING_CHARACTERS = 120


def stdlib_functions(root: str | Path | None = None) -> list[dict]:
    """Every function and method of the standard library's Python sources, ordered by file and line.

    Left out: tests, installed packages, files that do not parse, functions inside functions (part of their parent's
    body), bodies that are only a docstring, repeats of a prompt with its body, and functions whose text contains a
    special token of the tokenizer or whose body changes its meaning when dedented (strings over several lines).

    Args:
        root (`str` or `Path`, *optional*): folder of the sources; that of the running Python by default.

    Returns:
        `list[dict]` of strings: `module` (dotted), `name` (qualified in its module), `prompt` (signature with
        decorators, then the first docstring paragraph if there is one, as Python), `body` (source, dedented); and
        `documented` (`bool`), whether the prompt has a docstring.

    Raises:
        ValueError: if the folder holds no library sources.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or TEST_FOLDERS & set(parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        for item in _functions_of(path):
            found.setdefault((item["prompt"], item["body"]), {"module": module, **item})
    if not found:
        raise ValueError(
            f"Expected the sources of the standard library (.py files) under {root} and found none: this Python is "
            "embedded or has its library in a zip file, so there is nothing to train on. Use a regular installation, "
            "or pass root=, a folder with the sources."
        )
    return list(found.values())


def split_of(module: str) -> str:
    """The split of a module, by a stable hash of its top-level name; `_pydatetime` goes where `datetime` goes.

    Args:
        module (`str`): dotted name.
    """
    family = module.split(".")[0].removeprefix("_py").strip("_")
    bucket = int.from_bytes(hashlib.sha256(f"{SPLIT_SEED} {family}".encode()).digest()[:8], "big") % 100
    if bucket < HELD_OUT_PERCENT:
        return "test"
    return "validation" if bucket < 2 * HELD_OUT_PERCENT else "train"


def stdlib_datasets(
    functions: list[dict] | None = None, max_characters: int = 240, documented_only: bool = False
) -> dict[str, Dataset]:
    """Conversations to train on, to choose settings by (validation) and to report (test).

    Functions without a docstring are kept: a signature alone says much, and without them only a third of the training
    rows remain (2,726 of 7,575 in Python 3.11). A held-out function whose body is also a training row's is left out.

    Args:
        functions (`list[dict]`, *optional*): of [`stdlib_functions`]; read from the running Python by default.
        max_characters (`int`): longest prompt plus body; longer functions are left out. Of the rows of 240 characters,
            99 % fit 128 tokens of a vocabulary of 1024, and 97 % those of a vocabulary of 512.
        documented_only (`bool`): leave out functions without a docstring.

    Returns:
        `dict` of `train`, `validation` and `test`, with the columns `messages`, `module` and `name`. Each split is in
        the order of a stable hash, so that its first rows are a fair sample.

    Raises:
        ValueError: if a split is left without rows.
    """
    functions = stdlib_functions() if functions is None else functions
    parts = {split: [] for split in SPLITS}
    for item in functions:
        fits = len(item["prompt"]) + len(item["body"]) <= max_characters
        if fits and (item["documented"] or not documented_only):
            parts[split_of(item["module"])].append(item)
    trained = {item["body"] for item in parts["train"]}
    for split in SPLITS[1:]:
        parts[split] = [item for item in parts[split] if item["body"] not in trained]
    if not all(parts.values()):
        counts = ", ".join(f"{len(items):,} {split}" for split, items in parts.items())
        raise ValueError(
            f"Expected rows in every split and got {counts}: too few modules, or max_characters={max_characters} is "
            "too short for their functions. Raise it, or read a complete standard library."
        )
    return {
        split: Dataset.from_list([_row(item) for item in sorted(items, key=_shuffle_key)])
        for split, items in parts.items()
    }


def dataset_texts(rows: Dataset) -> list[str]:
    """Contents of all messages of `rows`, for [`build_tokenizer`]."""
    return [message["content"] for messages in rows["messages"] for message in messages]


def build_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens and chat template of [`~tide_hf.demo.sorting`].

    Any text decodes to itself.

    Args:
        texts (iterable of `str`): training texts, without those that are held out.
        vocab_size (`int`): tokens, of which 256 are the bytes and 5 the special tokens.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_special_tokens(tokenizer)


def _functions_of(path: Path) -> Iterator[dict]:
    """The usable functions of one file; none if it does not parse."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            source = file.read()
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    lines = source.split("\n")
    for scope, node in _definitions(tree):
        docstring = ast.get_docstring(node)
        statements = node.body if docstring is None else node.body[1:]
        body = _body(node, statements, lines)
        if body is None:
            continue
        prompt = _prompt(node, docstring)
        if not any(token in prompt + body for token in SPECIAL_TOKENS):
            documented = bool(docstring)
            yield {"name": ".".join([*scope, node.name]), "prompt": prompt, "body": body, "documented": documented}


def _definitions(tree: ast.AST, scope: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], ast.AST]]:
    """Functions of a module and methods of its classes, with the classes they stand in; not functions in functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield scope, node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node, (*scope, node.name))
        elif isinstance(node, (ast.stmt, ast.excepthandler)):
            yield from _definitions(node, scope)


def _prompt(node: ast.FunctionDef | ast.AsyncFunctionDef, docstring: str | None) -> str:
    """Signature and the first docstring paragraph, cut to [`DOCSTRING_CHARACTERS`]."""
    signature = copy(node)
    signature.body = []
    text = ast.unparse(signature).strip()
    if not docstring:
        return text
    summary = textwrap.shorten(docstring.strip().split("\n\n")[0], DOCSTRING_CHARACTERS, placeholder=" ...")
    unsafe = "\\" in summary or '"""' in summary or summary.endswith('"')
    return f"{text}\n    " + (repr(summary) if unsafe else f'"""{summary}"""')


def _body(node: ast.FunctionDef | ast.AsyncFunctionDef, statements: list[ast.stmt], lines: list[str]) -> str | None:
    """Dedented source of a function without its docstring; None if empty or if dedenting changed its meaning."""
    if not statements:
        return None
    # lines before the body; comments between docstring and code belong to it
    first_line = min(part.lineno for part in (statements[0], *getattr(statements[0], "decorator_list", ())))
    before = node.body[0].end_lineno if len(statements) < len(node.body) else first_line - 1
    if first_line in (before, node.lineno):  # def f(): return 1
        return "\n".join(ast.unparse(statement) for statement in statements)
    body = textwrap.dedent("\n".join(lines[before : node.end_lineno])).strip("\n")
    try:
        parsed = ast.parse(body).body
    except SyntaxError:
        return None
    # only text over several lines can change; comparing every tree would take most of the reading time
    if not any(mark in body for mark in ('"""', "'''", "\\\n")):
        return body
    same = [ast.dump(statement) for statement in parsed] == [ast.dump(statement) for statement in statements]
    return body if same else None


def _row(item: dict) -> dict:
    messages = [{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": item["body"]}]
    return {"messages": messages, "module": item["module"], "name": item["name"]}


def _shuffle_key(item: dict) -> bytes:
    return hashlib.sha256(f"{item['prompt']}\n{item['body']}".encode()).digest()
