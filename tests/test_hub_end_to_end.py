"""Recipes pushed from the command line as a user would, and processes with an empty cache that load the result."""

import json

import pytest
import torch
from embedded.networks import Network, build_network
from huggingface_hub import HfApi
from tiny import tiny_model

from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.hub import check_card, python_blocks

CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n"


def upload(folder, name, model, tokenizer) -> None:
    """A model of somebody's on the Hub, with a card."""
    api = HfApi()
    for part in (model, tokenizer):
        part.save_pretrained(folder / name)
    (folder / name / "README.md").write_text(CARD)
    api.create_repo(f"alice/{name}", exist_ok=True)
    api.upload_folder(repo_id=f"alice/{name}", folder_path=folder / name)


def write_rows(folder) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sorting_rows(8, seed=1)))


def publish(folder) -> None:
    """A start and a teacher of one tokenizer, and rows in a file."""
    for seed, name in enumerate(("e2e-start", "e2e-teacher")):
        upload(folder, name, tiny_model(seed=seed, dtype=torch.float32), build_tokenizer())
    write_rows(folder)


def publish_two_tokenizers(folder) -> None:
    """A start that reads some pairs of digits as one token, a mixture-of-experts teacher that reads digits; rows."""
    networks = {
        "cross-start": (Network(hidden=16, layers=2, heads=2, steps=0), build_tokenizer(("12", "34", "56"))),
        "cross-teacher": (Network(hidden=32, layers=2, heads=2, steps=0, experts=4), build_tokenizer()),
    }
    for seed, (name, (network, tokenizer)) in enumerate(networks.items()):
        upload(folder, name, build_network(network, tokenizer, 4, seed), tokenizer)
    write_rows(folder)


def recipe(folder, name, script="dense_teacher", **more) -> list[str]:
    """Words of a command line after `python` or `accelerate launch`; a flag given as None is left out."""
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
    flags = [word for flag, value in values.items() if value is not None for word in (f"--{flag}", str(value))]
    return [f"recipes/{script}.py", *flags, "--push_to_hub", "--hub_always_push", "--use_cpu"]


LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes", "1")
# from one commit, by its own code: the library cannot be imported; prints what tells its weights from another's
LOAD = """
import sys
sys.modules["tide_hf"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer

where = dict(revision=sys.argv[2], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **where)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **where)
chat = [{"role": "user", "content": "739152"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=8)
assert output.shape[1] > inputs["input_ids"].shape[1]
print("weights", sum(weight.double().abs().sum().item() for weight in model.parameters()))
"""


def finish(processes) -> list[str]:
    """Outputs of processes that have to end well."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), [text[-3000:] for text in outputs]
    return outputs


def require_whole_commits(repo, client, folder) -> list[str]:
    """Cards of the commits after the initial one, each of which has to load by its own code, with its own weights."""
    commits = repo.history()[1:]
    assert repo.titles()[1:] == ["Training in progress, step 1", "Training in progress, step 2"]
    loads = [client.start("-c", LOAD, repo.name, sha, cache=folder / sha, token=None) for sha in commits]
    weights = {text.split("weights ")[-1].strip() for text in finish(loads)}
    assert len(weights) == len(commits), "a commit has the weights of another one"
    cards = []
    for sha in commits:
        files = repo.files(sha)
        cards.append(files["README.md"].decode())
        assert check_card(cards[-1]) == [] and str(folder) not in cards[-1]
        assert json.loads(files["config.json"])["model_type"] == "tide_qwen3"
    return cards


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
    """Catches exit status 0, or a traceback instead of a sentence, when the last state is not on the Hub."""
    write_rows(tmp_path)
    hub.fault("POST", "alice/e2e-refused/commit", status=403, times=1000)
    status, output = client.python(*recipe(tmp_path, "alice/e2e-refused"))
    hub.faults.clear()
    assert status == 1 and "Traceback" not in output.split("The last state of this run")[-1]
    assert "The last state of this run is not on the Hub (alice/e2e-refused)" in output
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_every_commit_across_tokenizers_loads_without_the_library(hub, client, tmp_path):
    """Catches an intermediate commit that lacks code, tokenizer or card, and code of the teacher pushed for ours."""
    client.run(publish_two_tokenizers, tmp_path)
    models = {"model_name_or_path": "alice/cross-start", "teacher_model_name_or_path": "alice/cross-teacher"}
    command = recipe(tmp_path, "alice/cross", "moe_teacher", **models, hub_strategy="every_save", preset="tide-cross")
    status, output = client.python(*LAUNCH, *command, cache=tmp_path / "cache")
    assert status == 0, output[-3000:]
    for card in require_whole_commits(hub.repo("alice/cross"), client, tmp_path):
        assert "base_model: alice/cross-start" in card and "- alice/cross-teacher" in card
        assert "accelerate launch recipes/moe_teacher.py --model_name_or_path alice/cross-start" in card


@pytest.mark.slow
def test_every_commit_of_a_student_without_teacher(hub, client, pushed, tmp_path):
    """Catches a card that names a teacher that was not used, and an intermediate commit that lacks a part."""
    write_rows(tmp_path)
    more = {"teacher_model_name_or_path": None, "hub_strategy": "every_save"}
    status, output = client.python(
        *LAUNCH, *recipe(tmp_path, "alice/e2e-sft", "sft_student", **more), cache=tmp_path / "cache"
    )
    assert status == 0, output[-3000:]
    for card in require_whole_commits(hub.repo("alice/e2e-sft"), client, tmp_path):
        assert "base_model: alice/e2e-start" in card and "alice/e2e-teacher" not in card
        assert "accelerate launch recipes/sft_student.py" in card


@pytest.mark.slow
def test_adapter_of_a_recipe(hub, client, pushed, tmp_path):
    """Catches an adapter whose card calls it a whole model or names another base, or whose program does not run."""
    write_rows(tmp_path)
    more = {"teacher_model_name_or_path": None, "hub_strategy": "every_save", "lora_r": 2}
    status, output = client.python(
        *LAUNCH, *recipe(tmp_path, "alice/e2e-adapter", "finetune_lora", **more), cache=tmp_path / "cache"
    )
    assert status == 0, output[-3000:]
    repo = hub.repo("alice/e2e-adapter")
    assert [title for title in repo.titles() if "step" in title] == [f"Training in progress, step {n}" for n in (1, 2)]
    for sha in repo.history()[1:]:
        files = repo.files(sha)
        card = files["README.md"].decode()
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files
        assert check_card(card) == [] and str(tmp_path) not in card
        assert "base_model: alice/e2e-start" in card and "base_model_relation: adapter" in card
        assert "library_name: peft" in card and "alice/e2e-teacher" not in card
    programs = [
        client.start("-c", program, cache=tmp_path / str(index), token=None)
        for index, program in enumerate(python_blocks(card))
    ]
    assert programs and finish(programs)
