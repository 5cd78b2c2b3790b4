"""Converting between the two layouts on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointError
from ..folders import write_folder
from ..inspect import find_transformer
from ..nunchaku import import_nunchaku, is_nunchaku
from .convert import from_native, to_native
from .folder_notes import FolderNotes, read_folder_notes, report_of_file
from .inspect import file_report
from .read import read_metadata, read_native
from .write import write_native


def convert(source: str | Path, target: str | Path) -> Path:
    """Write the checkpoint `source` in the other layout and return where.

    A folder (of a transformer or a pipeline) becomes one .safetensors file, which ComfyUI reads; such a file becomes a
    transformer's folder, which diffusers reads. Weights, configuration, index and report keep their bytes, there and
    back. A checkpoint of Nunchaku or ``nunchaku_lite`` becomes either, as `target` is called. What is written has its
    name only when it is complete.

    Raises:
        CheckpointError: `source` is no DiRotQ checkpoint or breaks a rule of the format.
        FileExistsError: `target` exists. ValueError: its name does not fit what it would become.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another name")
    if is_nunchaku(source):
        imported = import_nunchaku(source)
        if target.suffix == ".safetensors":
            write_native(target, to_native(imported.tensors, imported.config), imported.config)
        else:
            _write_transformer(target, imported.tensors, imported.config, FolderNotes())
        return target
    if source.is_dir():
        folder = find_transformer(source)
        checkpoint = read_native(source)
        notes, known = read_folder_notes(folder, checkpoint.config)
        write_native(target, checkpoint.tensors, checkpoint.config, known, notes)
        return target
    if target.suffix == ".safetensors":
        raise ValueError(f"{source} is a single file, so {target} becomes a folder; name one")
    checkpoint = read_native(source)
    notes = FolderNotes.from_metadata(read_metadata(source)[0], source)
    if notes.report is None:
        notes = replace(notes, report=report_of_file(file_report(source), checkpoint.config))
    try:
        tensors = from_native(checkpoint.tensors, checkpoint.config)
        _write_transformer(target, tensors, checkpoint.config, notes)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return target


def _write_transformer(
    target: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], notes: FolderNotes
) -> None:
    """Write a transformer's folder in the diffusers layout."""

    def write(folder: Path) -> None:
        notes.write(folder, tensors)
        body = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(body, encoding="utf-8")

    write_folder(target, write)
