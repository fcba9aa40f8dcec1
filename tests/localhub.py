"""A small Hub on loopback for the tests: real HTTP, so that the real clients run.

    with LocalHub(folder) as hub:      # a client process needs HF_ENDPOINT=hub.endpoint before it imports anything
        hub.fault("POST", "/commit/", status=500, times=2)
        hub.repo("alice/x").files()    # path -> bytes at the head of main

Large files go through git-LFS, or with `xet=True` through hf_xet's own file-backed storage. Bodies are kept in memory.
"""

import base64
import hashlib
import json
import re
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".png")
TOKENS = {  # token -> (user, may write)
    "hf_alice_write_0123456789abcdefghijklmno": ("alice", True),
    "hf_alice_read_0123456789abcdefghijklmnop": ("alice", False),
    "hf_bob_write_0123456789abcdefghijklmnopq": ("bob", True),
}
ALICE, ALICE_READ, BOB = TOKENS


class Refused(Exception):
    """An answer that is an error: status, text, and the code by which the client tells what is missing."""

    def __init__(self, status: int, text: str, code: str | None = None, body: dict | None = None):
        self.status, self.text, self.code, self.body = status, text, code, body or {"error": text}


@dataclass
class Commit:
    """One state of a repository: path -> entry, where an entry is `{"oid", "size"}` and `"lfs"`, `"xet"`."""

    entries: dict[str, dict]
    title: str
    parent: str | None
    author: str | None


@dataclass
class Repo:
    """Branches, tags and pull requests (`refs`), and commits, newest last."""

    hub: "LocalHub"
    name: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    num_pull_requests: int = 0

    def add(self, ref: str, entries: dict, title: str, author: str | None) -> str:
        parent = self.refs.get(ref)
        sha = hashlib.sha1(repr((entries, title, parent, len(self.commits))).encode()).hexdigest()
        self.commits[sha] = Commit(entries, title, parent, author)
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str:
        """Sha of a branch, tag, full ref or sha."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.refs[ref]
        if revision in self.commits:
            return revision
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str = "main") -> list[str]:
        """Shas from the first commit to `revision`."""
        shas, sha = [], self.resolve(revision)
        while sha is not None:
            shas.append(sha)
            sha = self.commits[sha].parent
        return shas[::-1]

    def titles(self, revision: str = "main") -> list[str]:
        return [self.commits[sha].title for sha in self.history(revision)]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content of every file; None for what lies in Xet storage."""
        entries = self.commits[self.resolve(revision)].entries
        return {path: self.hub.blobs.get(entry.get("lfs") or entry["oid"]) for path, entry in entries.items()}


class LocalHub:
    """The server; see the head of this file."""

    def __init__(self, folder: str | Path, xet: bool = False):
        self.storage = Path(folder) / "xet" if xet else None
        if xet:
            self.storage.mkdir(parents=True, exist_ok=True)
        self.orgs: dict[str, set[str]] = {}  # organisation -> users who may write
        self.repos: dict[tuple[str, str], Repo] = {}  # (models or datasets, name)
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, object]] = []  # method, path, status
        self.faults: list[dict] = []
        self.lock = threading.RLock()
        self._start(0)

    def _start(self, port: int) -> None:
        self.gone = False
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def go_away(self) -> None:
        """Stops listening, and cuts connections that are kept open: clients meet a refused connection."""
        self.gone = True
        self.server.shutdown()
        self.server.server_close()

    def come_back(self) -> None:
        """Listens again, at the same address, with everything it held."""
        self._start(self.server.server_address[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.go_away()

    def fault(self, method: str, pattern: str, status: int = 500, times: int = 1, cut: bool = False) -> None:
        """The next `times` requests whose path has `pattern`: `status`, or the connection cut in mid-body."""
        self.faults.append({"method": method, "pattern": re.compile(pattern), "status": status, "times": times})
        self.faults[-1]["cut"] = cut

    def repo(self, name: str, kind: str = "models") -> Repo:
        return self.repos[kind, name]

    def statuses(self, method: str, pattern: str) -> list:
        """Statuses of the requests so far whose path has `pattern`."""
        return [status for asked, path, status in self.requests if asked == method and re.search(pattern, path)]

    def keep(self, content: bytes) -> dict:
        """Stores a regular file; its entry."""
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.blobs[oid] = content
        return {"oid": oid, "size": len(content)}


def xet_hashes(storage: Path) -> dict[str, str]:
    """sha256 -> Xet hash of every file in hf_xet's shards: 48-byte records, hashes as four little-endian words."""

    def text(raw: bytes) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))

    found = {}
    for shard in storage.glob("xet/xorbs/shards/*.mdb"):
        data, at = shard.read_bytes(), 48
        while (head := data[at : at + 48])[:32] != b"\xff" * 32:
            flags, num_entries = struct.unpack_from("<II", head, 32)
            at += 48 * (1 + num_entries + (num_entries if flags >> 31 else 0))
            if flags >> 30 & 1:
                found[text(data[at : at + 32])] = text(head[:32])
                at += 48
    return found


