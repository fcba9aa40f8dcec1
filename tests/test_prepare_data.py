"""Prepared datasets: what they carry, what training refuses, writing in parts, and the run from names."""

import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData
from real_tokenizers import qwen, sentencepiece, wordpiece
from tiny import tiny_model, tiny_trainer
from transformers import AutoTokenizer

from tide_hf.commands.distill import parse_arguments, run_distillation
from tide_hf.commands.prepare import parse_prepare_arguments, run_preparation
from tide_hf.data import (
    COLUMNS,
    PreparationRecord,
    RowPreparation,
    is_prepared,
    prepare_dataset,
    require_same_preparation,
    tokenizer_fingerprint,
    write_prepared,
)
from tide_hf.demo.sorting import build_tokenizer, sorting_rows

ROOT = Path(__file__).parent.parent
PAIRS = ("12", "34", "56", "78", "89", "01")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the datasets library."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


class Counting(RowPreparation):
    """A preparation that counts its rows, and stops at one of them."""

    seen: list
    stop_at: int | None

    def __call__(self, row):
        if self.stop_at is not None and len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(row)
        return super().__call__(row)


def preparation(kind=RowPreparation, tokenizer=None, teacher=None, **overrides) -> RowPreparation:
    values = {"max_length": 16, "teacher_max_length": 16, "block_size": 4, "alignment": "chunk", **overrides}
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    return kind(tokenizer, build_tokenizer(PAIRS) if teacher is None else teacher, **values)


def counting(stop_at=None) -> Counting:
    prepare = preparation(Counting)
    object.__setattr__(prepare, "seen", [])
    object.__setattr__(prepare, "stop_at", stop_at)
    return prepare


def raw_rows(count=25) -> Dataset:
    """Sorting rows, three of which cannot train."""
    rows = sorting_rows(count, seed=1).to_list()
    rows[3]["messages"] = rows[3]["messages"][:1]
    rows[11]["messages"] = []
    rows[12]["messages"][0]["content"] += "<mask>"
    return Dataset.from_list(rows)


def rows_of(dataset) -> list[dict]:
    return [{name: row[name] for name in COLUMNS} for row in dataset]


# -- the record -------------------------------------------------------------------------------------------------------


def through_parquet(dataset, folder: Path, streaming=False):
    """A repository as push_to_hub leaves it: Parquet, and the features in the card."""
    (folder / "data").mkdir(parents=True)
    dataset.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    card = DatasetCardData()
    DatasetInfosDict({"default": dataset.info.copy()}).to_dataset_card_data(card)
    DatasetCard(f"---\n{card}\n---\n").save(folder / "README.md")
    return load_dataset(str(folder), split="train", streaming=streaming)


def through_disk(dataset, folder: Path):
    dataset.save_to_disk(folder)
    return load_from_disk(folder)


WAYS = {
    "select": lambda rows, folder: rows.select([4, 1]),
    "shuffle": lambda rows, folder: rows.shuffle(seed=0),
    "split": lambda rows, folder: rows.train_test_split(0.5, seed=0)["test"],
    "filter": lambda rows, folder: rows.filter(lambda row: row["row_key"] > 0),
    "map": lambda rows, folder: rows.map(lambda row: {"more": 1}),
    "concatenate": lambda rows, folder: concatenate_datasets([rows, rows]),
    "disk": through_disk,
    "Parquet and card": through_parquet,
    "streamed from the Hub": lambda rows, folder: through_parquet(rows, folder, streaming=True),
    "stream": lambda rows, folder: rows.to_iterable_dataset().shuffle(seed=0, buffer_size=2).take(3),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_record_survives(tmp_path, way):
    """Catches a dataset that forgets what it was prepared with: training could not tell whether it may read it."""
    prepare = preparation()
    rows, report = prepare_dataset(raw_rows(), prepare)
    record = PreparationRecord(PreparationRecord.of(prepare).settings, {"train": report})
    moved = way(record.attach(rows), tmp_path / "data")
    assert is_prepared(moved) and PreparationRecord.read(moved) == record
    assert PreparationRecord.read(rows).reports == {}, "attaching changed the dataset it was given"
    assert require_same_preparation(moved, prepare) == report
    assert next(iter(moved))["input_ids"]


def test_rows_prepared_while_streaming_carry_their_record():
    """Catches a stream that the trainer refuses because only tables were given a record."""
    rows, _ = prepare_dataset(raw_rows().to_iterable_dataset(), preparation())
    assert is_prepared(rows) and PreparationRecord.read(rows) == PreparationRecord.of(preparation())


def test_rows_of_two_preparations_are_not_joined():
    """Catches a mixture of rows made for two lengths, of which the record would describe one."""
    one, two = (prepare_dataset(raw_rows(), preparation(max_length=size))[0] for size in (16, 32))
    with pytest.raises(ValueError, match="features can't be aligned"):
        concatenate_datasets([one, two])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [build_tokenizer, sentencepiece, wordpiece, qwen])
