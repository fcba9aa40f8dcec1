"""Pushing a run to the Hub so that nothing gets lost: whole commits, retries, and errors that are reported.

One state of a run is one commit: code, weights, tokenizer, generation config and card, and with
`hub_strategy="checkpoint"` or `"all_checkpoints"` the training state that belongs to them. Each state is staged in a
folder of its own, so that later saves and deleted checkpoints cannot change what is being uploaded.
"""

import fnmatch
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .card_edits import adopt_edits
from .provenance import SECRET

logger = logging.get_logger(__name__)

RETRY_WAITS = (1.0, 3.0, 9.0)  # seconds between the attempts of one push
RETRIED = (408, 409, 412, 429)  # and all from 500 up: somebody else pushed first, or the Hub is busy
STAGING, LAST_CHECKPOINT = "_push", "last-checkpoint"
# pickles, hidden files and keys are never pushed. Training state holds pickles too, and is pushed only if asked for
NEVER = ("training_args.bin", ".*", "_*", "*.env", "*.pem", "*.key", "*.pkl", "*.pickle", "events.out.tfevents*")
TRAINING_STATE = ("optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_state.json", "*.pt", "*.pth", "*.bin")
LARGEST_SCANNED = 4 << 20  # bytes; a larger text file is data, not settings, and is not searched for tokens


class PushError(RuntimeError):
    """The last state of a run is not on the Hub."""


@dataclass
class State:
    """What one commit will hold.

    Args:
        folder (`Path`): the staged files.
        message (`str`): of the commit.
        create_pr (`bool`): open a pull request instead of committing to the branch.
        given (`tuple[str, ...]`): metadata keys that the user set for the run; the card on the Hub does not override
            them.
    """

    folder: Path
    message: str
    create_pr: bool = False
    given: tuple[str, ...] = ()


def stage(target: Path, root: list[Path], checkpoint: Path | None = None, checkpoint_name: str = "") -> Path:
    """Lays files out in a folder as they will lie in the repository, and returns the folder.

    Args:
        target (`Path`): the folder; emptied first if it exists.
        root (`list[Path]`): files for the top of the repository; of two with the same name the later one counts.
        checkpoint (`Path`, *optional*): folder of a checkpoint with its training state.
        checkpoint_name (`str`): the name of that folder in the repository.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in root:
        if not _matches(path.name, TRAINING_STATE):
            _link(path, target / path.name)
    if checkpoint is not None:
        (target / checkpoint_name).mkdir()
        for path in checkpoint.iterdir():
            if path.name != "README.md":
                _link(path, target / checkpoint_name / path.name)
    return target


def _link(path: Path, target: Path) -> None:
    """Links weights, where the file system can, and copies everything else, because text is rewritten in place."""
    if not path.is_file() or _matches(path.name, NEVER) or _holds_secret(path):
        return
    target.unlink(missing_ok=True)
    if path.suffix != ".safetensors":
        shutil.copy(path, target)
        return
    try:
        os.link(path, target)
    except OSError:
        shutil.copy(path, target)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _holds_secret(path: Path) -> bool:
    """Whether a text file holds an access token; if so, an error is logged."""
    if path.suffix in (".safetensors", ".png", ".pt", ".pth") or path.stat().st_size > LARGEST_SCANNED:
        return False
    text, token = path.read_text(encoding="utf-8", errors="ignore"), get_token()
    found = (token is not None and token in text) or (
        path.name != "tokenizer.json" and SECRET.search(text) is not None
    )
    if found:
        logger.error(f"{path.name} holds what looks like an access token and is not pushed.")
    return found


class Pusher:
    """Commits states in the background, one after the other.

    A failure is logged at once; where another attempt can help, it is made after `RETRY_WAITS` seconds.

    Args:
        repo_id (`str`): the repository.
        revision (`str`, *optional*): branch, or `refs/pr/N`.
        token (`str`, *optional*): of the Hub, with write permission.
        keep_all (`bool`): commit every state; otherwise a new state replaces those that still wait.
    """

    def __init__(self, repo_id: str, revision: str | None, token: str | None, keep_all: bool):
        self.repo_id, self.revision, self.token, self.keep_all = repo_id, revision, token, keep_all
        self.api = HfApi(token=token, library_name="tide_hf")
        self.waiting: list[State] = []
        self.failed: State | None = None  # the newest state, if it did not arrive
        self.error: Exception | None = None
        self.last_commit = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, state: State) -> None:
        """Queues a state to be committed in the background.

        Args:
            state ([`State`]): its folder is deleted after the commit, or when a newer state replaces it.
        """
        with self._lock:
            if not self.keep_all:
                for outdated in self.waiting:
                    shutil.rmtree(outdated.folder, ignore_errors=True)
                self.waiting.clear()
            self.waiting.append(state)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="tide-hf-push")
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self.waiting:
                    self._thread = None
                    return
                state = self.waiting.pop(0)
            try:
                self.push(state)
            except Exception as error:
                logger.error(
                    f"{_sentence(state, self.repo_id, error)} Training continues, and the next push includes it."
                )

    def wait(self) -> None:
        """Returns once no state is waiting or being committed."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def push(self, state: State):
        """Commits one state now, with as many attempts as `RETRY_WAITS` allows.

        Args:
            state ([`State`]): kept as `failed` if it does not arrive.

        Returns:
            huggingface_hub's `CommitInfo`.

        Raises:
            Exception: that of the last attempt.
        """
        for wait in (*RETRY_WAITS, None):
            try:
                self.last_commit = self._commit(state)
                self._forget_failure()
                shutil.rmtree(state.folder, ignore_errors=True)
                return self.last_commit
            except Exception as error:
                if wait is None or not _can_help(error):
                    self._forget_failure()
                    self.failed, self.error = state, error
                    raise
                logger.warning(f"{_sentence(state, self.repo_id, error)} Trying again in {wait:g} s.")
                time.sleep(wait)

    def _forget_failure(self) -> None:
        if self.failed is not None:
            shutil.rmtree(self.failed.folder, ignore_errors=True)
        self.failed = self.error = None

    def _commit(self, state: State):
        """Adds everything in one commit, and deletes training state of an earlier one that it does not replace."""
        # not upload_folder(delete_patterns=…): where hf_xet is installed, it may split one state into several commits
        self._adopt_remote_card(state)
        paths = [path for path in sorted(state.folder.rglob("*")) if path.is_file()]
        added = {path.relative_to(state.folder).as_posix(): path for path in paths}
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in added.items()]
        if any(name.startswith(f"{LAST_CHECKPOINT}/") for name in added):
            operations += [CommitOperationDelete(name) for name in self._remote_state() if name not in added]
        return self.api.create_commit(
            self.repo_id,
            operations,
            commit_message=state.message,
            revision=None if state.create_pr else self.revision,
            create_pr=state.create_pr,
        )

    def _adopt_remote_card(self, state: State) -> None:
        """Keeps what people wrote into the card on the Hub since the last push."""
        card = state.folder / "README.md"
        try:
            remote = self.api.hf_hub_download(self.repo_id, card.name, revision=self.revision)
        except EntryNotFoundError:
            return
        if card.is_file():
            text = adopt_edits(card.read_text(encoding="utf-8"), Path(remote).read_text("utf-8"), state.given)
            card.write_text(text, encoding="utf-8")

    def _remote_state(self) -> list[str]:
        """Files of the training state in the repository."""
        try:
            tree = self.api.list_repo_tree(self.repo_id, LAST_CHECKPOINT, revision=self.revision)
            return [entry.path for entry in tree]
        except EntryNotFoundError:
            return []


