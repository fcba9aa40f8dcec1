"""How entry points say what a user got wrong: one line and exit status 1, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
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
        what = "A file of weights cannot be read: " if isinstance(error, SafetensorError) else ""
        sys.exit(prefix + what + " ".join(str(error).split()))


def require_dtype(dtype: str) -> None:
    """Refuses what is not the name of a floating-point type, which transformers looks up in torch.

    Args:
        dtype (`str`): such as `"bfloat16"`; `"auto"` passes.

    Raises:
        ValueError: naming it.
    """
    found = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={dtype!r} is not a precision of torch: expected bfloat16, float16, float32 or auto.")


def require_folder(path: str) -> None:
    """Refuses to write into what is not a folder, before anything is computed.

    Args:
        path (`str`): a folder, which need not exist.

    Raises:
        ValueError: naming it.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{path} is a file: choose a folder to write to.")
