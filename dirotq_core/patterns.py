"""The pattern language of `modules_to_not_convert` and `weight_only_modules`."""

from __future__ import annotations

import fnmatch

import torch


class ModulePatterns:
    """Module names selected by a user's list.

    An entry with ``*``, ``?`` or ``[`` is a glob over the full name. An entry that is itself a module's full name
    selects that module and all below it, nothing else: "proj_out" leaves FLUX's last linear alone, not the 38
    proj_out of its single blocks. Any other entry selects names that contain it as a run of dotted parts.
    """

    def __init__(self, entries: list[str], model: torch.nn.Module, field: str):
        modules = {n for n, _ in model.named_modules() if n}
        self._selected: set[str] = set()
        for entry in entries:
            if any(c in entry for c in "*?["):
                hits = {n for n in modules if fnmatch.fnmatchcase(n, entry)}
            elif entry in modules:
                hits = {n for n in modules if n == entry or n.startswith(entry + ".")}
            else:
                hits = {n for n in modules if f".{entry}." in f".{n}."}
            if not hits:
                raise ValueError(f"{field}: {entry!r} matches no module of {type(model).__name__}")
            self._selected |= hits

    def __contains__(self, name: str) -> bool:
        return name in self._selected
