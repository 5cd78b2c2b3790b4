"""A local server that speaks as much of the Hugging Face Hub's protocol as a download of a model needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK = 1 << 16


@dataclass
class Repository:
    """files: path → contents, replaced as a whole for another commit. gated: refused to everyone.

    lost: files that are listed but not sent.
    """

    files: dict[str, bytes]
    gated: bool = False
    lost: tuple[str, ...] = ()

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(k.encode() + v for k, v in sorted(self.files.items()))).hexdigest()

    @classmethod
    def of(cls, folder: Path) -> Repository:
        """What lies in `folder`."""
        return cls({str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()})


@dataclass
class Hub:
    """Serves `repositories` at `url` while entered, and again at the same port when entered again.

    requests: (method, path, Range header or "") of every request. delay: seconds before each 64 KiB of a file.
    cut_after: bytes of a file after which the connection breaks, once. sent: bytes of files.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    delay: float = 0.0
    cut_after: int | None = None
    sent: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self, name: str = "") -> list[tuple[str, str]]:
        """(path, Range) of the files that were sent and whose path ends in `name`."""
        return [(p, r) for method, p, r in self.requests if method == "GET" and "/resolve/" in p and p.endswith(name)]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = info or file
            repository = hub.repositories.get(found[1]) if found else None
            if found is None or repository is None:
                return self._refuse(404, "RepoNotFound")
            if repository.gated:
                return self._refuse(403, "GatedRepo")
            if found[2] not in (None, "main", repository.commit):
                return self._refuse(404, "RevisionNotFound")
            if info:
                return self._info(info[1], repository)
            if found[3] not in repository.files or found[3] in repository.lost:
                return self._refuse(404, "EntryNotFound")
            self._file(repository, repository.files[found[3]], body)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _info(self, name: str, repository: Repository) -> None:
            siblings = [{"rfilename": n, "size": len(d), "blobId": _etag(d)} for n, d in repository.files.items()]
            answer = json.dumps({"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def _file(self, repository: Repository, data: bytes, body: bool) -> None:
            begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(begin[1]) if begin else 0
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("X-Repo-Commit", repository.commit)
            self.send_header("ETag", f'"{_etag(data)}"')
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if body:
                self._send(data, start)

        def _send(self, data: bytes, start: int) -> None:
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

    return Handler


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
