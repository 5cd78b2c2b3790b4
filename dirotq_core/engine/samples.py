"""Calibration inputs: the arguments of the first block's calls, as files; and what later blocks make of them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .blocks import Arguments


@dataclass(frozen=True)
class Sample:
    """Some rows of one call of the first block: its arguments by name, on the host."""

    arguments: Arguments
    held_out: bool


def pack_samples(samples: list[Sample]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that holds `samples`.

    Nested tensors, which belong to all rows of a batch and mostly to all calls (rotary embeddings), are stored once.
    """
    tensors: dict[str, torch.Tensor] = {}

    def pack(value: Any, nested: bool = True) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            key = _digest(value) if nested else f"{len(tensors):06d}"
            tensors[key] = value
            return {"tensor": key}
        if isinstance(value, (tuple, list)):
            return {"tuple" if isinstance(value, tuple) else "list": [pack(v) for v in value]}
        if isinstance(value, dict):
            return {"dict": {k: pack(v) for k, v in value.items()}}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise ValueError(f"a block is called with a {type(value).__name__}, which the engine cannot store")

    form = [{"held_out": s.held_out, "arguments": {k: pack(v, False) for k, v in s.arguments.items()}} for s in samples]
    return tensors, {"samples": json.dumps(form)}


def _digest(t: torch.Tensor) -> str:
    data = t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
    return hashlib.sha256(f"{t.dtype}{tuple(t.shape)}".encode() + data).hexdigest()[:32]


def read_samples(file: Path) -> list[Sample]:
    """The samples in a file that `pack_samples` describes; tensors are views of the file where the system allows."""
    with safe_open(file, framework="pt") as f:
        form = json.loads(f.metadata()["samples"])
        tensors = {name: f.get_tensor(name) for name in f.keys()}

    def unpack(node: Any) -> Any:
        ((kind, value),) = node.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {k: unpack(v) for k, v in value.items()}
        if kind == "value":
            return value
        return (tuple if kind == "tuple" else list)(unpack(v) for v in value)

    return [Sample({k: unpack(v) for k, v in s["arguments"].items()}, s["held_out"]) for s in form]


def share_on(device: torch.device | str, samples: list[Sample]) -> list[Sample]:
    """`samples` with nested tensors, which are the same for many of them, on `device`, each once."""
    there: dict[int, torch.Tensor] = {}

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in there:
                there[id(value)] = value.to(device)
            return there[id(value)]
        if isinstance(value, (tuple, list)):
            return type(value)(move(v) for v in value)
        return {k: move(v) for k, v in value.items()} if isinstance(value, dict) else value

    def argument(value: Any) -> Any:
        return value if isinstance(value, torch.Tensor) else move(value)

    return [Sample({k: argument(v) for k, v in s.arguments.items()}, s.held_out) for s in samples]


class Activations:
    """What the blocks hand on, per sample: at first the samples' own, then what was last put.

    Kept in memory, or in one file that is mapped into it where it would be more than `limit` bytes.

    Args:
        names: of the arguments that change from block to block. scratch: the file.
        pinned: keep them in memory that a GPU copies to and from without waiting.
    """

    def __init__(
        self, samples: list[Sample], names: tuple[str, ...], limit: float, scratch: Path, pinned: bool = False
    ):
        self._pinned = pinned
        self.samples = samples
        self._current: list[Arguments] = [{n: s.arguments[n] for n in names} for s in samples]
        self._buffers: list[Arguments | None] = [None] * len(samples)
        self.bytes = sum(t.numel() * t.element_size() for current in self._current for t in current.values())
        self._scratch = scratch if self.bytes > limit else None
        self._pinned &= self._scratch is None
        self._used = 0
        if self._scratch is not None:
            # Reserved now: a full disk is an error here, and a crash once the file is mapped.
            size = self.bytes + 64 * len(samples) * len(names)
            _reserve(self._scratch, size)
            self._map = torch.from_file(str(self._scratch), shared=True, size=size, dtype=torch.uint8)

    @property
    def on_disk(self) -> bool:
        return self._scratch is not None

    def arguments(self, i: int) -> Arguments:
        """All arguments of the next block's call for sample i."""
        return {**self.samples[i].arguments, **self._current[i]}

    def put(self, i: int, results: Arguments) -> None:
        """Keep what a block returned for sample i."""
        buffers = self._buffers[i]
        if buffers is None:
            buffers = self._buffers[i] = {n: self._allocate(t) for n, t in results.items()}
        for name, tensor in results.items():
            # Without waiting only into pinned memory, which is read again in the order of the GPU's own work.
            buffers[name].copy_(tensor, non_blocking=self._pinned)
        self._current[i] = buffers

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        if self._scratch is None:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=self._pinned)
        size = prod(like.shape) * like.dtype.itemsize
        start = self._used
        self._used += -(-size // 64) * 64
        return self._map[start : start + size].view(like.dtype).reshape(like.shape)


def _reserve(file: Path, size: int) -> None:
    with file.open("wb") as f:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, size)
        else:
            zeros = bytes(1 << 24)
            for start in range(0, size, len(zeros)):
                f.write(zeros[: size - start])
