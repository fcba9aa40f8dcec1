"""Processes that are clients of the loopback Hub, and nothing else's: fixtures `hub` and `client`.

huggingface_hub reads its environment when it is imported, so no client can live in the test process. A fork server
that has imported everything once makes a fresh process per call cheap.
"""

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
from localhub import ALICE, LocalHub

TESTS = Path(__file__).parent
PRELOADED = ["tide_hf.commands.distill", "tide_hf.hub", "tiny", "peft", "matplotlib.figure", "datasets.arrow_dataset"]


class HubClient:
    """Runs functions and command lines as a user whose Hub is the loopback one.

    Args:
        endpoint (`str`): the Hub.
        folder (`Path`): caches go below it.
    """

    def __init__(self, endpoint: str, folder: Path):
        self.endpoint, self.folder = endpoint, folder
        self.refused_log = folder / "refused"
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def environment(self, cache: Path | None = None, token: str | None = ALICE, **variables: str) -> dict[str, str]:
        """Environment of a client; LFS in place of Xet unless HF_HUB_DISABLE_XET=0 is given."""
        values = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        values |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache or self.folder / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "LOOPBACK_ONLY_LOG": str(self.refused_log),
            "PYTHONPATH": os.pathsep.join([str(TESTS / "loopback_only"), str(TESTS.parent), str(TESTS)]),
            **({"HF_TOKEN": token} if token else {}),
            **variables,
        }
        return values

    def run(self, function, *arguments):
        """What a module-level function returns, or raises, in a fresh process."""
        with _environment(self.environment()), ProcessPoolExecutor(1, mp_context=self.context) as pool:
            return pool.submit(function, *arguments).result(timeout=300)

    def start(self, *command: str, **environment) -> subprocess.Popen:
        """A command line in a new interpreter."""
        return subprocess.Popen(
            [sys.executable, *command],
            env=self.environment(**environment),
            cwd=TESTS.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def python(self, *command: str, **environment) -> tuple[int, str]:
        """Exit status and output of a command line."""
        process = self.start(*command, **environment)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def refused(self) -> str:
        """Attempts so far to reach another host."""
        return self.refused_log.read_text() if self.refused_log.exists() else ""


@contextmanager
def _environment(values: dict[str, str]):
    """`os.environ` replaced for a while: the fork server takes it when it starts."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A Hub that keeps LFS and Xet files."""
    with LocalHub(tmp_path_factory.mktemp("hub"), xet=True) as hub:
        yield hub


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory):
    """Client processes; at the end, nothing may have tried to reach another host."""
    client = HubClient(hub.endpoint, tmp_path_factory.mktemp("client"))
    yield client
    assert client.refused() == ""
