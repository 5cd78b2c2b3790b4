"""The shards of a transformer's checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..files import WEIGHTS_NAME, TensorEntry
from ..safetensors_file import write_safetensors

#: Bytes of a shard at most, as the Hub likes them.
SHARD_BYTES = 5_000_000_000


def write_shards(folder: Path, entries: Mapping[str, TensorEntry], limit: int = SHARD_BYTES) -> None:
    """The weights of a transformer as `save_pretrained` lays them out: one file, or shards and their index."""
    shards: list[dict[str, TensorEntry]] = [{}]
    room = limit
    for name, entry in entries.items():
        if shards[-1] and entry.bytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = entry
        room -= entry.bytes
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS_NAME, shards[0])
        return
    stem, _, suffix = WEIGHTS_NAME.rpartition(".")
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{suffix}" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard)
    index = {
        "metadata": {"total_size": sum(e.bytes for e in entries.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
