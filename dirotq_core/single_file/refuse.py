"""What `from_single_file` says about tensors that are quantized already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointError


def refuse_quantized(tensors: Mapping[str, Any], file: str | None = None) -> None:
    """Raise CheckpointError, which says what to do, if these are tensors of a dirotq checkpoint.

    file: they were read from, for whatever purpose; None: they are to be quantized.
    """
    if file is None:
        ours = any(_packed(name, tensors) for name in tensors)
    else:  # other packages, whose files are no business of ours, pack weights as well
        ours = any(".input_site." in name for name in tensors) or _has_our_header(Path(file))
    if not ours:
        return
    if any(name.startswith(("double_blocks.", "single_blocks.", "blocks.")) for name in tensors):
        raise CheckpointError(
            f"{file or 'the file'} is a dirotq checkpoint for ComfyUI; for diffusers run `dirotq convert "
            f"{file or 'FILE'} --out FOLDER` and load FOLDER with from_pretrained, without a quantization_config"
        )
    raise CheckpointError(
        f"{file or 'the file'} is part of a dirotq checkpoint: load its folder, where config.json is, with "
        "from_pretrained, without a quantization_config"
    )


def _packed(name: str, tensors: Mapping[str, Any]) -> bool:
    weight = tensors.get(name.removesuffix("_scale"))
    return name.endswith(".weight_scale") and isinstance(weight, torch.Tensor) and weight.dtype == torch.uint8


def _has_our_header(file: Path) -> bool:
    from .read import read_metadata
    from .write import METADATA_KEY

    try:
        return file.is_file() and METADATA_KEY in read_metadata(file)[0]
    except CheckpointError:  # pickles are diffusers' business
        return False
