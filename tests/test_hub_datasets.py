"""A prepared dataset pushed with its card: what it says, what is kept of it, and that others load it from the Hub."""

import json
from pathlib import PurePosixPath

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from localhub import Handler, Refused
from tiny import tiny_model

from tide_hf.commands.prepare import _license, parse_prepare_arguments, run_preparation
from tide_hf.data import PreparationRecord
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.hub import check_card, python_blocks
from tide_hf.hub.sources import DataSource

STUDENT, TEACHER, RAW = "alice/prep-student", "alice/prep-teacher", "alice/prep-raw"
PAIRS = ("12", "34", "56")


def publish(folder) -> None:
    """A student, a teacher that reads pairs, and rows with a card, one of which cannot train."""
    api = HfApi()
    for seed, (name, tokenizer) in enumerate(((STUDENT, build_tokenizer()), (TEACHER, build_tokenizer(PAIRS)))):
        tiny_model(seed, vocab_size=len(tokenizer), hidden=16, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=folder / name)
    rows = sorting_rows(12, seed=1).to_list()
    rows[3]["messages"] = rows[3]["messages"][:1]
    (folder / "raw").mkdir()
    (folder / "raw" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "raw" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    api.create_repo(RAW, repo_type="dataset")
    api.upload_folder(repo_id=RAW, folder_path=folder / "raw", repo_type="dataset")


def flags(folder, name, student=STUDENT, teacher=TEACHER, rows=RAW) -> list[str]:
    values = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": rows,
        "max_length": 16,
        "output_dir": folder / "prepared",
        "hub_dataset_id": name,
    }
    return [word for flag, value in values.items() for word in (f"--{flag}", str(value))]


def prepare(command_line) -> None:
    from datasets import config

    config.USE_PARQUET_EXPORT = False  # no look-up in the Hub's dataset viewer, which is another host
    run_preparation(parse_prepare_arguments(command_line))


def load(name):
    """What a client gets from the Hub: rows and their record."""
    from datasets import config, load_dataset

    config.USE_PARQUET_EXPORT = False
    rows = load_dataset(name, split="train")
    return rows.to_list(), PreparationRecord.read(rows)


