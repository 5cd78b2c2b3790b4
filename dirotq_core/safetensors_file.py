"""Writing safetensors files without holding them in memory: tensors come from memory or from other files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .files import DTYPES, TensorEntry

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: safetensors' own order of dtypes, the last first: the widest, so that every tensor is aligned.
_ORDER = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64",
)  # fmt: skip
_RANK = {name: -i for i, name in enumerate(_ORDER)}
_COPY = 1 << 24


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor | TensorEntry], metadata: dict[str, str] | None = None,
    before_each: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Write one safetensors file, in the order of safetensors' own writer; same input, same bytes.

    before_each: called before each tensor is written; may raise to stop.
    """
    ordered = sorted(tensors.items(), key=lambda item: (_RANK[_NAMES[item[1].dtype]], item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, t in ordered:
        begin, end = end, end + byte_count(t)
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, t in ordered:
            if before_each is not None:
                before_each()
            if isinstance(t, TensorEntry):
                _copy(t, f)
            else:
                f.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def byte_count(t: torch.Tensor | TensorEntry) -> int:
    """Bytes of the tensor in a file."""
    return t.bytes if isinstance(t, TensorEntry) else t.numel() * t.element_size()


def _copy(entry: TensorEntry, out: BinaryIO) -> None:
    with entry.file.open("rb") as f:
        f.seek(8 + int.from_bytes(f.read(8), "little") + entry.begin)
        left = entry.bytes
        while left:
            data = f.read(min(left, _COPY))
            if not data:
                raise OSError(f"{entry.file} became shorter while it was read")
            out.write(data)
            left -= len(data)
