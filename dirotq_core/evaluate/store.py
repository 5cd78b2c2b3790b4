"""Results by key in files of JSON lines, appended as they come, so that a killed run loses nothing it has finished."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any


class Results:
    """Values by key in ``folder/name.RANK.jsonl``; every process reads all ranks' files and writes its own.

    A value belongs to a stamp, a text that tells what it was computed of. A key has a value for each stamp: which file
    is read last says nothing about which value is newer, as the next run may have another number of processes.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0):
        self.folder = folder
        self.file = folder / f"{name}.{rank}.jsonl"
        self._lock = Lock()
        self._known: dict[tuple[str, str], Any] = {}
        ranks = (
            f for f in folder.glob("*.jsonl") if f.name.removeprefix(f"{name}.").removesuffix(".jsonl").isdecimal()
        )
        for file in sorted(ranks):
            for key, stamp, value in _lines(file):
                self._known[key, stamp] = value

    def get(self, key: str, stamp: str) -> Any:
        """The value, None if there is none."""
        return self._known.get((key, stamp))

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """Yields ``put(key, stamp, value)``, which may be called from several threads."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        _end_line(self.file)
        with self.file.open("a", encoding="utf-8") as f:

            def put(key: str, stamp: str, value: Any) -> None:
                line = json.dumps([key, stamp, value], ensure_ascii=False) + "\n"
                with self._lock:
                    f.write(line)
                    f.flush()
                    self._known[key, stamp] = value

            yield put
            os.fsync(f.fileno())


def _lines(file: Path) -> Iterator[tuple[str, str, Any]]:
    for line in file.read_bytes().splitlines():
        try:
            key, stamp, value = json.loads(line)
        except ValueError:  # the line at which the run was killed
            continue
        yield key, stamp, value


def _end_line(file: Path) -> None:
    """Close a line that a killed run left open."""
    if file.exists() and (data := file.read_bytes()) and not data.endswith(b"\n"):
        with file.open("ab") as f:
            f.write(b"\n")
