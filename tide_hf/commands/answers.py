"""Has a teacher write answers to the prompts of a dataset, once: in parts, by any number of processes."""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Json, List, Value, load_from_disk
from datasets.utils.tqdm import tqdm

from ..alignment import Chat, resolve_template_kwargs
from ..data import DataError, RowSkipped
from ..data.answers import AnswerRecord, answer_row, describe_answers, read_prompt
from ..data.dataset import next_key
from ..data.encoding import Encoder
from ..data.formats import Conversation, PlainText, to_json
from ..hub import answers_card, find_source
from ..teachers.answers import DIFFUSION, AnswerWriter, answer_key, kind_of, prompt_key
from .answer_arguments import AnswerArguments, TeacherModel, launched
from .part_folder import PartFolder, wait_until

PLAN_FILE = "answers.json"
# of the arguments: what the answers do not depend on
NOT_TOLD = ("answers_dir", "prompts_per_part", "answer_batch_size")
# what a rendered prompt is held as, until it is answered
PROMPT_FEATURES = Features(
    {
        "ids": List(Value("int32")),
        "content": Json(),
        "key": Value("int64"),
        "index": Value("int32"),
        "problem": Value("string"),
    }
)


def write_answers(
    splits: Mapping[str, Dataset],
    teacher: TeacherModel,
    how: AnswerArguments,
    folder: str | Path,
    source: dict,
    chat_template_kwargs: dict | str | None = None,
    num_proc: int | None = None,
    license: Mapping[str, str] | None = None,
) -> DatasetDict | None:
    """Has a teacher answer all prompts of all splits, and saves the answers as raw rows for `load_from_disk`.

    Until the end everything is in a folder beside it, `<folder>.parts`. Called again with the same arguments after an
    interruption it goes on from the finished parts. Processes that accelerate or torchrun started share the parts, and
    a folder that all of them see; what they write does not depend on their number.

    Args:
        splits (`Mapping[str, Dataset]`): raw rows, see [`~tide_hf.data.answers.read_prompt`].
        teacher ([`TeacherModel`]), how ([`AnswerArguments`]): who writes, and how.
        folder (`str`): does not exist, is empty, or holds the result of the same call.
        source (`dict`): describes the rows; parts are continued only if it is the same. JSON values.
        chat_template_kwargs (`dict` or `str`, *optional*): of the teacher's chat template, as in a run.
        num_proc (`int`, *optional*): processes that render prompts.
        license (`Mapping[str, str]`, *optional*): what follows from the licences of teacher and data, for the card.

    Returns:
        `DatasetDict`: the answers, which carry an [`~tide_hf.data.answers.AnswerRecord`]; None in all processes
        but the first.

    Raises:
        ValueError: if the folder holds something else, with what differs; also for streams.
        DataError: for a split without any answer left.
    """
    folder, (rank, num_processes) = Path(folder), launched()
    if any(not isinstance(rows, Dataset) for rows in splits.values()):
        raise ValueError("A stream cannot be answered, since its rows are not known: turn streaming off.")
    config, tokenizer = teacher.config(), teacher.tokenizer()
    template = resolve_template_kwargs(chat_template_kwargs, [tokenizer])
    settings = json.loads(json.dumps(_settings(teacher, config, how)))
    plan = {**settings, "model": teacher.name, "template": template, "source": source, "splits": list(splits)}
    plan = json.loads(json.dumps(plan))
    result = PartFolder(folder, plan, PLAN_FILE, "a teacher's answers", "answers_dir")
    if result.is_finished():
        return load_from_disk(folder) if rank == 0 else None
    if not result.open(rank == 0, prompts_per_part=how.prompts_per_part):
        return None
    render = _Prompts(tokenizer, template, config, how.max_new_tokens)
    prompts = {name: _rendered(rows, render, num_proc) for name, rows in splits.items()}
    parts = _parts(result.work, prompts, how.prompts_per_part)
    mine = [part for part in parts[rank::num_processes] if not part[0].is_file()]
    if mine and not (folder / PLAN_FILE).is_file():  # else the first process has joined and removed them since
        writer = AnswerWriter(teacher.load(), tokenizer, how.decoding(), how.answer_batch_size)
        _write_parts(mine, prompts, writer, how)
    if rank:
        return None
    wait_until(lambda: all(path.is_file() for path, _, _ in parts))  # those of the other processes
    result.finish(_joined(result, parts, prompts, how, settings, license or {}))
    return load_from_disk(folder)


