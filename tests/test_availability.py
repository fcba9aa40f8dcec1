"""What a run would be missing is reported within seconds, before anything is loaded."""

import http.server
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from datasets import config as datasets_config
from huggingface_hub import constants

from tide_hf.hub import NotAvailableError, availability, require_available


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    """Caches without content, and an online machine."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def no_probe(monkeypatch):
    """Any question to the endpoint fails the test."""
    monkeypatch.setattr(availability, "endpoint_answers", lambda *args: pytest.fail("the endpoint was asked"))


def cache_model(tmp_path, name: str, file: str = "config.json") -> None:
    folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / file).write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abc")


@contextmanager
def endpoint(answer: bytes | None):
    """A server on loopback that answers every connection with these bytes, or stays silent."""
    stop, connections = threading.Event(), []
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)

    def serve():
        while not stop.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                continue
            connections.append(connection)
            if answer is not None:
                connection.recv(4096)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        stop.set()
        thread.join()
        for open_socket in (*connections, server):
            open_socket.close()


# -- what needs no network --------------------------------------------------------------------------------------------


def test_local_paths_pass_without_a_question(tmp_path, no_probe):
    """Catches a run on local files that waits for, or needs, a network."""
    for name, file in (("model", "config.json"), ("adapter", "adapter_config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}")
    require_available([str(tmp_path / "model"), str(tmp_path / "adapter")], [str(tmp_path / "rows.jsonl")])
    require_available([], [])


def test_what_can_be_no_name_is_said_without_a_question(tmp_path, no_probe):
    """Catches a mistyped path looked for on the Hub, whose answer is about the letters of repository names."""
    with pytest.raises(NotAvailableError) as error:
        require_available(["/not/there", str(tmp_path), "a/b/c"], ["rows.jsonl", "./here", "/not/there"])
    text = str(error.value)
    assert text.count("neither a folder nor a name on the Hub") == 2 and f"{str(tmp_path)!r} holds no config" in text
    assert text.count("neither a file or folder nor") == 3 and "'rows.jsonl' is neither" in text


@pytest.mark.parametrize("offline", [True, False])
def test_cached_names_pass_without_a_question(tmp_path, monkeypatch, no_probe, offline):
    """Catches a machine without network refused although everything is in its caches."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    cache_model(tmp_path, "somebody/Some-Model")
    (tmp_path / "datasets" / "somebody___some_data-2").mkdir(parents=True)
    (tmp_path / "datasets" / "imdb").mkdir()
    require_available(["somebody/Some-Model"], ["somebody/SomeData-2", "imdb"])


def test_model_without_configuration_is_not_cached(tmp_path, monkeypatch):
    """Catches a snapshot with a tokenizer alone taken for a model."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache_model(tmp_path, "somebody/model", file="tokenizer.json")
    with pytest.raises(NotAvailableError, match="the model somebody/model is neither"):
        require_available(["somebody/model"], [])


# -- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "datasets", "listed"),
    [
        (["a/x"], [], "the model a/x is neither"),
        ([], ["d/u"], "the dataset d/u is neither"),
        (["a/x", "b/y"], [], "the model a/x and the model b/y are neither"),
        (["a/x", "b/y"], ["d/u", "v"], "the model a/x, the model b/y, the dataset d/u and the dataset v are neither"),
    ],
)
def test_offline_names_everything_in_one_sentence(monkeypatch, no_probe, models, datasets, listed):
    """Catches a run that fails for one missing item after the other, and offline mode blamed on the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotAvailableError) as error:
        require_available(models, datasets)
    expected = f"HF_HUB_OFFLINE is set and {listed} a local path nor in the cache: unset it, or give local paths."
    assert str(error.value) == expected


def test_what_is_there_is_not_named(tmp_path, monkeypatch):
    """Catches a message that names what is already there."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache_model(tmp_path, "have/it")
    with pytest.raises(NotAvailableError) as error:
        require_available(["have/it", "miss/it"], [str(tmp_path)])
    assert (
        "miss/it" in str(error.value) and "have/it" not in str(error.value) and str(tmp_path) not in str(error.value)
    )


def test_a_silent_endpoint_is_given_up(monkeypatch):
    """Catches half a minute of retries per item where a firewall drops packets."""
    with endpoint(None) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        started = time.monotonic()
        with pytest.raises(NotAvailableError, match=rf"^{url} did not answer within 3 s, and the model a/x and the"):
            require_available(["a/x"], ["d/u"])
        assert time.monotonic() - started < availability.PROBE_SECONDS + 1


def test_the_wait_can_be_shortened(monkeypatch):
    """Catches a message that names another time than the one that was waited."""
    monkeypatch.setattr(availability, "PROBE_SECONDS", 0.25)
    with endpoint(None) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        started = time.monotonic()
        with pytest.raises(NotAvailableError, match=r"did not answer within 0\.25 s"):
            require_available(["a/x"], [])
        assert time.monotonic() - started < 1.5


def test_a_closed_port_is_given_up_at_once(monkeypatch):
    """Catches waiting out the whole time although the machine refused the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    assert not availability.endpoint_answers(f"http://127.0.0.1:{port}", seconds=5.0)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("status", [200, 401, 404, 503])
def test_any_http_answer_counts_as_reachable(monkeypatch, status):
    """Catches a working mirror, which answers its bare address with an error, reported as no network."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            require_available(["a/x"], ["d/u"])
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("answer", [b"SSH-2.0-server\r\n", b""], ids=["another protocol", "nothing"])
def test_an_endpoint_that_speaks_no_http_is_given_up_at_once(answer):
    """Catches a stack trace from a thread, and waiting out the whole time, for a port that is not a web server."""
    with endpoint(answer) as url:
        started = time.monotonic()
        assert not availability.endpoint_answers(url, seconds=2.0)
        assert time.monotonic() - started < 1.5


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_address_without_scheme_is_given_up_at_once():
    """Catches HF_ENDPOINT=my-mirror.example ending in a stack trace from a thread."""
    started = time.monotonic()
    assert not availability.endpoint_answers("my-mirror.example", seconds=2.0)
    assert time.monotonic() - started < 1.5
