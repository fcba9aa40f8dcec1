"""Embedded comparisons: small tasks made here, trained through the same doors as everybody's."""

from .comparison import RowResult, Task, TaskData, run_comparison
from .decoding import complete, exact_match, show_denoising
from .networks import Network
from .report import build_report, format_table, write_report
from .tasks import dense_task, moe_task, python_stdlib_task, rows_task, sorting_across_tokenizers_task, sorting_task

__all__ = [
    "Network",
    "RowResult",
    "Task",
    "TaskData",
    "build_report",
    "complete",
    "dense_task",
    "exact_match",
    "format_table",
    "moe_task",
    "python_stdlib_task",
    "rows_task",
    "run_comparison",
    "show_denoising",
    "sorting_across_tokenizers_task",
    "sorting_task",
    "write_report",
]