def test_fingerprint_is_of_the_content(tmp_path, kind):
    """Catches the same tokenizer refused because of its folder, its padding or how often it was used."""
    tokenizer = kind()
    before = tokenizer_fingerprint(tokenizer)
    for name in ("one", "two"):
        tokenizer.save_pretrained(tmp_path / name)
    one, two = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("one", "two"))
    two(["1", "12"], padding="max_length" if two.pad_token else False, truncation=True, max_length=8)
    two.padding_side = "right"
    assert before == tokenizer_fingerprint(one) == tokenizer_fingerprint(two)


def test_fingerprint_sees_every_difference():
    """Catches another tokenizer taken for the same: one token more, other merges, another EOS."""
    changed = [build_tokenizer() for _ in range(3)]
    changed[1].add_tokens(["10"])
    changed[2].eos_token = "<pad>"
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in [*changed, build_tokenizer(PAIRS)]}) == 4


def other_template():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<user>", "<user><user>")
    return tokenizer


def with_setting():
    tokenizer = build_tokenizer()
    tokenizer.chat_template += "{% if shout %}!{% endif %}"
    return tokenizer


DIFFERENT = {
    "student tokenizer": {"tokenizer": build_tokenizer(PAIRS[:2])},
    "student chat template": {"tokenizer": other_template()},
    "chat_template_kwargs": {"tokenizer": with_setting(), "chat_template_kwargs": {"shout": True}},
    "student mask_token_id": {"mask_token_id": 14},
    "max_length": {"max_length": 32},
    "block_size": {"block_size": 8},
    "eos_fill": {"eos_fill": "end"},
    "trained_turns": {"trained_turns": "last"},
    "teacher tokenizer": {"teacher": build_tokenizer(PAIRS[:2])},
    "teacher chat template": {"teacher": other_template()},
    "teacher_mask_token_id": {"teacher_mask_token_id": 14},
    "teacher_max_length": {"teacher_max_length": 32},
    "alignment": {"alignment": "token"},
}


@pytest.mark.parametrize(("label", "change"), DIFFERENT.items(), ids=DIFFERENT.keys())
def test_every_setting_is_compared(label, change):
    """Catches a setting that changes the rows and is not in the record, or that is named wrongly."""
    base = {"teacher": build_tokenizer()} if label.endswith("template") else {}
    if label == "chat_template_kwargs":
        base = {"tokenizer": with_setting()}
    prepared, _ = prepare_dataset(raw_rows(), preparation(**base))
    require_same_preparation(prepared, preparation(**base))
    with pytest.raises(ValueError, match="was prepared for something else") as error:
        require_same_preparation(prepared, preparation(**{**base, **change}))
    named = re.findall(r"(?<=[.;] )([\w ]+): prepared with .+?, this run has ", str(error.value))
    # without fill to the block's end the size of a block plays no part
    assert set(named) == {label} | ({"block_size"} if label == "eos_fill" else set())


def test_block_size_counts_only_where_blocks_are_filled():
    """Catches a dataset refused for a block size that its rows do not depend on."""
    prepared, _ = prepare_dataset(raw_rows(), preparation(eos_fill="none"))
    require_same_preparation(prepared, preparation(eos_fill="none", block_size=8))


