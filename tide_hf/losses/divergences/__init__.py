"""Every divergence of the library, one class in one file: a file added here adds a divergence."""

from importlib import import_module
from pkgutil import iter_modules

from ..divergence import Divergence

_modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
# name -> class, those for tokens first
DIVERGENCES: dict[str, type[Divergence]] = {
    value.name: value
    for pairs in ("token", "chunk")
    for module in _modules
    for value in vars(module).values()
    if isinstance(value, type) and value.__module__ == module.__name__ and value.pairs == pairs
}

__all__ = ["DIVERGENCES"]