def _parts(work: Path, prompts: dict, size: int) -> list[tuple[Path, str, int]]:
    """File, split and first prompt of each part."""
    return [
        (work / f"{name}-{start // size:05d}.jsonl", name, start)
        for name, (asked, _) in prompts.items()
        for start in range(0, len(asked), size)
    ]


def _settings(teacher: TeacherModel, config, how: AnswerArguments) -> dict:
    """Everything that the answers depend on but the rows, as plain values."""
    source = find_source(teacher.name)
    revision = getattr(config, "_commit_hash", None) or teacher.init_kwargs.get("revision")
    told = {name: value for name, value in asdict(how).items() if name not in NOT_TOLD}
    precision = "4 bits" if teacher.load_in_4bit else teacher.dtype
    named = {"teacher": source.name, "revision": revision, "kind": kind_of(config), "decoding": how.in_words()}
    return {**named, "precision": precision, **told}


class _Prompts:
    """Renders raw rows into the teacher's prompts; a callable for `Dataset.map`."""

    def __init__(self, tokenizer, settings: dict, config, max_new_tokens: int):
        self.tokenizer, self.encoder, self.settings = tokenizer, Encoder.of(tokenizer), settings
        self.mask = getattr(config, "mask_token_id", None) if kind_of(config) == DIFFUSION else None
        self.room = (getattr(config, "max_position_embeddings", None) or sys.maxsize) - max_new_tokens

    def __call__(self, row: dict, index: int) -> dict:
        try:
            content = read_prompt(row)
            ids = self._ids(content)
        except RowSkipped as error:
            return {"ids": [], "content": None, "key": 0, "index": index, "problem": str(error)}
        return {"ids": ids, "content": _packed(content), "key": prompt_key(ids), "index": index, "problem": None}

    def _ids(self, content: Conversation | PlainText) -> list[int]:
        """The prompt's tokens, as at inference."""
        if isinstance(content, PlainText):
            text, leading = content.prompt, self.encoder.leading
        else:
            text, leading = self._render(content), ()
        ids = [*leading, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        if self.mask is not None and self.mask in ids:
            raise RowSkipped("the teacher's mask token is part of the prompt")
        if len(ids) > self.room:
            raise RowSkipped(f"a prompt of more than {self.room} tokens leaves no room for the answer")
        return ids

    def _render(self, content: Conversation) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The dataset holds conversations, and the tokenizer of {self.tokenizer.name_or_path} has no chat "
                "template to ask them with: take a teacher that has one, or give 'prompt' and 'completion' as text."
            )
        chat = Chat(self.tokenizer, content.messages, content.tools, {**self.settings, **content.settings})
        try:
            return chat.render(content.messages, prompt=True)
        except Exception as error:
            raise RowSkipped(f"chat template: {error}") from error


def _packed(content: Conversation | PlainText) -> dict:
    """A prompt as raw columns."""
    if isinstance(content, PlainText):
        return {"prompt": content.prompt}
    parts = {"prompt": content.messages, "tools": content.tools, "chat_template_kwargs": content.settings or None}
    return {name: part for name, part in parts.items() if part is not None}


def _rendered(rows: Dataset, render: _Prompts, num_proc: int | None) -> tuple[Dataset, dict[str, int]]:
    """The prompts of a split that can be answered, and how many rows cannot, by reason."""
    prompts = rows.map(
        render,
        with_indices=True,
        remove_columns=rows.column_names,
        features=PROMPT_FEATURES,
        num_proc=num_proc,
        desc="Rendering prompts",
    )
    problems = prompts["problem"][:]
    kept = [index for index, problem in enumerate(problems) if problem is None]
    return prompts.select(kept), dict(Counter(problem for problem in problems if problem is not None))


