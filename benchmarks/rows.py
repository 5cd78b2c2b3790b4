"""Rows of a table, kept as they are made: a run that ended early goes on there, and a row that fails is a row too."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Once:
    """A value that is made when it is first asked for; what fails once is not tried again."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._made, self._error = make, None, None

    def __call__(self) -> Any:
        if self._error is not None:
            raise self._error
        if self._made is None:
            try:
                self._made = self._make()
            except Exception as error:
                self._error = error
                raise
        return self._made


class Rows:
    """The rows of OUT.json. Until none fails, those that succeeded stand in OUT.part.json, where the next run begins.

    Raises ValueError if OUT.part.json was measured on something else than `about` says.
    """

    def __init__(self, out: Path, about: dict[str, Any]):
        self.out, self.about = out.with_suffix(".json"), about
        self.part = out.with_suffix(".part.json")
        self.rows: list[Row] = []
        self._known: dict[tuple[str, str], Row] = {}
        self.part.parent.mkdir(parents=True, exist_ok=True)
        if self.part.exists():
            before = json.loads(self.part.read_text())
            if before["environment"] != about:
                raise ValueError(
                    f"{self.part} is left of a run that ended early, of {before['environment']}; this one is of "
                    f"{about}. Delete the file, or choose another --out"
                )
            self._known = {(r["model"], r["method"]): r for r in before["rows"]}
            print(f"{len(self._known)} rows stand in {self.part} and are not made again", flush=True)

    def add(self, model: str, method: str, config: dict | None, make: Callable[[], Row]) -> Row:
        """The row that `make` returns, or that a run before made with that `config`; what it raises becomes the row."""
        row = self._known.pop((model, method), None)
        if row is None or (config is not None and row.get("config") != config):
            try:
                row = make()
            except Exception as error:  # of whatever kind: the other rows do not depend on it, and it ends in the table
                traceback.print_exc()
                row = {"model": model, "method": method, "error": f"{type(error).__name__}: {error}"}
        self.rows.append(row)
        write(self.part, self.about, [*self._good, *self._known.values()])
        return row

    @property
    def _good(self) -> list[Row]:
        return [r for r in self.rows if "error" not in r]

    def finish(self) -> list[Row]:
        """All rows, in OUT.json; OUT.part.json stays while some of them failed."""
        write(self.out, self.about, self.rows)
        if len(self._good) == len(self.rows):
            self.part.unlink(missing_ok=True)
        return self.rows


def failures(rows: list[Row]) -> str | None:
    """What failed, for `sys.exit`; None if nothing did."""
    bad = [f"{r['model']}, {r['method']}: {r['error']}" for r in rows if "error" in r]
    return "\n".join([f"{len(bad)} of {len(rows)} rows failed; run again to try them:", *bad]) if bad else None


def write(path: Path, about: dict[str, Any], rows: list[Row]) -> None:
    """All at once: killed, the file is the one before or the new one."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    os.replace(fresh, path)
