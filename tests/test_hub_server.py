"""The loopback Hub against the real client, before anything is built on it."""

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from localhub import ALICE, ALICE_READ, BOB

CONTENT = bytes(range(256)) * 400


def use_xet(xet: bool) -> None:
    constants.HF_HUB_DISABLE_XET = not xet


def upload_and_download(name: str, xet: bool, folder: str) -> dict[str, bytes]:
    use_xet(xet)
    api = HfApi()
    api.create_repo(name)
    for path, content in (("model.safetensors", CONTENT), ("sub/config.json", b"{}")):
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=name)
    path = snapshot_download(name, cache_dir=folder)
    return {file: open(f"{path}/{file}", "rb").read() for file in ("model.safetensors", "sub/config.json")}


@pytest.mark.parametrize("xet", [False, True])
def test_what_goes_in_comes_out(hub, client, tmp_path, xet):
    """Catches a fixture that stores nothing, or a client that does not take the path it is said to take."""
    name = f"alice/round-trip-{xet}"
    files = client.run(upload_and_download, name, xet, str(tmp_path))
    assert files == {"model.safetensors": CONTENT, "sub/config.json": b"{}"}
    assert bool(hub.statuses("GET", f"{name}/xet-write-token")) == xet
    assert bool(hub.statuses("POST", f"{name}.git/info/lfs")) != xet


def refusals(name: str) -> dict[str, object]:
    """Status or class of what each forbidden thing raises."""
    api, found = HfApi(), {}
    api.create_repo(f"alice/{name}", private=True)

    def note(what, call):
        try:
            call()
        except RevisionNotFoundError:
            found[what] = "revision"
        except RepositoryNotFoundError as error:
            found[what] = f"repo {error.response.status_code}"
        except HfHubHTTPError as error:
            found[what] = error.response.status_code

    note("bad token", lambda: HfApi(token="hf_nobody").whoami())
    note("read token", lambda: HfApi(token=ALICE_READ).create_repo("mine"))
    note("foreign namespace", lambda: HfApi(token=BOB).create_repo("alice/taken"))
    note("private", lambda: HfApi(token=BOB).repo_info(f"alice/{name}"))
    note("anonymous", lambda: HfApi(token=False).repo_info(f"alice/{name}"))
    note("exists", lambda: HfApi(token=ALICE).create_repo(name))
    note("no branch", lambda: api.repo_info(f"alice/{name}", revision="nowhere"))

    def outdated():
        api.upload_file(
            path_or_fileobj=b"x", path_in_repo="x", repo_id=f"alice/{name}", revision="main", parent_commit="0" * 40
        )

    note("outdated", outdated)
    return found


def test_refusals_are_those_of_the_hub(hub, client):
    """Catches a Hub that lets everything pass, against which no error path is ever run."""
    assert client.run(refusals, "refusals") == {
        "bad token": 401,
        "read token": 403,
        "foreign namespace": 403,
        "private": "repo 404",
        "anonymous": "repo 401",
        "exists": 409,
        "no branch": "revision",
        "outdated": 412,
    }


def download(name: str, folder: str) -> bytes:
    return open(hf_hub_download(name, "model.safetensors", cache_dir=folder), "rb").read()


def test_cut_connections_are_cut(hub, client, tmp_path):
    """Catches a fault injection that injects none: the client has to ask again, and gets the whole file."""
    client.run(upload_and_download, "alice/cut", False, str(tmp_path / "one"))
    hub.fault("GET", "/cdn/", cut=True)
    assert client.run(download, "alice/cut", str(tmp_path / "two")) == CONTENT
    first, second = hub.statuses("GET", "/cdn/")[-2:]
    assert first == "cut" and second in (200, 206)


def reach_out() -> str:
    import socket

    try:
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    except OSError as error:
        return str(error)
    return "connected"


def test_other_hosts_are_refused(client):
    """Catches a guard that guards nothing."""
    before = client.refused()
    assert "loopback only" in client.run(reach_out)
    assert client.refused() == before + "getaddrinfo 192.0.2.1\n"
    client.refused_log.write_text(before)
