"""Embedded comparisons: small tasks made here, trained through the same doors as everybody's."""

from .comparison import Network, RowResult, Task, TaskData, run_comparison
from .decoding import complete, exact_match, show_denoising
from .report import build_report, format_table, write_report
from .tasks import python_stdlib_task, rows_task, sorting_task

__all__ = [
    "Network",
    "RowResult",
    "Task",
    "TaskData",
    "build_report",
    "complete",
    "exact_match",
    "format_table",
    "python_stdlib_task",
    "rows_task",
    "run_comparison",
    "show_denoising",
    "sorting_task",
    "write_report",
]
