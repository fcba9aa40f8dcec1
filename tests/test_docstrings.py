"""Every public function, method and class of the package says what it does and what it takes."""

import importlib
import inspect
import pkgutil
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

import pytest

import tide_hf

PACKAGE = Path(tide_hf.__file__).parent
MODULES = sorted(found.name for found in pkgutil.walk_packages([str(PACKAGE)], "tide_hf."))
FILES = sorted(
    path
    for folder in (PACKAGE, PACKAGE.parent / "recipes")
    for path in folder.rglob("*")
    if path.suffix in (".py", ".md", ".yaml")
)
# "Arguments as in [`x`]", "As [`x`], …": the other docstring says the rest. "Other fields as in [`x`]" does not excuse
# a class's own fields, and only those are looked for
REFERS = re.compile(r"(?<!\bother fields )\bas (?:in )?\[`[~\w.]+`\]", re.IGNORECASE)
FORWARDED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
PLANTED = '''
from dataclasses import dataclass, field

@dataclass
class Record:
    """Has a `told` field."""

    told: int
    untold: int
    helped: int = field(default=0, metadata={"help": "Says it itself."})

@dataclass
class Wider(Record):
    """Has an `own` field. Other fields as in [`Record`]."""

    own: int = 0
    owned: int = 0

@dataclass
class Bare:
    x: int

class Planted:
    """A class that is made of x and y.

    Args:
        x: a number.
    """

    def __init__(self, x, why):
        self.x = x

    def method(self, said, unsaid, *args, **kwargs):
        """Takes what is `said`, not unsaidly."""

    @classmethod
    def make(cls, z):
        """Makes one."""

    @property
    def silent(self):
        return self.x

    def _private(self, z):
        pass

class Child(Planted):
    """Does it another way."""

    def method(self, said, more):
        pass

    def silent(self):
        pass

def bare(x):
    return x

def refers(x, y):
    """As [`bare`], twice."""

def sees(x):
    """Adds one, see [`bare`]."""

def complete(x, *, y=0):
    """Adds x and y."""

def _private(x):
    pass
'''


def public_parts(module: ModuleType) -> list[tuple[str, object]]:
    """(name, object) of the public functions and classes that a module defines, and of the methods of these."""
    found = []
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            found.append((name, value))
            found += methods(value) if inspect.isclass(value) else []
    return found


def methods(cls: type) -> list[tuple[str, object]]:
    """(name, function) of the public methods written in a class, without those that override another library's."""
    found = []
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if name.startswith("_") or not inspect.isfunction(function) or function.__module__ != cls.__module__:
            continue
        bases = [base for base in cls.__mro__[1:] if name in vars(base)]
        if all(base.__module__.partition(".")[0] == cls.__module__.partition(".")[0] for base in bases):
            found.append((f"{cls.__name__}.{name}", function))
    return found


def parameters(value) -> list[str]:
    """What a caller gives: to a function, to a class's own constructor, or as the fields of a dataclass."""
    if is_dataclass(value):
        # a field with a help text is explained there
        own = inspect.get_annotations(value)
        return [part.name for part in fields(value) if part.init and part.name in own and "help" not in part.metadata]
    if inspect.isclass(value):
        value = vars(value).get("__init__")
        if not inspect.isfunction(value):
            return []
    return [
        name
        for name, parameter in inspect.signature(value).parameters.items()
        if name not in ("self", "cls") and name[0] != "_" and parameter.kind not in FORWARDED
    ]


def problems(module: ModuleType) -> list[str]:
    """What the docstrings of a module leave out."""
    found = []
    for name, value in public_parts(module):
        # a method inherits the docstring of what it overrides; a class has its own
        text = (vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)) or ""
        if is_dataclass(value) and text.startswith(f"{name}("):  # written by `dataclass` itself
            text = ""
        if inspect.isclass(value):
            text += getattr(vars(value).get("__init__"), "__doc__", None) or ""
        if not text:
            found.append(f"{name} has no docstring")
        elif not REFERS.search(text):
            missing = [part for part in parameters(value) if not re.search(rf"\b{re.escape(part)}\b", text)]
            found += [f"{name} says nothing of {', '.join(missing)}"] if missing else []
    return found


def test_the_walk_finds_what_is_missing(monkeypatch):
    """Catches a walk that passes over methods, constructors, dataclasses or parameters, and so finds nothing."""
    module = ModuleType("planted")
    monkeypatch.setitem(sys.modules, "planted", module)  # inspect looks for inherited docstrings there
    exec(PLANTED, vars(module))
    assert problems(module) == [
        "Record says nothing of untold",
        "Wider says nothing of owned",
        "Bare has no docstring",
        "Planted says nothing of why",
        "Planted.method says nothing of unsaid",
        "Planted.make says nothing of z",
        "Planted.silent has no docstring",
        "Child.method says nothing of more",
        "Child.silent has no docstring",
        "bare has no docstring",
        "sees says nothing of x",
    ]
    assert len(MODULES) > 60 and "tide_hf.training.nonfinite.guard" in MODULES
    names = [name for name, _ in public_parts(importlib.import_module("tide_hf.training.trainer"))]
    assert "TIDETrainer" in names and "TIDETrainer.compute_loss" not in names, "transformers documents its own methods"


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented(name):
    """Catches a public name without a docstring, and an argument of which the reference says nothing."""
    assert problems(importlib.import_module(name)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_what_is_cited_can_be_read(path):
    """Catches a source that readers do not have: the project's own notes instead of the paper."""
    assert not re.search(r"\bSPEC\b", path.read_text(encoding="utf-8"))
