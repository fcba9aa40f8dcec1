"""Finds what a run would be missing, within seconds and before anything is loaded.

Without a network, the libraries retry for about half a minute per model or dataset; here the endpoint is asked once.
"""

import queue
import threading
import urllib.error
import urllib.request
from pathlib import Path

from datasets import config as datasets_config
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import constants, try_to_load_from_cache

from .sources import is_hub_name

PROBE_SECONDS = 3.0
# files that make a folder a model, or an adapter on one
CONFIG_FILES = ("config.json", "adapter_config.json")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


class NotAvailableError(RuntimeError):
    """A model or dataset of a run is neither on this machine nor can it be downloaded."""


def require_available(models: list[str], datasets: list[str]) -> None:
    """Checks that every model and dataset is local, in the cache, or on a Hub that can be reached.

    Args:
        models, datasets (`list[str]`): Hub names or local paths.

    Raises:
        NotAvailableError: in one sentence, everything that is missing or cannot be what it is given as.
    """
    wrong = [_wrong_model(name) for name in models] + [_wrong_dataset(name) for name in datasets]
    if any(wrong):
        raise NotAvailableError(" ".join(filter(None, wrong)))
    missing = [f"the model {name}" for name in models if not _has_model(name)]
    missing += [f"the dataset {name}" for name in datasets if not _has_dataset(name)]
    if not missing:
        return
    listed = " and ".join([", ".join(missing[:-1]), missing[-1]]) if len(missing) > 1 else missing[0]
    if constants.is_offline_mode():
        raise NotAvailableError(
            f"HF_HUB_OFFLINE is set and {listed} {'is' if len(missing) == 1 else 'are'} neither a local path nor in "
            "the cache: unset it, or give local paths."
        )
    if not endpoint_answers(constants.ENDPOINT):
        raise NotAvailableError(
            f"{constants.ENDPOINT} did not answer within {PROBE_SECONDS:g} s, and {listed} "
            f"{'is' if len(missing) == 1 else 'are'} neither a local path nor in the cache: connect, or give local "
            "paths."
        )


def endpoint_answers(endpoint: str, seconds: float | None = None) -> bool:
    """Whether an HTTP server answers at all in the given time, which includes the look-up of its name.

    Args:
        endpoint (`str`): its URL.
        seconds (`float`, *optional*): the time; `PROBE_SECONDS` by default.
    """
    seconds = PROBE_SECONDS if seconds is None else seconds
    answers = queue.Queue()

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds).close()
            answers.put(True)
        except Exception as error:
            answers.put(isinstance(error, urllib.error.HTTPError))  # an error status is an answer too

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return False


def _wrong_model(name: str) -> str | None:
    """Why a name can be neither a saved model nor one on the Hub."""
    path = Path(name)
    if not path.exists():
        return None if is_hub_name(name) else f"{name!r} is neither a folder nor a name on the Hub (OWNER/MODEL)."
    if not any((path / file).is_file() for file in CONFIG_FILES):
        return f"{name!r} holds no config.json: expected a folder that save_pretrained has written."
    return None


def _wrong_dataset(name: str) -> str | None:
    """Why a name can be neither a local dataset nor one on the Hub."""
    if Path(name).exists() or (is_hub_name(name) and not name.endswith(DATA_SUFFIXES)):
        return None
    return f"{name!r} is neither a file or folder nor a name on the Hub (OWNER/DATASET)."


def _has_model(name: str) -> bool:
    """Whether it is a folder, or a Hub model whose configuration is cached."""
    return Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str)


def _has_dataset(name: str) -> bool:
    """Whether it is a local path, or a Hub dataset that the datasets library has prepared before."""
    *namespace, short_name = name.split("/")
    folder = "___".join([*namespace, camelcase_to_snakecase(short_name)])
    return Path(name).exists() or (Path(datasets_config.HF_DATASETS_CACHE) / folder).is_dir()
