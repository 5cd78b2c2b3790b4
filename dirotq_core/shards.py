"""The shards of a transformer's checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from .files import INDEX_NAME, WEIGHTS_NAME, TensorEntry
from .safetensors_file import byte_count, write_safetensors

#: Bytes of a shard at most, as the Hub likes them.
SHARD_BYTES = 5_000_000_000

Tensors = Mapping[str, torch.Tensor | TensorEntry]


def write_shards(folder: Path, tensors: Tensors, limit: int) -> None:
    """The weights of a transformer as `save_pretrained` lays them out: one file, or shards and their index."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        size = byte_count(tensor)
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS_NAME, tensors)
        return
    stem, _, suffix = WEIGHTS_NAME.rpartition(".")
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{suffix}" for i in range(len(shards))]
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    write_mapped(folder, tensors, weight_map)
    index = {"metadata": {"total_size": sum(map(byte_count, tensors.values()))}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX_NAME).write_text(text, encoding="utf-8")


def write_mapped(folder: Path, tensors: Tensors, weight_map: Mapping[str, str]) -> None:
    """Write each of `tensors` to the file that `weight_map` names for it."""
    for file in sorted(set(weight_map.values())):
        write_safetensors(folder / file, {n: t for n, t in tensors.items() if weight_map[n] == file})
