"""A local server that speaks as much of the Hugging Face Hub's protocol as models need: push, pull, gates, tokens."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

CHUNK = 1 << 16
#: Suffixes that a repository's .gitattributes sends to large-file storage.
LARGE = (".safetensors", ".png", ".model")

Files = dict[str, bytes]


@dataclass
class Repository:
    """A model's repository.

    files: path → contents of the branch main, replaced as a whole for another commit. gated: True or "manual": only its
    owner and `granted` users get files. lost: files that are listed but not sent. past: revision → files. requests: of
    pull requests, the files proposed.
    """

    files: Files
    gated: bool | str = False
    lost: tuple[str, ...] = ()
    private: bool = False
    granted: set[str] = field(default_factory=set)
    past: dict[str, Files] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def commit(self) -> str:
        return commit_of(self.files)

    @classmethod
    def of(cls, folder: Path) -> Repository:
        """What lies in `folder`."""
        return cls({f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()})

    def at(self, revision: str) -> Files | None:
        return self.files if revision in ("main", self.commit) else self.past.get(revision)

    def put(self, files: Files, revision: str = "main") -> str:
        """Make `files` the next commit of a branch; older commits stay reachable by id."""
        commit = commit_of(files)
        if revision == "main":
            self.past[self.commit] = self.files
            self.files = files
        else:
            self.past[revision] = files
        self.past[commit] = files
        return commit


def commit_of(files: Files) -> str:
    return hashlib.sha1(b"".join(k.encode() + v for k, v in sorted(files.items()))).hexdigest()


@dataclass
class Hub:
    """Serves `repositories` at `url` while entered, and again at the same port when entered again.

    tokens: access token → (user, whether it may write). requests: (method, path, Range header or "") of every request.
    delay: seconds before each 64 KiB of a file. cut_after: bytes of a file after which the connection breaks, once.
    sent: bytes of files.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    tokens: dict[str, tuple[str, bool]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    delay: float = 0.0
    cut_after: int | None = None
    sent: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self, name: str = "") -> list[tuple[str, str]]:
        """(path, Range) of the files that were sent and whose path ends in `name`."""
        return [(p, r) for method, p, r in self.requests if method == "GET" and "/resolve/" in p and p.endswith(name)]


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message or code


