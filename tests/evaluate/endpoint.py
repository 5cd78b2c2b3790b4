"""A local server that speaks as much of OpenAI's chat protocol as a judge needs, and misbehaves on demand."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from dirotq.dirotq_core.evaluate.judge.endpoint import Endpoint


@dataclass
class Answer:
    """What is sent: a status with headers and a body, or a connection that breaks."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


def said(text: object) -> Answer:
    """A proper answer."""
    return Answer(json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


@dataclass
class Question:
    """A request, taken apart. texts, images: of all its messages, in order."""

    body: dict
    headers: dict[str, str]
    texts: list[str]
    images: list[np.ndarray]

    @property
    def turns(self) -> int:
        return len(self.body["messages"])


@dataclass
class Server:
    """answer: what to say to a question; may raise nothing. questions: all that came."""

    answer: Callable[[Question], Answer]
    questions: list[Question] = field(default_factory=list)
    delay: float = 0.0
    under_way: int = 0
    most: int = 0

    def __enter__(self) -> Server:
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def count(self, by: int) -> None:
        with self._lock:
            self.under_way += by
            self.most = max(self.most, self.under_way)


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            server.count(1)
            time.sleep(server.delay)
            assert self.path == "/v1/chat/completions"
            question = _question(json.loads(data), dict(self.headers))
            server.questions.append(question)
            answer = server.answer(question)
            server.count(-1)
            if answer.cut:
                self.close_connection = True
                return
            try:
                self._send(answer)
            except (BrokenPipeError, ConnectionResetError):  # nobody waits any more
                pass

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

    return Handler


def _question(body: dict, headers: dict[str, str]) -> Question:
    texts, images = [], []
    for message in body["messages"]:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                kind, _, data = part["image_url"]["url"].partition(",")
                assert kind == "data:image/png;base64"
                images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    return Question(body, headers, texts, images)


def quick(server: Server, **changes: object) -> Endpoint:
    """The judge that asks it, without long pauses."""
    return Endpoint(server.url, "judge-7b", **{"pause": 0.01, "tries": 3, "timeout": 5, **changes})
