"""Pushing a run: whole commits, errors that are reported, resuming from the Hub.

The last save and the final push hold the same files: the client skips the second commit.
"""

import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from localhub import ALICE
from tiny import tiny_model, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.hub import PushError, check_card, pushing

CARD = "---\nlicense: apache-2.0\nlanguage: en\nbase_model: Qwen/Qwen3-0.6B\n---\n"
MODEL_FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def make_trainer(folder: Path, name: str, **overrides):
    """Four steps, a push every two, on a start with a card of its own; waits shortened."""
    pushing.RETRY_WAITS = (0.05, 0.05)
    student, kwargs = folder / "student", overrides.pop("trainer_kwargs", {})
    if not student.exists():
        tiny_model(dtype=torch.float32).save_pretrained(student)
        (student / "README.md").write_text(CARD)
    values = {"save_strategy": "steps", "save_steps": 2, "hub_strategy": "every_save", "hub_always_push": True}
    values |= {"push_to_hub": True, "hub_model_id": name, **overrides}
    model = AutoModelForCausalLM.from_pretrained(student)
    return tiny_trainer(folder / "out", model=model, trainer_kwargs=kwargs, **values)


def train(folder: Path, name: str, push: bool = True, **overrides) -> dict:
    """One run; the error it ended with, what was logged, and the weights at its end."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append((record.levelname, record.getMessage()))
    logging.getLogger("tide_hf").addHandler(handler)
    error = None
    trainer = make_trainer(folder, name, **overrides)
    try:
        trainer.train(trainer.args.resume_from_checkpoint)
        if push:
            trainer.push_to_hub()
    except PushError as raised:
        error = str(raised)
    weights = {key: value.numpy() for key, value in trainer.model.state_dict().items()}
    return {"error": error, "heard": heard, "weights": weights}


def load_at(name: str, revision: str | None, folder: Path) -> list[str]:
    """Loads and generates from one commit with an empty cache; what the card lacks."""
    path = snapshot_download(name, revision=revision, cache_dir=folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    output = model.generate(tokenizer("12", return_tensors="pt")["input_ids"], max_new_tokens=4)
    assert output.shape[1] > 2
    return check_card(Path(path, "README.md"))


def same_weights(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all((left[key] == right[key]).all() for key in left)


# -- what a commit holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "titles", "extra"),
    [
        ("end", ["End of training"], set()),
        ("every_save", ["step 2", "step 4"], set()),
        ("checkpoint", ["step 2", "step 4"], {"last-checkpoint/optimizer.pt"}),
        ("all_checkpoints", ["step 2", "step 4"], {"checkpoint-2/optimizer.pt"}),
    ],
)
def test_every_commit_is_whole(hub, client, tmp_path, strategy, titles, extra):
    """Catches an intermediate commit without tokenizer, card or generation config, and a pickle that is pushed."""
    name = f"alice/strategy-{strategy}"
    assert client.run(train_strategy, tmp_path, name, strategy)["error"] is None
    repo = hub.repo(name)
    assert [title.split(", ")[-1] for title in repo.titles()[1:]] == titles
    for sha in repo.history()[1:]:
        files = repo.files(sha)
        assert files.keys() >= MODEL_FILES | extra
        assert not [path for path in files if path.endswith("training_args.bin") or "_push" in path]
        assert not [path for path, content in files.items() if ALICE.encode() in content]
        assert client.run(load_at, name, sha, tmp_path / sha) == []


def train_strategy(folder, name, strategy):
    return train(folder, name, hub_strategy=strategy)


def train_with_xet(folder, name):
    constants.HF_HUB_DISABLE_XET = False
    return train(folder, name, hub_strategy="checkpoint")


def load_with_xet(name, folder):
    constants.HF_HUB_DISABLE_XET = False
    return load_at(name, None, folder)


def test_push_through_xet(hub, client, tmp_path):
    """Catches an upload path that only works with LFS."""
    assert client.run(train_with_xet, tmp_path, "alice/xet")["error"] is None
    assert hub.statuses("GET", "alice/xet/xet-write-token") and client.run(load_with_xet, "alice/xet", tmp_path) == []


def train_private_branch(folder, name):
    return train(folder, name, hub_private_repo=True, hub_revision="trial")


def test_private_organisation_and_branch(hub, client, tmp_path):
    """Catches a public repository, a push to main instead of the branch, and code in the card that loads main."""
    hub.orgs["lab"] = {"alice"}
    assert client.run(train_private_branch, tmp_path, "lab/secret")["error"] is None
    repo = hub.repo("lab/secret")
    assert repo.private and repo.titles() == ["initial commit"] and len(repo.titles("trial")) == 3
    assert 'from_pretrained("lab/secret", revision="trial")' in repo.files("trial")["README.md"].decode()


def open_request(folder, name):
    HfApi().create_repo(name)
    trainer = make_trainer(folder, name, hub_strategy="end", max_steps=1)
    trainer.train()
    return trainer.push_to_hub(create_pr=True).pr_url


def test_pull_request_to_an_existing_repository(hub, client, tmp_path):
    """Catches a pull request that commits to main."""
    assert client.run(open_request, tmp_path, "alice/request").endswith("/discussions/1")
    repo = hub.repo("alice/request")
    assert repo.titles() == ["initial commit"] and "model.safetensors" in repo.files("refs/pr/1")


def push_adapter(folder, name):
    from peft import AutoPeftModelForCausalLM, LoraConfig

    start = folder / "start"
    tiny_model(dtype=torch.float32).save_pretrained(start)
    build_tokenizer().save_pretrained(start)
    (start / "README.md").write_text(CARD)
    api = HfApi()
    api.create_repo("alice/start", exist_ok=True)
    api.upload_folder(repo_id="alice/start", folder_path=start)
    pushing.RETRY_WAITS = (0.05,)
    trainer = tiny_trainer(
        folder / "out",
        model="alice/start",
        trainer_kwargs={"peft_config": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])},
        **{"push_to_hub": True, "hub_model_id": name, "save_strategy": "steps", "save_steps": 2},
        **{"hub_strategy": "every_save", "hub_always_push": True},
    )
    trainer.train()
    trainer.push_to_hub()
    AutoPeftModelForCausalLM.from_pretrained(name)
    return check_card(folder / "out" / "README.md")


def test_adapter_is_pushed_as_one(hub, client, tmp_path):
    """Catches PEFT's stock card over ours, or a card that calls an adapter a whole model."""
    assert client.run(push_adapter, tmp_path, "alice/adapter") == []
    repo = hub.repo("alice/adapter")
    for sha in repo.history()[1:]:
        files = repo.files(sha)
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files
        card = files["README.md"].decode()
        assert "library_name: peft" in card and "base_model: alice/start" in card
        assert "base_model_relation: adapter" in card and "AutoPeftModelForCausalLM" in card


