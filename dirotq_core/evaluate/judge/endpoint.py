"""A judge behind an endpoint that speaks OpenAI's chat protocol: vLLM, SGLang, llama.cpp, Ollama and others."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from .protocol import JudgeError, Message, QuestionRefused

#: The key, if the endpoint wants one, is read from here and written nowhere.
KEY_VARIABLE = "DIROTQ_JUDGE_API_KEY"
#: Statuses after which the same request may succeed.
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
#: Statuses that may be about this one question: a content filter, or pictures that are too large.
OF_A_QUESTION = (400, 413, 422)
LONGEST_PAUSE = 60.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Endpoint:
    """Call it with messages, from any thread; it returns the reply.

    Attributes:
        url: up to and including ``/v1``. model: its name there. max_tokens: of a reply.
        tries: of one request. pause: seconds before the second try, doubled before each further one.
        timeout: seconds to wait for an answer.

    Raises:
        ValueError: `url` is not one.
    """

    url: str
    model: str
    max_tokens: int = 512
    tries: int = 6
    pause: float = 1.0
    timeout: float = 300.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the judge's address {self.url!r} must begin with http:// or https://")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                f"the judge's address must hold neither a password nor a query; a key goes to {KEY_VARIABLE}"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What the replies depend on."""
        return {"model": self.model, "url": self.url, "max_tokens": self.max_tokens}

    def __call__(self, messages: Sequence[Message]) -> str:
        """The reply. JudgeError if there is none, QuestionRefused if another question may have one."""
        body = {
            "model": self.model,
            "messages": [_message(m) for m in messages],
            "temperature": 0,
            "seed": 0,
            "max_tokens": self.max_tokens,
        }
        data = json.dumps(body).encode()
        problem, asked = "", None
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self._wait(attempt, asked))
            try:
                return _reply(self._post(data))
            except urllib.error.HTTPError as error:
                problem, asked = _explain(error), error.headers.get("Retry-After")
                if error.code not in PASSING:
                    kind = QuestionRefused if error.code in OF_A_QUESTION else JudgeError
                    raise kind(f"the judge at {self.url} refused: {problem}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem, asked = f"{type(error).__name__}: {str(error)[:200]}", None
        raise JudgeError(f"the judge at {self.url} failed {self.tries} times, at last with {problem}")

    def _wait(self, attempt: int, asked: str | None) -> float:
        seconds = self.pause * 2 ** (attempt - 1)
        if asked and asked.strip().isdecimal():
            seconds = max(seconds, float(asked))
        return min(seconds, LONGEST_PAUSE)

    def _post(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", data, headers)
        with _OPENER.open(request, timeout=self.timeout) as response:
            return response.read()


def _explain(error: urllib.error.HTTPError) -> str:
    try:
        text = error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    return f"status {error.code}, {' '.join(text.split())[:200] or error.reason}"


def _message(message: Message) -> dict[str, Any]:
    if message.role == "assistant":
        return {"role": "assistant", "content": "".join(p for p in message.parts if isinstance(p, str))}
    return {"role": message.role, "content": [_part(p) for p in message.parts]}


def _part(part: str | np.ndarray) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(part).save(buffer, format="png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _reply(body: bytes) -> str:
    """The text of an answer; ValueError if it is none, as from a proxy that answers for a dead server."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"an answer without choices: {body[:100]!r}") from error
    if isinstance(content, list):
        content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    return content if isinstance(content, str) else ""  # null: it said nothing, and is reminded
