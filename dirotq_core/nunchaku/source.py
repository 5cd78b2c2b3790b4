"""Recognizing and opening checkpoints of Nunchaku and ``nunchaku_lite``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoint import CheckpointError
from ..files import checkpoint_files, read_headers, read_json
from ..inspect import find_transformer

#: Files of the layout that Nunchaku had before single files.
SPLIT = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
#: What is added to the input of a linear behind GELU, so that its codes need no sign.
GELU_SHIFT = 0.171875
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Names:
    """What a stored linear's tensors are called."""

    down: str
    up: str
    smooth: str


NATIVE_NAMES, LITE_NAMES = Names("lora_down", "lora_up", "smooth"), Names("proj_down", "proj_up", "smooth_factor")


@dataclass(frozen=True)
class NunchakuSource:
    """An opened checkpoint.

    Attributes:
        path: for messages. config: of the transformer, without quantization. tensors: all, memory-mapped.
        lite: diffusers' own module names and no fused arithmetic; else Nunchaku's.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]
    lite: bool

    @property
    def names(self) -> Names:
        return LITE_NAMES if self.lite else NATIVE_NAMES


def is_nunchaku(path: Path) -> bool:
    """Whether the file or folder is one of theirs, by its header or configuration; nothing is loaded."""
    if path.is_file():
        return path.suffix == ".safetensors" and looks_packed(read_headers([path]))
    if not path.is_dir():
        return False
    if (path / SPLIT[0]).is_file():
        return True
    config = next((f for f in (path / "transformer" / "config.json", path / "config.json") if f.is_file()), None)
    if config is None:
        return False
    quantization = read_json(config).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "nunchaku_lite"


def looks_packed(names: Iterable[str]) -> bool:
    """Whether tensors of these names are W4A4 linears as Nunchaku calls their parts."""
    kinds = {n.rpartition(".")[2] for n in names}
    return "qweight" in kinds and not kinds.isdisjoint({"lora_down", "proj_down"})


def open_nunchaku(path: Path) -> NunchakuSource:
    """Open a single file, a folder of the older layout, or the folder of a ``nunchaku_lite`` model or pipeline.

    Raises:
        CheckpointError: it is damaged, has no configuration, is NVFP4, or a model that has no recipe; one sentence.
    """
    if path.is_file():
        config, files, lite = _config_of_header(path), [path], False
    elif (path / SPLIT[0]).is_file():
        config, files, lite = read_json(path / "config.json"), [path / name for name in SPLIT], False
    else:
        folder = find_transformer(path)
        config, files, lite = read_json(folder / "config.json"), checkpoint_files(folder), True
    headers = read_headers(files)
    lite = lite or any(n.endswith(".attn.to_q.qweight") for n in headers)
    if any(str(e.dtype).removeprefix("torch.") in FLOAT8 for e in headers.values()):
        raise CheckpointError(
            f"{path} is NVFP4 (4-bit floats with scales per 16 columns), which dirotq has no format for; quantize the "
            "original model with dirotq, or take the INT4 variant of this one"
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}
    return NunchakuSource(path, _transformer_config(config, path), tensors, lite)


def _config_of_header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as f:
        text = (f.metadata() or {}).get("config")
    if text is None:
        raise CheckpointError(
            f"{path} has no configuration in its header; give the merged single file, or a folder with "
            f"{SPLIT[0]}, {SPLIT[1]} and config.json"
        )
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the configuration in its header is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: the configuration in its header must be a JSON object")
    return config


def _transformer_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    name = config.get("_class_name")
    if isinstance(name, str) and name.startswith("NunchakuFlux"):
        name = "FluxTransformer2DModel"
    if name != "FluxTransformer2DModel":
        raise CheckpointError(f"{path} is a {name}; of Nunchaku's models dirotq imports FLUX.1")
    return {k: v for k, v in config.items() if k != "quantization_config"} | {"_class_name": name}