def test_report_of_the_split_is_found():
    """Catches the coverage of the test rows reported for the training rows."""
    rows, report = prepare_dataset(raw_rows(), preparation())
    other = type(report)(num_rows=1)
    reports = {"train": report, "test": other}
    recorded = PreparationRecord(PreparationRecord.of(preparation()).settings, reports).attach(rows)
    assert require_same_preparation(recorded, preparation(), "train") == report
    as_test = Dataset(recorded.data, info=recorded.info, split="test")
    assert require_same_preparation(as_test, preparation(), "eval") == other


# -- the trainer ------------------------------------------------------------------------------------------------------


def chunk_trainer(tmp_path, rows, **overrides):
    tokenizers = {"processing_class": build_tokenizer(), "teacher_processing_class": build_tokenizer(PAIRS)}
    return tiny_trainer(
        tmp_path,
        rows=rows,
        model=tiny_model(0),
        teacher=tiny_model(1, vocab_size=len(tokenizers["teacher_processing_class"])),
        **{"preset": "tide-cross", "trainer_kwargs": tokenizers, **overrides},
    )


@pytest.mark.slow
def test_trainer_takes_what_was_written_for_it(tmp_path):
    """Catches a dataset refused that is this run's own, prepared again, or trained on differently; and its report,
    which the model card shows, lost."""
    raw = chunk_trainer(tmp_path / "raw", raw_rows())
    written = write_prepared({"train": raw_rows()}, raw.plan.preparation, tmp_path / "prepared", rows_per_part=10)
    trainer = chunk_trainer(tmp_path / "run", load_from_disk(tmp_path / "prepared")["train"])
    assert rows_of(trainer.train_dataset) == rows_of(raw.train_dataset) == rows_of(written["train"])
    assert trainer.preparation_reports == raw.preparation_reports
    assert trainer.preparation_reports["train"].num_aligned_bytes > 0
    losses = [run.train().training_loss for run in (raw, trainer)]
    assert losses[0] == losses[1] != 0


def test_trainer_refuses_another_tokenizers_rows(tmp_path):
    """Catches training on ids of another vocabulary, which fit the embedding and mean something else."""
    prepared, _ = prepare_dataset(
        raw_rows(), preparation(teacher=build_tokenizer(PAIRS[:3]), teacher_mask_token_id=14)
    )
    with pytest.raises(ValueError) as error:
        chunk_trainer(tmp_path, prepared, max_length=32)
    message = str(error.value)
    assert message.startswith("The train dataset was prepared for something else.")
    names = [tokenizer_fingerprint(build_tokenizer(pairs)) for pairs in (PAIRS[:3], PAIRS)]
    assert f"(fingerprint {names[0]}), this run has " in message and f"(fingerprint {names[1]})" in message
    assert "max_length: prepared with 16, this run has 32" in message
    assert "eos_fill" not in message and "student tokenizer" not in message


def test_trainer_refuses_rows_without_a_record(tmp_path):
    """Catches token columns of unknown origin trained on as if they were this run's; and the way out."""
    trainer = chunk_trainer(tmp_path / "raw", raw_rows())
    unknown = Dataset.from_list(rows_of(trainer.train_dataset))
    with pytest.raises(ValueError, match=r"no record of the tokenizers .*PreparationRecord\.of.*attach"):
        chunk_trainer(tmp_path / "run", unknown)
    with pytest.raises(ValueError, match="no record"):
        chunk_trainer(tmp_path / "stream", unknown.to_iterable_dataset())
    recorded = PreparationRecord.of(trainer.plan.preparation).attach(unknown)
    assert len(chunk_trainer(tmp_path / "known", recorded).train_dataset) == 22
    stream = PreparationRecord.of(trainer.plan.preparation).attach(unknown.to_iterable_dataset())
    chunk_trainer(tmp_path / "known_stream", stream)