API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
WEB = r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", API + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("POST", API + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", API + r"/refs", "refs"),
    ("POST", API + r"/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", API + r"/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", API + r"/xet-(?P<access>read|write)-token/(?P<revision>[^/]+)", "xet_token"),
    ("POST", WEB + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
    ("GET", WEB + r"/(?:resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    """One request: an injected fault, or a method of `ROUTES`."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1

    def log_message(self, *_):
        pass

    # -- plumbing -----------------------------------------------------------------------------------------------------

    def handle_request(self):
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.cut, status = False, None
        if self.hub.gone:
            self.close_connection = True
            return
        try:
            self._inject_fault()
            self.payload = self._read()
            self.user, self.may_write = self._who()
            status = self._dispatch("GET" if self.command == "HEAD" else self.command, url.path)
        except Refused as refused:
            status = refused.status
            headers = {"X-Error-Message": refused.text}
            self.answer(refused.body, status, headers | ({"X-Error-Code": refused.code} if refused.code else {}))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection, status = True, "cut"
        finally:
            self.hub.requests.append((self.command, self.path, status))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def _inject_fault(self):
        for fault in self.hub.faults:
            if fault["times"] > 0 and fault["method"] == self.command and fault["pattern"].search(self.path):
                fault["times"] -= 1
                if not fault["cut"]:
                    self._read()
                    raise Refused(fault["status"], "injected fault")
                length = int(self.headers.get("Content-Length") or 0)
                if length:  # an upload is cut while it arrives, a download while it leaves
                    self.rfile.read(length // 2)
                    self.connection.shutdown(2)
                    raise ConnectionResetError
                self.cut = True

    def _dispatch(self, method: str, path: str):
        for expected, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if method == expected and match:
                arguments = {key: unquote(value) if value else None for key, value in match.groupdict().items()}
                if "kind" in arguments:
                    arguments["kind"] = arguments["kind"] or "models"
                with self.hub.lock:
                    return getattr(self, name)(**arguments)
        raise Refused(404, f"no such route: {method} {path}")

    def _read(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length)
        if len(content) != length:
            raise ConnectionResetError
        return content

    def answer(self, content=b"", status: int = 200, headers: dict | None = None) -> int:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json"} | (headers or {})
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.cut else content)
        self.wfile.flush()
        if self.cut and self.command != "HEAD":
            self.connection.shutdown(2)
            raise ConnectionResetError
        return status

    def answer_file(self, content: bytes, headers: dict) -> int:
        """A file or the range of it that was asked for."""
        asked = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", ""))
        if not asked:
            return self.answer(content, 200, headers)
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.answer(content[first : last + 1], 206, headers)

    # -- who may do what ----------------------------------------------------------------------------------------------

    def _who(self) -> tuple[str | None, bool]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token, (None, False))

    def _is_member(self, namespace: str) -> bool:
        return self.user is not None and (self.user == namespace or self.user in self.hub.orgs.get(namespace, ()))

    def _require_writer(self, name: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if not self.may_write or not self._is_member(name.split("/")[0]):
            raise Refused(403, f"{self.user} may not write to {name}")

    def _repo(self, kind: str, name: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self._is_member(name.split("/")[0])):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._require_writer(name)
        return repo

    # -- reading ------------------------------------------------------------------------------------------------------

    def whoami(self):
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        return self.answer({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def info(self, kind, name, revision=None):
        repo = self._repo(kind, name)
        sha = repo.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha].entries)]
        return self.answer({"id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def _entry(self, path: str, entry: dict) -> dict:
        listed = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
        if "lfs" in entry:
            listed["lfs"] = {"oid": entry["lfs"], "size": entry["size"], "pointerSize": 130}
        return listed | ({"xetHash": entry["xet"]} if entry.get("xet") else {})

    def tree(self, kind, name, revision, folder=None):
        repo = self._repo(kind, name)
        entries = repo.commits[repo.resolve(revision)].entries
        prefix = f"{folder}/" if folder else ""
        listed = [self._entry(path, entry) for path, entry in sorted(entries.items()) if path.startswith(prefix)]
        if "recursive" not in self.query:
            listed = [entry for entry in listed if "/" not in entry["path"][len(prefix) :]]
        if folder and not listed:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        return self.answer(listed)

    def paths_info(self, kind, name, revision):
        repo = self._repo(kind, name)
        entries = repo.commits[repo.resolve(revision)].entries
        body = self.payload.decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        return self.answer([self._entry(path, entries[path]) for path in paths if path in entries])

    def refs(self, kind, name):
        heads = {ref: sha for ref, sha in self._repo(kind, name).refs.items() if ref.startswith("refs/heads/")}
        branches = [{"name": ref[11:], "ref": ref, "targetCommit": sha} for ref, sha in heads.items()]
        return self.answer({"branches": branches, "converts": [], "tags": []})

    def resolve(self, kind, name, revision, path):
        repo = self._repo(kind, name)
        sha = repo.resolve(revision)
        entry, headers = repo.commits[sha].entries.get(path), {"X-Repo-Commit": sha}
        if entry is None:
            return self.answer({"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
        if "lfs" not in entry:
            return self.answer_file(self.hub.blobs[entry["oid"]], headers | {"ETag": f'"{entry["oid"]}"'})
        # another host name, as the real one's: the client does not follow it with a HEAD, nor sends its token there
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
        headers |= {"X-Linked-Etag": f'"{entry["lfs"]}"', "X-Linked-Size": entry["size"]}
        if entry.get("xet"):
            route = f"{self.hub.endpoint}/api/{kind}/{name}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": entry["xet"], "X-Xet-Refresh-Route": route}
        return self.answer(b"", 302, headers | {"Location": f"{elsewhere}/cdn/{entry['lfs']}"})

    def cdn(self, oid):
        return self.answer_file(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    # -- writing ------------------------------------------------------------------------------------------------------

    def create(self):
        asked = json.loads(self.payload)
        namespace = asked.get("organization") or self.user
        kind, name = f"{asked.get('type') or 'model'}s", f"{namespace}/{asked['name']}"
        self._require_writer(name)
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.hub.repos:
            text = "You already created this repo"
            raise Refused(409, text, body={"error": text, "url": url})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repo = self.hub.repos[kind, name] = Repo(self.hub, name, private)
        repo.add("refs/heads/main", {".gitattributes": self.hub.keep(b"")}, "initial commit", self.user)
        return self.answer({"url": url, "name": name, "id": name})

    def branch(self, kind, name, branch):
        repo, ref = self._repo(kind, name, write=True), f"refs/heads/{branch}"
        if ref in repo.refs:
            raise Refused(409, f"Reference {ref} already exists")
        repo.refs[ref] = repo.resolve(json.loads(self.payload or b"{}").get("startingPoint") or "main")
        return self.answer({})

    def validate(self):
        text = json.loads(self.payload)["content"]
        try:
            head = re.match(r"---\n(.*?)\n---\s", text, re.DOTALL)
            errors = [] if head is None or isinstance(yaml.safe_load(head[1]), dict) else ["must be a mapping"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        messages = [{"message": message} for message in errors]
        return self.answer({"errors": messages, "warnings": []}, 400 if errors else 200)

    def preupload(self, kind, name, revision):
        repo = self._repo(kind, name, write="create_pr" not in self.query)
        entries, listed = repo.commits[repo.resolve(revision)].entries, []
        for file in json.loads(self.payload)["files"]:
            old = entries.get(file["path"], {})
            listed.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": old.get("lfs") or old.get("oid"),
                }
            )
        return self.answer({"files": listed})

    def lfs_batch(self, kind, name):
        self._repo(kind, name)
        objects = []
        for item in json.loads(self.payload)["objects"]:
            wanted = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                href = f"{self.hub.endpoint}/lfs/{item['oid']}"
                wanted["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(wanted)
        return self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.payload).hexdigest() != oid:
            raise Refused(400, "sha256 mismatch")
        self.hub.blobs[oid] = self.payload
        return self.answer()

    def lfs_verify(self, oid):
        if oid not in self.hub.blobs:
            raise Refused(404, "object not found")
        return self.answer({})

    def xet_token(self, kind, name, access, revision):
        self._repo(kind, name)
        if self.hub.storage is None:
            raise Refused(404, "this hub has no Xet storage")
        url, expires = f"local://{self.hub.storage}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expires}
        return self.answer({"casUrl": url, "exp": expires, "accessToken": "xet"}, headers=headers)

    def commit(self, kind, name, revision):
        as_request = "create_pr" in self.query
        repo = self._repo(kind, name, write=not as_request)
        parent = repo.resolve(revision)
        entries, title = dict(repo.commits[parent].entries), ""
        for line in self.payload.splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                entries[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                entries[value["path"]] = self._lfs_entry(value)
            elif entries.pop(value["path"], None) is None:
                raise Refused(404, f"{value['path']} does not exist", "EntryNotFound")
        url = f"{self.hub.endpoint}/{name}"
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if as_request:
            repo.num_pull_requests += 1
            ref = f"refs/pr/{repo.num_pull_requests}"
            repo.refs[ref] = parent
        elif ref not in repo.refs:
            raise Refused(404, f"{revision} is not a branch", "RevisionNotFound")
        sha = repo.add(ref, entries, title, self.user)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
        if as_request:
            answer["pullRequestUrl"] = f"{url}/discussions/{repo.num_pull_requests}"
        return self.answer(answer)

    def _lfs_entry(self, value: dict) -> dict:
        xet = xet_hashes(self.hub.storage).get(value["oid"]) if self.hub.storage else None
        if xet is None and value["oid"] not in self.hub.blobs:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
        pointer = hashlib.sha1(value["oid"].encode()).hexdigest()
        size = value.get("size") or len(self.hub.blobs[value["oid"]])
        return {"oid": pointer, "size": size, "lfs": value["oid"], "xet": xet}
