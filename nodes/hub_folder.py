"""Folders that hold what was downloaded from the Hub, and how to tell that one is complete."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

_NAME = ".dirotq_download.json"


@dataclass(frozen=True)
class Record:
    """A finished download. commit: what `revision` was then. files: path in the folder → bytes."""

    repo_id: str
    revision: str
    commit: str
    files: dict[str, int]


def folder_of(repo_id: str, revision: str, into: Path) -> Path:
    """Where a revision of a repository is kept below `into`."""
    return into / f"{repo_id.replace('/', '--')}@{revision.replace('/', '--')}"


def read_record(folder: Path) -> Record | None:
    """The record of the download in `folder`; None unless all of its files are there in full."""
    try:
        record = Record(**json.loads((folder / _NAME).read_bytes()))
        complete = all((folder / name).stat().st_size == size for name, size in record.files.items())
    except (OSError, TypeError, ValueError, AttributeError):
        return None
    return record if complete else None


def write_record(folder: Path, record: Record | None) -> None:
    """Say that the download in `folder` is complete, or with None that it is not."""
    if record is None:
        (folder / _NAME).unlink(missing_ok=True)
    else:
        (folder / _NAME).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