@pytest.fixture(scope="module", autouse=True)
def directories(hub):
    """Listings of the Hub name directories too, as the real one's do: `datasets` looks for `data` in them."""

    def tree(self, kind, name, revision, folder=None):
        repo = self._repo(kind, name)
        entries = repo.commits[repo.resolve(revision)].entries
        parents = {str(parent) for path in entries for parent in PurePosixPath(path).parents} - {"."}
        listed = [self._entry(path, entry) for path, entry in entries.items()]
        listed += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in parents]
        prefix = f"{folder}/" if folder else ""
        below = sorted(
            (entry for entry in listed if entry["path"].startswith(prefix)), key=lambda entry: entry["path"]
        )
        if folder and not below:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        deep = self.query.get("recursive", "").lower() == "true"
        return self.answer([entry for entry in below if deep or "/" not in entry["path"][len(prefix) :]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "tree", tree)
        yield


@pytest.fixture(scope="module")
def folder(client, directories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    client.run(publish, folder)
    return folder


@pytest.fixture(scope="module")
def card(hub, client, folder) -> str:
    client.run(prepare, flags(folder, "alice/rows"))
    return hub.repo("alice/rows", "datasets").files()["README.md"].decode()


def metadata_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def leaks(card: str) -> list[str]:
    """Of what a model card may lack, that which no card may hold."""
    return [said for said in check_card(card) if "local path" in said or "access token" in said or "leftover" in said]


def test_every_state_with_rows_has_the_card(hub, card, folder):
    """Catches a dataset pushed bare, or without tokenizers, counts, coverage, licence and source of its rows."""
    metadata = metadata_of(card)
    assert (metadata["license"], metadata["language"], metadata["source_datasets"]) == ("mit", ["en"], [RAW])
    assert metadata["configs"][0]["data_files"] and metadata["dataset_info"]["splits"][0]["num_examples"] == 11
    rows = "train: 11 of 12 rows kept (0 truncated), 88 trained-on tokens"
    coverage = "87.5% of them aligned with the teacher in 71 chunks (100.0% of 121 answer bytes). 1 dropped:"
    for said in (STUDENT, TEACHER, rows, coverage, "`alignment` | chunk"):
        assert said in card
    assert leaks(card) == [] and str(folder) not in card
    repo = hub.repo("alice/rows", "datasets")
    states = [repo.files(sha) for sha in repo.history()]
    with_rows = [files for files in states if any(path.endswith(".parquet") for path in files)]
    assert with_rows and all(TEACHER in files["README.md"].decode() for files in with_rows)


def test_another_client_gets_rows_and_record(client, card, folder):
    """Catches a card that overwrites the metadata in which the record of the preparation travels."""
    from datasets import load_from_disk

    local = load_from_disk(folder / "prepared")["train"]
    rows, record = client.run(load, "alice/rows")
    assert rows == local.to_list() and record == PreparationRecord.read(local)
    assert record.settings["teacher_tokenizer"]["name"] == TEACHER


def edit_and_prepare_again(name, command_line):
    api = HfApi()
    path = api.hf_hub_download(name, "README.md", repo_type="dataset")
    with open(path) as file:
        text = file.read().replace("license: mit", "license: cc-by-4.0") + "\nWritten on the Hub.\n"
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=name, repo_type="dataset")
    prepare(command_line)


def test_an_edit_on_the_hub_survives_the_next_push(hub, client, folder, tmp_path):
    """Catches a person's words or licence overwritten, a second copy of ours, and a source that is no longer one."""
    client.run(prepare, flags(tmp_path, "alice/rows-edited"))
    rows = folder / "raw" / "train.jsonl"
    local = flags(tmp_path / "again", "alice/rows-edited", folder / STUDENT, folder / TEACHER, rows)
    client.run(edit_and_prepare_again, "alice/rows-edited", local)
    card = hub.repo("alice/rows-edited", "datasets").files()["README.md"].decode()
    assert card.rstrip().endswith("Written on the Hub.") and card.count("## Settings") == 1
    metadata = metadata_of(card)
    assert (metadata["license"], metadata["source_datasets"]) == ("cc-by-4.0", [])
    assert "`prep-student`" in card and "`prep-teacher`" in card and RAW not in card
    assert leaks(card) == [] and str(folder) not in card and str(tmp_path) not in card
    assert len(client.run(load, "alice/rows-edited")[0]) == 11


@pytest.mark.slow
def test_recipe_pushes_what_another_recipe_trains_on(hub, client, folder, tmp_path):
    """Catches the sentence 'train with --dataset_name' that does not hold, and a program of the card that fails."""
    log = tmp_path / "refused"
    apart = {"LOOPBACK_ONLY_LOG": str(log)}
    command = ["recipes/prepare_data.py", *flags(tmp_path, "alice/rows-recipe"), "--hub_private", "true"]
    status, output = client.python(*command, **apart)
    assert status == 0 and "train with --dataset_name alice/rows-recipe" in output, output[-3000:]
    repo = hub.repo("alice/rows-recipe", "datasets")
    assert repo.private
    program = python_blocks(repo.files()["README.md"].decode())[0]
    training = ["--preset", "tide-cross", "--max_steps", "1", "--report_to", "none", "--use_cpu"]
    train = [*flags(tmp_path, "", rows="alice/rows-recipe")[:-4], "--output_dir", str(tmp_path / "out"), *training]
    processes = [
        client.start("-c", f"{program}\nassert len(rows) == 11", cache=tmp_path / "one", **apart),
        client.start("recipes/moe_teacher.py", *train, cache=tmp_path / "two", **apart),
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [output[-3000:] for output in outputs]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "- alice/rows-recipe" in (tmp_path / "out" / "README.md").read_text()
    # `datasets` asks the Hub's dataset viewer, which is another host, and goes on without it
    assert set(log.read_text().splitlines()) == {"getaddrinfo datasets-server.127.0.0.1"}


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (["mit", "mit"], {"license": "mit"}),
        (["mit", "apache-2.0"], {}),
        (["mit", None], {}),
        ([None], {}),
        (["mit", "cc-by-nc-4.0", None], {"license": "cc-by-nc-4.0"}),
    ],
    ids=str,
)
def test_license_of_a_mixture(licenses, expected):
    """Catches one part's permissive licence claimed for another part, and a restriction that gets lost."""
    assert (
        _license([DataSource(f"org/{index}", True, license=name) for index, name in enumerate(licenses)]) == expected
    )