@pytest.mark.slow
def test_baseline_without_teacher_reads_aligned_rows_as_plain_ones(tmp_path):
    """Catches a ce baseline that needs a second preparation, or masks whole chunks of a teacher it does not have."""
    student, teacher = build_tokenizer(), build_tokenizer(PAIRS)
    masks = {"mask_token_id": student.mask_token_id, "teacher_mask_token_id": teacher.mask_token_id}
    aligned, _ = prepare_dataset(raw_rows(), preparation(**masks))
    assert any(row["chunk_ids"].count(chunk) > 1 for row in aligned for chunk in range(6))
    settings = {"teacher": None, "preset": "ce", "model": tiny_model(0)}
    plain = tiny_trainer(tmp_path / "plain", rows=raw_rows(), **settings).train().training_loss
    settings["model"] = tiny_model(0)
    assert tiny_trainer(tmp_path / "aligned", rows=aligned, **settings).train().training_loss == plain
    with pytest.raises(ValueError, match=r"else\. max_length: prepared with 16, this run has 32\. Prepare"):
        tiny_trainer(tmp_path / "longer", rows=aligned, max_length=32, **settings)


# -- writing in parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "streaming"])
@pytest.mark.parametrize("rows_per_part", [3, 5, 100])
def test_parts_give_the_rows_of_one_preparation(tmp_path, streaming, rows_per_part):
    """Catches rows lost or numbered anew at the edge of a part, a part without any row left, and wrong totals."""
    raw = raw_rows()
    raw = Dataset.from_list(
        [{"messages": row["messages"][:1]} if i in (6, 7, 8) else row for i, row in enumerate(raw)]
    )
    prepare = preparation(mask_token_id=14)
    expected, report = prepare_dataset(raw, prepare)
    source = raw.to_iterable_dataset() if streaming else raw
    splits = {"train": source, "test": source}
    written = write_prepared(splits, prepare, tmp_path / "out", rows_per_part=rows_per_part)
    assert rows_of(written["train"]) == rows_of(written["test"]) == rows_of(expected)
    assert PreparationRecord.read(written["train"]).reports == {"train": report, "test": report}
    assert report.num_kept == 19 and len(report.dropped) == 3
    stored = json.loads((tmp_path / "out" / "preparation.json").read_text())
    assert stored["reports"]["train"]["num_kept"] == 19
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"], "parts are left over"


def test_stream_without_known_columns(tmp_path):
    """Catches rows of a generator typed by the first of them: others lose their columns."""
    rows = [{"text": "12"}, {"prompt": "3", "completion": "45"}, sorting_rows(1, seed=0)[0]]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    written = write_prepared({"train": stream}, preparation(), tmp_path / "out", rows_per_part=3)
    assert rows_of(written["train"]) == rows_of(prepare_dataset(stream, preparation())[0])
    assert len(written["train"]) == 3


def test_several_processes_write_the_same(tmp_path):
    """Catches row ids that start again in each process."""
    alone, together = (
        write_prepared({"train": raw_rows()}, preparation(), tmp_path / str(n), num_proc=n, rows_per_part=10)
        for n in (1, 2)
    )
    assert rows_of(alone["train"]) == rows_of(together["train"])


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "streaming"])
@pytest.mark.parametrize("stop_at", [0, 7, 10, 19])
def test_interrupted_run_goes_on(tmp_path, streaming, stop_at):
    """Catches finished parts prepared again, an unfinished one taken for finished, and another result in the end."""
    raw = raw_rows()
    raw = raw.to_iterable_dataset() if streaming else raw
    whole = write_prepared({"train": raw}, preparation(), tmp_path / "whole", rows_per_part=5)
    with pytest.raises(KeyboardInterrupt):
        write_prepared({"train": raw}, counting(stop_at), tmp_path / "out", rows_per_part=5)
    assert not (tmp_path / "out").exists(), "an unfinished dataset must not look like one"
    resumed = counting()
    written = write_prepared({"train": raw}, resumed, tmp_path / "out", rows_per_part=5)
    assert len(resumed.seen) == 25 - stop_at // 5 * 5
    assert rows_of(written["train"]) == rows_of(whole["train"])
    assert PreparationRecord.read(written["train"]) == PreparationRecord.read(whole["train"])
    again = counting()
    assert rows_of(write_prepared({"train": raw}, again, tmp_path / "out", rows_per_part=7)["train"])
    assert again.seen == [], "what is finished is not prepared again"


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": {"dataset_name": "b"}}, "source: prepared with .*'a'.* this run has .*'b'"),
        ({"preparation": preparation(max_length=32)}, "max_length: prepared with 16, this run has 32"),
        ({"preparation": RowPreparation(build_tokenizer(), None, 16, 16, 4)}, "the rows have no teacher side"),
    ],
)
def test_parts_of_something_else_are_refused(tmp_path, change, said, finished):
    """Catches an interrupted run continued with other rows or settings, and another dataset's result returned."""
    given = {"preparation": preparation(), "source": {"dataset_name": "a"}, "rows_per_part": 5}
    if finished:
        write_prepared({"train": raw_rows()}, output_dir=tmp_path / "out", **given)
    else:
        with pytest.raises(KeyboardInterrupt):
            write_prepared({"train": raw_rows()}, output_dir=tmp_path / "out", **{**given, "preparation": counting(7)})
    with pytest.raises(ValueError, match=said):
        write_prepared({"train": raw_rows()}, output_dir=tmp_path / "out", **{**given, **change})


