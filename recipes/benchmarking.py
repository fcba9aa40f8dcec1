"""What the benchmarks share: times, peaks of memory, and the file of their results."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, with the work that it has given to a GPU."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_resident() -> int:
    """Bytes of resident memory that this process had at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_growth(function: Callable[[], object]) -> int:
    """By how many bytes memory exceeds its present size at most during one call: a GPU's, else Linux's resident."""
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is what is resident now
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def write_results(path: Path, results: dict, indent: int = 2) -> None:
    """Writes JSON, making the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=indent) + "\n")
