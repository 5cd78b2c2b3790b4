"""Converting between the two layouts on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..folders import write_folder
from ..inspect import find_transformer
from ..nunchaku import import_nunchaku, is_nunchaku
from .convert import from_native, to_native
from .read import read_native
from .write import write_native

SHARD_SIZE = "5GB"


def convert(source: str | Path, target: str | Path) -> Path:
    """Write the checkpoint `source` in the other layout and return where.

    A folder (of a transformer or a pipeline) becomes one .safetensors file, which ComfyUI reads; such a file becomes a
    transformer's folder, which diffusers reads. Every tensor keeps its bytes, there and back. A checkpoint of Nunchaku
    or ``nunchaku_lite`` becomes either, as `target` is called. What is written has its name only when it is complete.

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
            _write_transformer(target, imported.tensors, imported.config)
        return target
    if source.is_dir():
        find_transformer(source)
        checkpoint = read_native(source)
        write_native(target, checkpoint.tensors, checkpoint.config)
        return target
    if target.suffix == ".safetensors":
        raise ValueError(f"{source} is a single file, so {target} becomes a folder; name one")
    checkpoint = read_native(source)
    _write_transformer(target, from_native(checkpoint.tensors, checkpoint.config), checkpoint.config)
    return target


def _write_transformer(target: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write a transformer's folder in the diffusers layout."""
    # Parts of larger tensors are copied: the writer takes whole ones only.
    whole = {n: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for n, t in tensors.items()}

    def write(folder: Path) -> None:
        from huggingface_hub import save_torch_state_dict

        pattern = "diffusion_pytorch_model{suffix}.safetensors"
        save_torch_state_dict(whole, folder, filename_pattern=pattern, max_shard_size=SHARD_SIZE)
        body = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(body, encoding="utf-8")

    write_folder(target, write)
