"""What stands beside the tensors of a folder, kept in a single file's header so that the way back restores it.

Two ways to lose nothing: a file made of a folder carries the folder's report and index as they were under a key of
their own, and a folder made of a file carries the file's report as a field of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointError, check_names
from ..files import INDEX_NAME, WEIGHTS_NAME, check_plain, checkpoint_files, json_object, weight_map_of
from ..inspect import report_folder
from ..report import REPORT_NAME, QuantizationReport
from ..shards import write_mapped, write_shards
from ..solve import LinearReport
from .names import fusions

#: Key of a single file's metadata: JSON object of `FolderNotes`.
FOLDER_KEY = "dirotq_folder"
#: Key of a folder's report: what stood under the report's key in the file that the folder was made of.
SINGLE_FILE = "single_file"
#: Bytes of a shard where the file does not say how it was split: diffusers' default.
SHARD_BYTES = 10_000_000_000


@dataclass(frozen=True)
class FolderNotes:
    """Of a folder. report: text of its report. index: of its shards' index. weights: their file, if it is but one of
    another name than usual."""

    report: str | None = None
    index: str | None = None
    weights: str | None = None

    def to_json(self) -> str | None:
        body = {k: v for k, v in vars(self).items() if v is not None}
        return json.dumps(body, sort_keys=True) if body else None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> FolderNotes:
        """Those in the metadata of the single file `path`. CheckpointError if they are none."""
        try:
            body = json_object(metadata.get(FOLDER_KEY, "{}").encode())
            if not all(isinstance(v, str) for v in body.values()):
                raise ValueError("holds values that are no strings")
            return cls(**body)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the {FOLDER_KEY} in its header {error}") from error

    def write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write `tensors` into `folder` as they were split, and the report. CheckpointError names what does not fit."""
        if self.index is not None:
            weight_map = _weight_map(self.index)
            check_names(tensors, weight_map)
            write_mapped(folder, tensors, weight_map)
            _write(folder / INDEX_NAME, self.index)
        elif self.weights is not None:
            check_plain(self.weights, "its header")
            write_mapped(folder, tensors, dict.fromkeys(tensors, self.weights))
        else:
            write_shards(folder, tensors, SHARD_BYTES)
        if self.report is not None:
            _write(folder / REPORT_NAME, self.report)


def _weight_map(index: str) -> dict[str, str]:
    try:
        body = json_object(index.encode())
    except ValueError as error:
        raise CheckpointError(f"the index in its header {error}") from error
    return weight_map_of(body, "the index in its header")


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


def read_folder_notes(folder: Path, config: Mapping[str, Any]) -> tuple[FolderNotes, dict[str, float]]:
    """Of a transformer's folder: notes, and native linear → SQNR in dB, both for a single file's header."""
    index = weights = report = None
    files = checkpoint_files(folder)
    if (folder / INDEX_NAME).is_file():
        index = (folder / INDEX_NAME).read_bytes().decode()
    elif len(files) == 1 and files[0].name != WEIGHTS_NAME:
        weights = files[0].name
    known: dict[str, float] = {}
    found = report_folder(folder)
    if found is not None:
        body = QuantizationReport.load(found)
        assert body is not None
        report = (found / REPORT_NAME).read_bytes().decode()
        known = _single_file(report) or _fused({r.name: r.output_db for r in body.linears}, config)
        if report == report_of_file(known, config):
            report = None
    return FolderNotes(report, index, weights), known


def _single_file(report: str) -> dict[str, float]:
    body = json.loads(report).get(SINGLE_FILE)
    if not isinstance(body, dict) or not all(type(v) in (int, float) and math.isfinite(v) for v in body.values()):
        return {}
    return body


def _fused(parts: Mapping[str, float | None], config: Mapping[str, Any]) -> dict[str, float]:
    """SQNR of native linears, of those of their parts the lowest: what they have together is not known."""
    out = {}
    for fusion in fusions(config):
        known = [db for p in fusion.parts if (db := parts.get(p)) is not None and math.isfinite(db)]
        if len(known) == len(fusion.parts):
            out[fusion.native] = min(known)
    return out


def report_of_file(known: Mapping[str, float], config: Mapping[str, Any]) -> str | None:
    """The report of a folder that is made of a single file, from the SQNR of the file's linears; None without."""
    if not known:
        return None
    quantization = config["quantization_config"]
    linears = [
        LinearReport(part, 0, None, None, f"measured as {f.native}" if len(f.parts) > 1 else None, known[f.native])
        for f in fusions(config)
        for part in f.parts
        if f.native in known
    ]
    report = QuantizationReport(quantization.get("method"), quantization.get("activation_bits"), linears)
    return json.dumps(report.to_dict() | {SINGLE_FILE: dict(sorted(known.items()))}, indent=1) + "\n"
