"""The folder in which a run keeps its finished parts, so that a killed run can go on.

It lies beside the output as ``.NAME.partial``. A part is a safetensors file and a record, a JSON file beside it with
the part's size and SHA-256; the record is written after the part, and each appears under its name by a rename after its
bytes are on the disk. A part without a fitting record does not exist.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..safetensors_file import write_safetensors

RUN, LOCK, ASSEMBLED = "run.json", "lock", "assembled"


class ResumeError(ValueError):
    """The work folder belongs to another run than the one asked for; the message names what differs."""


class Journal:
    """The work folder of one run, locked while it is open.

    Args:
        target: the output, beside which the work folder lies.
        fingerprint: everything the result depends on, by name. That of a work folder with finished parts must be equal.
        owner: False for a process that only helps the one that has locked the folder.

    Raises:
        ResumeError: another process works on it, or parts of it were made with another fingerprint.
    """

    def __init__(self, target: Path, fingerprint: Mapping[str, Any], owner: bool = True):
        self.folder = work_folder(target)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / LOCK)
        try:
            if owner:
                self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ResumeError(f"another process is working in {self.folder}") from error
        try:
            self.resumed = self._check(dict(fingerprint))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock.is_locked and not self._parts():
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing to go on from, and in the way of another run
        self.close()

    def close(self) -> None:
        self._lock.release()

    def _parts(self) -> list[Path]:
        """The records of finished parts."""
        return [f for f in self.folder.glob("*.json") if f.name != RUN]

    def _check(self, fingerprint: dict[str, Any]) -> bool:
        file = self.folder / RUN
        fingerprint = json.loads(json.dumps(fingerprint))
        if not file.exists():
            return self._begin(fingerprint)
        try:
            before = json.loads(file.read_bytes())
        except ValueError as error:
            raise ResumeError(f"{file} is damaged ({error}); remove {self.folder} to start over") from error
        changes = differences(before, fingerprint)
        if changes and not self._parts():
            return self._begin(fingerprint)
        if changes:
            raise ResumeError(
                f"{self.folder} holds an unfinished run that was started differently: {'; '.join(changes[:3])}"
                + (f"; and {len(changes) - 3} more differences" if len(changes) > 3 else "")
                + ". Run it as it was started to resume it, or remove that folder to start over"
            )
        return True

    def _begin(self, fingerprint: dict[str, Any]) -> bool:
        (self.folder / ASSEMBLED).unlink(missing_ok=True)
        write_atomically(self.folder / RUN, json.dumps(fingerprint, indent=1).encode())
        return False

    def part(self, name: str) -> Path:
        """Where the part called `name` lies, finished or not."""
        return self.folder / f"{name}.safetensors"

    def record(self, name: str) -> Any:
        """What was noted of the finished part called `name`; None if it is not finished or its bytes have changed."""
        file = self.part(name)
        try:
            record = json.loads(file.with_suffix(".json").read_bytes())
            if file.stat().st_size != record["bytes"] or file_digest(file) != record["sha256"]:
                return None
            return record["note"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def commit(
        self, name: str, tensors: Mapping[str, torch.Tensor], note: Any, metadata: dict[str, str] | None = None
    ) -> None:
        """Finish the part called `name`."""
        file = self.part(name)
        file.with_suffix(".json").unlink(missing_ok=True)
        temporary = file.with_suffix(".tmp")
        try:
            write_safetensors(temporary, tensors, metadata)
            sync(temporary)
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)  # on a full disk it would be in the way
            raise
        record = {"bytes": file.stat().st_size, "sha256": file_digest(file), "note": note}
        write_atomically(file.with_suffix(".json"), json.dumps(record).encode())

    @property
    def assembled(self) -> bool:
        """Whether the result was about to get its name, or has it."""
        return (self.folder / ASSEMBLED).exists()

    def mark_assembled(self) -> None:
        write_atomically(self.folder / ASSEMBLED, b"")

    def remove(self) -> None:
        """Forget everything; the run is over. Its description goes last: killed here, it is still known what ended."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (RUN, LOCK, ASSEMBLED):
                path.unlink()
        (self.folder / RUN).unlink()
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def work_folder(target: Path) -> Path:
    """Where the work on `target` is kept until it is complete."""
    return target.parent / f".{target.name}.partial"


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """One line per value in which two fingerprints differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in sorted(before.keys() | after.keys()):
            inner = f"{name}.{key}" if name else key
            found += differences(before.get(key), after.get(key), inner)
        return found
    return [] if before == after else [f"{name} was {_short(before)} and is {_short(after)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def write_atomically(file: Path, data: bytes) -> None:
    """Write `file` so that it holds either what it held before or all of `data`, whenever the power fails."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def sync(file: Path) -> None:
    """Have the bytes of `file` on the disk."""
    with file.open("rb+") as f:
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk, where the system knows how."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while data := f.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()
