"""Writing a single file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..safetensors_file import write_safetensors
from .folder_notes import FOLDER_KEY, FolderNotes

#: Key of the header's metadata under which the transformer's config.json stands.
METADATA_KEY = "dirotq"
#: The key of what was measured when the file was made: native linear → SQNR in dB of its outputs.
REPORT_KEY = "dirotq_report"


def write_native(
    path: str | Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any],
    output_db: Mapping[str, float] | None = None, notes: FolderNotes | None = None,
    before_each: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Write native tensors and the transformer's config.json to `path`; the file appears only when it is complete.

    output_db: native linear → SQNR in dB of its outputs, where it was measured; for who reads the file later. notes: of
    the folder that the file is made of. before_each: called before each tensor is written; if it raises, no file is
    left.

    Raises:
        FileExistsError: `path` exists.
        ValueError: `config` has no dirotq quantization_config, or `path` does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors")
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name")
    if (config.get("quantization_config") or {}).get("quant_method") != "dirotq":
        raise ValueError("config has no dirotq quantization_config")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        metadata = {METADATA_KEY: json.dumps(config, sort_keys=True)}
        if output_db:
            metadata[REPORT_KEY] = json.dumps({name: round(db, 2) for name, db in output_db.items()}, sort_keys=True)
        folder = notes.to_json() if notes else None
        if folder is not None:
            metadata[FOLDER_KEY] = folder
        # safetensors' own writer leaves the order of metadata to chance.
        write_safetensors(partial, tensors, metadata, before_each)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
