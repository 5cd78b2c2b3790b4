"""A checkpoint's files, checked without loading them: JSON, safetensors headers, and tensors one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import safe_open

from .checkpoint import CheckpointError, CheckpointSpec, check_header, check_names, check_values

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
MAX_HEADER = 100_000_000  # the format's own limit

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. begin, end: bytes from the start of the file's data."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; CheckpointError names the file if it holds anything else."""
    try:
        return json_object(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} {error}") from error


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; ValueError says what it is instead, or which name stands in it twice."""
    try:
        # safetensors pads its header with spaces, which JSON allows.
        body = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"must hold a JSON object, not a {type(body).__name__}")
    return body


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) < len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"names {next(k for k in names if names.count(k) > 1)!r} twice")
    return body


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of the transformer in `folder`: those of its index, or the only one.

    Raises CheckpointError if there is none, the index is broken, or a file it names is absent.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        files = indexed_files(index, read_json(index))
    elif (folder / WEIGHTS_NAME).is_file():
        files = [folder / WEIGHTS_NAME]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors file")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
    return files


def indexed_files(index: Path, body: dict[str, Any]) -> list[Path]:
    """The files that `body`, read from `index`, names, there or not. CheckpointError as of `weight_map_of`."""
    return [index.parent / name for name in sorted(set(weight_map_of(body, index).values()))]


def weight_map_of(body: dict[str, Any], where: object) -> dict[str, str]:
    """Tensor names → file names of an index. CheckpointError if it has none, or names files of other folders."""
    weight_map = body.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{where} has no weight_map from tensor names to file names")
    for name in sorted(set(weight_map.values())):
        check_plain(name, where)
    return weight_map


def check_plain(name: str, where: object) -> None:
    """CheckpointError unless `name`, which `where` has, is a safetensors file without a way out of the folder, on any
    system. Links are not looked at: the Hub's cache consists of them, and a file's content makes none."""
    if not (name.endswith(".safetensors") and name.isprintable() and not any(c in name for c in "/\\:")):
        raise CheckpointError(f"{where} names {name[:100]!r}, which is no .safetensors file of its own folder")


def read_headers(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """Tensor name → entry, over all files. CheckpointError names the file, the tensor and the rule it breaks."""
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in _read_header(file).items():
            if name in entries:
                raise CheckpointError(f"tensor {name!r} is in {entries[name].file} and in {file}")
            entries[name] = entry
    return entries


def _read_header(file: Path) -> dict[str, TensorEntry]:
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{file} is truncated or no safetensors file: its header claims {length} bytes, the file has {size}"
            )
        try:
            header = json_object(f.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file}: its header {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{file}: its __metadata__ is no JSON object of strings")
    entries = {name: _entry(file, name, fields) for name, fields in header.items()}
    _check_extents(file, entries, size - 8 - length)
    return entries


def _entry(file: Path, name: str, fields: Any) -> TensorEntry:
    where = f"{file}: tensor {name!r}"
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where} has no header entry of dtype, shape and data_offsets")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has the unknown dtype {dtype!r}")
    if not _naturals(shape):
        raise CheckpointError(f"{where} has shape {shape!r}, not a list of non-negative integers")
    if not (_naturals(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise CheckpointError(f"{where} has data_offsets {offsets!r}, not [begin, end] with 0 <= begin <= end")
    if prod(max(n, 1) for n in shape) >= 2**60:  # empty ones as well: their strides would overflow
        raise CheckpointError(f"{where} has a shape of more than 2⁶⁰ elements")
    entry = TensorEntry(file, DTYPES[dtype], tuple(shape), offsets[0], offsets[1])
    needed = prod(shape) * entry.dtype.itemsize
    if entry.bytes != needed:
        raise CheckpointError(f"{where} has {entry.bytes} bytes, but {dtype} of shape {shape} takes {needed}")
    return entry


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_extents(file: Path, entries: Mapping[str, TensorEntry], data: int) -> None:
    """The tensors fill the `data` bytes after the header without overlap, gap or remainder."""
    end, previous = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > data:
            raise CheckpointError(
                f"{file}: tensor {name!r} ends at byte {entry.end} of the data, of which the file has {data}; "
                "it is truncated"
            )
        if entry.begin < end:
            raise CheckpointError(f"{file}: tensor {name!r} overlaps {previous!r}")
        if entry.begin > end:
            raise CheckpointError(f"{file}: {entry.begin - end} bytes before tensor {name!r} belong to no tensor")
        end, previous = entry.end, name
    if end != data:
        raise CheckpointError(f"{file}: {data - end} bytes after the last tensor belong to no tensor")


def check_headers(entries: Mapping[str, TensorEntry], spec: CheckpointSpec) -> None:
    """Raise CheckpointError unless the names, shapes and dtypes are those of `spec`."""
    check_names(entries, spec)
    for name, entry in entries.items():
        check_header(name, entry.shape, entry.dtype, *spec[name])


def check_files(files: Iterable[Path], spec: CheckpointSpec) -> None:
    """Raise CheckpointError unless the files hold what `spec` says: headers first, then values, a tensor at a time."""
    files = list(files)
    entries = read_headers(files)
    check_headers(entries, spec)
    for file in files:
        with safe_open(file, framework="pt") as f:
            for name in f.keys():
                if entries[name].dtype != torch.uint8:  # every byte is two valid codes
                    check_values(name, f.get_tensor(name))
