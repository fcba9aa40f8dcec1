"""A folder that several processes write in parts, that an interruption does not lose, and that appears whole."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class PartFolder:
    """Where a result goes, and beside it, in `<folder>.parts`, its parts until it is finished.

    Args:
        folder (`Path`): of the result: it does not exist, is empty, or holds what the same plan gave.
        plan (`dict`): everything that the result depends on, flat, as JSON values.
        plan_file (`str`): holds the plan in both folders.
        what (`str`): the result in words.
        choose (`str`): the setting that names another folder.
    """

    folder: Path
    plan: dict
    plan_file: str
    what: str
    choose: str

    @property
    def work(self) -> Path:
        """The folder of the parts."""
        return Path(f"{str(self.folder).rstrip('/')}.parts")

    def is_finished(self) -> bool:
        """Whether the result is there.

        Raises:
            ValueError: if the folder holds something else, with what differs.
        """
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return False
        self._require_same_plan(self.folder, self.plan)
        return True

    def open(self, is_main_process: bool, **further) -> bool:
        """Begins the folder of parts, or checks that an existing one was begun for the same.

        Only the first process begins one; False in another that finds the result there already.

        Args:
            is_main_process (`bool`): whether this is the first process.
            further: what only the parts depend on.
        """
        plan = {**self.plan, **further}
        if is_main_process and not self.work.exists():
            begun = self.work.with_name(f"{self.work.name}.new")
            shutil.rmtree(begun, ignore_errors=True)
            begun.mkdir(parents=True)
            self._write_plan(begun, plan)
            os.replace(begun, self.work)
        wait_until(lambda: (self.work / self.plan_file).is_file() or (self.folder / self.plan_file).is_file())
        if not (self.work / self.plan_file).is_file():
            return False
        self._require_same_plan(self.work, plan)
        return True

    def finish(self, staging: Path) -> None:
        """Makes a whole result of the first process, in the folder `staging`, the folder, and removes the parts."""
        self._write_plan(staging, self.plan)
        if self.folder.exists():
            self.folder.rmdir()
        os.replace(staging, self.folder)
        shutil.rmtree(self.work)

    def _write_plan(self, folder: Path, plan: dict) -> None:
        (folder / self.plan_file).write_text(json.dumps(plan, indent=1, ensure_ascii=False), encoding="utf-8")

    def _require_same_plan(self, folder: Path, plan: dict) -> None:
        path = folder / self.plan_file
        if not path.is_file():
            raise ValueError(f"{folder} holds something other than {self.what}: choose a new or empty folder.")
        before = json.loads(path.read_text(encoding="utf-8"))
        different = [
            f"{name}: written with {before.get(name)}, this run has {value}"
            for name, value in plan.items()
            if before.get(name) != value
        ]
        if different:
            raise ValueError(
                f"{folder} was written for something else. {'; '.join(different)}. Give the same again to go on with "
                f"it, choose another folder ({self.choose}), or remove this one."
            )


def wait_until(is_done: Callable[[], bool]) -> None:
    """Waits for what another process does, until `is_done()`."""
    while not is_done():
        time.sleep(POLL_SECONDS)