def test_output_of_something_else_is_left_alone(tmp_path):
    """Catches a folder of the user's overwritten."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something other than prepared rows"):
        write_prepared({"train": raw_rows()}, preparation(), tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").is_file()


def test_split_without_any_row_is_an_error(tmp_path):
    """Catches an empty split saved as a success."""
    rows = Dataset.from_list([{"messages": row["messages"][:1]} for row in raw_rows()])
    with pytest.raises(ValueError, match=r"split 'train' is left.*0 of 25 rows kept.*24 dropped: no assistant"):
        write_prepared({"train": rows}, preparation(), tmp_path / "out", rows_per_part=10)
    prepared, _ = prepare_dataset(raw_rows(), preparation())
    with pytest.raises(ValueError, match="prepared already"):
        write_prepared({"train": prepared}, preparation(), tmp_path / "twice")


# -- from names -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Student and teacher without weights, and rows."""
    paths = {name: tmp_path / name for name in ("teacher", "student", "rows.jsonl", "prepared", "out")}
    for name, tokenizer in (("teacher", build_tokenizer(PAIRS)), ("student", build_tokenizer())):
        tiny_model(vocab_size=len(tokenizer), hidden=16, dtype=torch.float32).config.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    paths["rows.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in raw_rows().to_list()))
    return paths


def flags_of(folders, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folders["student"])),
        *("--teacher_model_name_or_path", str(folders["teacher"])),
        *("--dataset_name", str(folders["rows.jsonl"])),
        *("--max_length", "16"),
        *more,
    ]


def test_what_the_recipe_wrote_trains(folders, capsys):
    """Catches a recipe that needs weights, or resolves tokenizers, masks and lengths otherwise than training does."""
    run_preparation(parse_prepare_arguments(flags_of(folders, "--output_dir", str(folders["prepared"]))))
    shown = capsys.readouterr().out
    assert "train: 22 of 25 rows kept" in shown and "1 dropped: the student's mask token '<mask>'" in shown
    for seed, name in enumerate(("student", "teacher")):
        vocab_size = len(AutoTokenizer.from_pretrained(folders[name]))
        model = tiny_model(seed, vocab_size=vocab_size, hidden=16, dtype=torch.float32)
        model.save_pretrained(folders[name])
    flags = flags_of({**folders, "rows.jsonl": folders["prepared"]}, "--output_dir", str(folders["out"]))
    flags += ["--preset", "tide-cross", "--max_steps", "1", "--report_to", "none", "--use_cpu"]
    trainer = run_distillation(parse_arguments("outputs", flags))
    assert trainer.preparation_reports["train"].num_rows == 25
    assert trainer.objective.alignment == "chunk" and (folders["out"] / "model.safetensors").is_file()
    with pytest.raises(SystemExit, match="eos_fill: prepared with block, this run has end"):
        run_distillation(parse_arguments("outputs", [*flags, "--eos_fill", "end"]))


