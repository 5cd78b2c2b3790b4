"""Converting between the two layouts on disk."""

from __future__ import annotations

import json
from pathlib import Path

from ..folders import write_folder
from ..inspect import find_transformer
from .convert import from_native
from .read import read_native
from .write import write_native

SHARD_SIZE = "5GB"


def convert(source: str | Path, target: str | Path) -> Path:
    """Write the checkpoint `source` in the other layout and return where.

    A folder (of a transformer or a pipeline) becomes one .safetensors file, which ComfyUI reads; such a file becomes a
    transformer's folder, which diffusers reads. Every tensor keeps its bytes, there and back. What is written has its
    name only when it is complete.

    Raises:
        CheckpointError: `source` is no DiRotQ checkpoint or breaks a rule of the format.
        FileExistsError: `target` exists. ValueError: its name does not fit what it would become.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another name")
    if source.is_dir():
        find_transformer(source)
        checkpoint = read_native(source)
        write_native(target, checkpoint.tensors, checkpoint.config)
        return target
    if target.suffix == ".safetensors":
        raise ValueError(f"{source} is a single file, so {target} becomes a folder; name one")
    checkpoint = read_native(source)
    tensors = {n: t.clone() for n, t in from_native(checkpoint.tensors, checkpoint.config).items()}  # no views

    def write(folder: Path) -> None:
        from huggingface_hub import save_torch_state_dict

        pattern = "diffusion_pytorch_model{suffix}.safetensors"
        save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=SHARD_SIZE)
        body = json.dumps(checkpoint.config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(body, encoding="utf-8")

    write_folder(target, write)
    return target