def _can_help(error: Exception) -> bool:
    """Whether the same request may succeed later; one that the Hub refused for good will not."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status is None or status in RETRIED or status >= 500


def _sentence(state: State, repo_id: str, error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{state.message!r} could not be pushed to {repo_id}: {SECRET.sub('[token]', reason)}."


# -- resuming ---------------------------------------------------------------------------------------------------------


def fetch_training_state(repo: str, revision: str | None = None, token: str | None = None) -> str:
    """Downloads the last training state that a run pushed.

    Args:
        repo (`str`): Hub name, or `name@revision`.
        revision (`str`, *optional*): branch or commit, unless `repo` names one.
        token (`str`, *optional*): of the Hub, for a private repository.

    Returns:
        `str`: the local folder of the checkpoint.

    Raises:
        ValueError: if the repository holds no training state.
    """
    name, _, given = repo.partition("@")
    revision = given or revision
    patterns = [f"{LAST_CHECKPOINT}/*", "checkpoint-*/*"]
    folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
    last = folder / LAST_CHECKPOINT
    found = str(last) if last.is_dir() else get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise ValueError(
            f"{repo} holds no training state to resume from, only a model: to be resumed from the Hub, a run must be "
            "started with --hub_strategy checkpoint (or all_checkpoints)."
        )
    return found


def has_remote_code(folder: str | Path) -> bool:
    """Whether a saved model names its code for the Auto classes, and the files are there.

    Args:
        folder (`str` or `Path`): that `save_pretrained` wrote.
    """
    config = Path(folder) / "config.json"
    if not config.is_file():
        return False
    auto_map = json.loads(config.read_text(encoding="utf-8")).get("auto_map") or {}
    files = [
        f"{target.split('--')[-1].rsplit('.', 1)[0]}.py" for target in auto_map.values() if isinstance(target, str)
    ]
    return {"AutoConfig", "AutoModel"} <= set(auto_map) and all((Path(folder) / name).is_file() for name in files)
