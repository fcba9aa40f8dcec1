"""Runs an embedded comparison from a recipe's arguments and shows the outcome."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForCausalLM

from tide_hf.data import PreparationReport

from .comparison import RowResult, Task, TaskData, run_comparison
from .decoding import complete, show_denoising
from .report import build_report, format_table, write_report

# the only flags that mean something to an embedded comparison
FLAGS = {"dataset_name", "output_dir", "seeds"}
NUM_COMPLETIONS = 3


def run_embedded(arguments, choose_task: Callable[[str | None], Task]) -> None:
    """Runs the comparison that `--dataset_name` asks for.

    Args:
        arguments ([`~tide_hf.commands.distill.Arguments`]): of the recipe.
        choose_task (`Callable`): name, or None for the default -> task, see [`dense_task`] and [`moe_task`].
    """
    refuse_other_flags(arguments, FLAGS)
    try:
        task = choose_task(arguments.script.dataset_name)
    except ValueError as error:
        sys.exit(str(error))
    num_seeds = 3 if task.decodes else 1
    run_and_show(task, list(range(arguments.script.seeds or num_seeds)), arguments.training.output_dir)


def refuse_other_flags(arguments, flags: set[str]) -> None:
    """Stops a run without models of the user's if it was given flags it would ignore, or several processes.

    Args:
        arguments ([`~tide_hf.commands.distill.Arguments`]): of the recipe.
        flags (`set[str]`): the ones that mean something to its embedded run.
    """
    unused = sorted(arguments.given - flags)
    if unused:
        sys.exit(
            f"--{', --'.join(unused)} has no meaning for an embedded comparison, which brings its own models and "
            "settings. Give --model_name_or_path, and what the recipe says goes with it, to train your own models."
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("An embedded comparison runs in one process: start it with accelerate launch --num_processes 1.")


def run_and_show(task: Task, seeds: list[int], output_dir: str) -> dict:
    """Runs a comparison, prints its table, writes report, plot and the distilled student into a folder.

    Returns:
        the report, see [`build_report`].
    """
    started = time.time()
    results = run_comparison(task, seeds, output_dir)
    report = build_report(task, results, seeds)
    write_report(report, results, output_dir)
    print(f"\n{format_table(report)}\n\nThe student's rows: {PreparationReport(**report['preparation'])}\n")
    student = next(result for result in results if result.name == task.distilled and result.seed == seeds[0])
    for file in Path(student.path).iterdir():
        if file.is_file() and file.name != "training_args.bin":
            shutil.copy(file, output_dir)
    data = task.load(seeds[0])
    held_out_prompt = data.held_out_rows[0]["messages"][0]["content"]
    _show_student(data, results, task, output_dir)
    print(f"\n{time.time() - started:.0f} s in all. Report, curves and the student are in {output_dir}. To load it:\n")
    print(loading_lines(output_dir, held_out_prompt))
    return report


def _show_student(data: TaskData, results: list[RowResult], task: Task, output_dir: str) -> None:
    """One answer being denoised, or a few completions by teacher and student."""
    student = AutoModelForCausalLM.from_pretrained(output_dir)
    if task.decodes:
        print("One held-out prompt being denoised by the distilled student:")
        show_denoising(student, data.tokenizer, data.held_out_rows[0]["messages"])
        return
    rows = data.held_out_rows.select(range(NUM_COMPLETIONS))
    teacher = AutoModelForCausalLM.from_pretrained(next(row.path for row in results if row.name == "teacher"))
    answers = {
        "teacher": complete(teacher, data.teacher_tokenizer or data.tokenizer, rows, task.num_completion_tokens)[0],
        f"student ({task.distilled})": complete(student, data.tokenizer, rows, task.num_completion_tokens)[0],
    }
    for index, messages in enumerate(rows["messages"]):
        print(f"--- prompt\n{messages[0]['content']}\n--- reference\n{messages[-1]['content']}")
        for name, texts in answers.items():
            print(f"--- {name}\n{texts[index]}")


def loading_lines(output_dir: str, prompt: str) -> str:
    """Python that loads and uses the saved student."""
    return f"""    import tide_hf
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained("{output_dir}")
    tokenizer = AutoTokenizer.from_pretrained("{output_dir}")
    prompt = tokenizer.apply_chat_template(
        [{{"role": "user", "content": {prompt!r}}}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))"""
