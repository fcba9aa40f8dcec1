"""Embedded comparisons: small tasks made here, trained through the same doors as everybody's."""

from tide_hf.demo.copying import build_case_tokenizer, copying_rows

from .comparison import RowResult, Task, TaskData, run_comparison
from .decoding import complete, show_denoising
from .few_step import copying_task, sorting_few_step_task
from .few_step_report import run_and_show_few_step, show_few_step
from .networks import Network
from .report import build_report, format_table, write_report
from .tasks import dense_task, moe_task, python_stdlib_task, rows_task, sorting_across_tokenizers_task, sorting_task

__all__ = [
    "Network",
    "RowResult",
    "Task",
    "TaskData",
    "build_case_tokenizer",
    "build_report",
    "complete",
    "copying_rows",
    "copying_task",
    "dense_task",
    "format_table",
    "moe_task",
    "python_stdlib_task",
    "rows_task",
    "run_and_show_few_step",
    "run_comparison",
    "show_denoising",
    "show_few_step",
    "sorting_across_tokenizers_task",
    "sorting_few_step_task",
    "sorting_task",
    "write_report",
]
