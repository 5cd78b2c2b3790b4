"""A real ComfyUI server in a temporary base directory, and a client of its HTTP API."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: How a server runs: on the CPU, unless the environment says otherwise (`COMFYUI_ARGS=""` for a GPU).
ARGUMENTS = shlex.split(os.environ.get("COMFYUI_ARGS", "--cpu"))
#: The pack's folder in custom_nodes, and so the name under which ComfyUI serves its help pages and templates.
PACK = "dirotq"
START_SECONDS = 180


class GraphError(Exception):
    """ComfyUI refused a prompt or a node failed. `kind` is the exception's class, `node` the node type."""

    def __init__(self, message: str, kind: str = "", node: str = ""):
        super().__init__(message)
        self.kind, self.node = kind, node


class Client:
    """The HTTP API of a running server."""

    def __init__(self, url: str, base: Path):
        self.url, self.base = url, base

    def get(self, path: str) -> Any:
        """The JSON at `path`."""
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read()

    def post(self, path: str, body: Any) -> Any:
        """Post JSON; the JSON of the answer, or None where it is empty. GraphError with what the server said."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                data = response.read()
        except urllib.error.HTTPError as error:
            raise GraphError(_refusal(error.read())) from error
        return json.loads(data) if data else None

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def queue(self, prompt: Mapping[str, Any], client_id: str | None = None) -> str:
        """Queue an API-format prompt; its id. GraphError if validation fails."""
        return self.post("/prompt", {"prompt": prompt, "client_id": client_id or uuid.uuid4().hex})["prompt_id"]

    def progress(
        self, prompt: Mapping[str, Any], stop: Callable[[str, int, int], bool] | None = None, timeout: float = 120
    ) -> list[tuple[str, int, int]]:
        """Run a prompt; (node, value, maximum) of every progress message that a browser would have got meanwhile.

        stop: of such a message, whether to interrupt the prompt now, which then is a GraphError.
        """
        return asyncio.run(asyncio.wait_for(self._progress(prompt, stop), timeout))

    async def _progress(
        self, prompt: Mapping[str, Any], stop: Callable[[str, int, int], bool] | None
    ) -> list[tuple[str, int, int]]:
        import aiohttp

        client_id, seen = uuid.uuid4().hex, []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{self.url}/ws?clientId={client_id}") as ws:
            number = await asyncio.to_thread(self.queue, prompt, client_id)
            async for message in ws:
                body = json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else {}
                data = body.get("data", {})
                if body.get("type") == "progress":
                    seen.append((data["node"], data["value"], data["max"]))
                    if stop is not None and stop(*seen[-1]):
                        await asyncio.to_thread(self.interrupt)
                        stop = None
                if body.get("type") == "executing" and data["node"] is None and data["prompt_id"] == number:
                    break
        await asyncio.to_thread(self.wait, number)
        return seen

    def wait(self, prompt_id: str, timeout: float = 120) -> dict[str, Any]:
        """Node id → outputs of a queued prompt. GraphError if a node failed or was interrupted."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                _raise_for_status(entry)
                return entry["outputs"]
            time.sleep(0.1)
        self.interrupt()
        raise TimeoutError(f"prompt {prompt_id} took longer than {timeout} s")

    def run(self, prompt: Mapping[str, Any], timeout: float = 120) -> dict[str, Any]:
        """`queue` and `wait`."""
        return self.wait(self.queue(prompt), timeout)

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def wait_until_running(self, prompt_id: str, timeout: float = 30) -> None:
        """Return once the prompt has left the waiting part of the queue and its first node runs."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if any(item[1] == prompt_id for item in self.get("/queue")["queue_running"]):
                return
            time.sleep(0.05)
        raise TimeoutError(f"prompt {prompt_id} did not start within {timeout} s")

    def file(self, reference: Mapping[str, str]) -> Path:
        """The file that an output like {"filename", "subfolder", "type"} names."""
        return self.base / reference["type"] / reference["subfolder"] / reference["filename"]


def _refusal(body: bytes) -> str:
    try:
        answer = json.loads(body)
        details = [e["message"] + ": " + e["details"] for n in answer["node_errors"].values() for e in n["errors"]]
        return "; ".join([answer["error"]["message"], *details])
    except (KeyError, TypeError, ValueError, AttributeError):
        return body.decode(errors="replace")


def _raise_for_status(entry: Mapping[str, Any]) -> None:
    for kind, message in entry["status"]["messages"]:
        if kind == "execution_error":
            raise GraphError(message["exception_message"].strip(), message["exception_type"], message["node_type"])
        if kind == "execution_interrupted":
            raise GraphError("interrupted", "InterruptProcessingException", message.get("node_type", ""))
    if entry["status"]["status_str"] != "success":
        raise GraphError(f"prompt ended with {entry['status']}")


class Server:
    """A ComfyUI process, started by `with`, stopped at its end.

    packs: folder name in custom_nodes → folder to link there. env: variables beside our own, e.g. another HF_ENDPOINT.
    arguments: of main.py, in place of `ARGUMENTS`.
    """

    def __init__(
        self, checkout: Path, base: Path, packs: Mapping[str, Path], env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = ARGUMENTS,
    ):  # fmt: skip
        self.checkout, self.base, self.env, self.arguments = checkout, base, env or {}, arguments
        for name in ("custom_nodes", "input", "models", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in packs.items():
            link = base / "custom_nodes" / name
            if not link.is_symlink():  # a second server in the same base
                link.symlink_to(folder, target_is_directory=True)
        self.log_file = base / "server.log"
        self.client: Client

    def __enter__(self) -> Server:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.client = Client(f"http://127.0.0.1:{port}", self.base)
        command = [sys.executable, str(self.checkout / "main.py"), *self.arguments, "--port", str(port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--disable-auto-launch"]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | self.env
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=self.base)
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-4000:]}")
            try:
                self.client.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI was not up after {START_SECONDS} s:\n{self.log()[-4000:]}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        """What the server has printed, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log_file.read_text(encoding="utf-8", errors="replace"))

    def import_seconds(self, pack: str = PACK) -> float:
        """What ComfyUI says the import of a pack took."""
        found = re.search(rf"([\d.]+) seconds(?: \(IMPORT FAILED\))?: \S*custom_nodes/{pack}\s", self.log())
        if found is None:
            raise ValueError(f"the log has no import time of {pack}:\n{self.log()[-4000:]}")
        return float(found[1])
