"""The recipes' parser: TRL's, with refusals of one line."""

import sys
from typing import NoReturn

from trl import TrlParser

from ..training.config import REGISTRIES, choices_of
from .refusals import REFUSALS, refusing


class RecipeParser(TrlParser):
    """[`~trl.TrlParser`] that exits with one line for what it cannot read, on a command line or in a file.

    Fields whose choices are a registry offer what it holds when the parser is made.

    Args:
        dataclass_types (`type` or `Iterable[type]`): whose fields are flags.
        kwargs: as in `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(dataclass_types, **kwargs)
        for action in self._actions:
            if action.choices is not None and action.dest in REGISTRIES:
                action.choices = choices_of(action.dest)

    def error(self, message: str) -> NoReturn:
        """As [`argparse.ArgumentParser.error`], without the usage, which has a flag for every training argument.

        Args:
            message (`str`): what is wrong.
        """
        sys.exit(f"{self.prog}: {message}. See --help for what there is.")

    def parse_args_and_config(self, args: list[str] | None = None, **kwargs) -> tuple:
        """As [`~trl.TrlParser.parse_args_and_config`]; `--config=FILE` is read like `--config FILE`.

        Args:
            args (`list[str]`, *optional*): `sys.argv[1:]` by default.
            kwargs: as there.
        """
        args = sys.argv[1:] if args is None else args
        args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        if args[-1:] == ["--config"]:
            self.error("argument --config: expected the path of a YAML file")
        # a file may hold any type
        with refusing(f"{self.prog}: ", (*REFUSALS, TypeError)):
            return super().parse_args_and_config(args, **kwargs)