def test_mixture_of_a_config_file(folders, tmp_path):
    """Catches a training recipe's file refused for settings of the training, or written where its run would save."""
    parts = [{"path": str(folders["rows.jsonl"])}, {"path": str(folders["rows.jsonl"]), "split": "train[:4]"}]
    content = {"datasets": parts, "test_split_size": 0.25, "learning_rate": 1e-3, "bf16": True, "max_length": 16}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**content, "output_dir": str(folders["out"])}))
    flags = ["--config", str(path), *flags_of(folders)[:4]]
    assert parse_prepare_arguments(flags).write.output_dir == "prepared"
    dataset = run_preparation(parse_prepare_arguments([*flags, "--output_dir", str(folders["prepared"])]))
    assert isinstance(dataset, DatasetDict) and len(dataset["train"]) + len(dataset["test"]) == 22 + 3
    reports = PreparationRecord.read(dataset["test"]).reports
    assert {name: report.num_rows for name, report in reports.items()} == {"train": 21, "test": 8}
    assert not folders["out"].exists()


@pytest.mark.slow
def test_template_and_settings_are_flags(folders, tmp_path):
    """Catches a preparation that renders with another template, or other settings, than the run it is for."""
    path = tmp_path / "mine.jinja"
    path.write_text(with_setting().chat_template, encoding="utf-8")
    given = ["--chat_template", str(path), "--chat_template_kwargs", '{"shout": true}']
    run_preparation(parse_prepare_arguments(flags_of(folders, "--output_dir", str(folders["prepared"]), *given)))
    settings = PreparationRecord.read(load_from_disk(folders["prepared"])["train"]).settings
    assert settings["chat_template_kwargs"] == '{"shout": true}'
    for seed, name in enumerate(("student", "teacher")):
        size = len(AutoTokenizer.from_pretrained(folders[name]))
        tiny_model(seed, vocab_size=size, hidden=16, dtype=torch.float32).save_pretrained(folders[name])
    flags = flags_of({**folders, "rows.jsonl": folders["prepared"]}, "--output_dir", str(folders["out"]))
    flags += ["--preset", "tide-cross", "--max_steps", "1", "--report_to", "none", "--use_cpu"]
    with pytest.raises(SystemExit, match="student chat template: prepared with"):
        run_distillation(parse_arguments("outputs", flags))
    with pytest.raises(SystemExit, match="chat_template_kwargs: prepared with"):
        run_distillation(parse_arguments("outputs", [*flags, *given[:2]]))
    run_distillation(parse_arguments("outputs", [*flags, *given]))
    saved = AutoTokenizer.from_pretrained(folders["out"])
    messages = [{"role": "user", "content": "12"}]
    assert saved.apply_chat_template(messages, tokenize=False).endswith("!")


def test_streaming_writes_the_same(folders):
    """Catches --dataset_streaming that prepares other rows, or loads everything first."""
    table, stream = (
        run_preparation(parse_prepare_arguments(flags_of(folders, "--output_dir", str(folders[name]), *more)))
        for name, more in (("prepared", []), ("out", ["--dataset_streaming", "true", "--rows_per_part", "4"]))
    )
    assert rows_of(table["train"]) == rows_of(stream["train"])


def test_the_papers_file_is_understood(monkeypatch):
    """Catches a published configuration that the preparation cannot read."""
    monkeypatch.setattr("tide_hf.commands.prepare.check_available", lambda *names: None)
    arguments = parse_prepare_arguments(["--config", str(ROOT / "recipes/configs/wedlm_to_qwen3.yaml")])
    assert (arguments.run.max_length, arguments.run.teacher_max_length, arguments.run.block_size) == (512, 768, 32)
    assert len(arguments.mixture.datasets) == 9


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_lenght", "8"], "unknown: --max_lenght"),
        (["--max_length", "18"], "block_size=4 does not fit max_length=18"),
        (["--dataset_train_split", "tran"], "has the splits train, but none of tran, test"),
    ],
)
def test_what_cannot_be_prepared_is_one_sentence(folders, flags, said):
    """Catches a misspelt setting silently ignored, and rows prepared that training will refuse."""
    with pytest.raises(SystemExit, match=said):
        run_preparation(parse_prepare_arguments([*flags_of(folders), *flags]))


@pytest.mark.slow
def test_recipe_without_arguments_says_what_it_needs(tmp_path):
    """Catches a traceback, or a usage text of a hundred flags, as the answer to the bare command."""
    command = [sys.executable, str(ROOT / "recipes" / "prepare_data.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Nothing to prepare: give --model_name_or_path")
