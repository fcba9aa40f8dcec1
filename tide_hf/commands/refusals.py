"""How entry points say what a user got wrong: one line and exit status 1, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers.utils import logging
from yaml import YAMLError

from ..hub import NotAvailableError

logger = logging.get_logger(__name__)
# what the libraries raise for wrong names, paths, files, choices and templates, and for an extra that is missing
REFUSALS = (
    OSError,
    ValueError,
    ImportError,
    DatasetsError,
    NotAvailableError,
    SafetensorError,
    TemplateError,
    YAMLError,
)


@contextmanager
def refusing(prefix: str = "", kinds: tuple[type[Exception], ...] = REFUSALS) -> Iterator[None]:
    """Inside, errors that are the user's to mend end the program with their message on one line.

    `TRANSFORMERS_VERBOSITY=debug` shows the traceback all the same.

    Args:
        prefix (`str`): begins the line.
        kinds (`tuple`): exception classes that are treated so.
    """
    try:
        yield
    except kinds as error:
        logger.debug("Refused:", exc_info=True)
        sys.exit(prefix + " ".join(str(error).split()))
