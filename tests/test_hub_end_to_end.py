"""A recipe pushed from the command line as a user would, and a second process with an empty cache that loads it."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from tiny import tiny_model

from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.hub import python_blocks

CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n"


def publish(folder) -> None:
    """A start and a teacher on the Hub, each with a card, and rows in a file."""
    api = HfApi()
    for seed, name in enumerate(("e2e-start", "e2e-teacher")):
        tiny_model(seed=seed, dtype=torch.float32).save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
        (folder / name / "README.md").write_text(CARD)
        api.create_repo(f"alice/{name}", exist_ok=True)
        api.upload_folder(repo_id=f"alice/{name}", folder_path=folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sorting_rows(8, seed=1)))


def recipe(folder, name, **more) -> list[str]:
    values = {
        "model_name_or_path": "alice/e2e-start",
        "teacher_model_name_or_path": "alice/e2e-teacher",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "out",
        "hub_model_id": name,
        "hub_strategy": "checkpoint",
        "max_steps": 2,
        "save_steps": 1,
        "max_length": 16,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        **more,
    }
    flags = [word for flag, value in values.items() for word in (f"--{flag}", str(value))]
    return ["recipes/dense_teacher.py", *flags, "--push_to_hub", "--hub_always_push", "--use_cpu"]


@pytest.fixture(scope="module")
def pushed(hub, client, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("e2e")
    client.run(publish, folder)
    status, output = client.python(*recipe(folder, "alice/e2e"), cache=folder / "cache")
    assert status == 0, output[-3000:]
    return hub.repo("alice/e2e").files()["README.md"].decode()


@pytest.mark.slow
def test_recipe_pushes_what_a_second_process_loads(hub, client, pushed, tmp_path):
    """Catches a repository that only the process that wrote it can load, and a card whose program does not run."""
    from tide_hf.hub import check_card

    assert check_card(pushed) == []
    assert "base_model: alice/e2e-start" in pushed and "- alice/e2e-teacher" in pushed and "rows.jsonl" in pushed
    assert "python recipes/dense_teacher.py --model_name_or_path alice/e2e-start" in pushed
    files = hub.repo("alice/e2e").files()
    assert {"last-checkpoint/optimizer.pt", "training_curves.png", "generation_config.json"} <= files.keys()
    for index, program in enumerate(python_blocks(pushed)):
        status, output = client.python("-c", program, cache=tmp_path / str(index), token=None)
        assert status == 0, output[-3000:]


@pytest.mark.slow
def test_it_loads_without_the_library(client, pushed, tmp_path):
    """Catches a checkpoint that needs tide_hf although its card says that it brings its code."""
    programs = [program for program in python_blocks(pushed) if "trust_remote_code" in program]
    assert len(programs) == 1
    status, output = client.python(
        "-c", f"import sys\nsys.modules['tide_hf'] = None\n{programs[0]}", cache=tmp_path, token=None
    )
    assert status == 0, output[-3000:]


@pytest.mark.slow
def test_recipe_that_cannot_push_says_so_and_fails(hub, client, pushed, tmp_path):
    """Catches exit status 0, or a traceback in place of a sentence, when the last state is not on the Hub."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sorting_rows(8, seed=1)))
    hub.fault("POST", "alice/e2e-refused/commit", status=403, times=1000)
    status, output = client.python(*recipe(tmp_path, "alice/e2e-refused"))
    hub.faults.clear()
    assert status == 1 and "Traceback" not in output.split("The last state of this run")[-1]
    assert "The last state of this run is not on the Hub (alice/e2e-refused)" in output
    assert (tmp_path / "out" / "model.safetensors").is_file()
