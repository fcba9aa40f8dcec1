"""The standard library as a task: what is read, how it is split, and its tokenizer."""

import ast
import textwrap
from pathlib import Path

import pytest
from embedded.python_stdlib import (
    SPLITS,
    build_tokenizer,
    dataset_texts,
    split_of,
    stdlib_datasets,
    stdlib_functions,
)

from tide_hf.data import RowPreparation

SOURCE = '''
import functools


class Queue:
    @property
    def size(self):
        """Number of items.

        Never negative.
        """
        # the lock is held
        return len(self._items)

    def text(self):
        return """first
        second"""

    def label(self): return "x" if self else "y"


def outer(call):
    @functools.wraps(call)
    def inner():
        return call()
    return inner


def stub():
    """Only a docstring."""


def special():
    return "<mask>"


def quoted(path="a\\\\b"):
    """Split at \\\\ or "x\\""""
    return path.split("\\\\")


if True:
    def chosen():
        return 1
'''


@pytest.fixture(scope="module")
def functions():
    return stdlib_functions()


@pytest.fixture(scope="module")
def splits(functions):
    return stdlib_datasets(functions)


@pytest.fixture(scope="module")
def tokenizer(splits):
    return build_tokenizer(dataset_texts(splits["train"]))


@pytest.fixture
def small_library(tmp_path):
    for name in ("queue.py", "test/queue.py", "json/tests/queue.py", "site-packages/queue.py", "mine.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SOURCE.replace("_items", name.replace("/", "_").removesuffix(".py")))
    (tmp_path / "heapq.py").write_text("def broken(:\n")
    (tmp_path / "bisect.py").write_bytes(b"# coding: utf-8\ndef undecodable():\n    return '\xff'\n")
    return tmp_path


def test_a_file_becomes_the_prompts_and_bodies_it_holds(small_library):
    """Catches lost decorators and comments, a docstring left in the answer, and text changed by dedenting."""
    found = {item["name"]: item for item in stdlib_functions(small_library)}
    assert {item["module"] for item in found.values()} == {"queue"}
    assert list(found) == ["Queue.size", "Queue.label", "outer", "quoted", "chosen"]
    size = found["Queue.size"]
    assert size["prompt"] == '@property\ndef size(self):\n    """Number of items."""' and size["documented"]
    assert size["body"] == "# the lock is held\nreturn len(self.queue)"
    assert found["Queue.label"]["body"] == "return 'x' if self else 'y'" and not found["Queue.label"]["documented"]
    assert found["outer"]["body"].startswith("@functools.wraps(call)\ndef inner():\n    return call()\n")
    docstring = ast.get_docstring(ast.parse(found["quoted"]["prompt"]).body[0])
    assert docstring == 'Split at \\ or "x"'


@pytest.mark.slow
def test_every_body_is_code_under_its_signature(functions):
    """Catches bodies cut at the wrong line, or dedented out of their own indentation."""
    assert len(functions) > 5000
    for item in functions[::40]:
        [node] = ast.parse(item["prompt"] + "\n" + textwrap.indent(item["body"], "    ")).body
        assert node.name == item["name"].rpartition(".")[2], item
        assert (ast.get_docstring(node) is not None) == item["documented"], item


def test_the_parts_share_no_module_and_no_body(splits):
    """Catches held-out numbers that were learned by heart, from the same module or from a copy of the function."""
    families = {
        split: {name.split(".")[0].removeprefix("_py").strip("_") for name in splits[split]["module"]}
        for split in SPLITS
    }
    assert not families["train"] & (families["validation"] | families["test"])
    assert not families["validation"] & families["test"]
    bodies = {split: {messages[1]["content"] for messages in splits[split]["messages"]} for split in SPLITS}
    assert not bodies["train"] & (bodies["validation"] | bodies["test"])
    assert split_of("_pydatetime") == split_of("datetime") and split_of("email.mime.text") == split_of("email")


def test_the_split_is_the_same_in_every_process_and_version():
    """Catches a split by Python's salted hash, under which every run would hold out other modules."""
    assert [split_of(name) for name in ("asyncio", "pathlib", "ipaddress")] == ["train", "validation", "test"]


@pytest.mark.slow
def test_rows_are_conversations_that_fit(splits, tokenizer):
    """Catches rows that the trainer drops or cuts, and parts too small to measure anything."""
    for split, least in zip(SPLITS, (4000, 200, 200), strict=True):
        assert len(splits[split]) >= least
        for messages in splits[split].select(range(200))["messages"]:
            assert [message["role"] for message in messages] == ["user", "assistant"]
            assert all(message["content"].strip() for message in messages)
            assert sum(len(message["content"]) for message in messages) <= 240
    prepare = RowPreparation(tokenizer, None, max_length=128, teacher_max_length=128, block_size=16, eos_fill="none")
    rows = [prepare.prepare(row) for row in splits["test"].select(range(200))]
    assert sum(truncated for _, truncated in rows) <= 4
    for (columns, truncated), messages in zip(rows, splits["test"]["messages"], strict=False):
        answer = tokenizer.decode([label for label in columns["labels"] if label != -100])
        assert truncated or answer == messages[1]["content"] + "<eos>"


def test_the_tokenizer_gives_unseen_code_back(splits, tokenizer):
    """Catches a tokenizer that eats indentation, spaces before punctuation, or bytes it never saw."""
    assert len(tokenizer) == 1024
    texts = [*dataset_texts(splits["test"]), " x  ,\t'naïve 🙂'\r\n\n    # end \n"]
    encoded = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == texts
    assert not {token for row in encoded for token in row} & set(tokenizer.all_special_ids)


@pytest.mark.slow
def test_rows_and_tokens_do_not_depend_on_the_order_of_files(small_library, functions, splits, tokenizer, monkeypatch):
    """Catches first rows and token ids that differ from one machine or run to the next."""
    (small_library / "csv.py").write_text(SOURCE)  # repeats: the first file's are kept
    expected, listing = stdlib_functions(small_library), sorted(small_library.rglob("*.py"))
    for order in (listing, listing[::-1]):
        monkeypatch.setattr(Path, "rglob", lambda root, pattern, order=order: iter(order))
        assert stdlib_functions(small_library) == expected
    assert stdlib_datasets(functions[::-1])["train"]["messages"] == splits["train"]["messages"]
    again = build_tokenizer(dataset_texts(splits["train"]))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_python_without_sources_is_named(tmp_path, functions):
    """Catches an empty data set that fails much later, inside the trainer."""
    for root in (tmp_path, tmp_path / "python311.zip"):
        with pytest.raises(ValueError, match="embedded or has its library in a zip file"):
            stdlib_functions(root)
    with pytest.raises(ValueError, match=r"0 validation.*max_characters=240"):
        stdlib_datasets([item for item in functions[:2000] if split_of(item["module"]) != "validation"])