def push_edit_push(folder, name):
    trainer = make_trainer(folder, name, max_steps=2)
    trainer.train()
    api = HfApi()
    card = Path(api.hf_hub_download(name, "README.md")).read_text() + "\nWritten on the Hub.\n"
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=name)
    trainer.push_to_hub(tags="second")


def test_an_edit_on_the_hub_survives_the_next_push(hub, client, tmp_path):
    """Catches a person's words in the published card overwritten by the run."""
    client.run(push_edit_push, tmp_path, "alice/edited")
    card = hub.repo("alice/edited").files()["README.md"].decode()
    assert card.rstrip().endswith("Written on the Hub.") and "- second" in card and check_card(card) == []


# -- faults -----------------------------------------------------------------------------------------------------------

COMMIT = "/commit/main"


def train_with_seed(folder, name, seed):
    return train(folder, name, seed=seed)


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        (("POST", COMMIT, 409), 1),
        (("POST", COMMIT, 412), 1),
        (("POST", COMMIT, 500), 2),
        (("POST", COMMIT, 503), 2),
        (("POST", "/preupload/", 502), 1),
        (("PUT", "/lfs/", "cut"), 1),
        (("POST", COMMIT, "cut"), 1),
    ],
    ids=str,
)
def test_a_passing_fault_loses_nothing(hub, client, tmp_path, fault, times):
    """Catches a push that is lost to a temporary fault: every state has to arrive."""
    method, pattern, status = fault
    name = f"alice/passing-{status}-{pattern.strip('/').split('/')[0]}"
    path = pattern if pattern == "/lfs/" else f"{name}{pattern}"
    kind = {"cut": True} if status == "cut" else {"status": status}
    hub.fault(method, path, times=times, **kind)
    # weights of its own: the Hub does not ask for a file that it has
    assert client.run(train_with_seed, tmp_path, name, sum(name.encode()))["error"] is None
    assert len(hub.repo(name).titles()) == 3 and hub.faults[-1]["times"] == 0
    assert client.run(load_at, name, None, tmp_path / "cache") == []


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_lasting_fault_is_heard_and_ends_the_run(hub, client, tmp_path, status):
    """Catches a background push that fails silently, a run that ends as if it had succeeded, and a lost model."""
    name = f"alice/lasting-{status}"
    hub.fault("POST", f"{name}{COMMIT}", status=status, times=1000)
    outcome = client.run(train, tmp_path, name, False)
    hub.faults.clear()
    assert "The last state of this run is not on the Hub" in outcome["error"] and name in outcome["error"]
    errors = [text for level, text in outcome["heard"] if level == "ERROR"]
    assert sum("could not be pushed" in text for text in errors) == 2, outcome["heard"]
    attempts = len(hub.statuses("POST", f"{name}{COMMIT}"))
    assert attempts == (3 if status in (401, 403, 404) else 9), "a refusal is not asked again and again"
    assert hub.repo(name).titles() == ["initial commit"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert same_weights({key: value.numpy() for key, value in saved.items()}, outcome["weights"])
    assert (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").is_file()


def make_with_token(folder, name, token):
    make_trainer(folder, name, hub_token=token)


@pytest.mark.parametrize(
    ("token", "status"), [("hf_nobody", "401"), ("hf_bob_write_0123456789abcdefghijklmnopq", "403")]
)
def test_a_token_that_may_not_write_is_said_before_training(client, tmp_path, token, status):
    """Catches hours of training before the first push is refused."""
    with pytest.raises(Exception, match=status):
        client.run(make_with_token, tmp_path, f"alice/refused-{status}", token)


@pytest.mark.slow
def test_server_that_goes_away_and_comes_back(hub, client, tmp_path):
    """Catches a state of the time when the Hub could not be reached that is never pushed."""
    stop = threading.Event()
    orders = threading.Thread(target=obey, args=(hub, tmp_path, stop))
    orders.start()
    try:
        assert client.run(train_while_gone, tmp_path, "alice/gone")["error"] is None
    finally:
        stop.set()
        orders.join()
    assert [path.name for path in sorted(tmp_path.glob("*.done"))] == ["come_back.done", "go_away.done"]
    assert hub.repo("alice/gone").titles()[-1] == "Training in progress, step 4"


def obey(hub, folder, stop) -> None:
    """Does to the Hub what the training process asks for by a file."""
    while not stop.wait(0.05):
        for order in ("go_away", "come_back"):
            if (folder / order).exists():
                getattr(hub, order)()
                (folder / order).rename(folder / f"{order}.done")


def train_while_gone(folder, name):
    def ask(order):
        (folder / order).touch()
        while not (folder / f"{order}.done").exists():
            time.sleep(0.05)

    class Gone(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer._finish_current_push()
            if state.global_step == 4:
                ask("go_away")

        def on_train_end(self, args, state, control, **kwargs):
            trainer._finish_current_push()
            assert trainer._pusher.failed is not None
            ask("come_back")

    trainer = make_trainer(folder, name, trainer_kwargs={"callbacks": [Gone()]})
    pushing.RETRY_WAITS = ()  # the client itself asks for half a minute
    trainer.train()
    return {"error": None}


@pytest.mark.slow
def test_two_pushers_at_once(hub, client, tmp_path):
    """Catches a commit lost when two runs push to one repository."""
    first = client.start("-c", PUSHER, str(tmp_path / "one"), "alice/both", "1")
    second = client.start("-c", PUSHER, str(tmp_path / "two"), "alice/both", "2")
    outputs = [process.communicate(timeout=200)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    titles = hub.repo("alice/both").titles()
    assert [titles.count(f"Training in progress, step {step}") for step in (2, 4)] == [2, 2]
    assert client.run(load_at, "alice/both", None, tmp_path / "cache") == []


PUSHER = """
import sys
from pathlib import Path
from test_hub_push import train
raise SystemExit(train(Path(sys.argv[1]), sys.argv[2], seed=int(sys.argv[3]))["error"])
"""


# -- resuming ---------------------------------------------------------------------------------------------------------


def interrupt_and_resume(folder, name):
    whole = train(folder / "whole", f"{name}-whole", False)["weights"]
    first = make_trainer(folder / "first", name, hub_strategy="checkpoint", save_total_limit=1)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    first.add_callback(Stop())
    first.train()
    resumed = make_trainer(folder / "second", f"{name}-second")
    resumed.train(resume_from_checkpoint=name)
    steps = [entry["step"] for entry in resumed.state.log_history if "loss" in entry]
    after = {key: value.numpy() for key, value in resumed.model.state_dict().items()}
    return steps, same_weights(whole, after)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [None, "trainer_state.json", "/cdn/"])
def test_resume_from_the_hub_goes_on_exactly(hub, client, tmp_path, pattern):
    """Catches a resumed run that starts anew or with another optimizer state, or that an interrupted download ends."""
    if pattern is not None:
        hub.fault("GET", pattern, times=2, cut=True)
    assert client.run(interrupt_and_resume, tmp_path, f"alice/resume-{len(pattern or '')}") == ([1, 2, 3, 4], True)
    if pattern is not None:
        assert hub.statuses("GET", pattern).count("cut") >= 1 and hub.faults.pop()["times"] < 2


def resume_from_a_model(folder, name):
    train(folder, name, hub_strategy="end", max_steps=1)
    make_trainer(folder, f"{name}-2").train(resume_from_checkpoint=name)


def test_resume_without_training_state_says_so(client, tmp_path):
    """Catches an error about a missing file that does not say what to do."""
    with pytest.raises(ValueError, match=r"holds no training state to resume from.*--hub_strategy checkpoint"):
        client.run(resume_from_a_model, tmp_path, "alice/model-only")