def _write_parts(parts: list, prompts: dict, writer: AnswerWriter, how: AnswerArguments) -> None:
    """Writes parts, each of which gets its final name once all of it is there."""
    # a prompt that the dataset repeats is answered with draws of its own
    keys = {}
    for name, (asked, _) in prompts.items():
        found = Counter()
        keys[name] = [next_key(key, found) for key in asked["key"][:]]
    for path, name, start in tqdm(parts, desc="Writing answers", unit=" parts"):
        chosen = range(start, min(start + how.prompts_per_part, len(keys[name])))
        ids = prompts[name][0].select(chosen)["ids"][:]
        asked = [(ids[place], keys[name][index]) for place, index in enumerate(chosen)]
        written = writer.write(
            [prompt for prompt, _ in asked for _ in range(how.num_answers)],
            [answer_key(how.answer_seed, key, number) for _, key in asked for number in range(how.num_answers)],
        )
        answers = [[answer.text, answer.is_finished] for answer in written]
        firsts = range(0, len(answers), how.num_answers)
        lines = [json.dumps(answers[first : first + how.num_answers]) for first in firsts]
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("\n".join(lines), encoding="utf-8")
        os.replace(unfinished, path)


def _joined(
    result: PartFolder, parts: list, prompts: dict, how: AnswerArguments, settings: dict, license: Mapping[str, str]
) -> Path:
    """One dataset of all parts, in a folder beside them."""
    counts, tables = {}, {}
    for name, (asked, dropped) in prompts.items():
        paths = [path for path, split, _ in parts if split == name]
        counts[name] = _counted(paths, how) | {"num_rows": len(asked) + sum(dropped.values()), "dropped": dropped}
        if not counts[name]["num_kept"]:
            raise DataError(
                f"No answer of the split {name!r} is left to train on: "
                f"{describe_answers({**settings, **counts[name]})}. Raise max_new_tokens, or set keep_unfinished."
            )
    record = AnswerRecord(settings, counts)
    for name, (asked, _) in prompts.items():
        paths = [str(path) for path, split, _ in parts if split == name]
        rows = partial(_rows, paths, asked, how)
        tables[name] = Dataset.from_generator(
            rows, features=record.features(), cache_dir=str(result.work / "cache" / name), split=name
        )
    staging = result.work / "whole"
    shutil.rmtree(staging, ignore_errors=True)
    DatasetDict(tables).save_to_disk(staging)
    card = answers_card(record, result.folder.name, **license)
    (staging / "README.md").write_text(card, encoding="utf-8")
    return staging


def _kept(answers: list, how: AnswerArguments) -> Iterator[tuple[int, str, bool, str]]:
    """Number, text, end and fate of each answer to one prompt: kept, unfinished, empty or repeated."""
    seen = set()
    for number, (text, finished) in enumerate(answers):
        fate = "kept"
        if not finished and not how.keep_unfinished:
            fate = "unfinished"
        elif not text.strip():
            fate = "empty"
        elif how.distinct_answers and text in seen:
            fate = "repeated"
        else:
            seen.add(text)
        yield number, text, finished, fate


def _lines(paths: list) -> Iterator[list]:
    """The answers to each prompt of a split, in order."""
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _counted(paths: list[Path], how: AnswerArguments) -> dict[str, int]:
    """What became of the answers of a split; an unfinished answer that is kept counts as both."""
    fates, num_prompts, num_unfinished = Counter(), 0, 0
    for answers in _lines(paths):
        num_prompts += 1
        num_unfinished += sum(not finished for _, finished in answers)
        fates.update(fate for *_, fate in _kept(answers, how))
    return {
        "num_prompts": num_prompts,
        "num_written": fates.total(),
        "num_kept": fates["kept"],
        "num_unfinished": num_unfinished,
        "num_empty": fates["empty"],
        "num_repeated": fates["repeated"],
    }


def _rows(paths: list[str], asked: Dataset, how: AnswerArguments) -> Iterator[dict]:
    """The rows of a split's dataset."""
    for prompt, answers in zip(asked, _lines(paths), strict=True):
        columns = {name: to_json(part) for name, part in prompt["content"].items()}
        content = read_prompt(columns)
        for number, text, finished, fate in _kept(answers, how):
            if fate == "kept":
                yield answer_row(content, text, finished, prompt["index"], number)