_NAME = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, str]] = [
    ("GET", rf"/api/models/{_NAME}(?:/revision/([^/]+))?", "info"),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)(?:/(.+))?", "tree"),
    ("POST", rf"/api/models/{_NAME}/paths-info/([^/]+)", "paths"),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/repos/create", "create"),
    ("PUT", rf"/api/models/{_NAME}/settings", "settings"),
    ("POST", rf"/api/models/{_NAME}/tag/([^/]+)", "tag"),
    ("POST", rf"/api/models/{_NAME}/branch/([^/]+)", "branch"),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", rf"/large/{_NAME}/([0-9a-f]+)", "upload"),
    ("POST", rf"/large/{_NAME}/verify", "verify"),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", "commit"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, method: str) -> None:
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for wanted, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, path)
                if wanted == method and match:
                    getattr(self, f"_{name}")(*(unquote(g) if g else g for g in match.groups()))
                    return
            raise _Refused(404, "RepoNotFound")
        except _Refused as error:
            self._reply(error.status, {"error": error.message}, {"X-Error-Code": error.code} if error.code else {})

    def _reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if isinstance(body, dict) and "error" in body:
            self.send_header("X-Error-Message", body["error"])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- who asks, and for what ---

    def _user(self) -> tuple[str | None, bool]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token, (None, False))

    def _repository(self, name: str) -> Repository:
        """The one called `name`, if who asks may know of it."""
        user, _ = self._user()
        found = self.hub.repositories.get(name)
        if found is None or (found.private and user != name.split("/")[0]):
            raise _Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        return found

    def _readable(self, name: str, revision: str | None) -> tuple[Repository, Files]:
        repository = self._repository(name)
        files = repository.at(revision or "main")
        if files is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, files

    def _writable(self, name: str) -> Repository:
        user, writes = self._user()
        if user is None:
            raise _Refused(401, "RepoNotFound", "Invalid username or password.")
        repository = self._repository(name)
        if user != name.split("/")[0] or not writes:
            raise _Refused(403, "", "Forbidden: you must use a write token of its owner to upload")
        return repository

    def _json(self) -> Any:
        return json.loads(self.body)

    # --- reading ---

    def _info(self, name: str, revision: str | None) -> None:
        repository, files = self._readable(name, revision)
        siblings = [{"rfilename": n, "size": len(d), "blobId": etag_of(n, d)} for n, d in sorted(files.items())]
        sha = repository.commit if files is repository.files else commit_of(files)
        gated = "auto" if repository.gated is True else repository.gated
        info = {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "gated": gated, "tags": []}
        self._reply(200, info | {"private": repository.private, "cardData": card_data(files.get("README.md", b""))})

    def _tree(self, name: str, revision: str, folder: str | None) -> None:
        _, files = self._readable(name, revision)
        prefix = f"{folder}/" if folder else ""
        found = {n: d for n, d in files.items() if n.startswith(prefix)}
        if folder and not found:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist")
        self._reply(200, [_entry(n, d) for n, d in sorted(found.items())])

    def _paths(self, name: str, revision: str) -> None:
        _, files = self._readable(name, revision)
        form = self._json() if self.body[:1] == b"{" else {"paths": parse_qs(self.body.decode()).get("paths", [])}
        self._reply(200, [_entry(n, files[n]) for n in form["paths"] if n in files])

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository, files = self._readable(name, revision)
        user, _ = self._user()
        if repository.gated and user != name.split("/")[0] and user not in repository.granted:
            raise _Refused(403 if user else 401, "GatedRepo", f"Access to model {name} is restricted")
        if file not in files or file in repository.lost:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = files[file]
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(begin[1]) if begin else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("X-Repo-Commit", repository.commit if files is repository.files else commit_of(files))
        self.send_header("ETag", f'"{etag_of(file, data)}"')
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command != "HEAD":
            self._send(data, start)

    def _send(self, data: bytes, start: int) -> None:
        hub = self.hub
        try:
            for i in range(start, len(data), CHUNK):
                if hub.cut_after is not None and i >= hub.cut_after:
                    hub.cut_after = None
                    self.close_connection = True
                    return
                time.sleep(hub.delay)
                hub.sent += self.wfile.write(data[i : i + CHUNK])
        except (BrokenPipeError, ConnectionResetError):  # the client was interrupted
            pass

    def _whoami(self) -> None:
        user, writes = self._user()
        if user is None:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        role = {"displayName": "t", "role": "write" if writes else "read"}
        self._reply(200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": role}})

    # --- writing ---

    def _validate(self) -> None:
        try:
            card_data(self._json()["content"].encode())
        except ValueError as error:
            self._reply(400, {"errors": [{"message": str(error)}], "warnings": []})
        else:
            self._reply(200, {"errors": [], "warnings": []})

    def _create(self) -> None:
        user, writes = self._user()
        form = self._json()
        owner = form.get("organization") or user
        name = f"{owner}/{form['name']}"
        if user is None:
            raise _Refused(401, "", "Invalid username or password.")
        if owner != user or not writes:
            raise _Refused(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}"')
        answer = {"id": name, "name": name, "url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            self._reply(409, answer | {"error": "You already created this model repo"})
            return
        private = form.get("private") or form.get("visibility") == "private"
        self.hub.repositories[name] = Repository({".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._reply(200, answer)

    def _settings(self, name: str) -> None:
        repository, form = self._writable(name), self._json()
        repository.gated = form.get("gated", repository.gated)
        self._reply(200, form)

    def _tag(self, name: str, revision: str) -> None:
        repository = self._writable(name)
        _, files = self._readable(name, revision)
        repository.past[self._json()["tag"]] = files
        self._reply(200, {})

    def _branch(self, name: str, branch: str) -> None:
        repository = self._writable(name)
        if branch == "main" or branch in repository.past:
            raise _Refused(409, "", f"Reference already exists: {branch}")
        repository.past[branch] = repository.files
        self._reply(200, {})

    def _preupload(self, name: str, revision: str) -> None:
        self._writable(name)
        _, files = self._readable(name, revision)
        self._reply(
            200,
            {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": etag_of(f["path"], files[f["path"]]) if f["path"] in files else None,
                    }
                    for f in self._json()["files"]
                ]
            },
        )

    def _batch(self, name: str) -> None:
        repository = self._writable(name)
        objects = []
        for o in self._json()["objects"]:
            upload = {"href": f"{self.hub.url}/large/{name}/{o['oid']}", "header": {}}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/large/{name}/verify", "header": {}}}
            objects.append({**o, **({} if o["oid"] in repository.large else {"actions": actions})})
        self._reply(200, {"transfer": "basic", "objects": objects})

    def _upload(self, name: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "", "the content does not have this SHA-256")
        self.hub.repositories[name].large[oid] = self.body  # as in the signed URL of a store: no token
        self._reply(200, {})

    def _verify(self, name: str) -> None:
        form = self._json()
        if len(self._writable(name).large.get(form["oid"], b"")) != form["size"]:
            raise _Refused(400, "", "the object has another size")
        self._reply(200, {})

    def _commit(self, name: str, revision: str) -> None:
        repository = self._writable(name)
        files = dict(self._readable(name, revision)[1])
        change: dict[str, Callable[[dict], object]] = {
            "header": lambda v: None,
            "file": lambda v: files.update({v["path"]: base64.b64decode(v["content"])}),
            "lfsFile": lambda v: files.update({v["path"]: repository.large[v["oid"]]}),
            "deletedFile": lambda v: files.pop(v["path"]),
        }
        for line in self.body.splitlines():
            operation = json.loads(line)
            change[operation["key"]](operation["value"])
        as_request = "create_pr" in self.query
        commit = repository.put(files, "refs/pr/1" if as_request else revision)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "hookOutput": ""}
        self._reply(200, answer | {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1" if as_request else None})


def etag_of(name: str, data: bytes) -> str:
    """As git names a blob, or as large-file storage does."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": etag_of(name, data)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def card_data(readme: bytes) -> dict[str, Any] | None:
    """The YAML block in front of a card, None without one; ValueError if it is none."""
    import yaml

    match = re.match(r"---\n(.*?\n)---\n", readme.decode(), re.DOTALL)
    if match is None:
        return None
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata is no YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("the metadata is no mapping")
    return data
