"""Reading a quantized transformer for ComfyUI, from a single file or from a folder in the diffusers layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint import CheckpointError, check_names, check_tensor, checkpoint_tensors
from ..config import DiRotQConfig
from ..files import checkpoint_files, read_headers, read_json
from ..inspect import find_transformer, sites_of
from ..layout import SitePlan
from ..nunchaku.source import looks_packed
from .convert import from_native, to_native
from .names import fusions
from .write import METADATA_KEY


@dataclass(frozen=True)
class NativeCheckpoint:
    """A checked checkpoint under native names.

    Attributes:
        tensors: by native name; memory-mapped where the file has them as they are. plans: native linear → its site,
            for the quantized ones. quantization: resolved. config: the transformer's config.json.
    """

    tensors: dict[str, torch.Tensor]
    plans: dict[str, SitePlan]
    quantization: DiRotQConfig
    config: dict[str, Any]


def read_native(path: str | Path) -> NativeCheckpoint:
    """Read and check `path`: a single .safetensors file of dirotq, or a folder of a transformer or a pipeline.

    Raises:
        CheckpointError: it is something else (the message says what), or it breaks a rule of the format.
    """
    path = Path(path)
    if path.is_dir():
        folder = find_transformer(path)
        config = read_json(folder / "config.json")
        files = checkpoint_files(folder)
    else:
        config, files = read_config(path), [path]
    quantization, plans, model = read_layout(config, path)
    read_headers(files)  # extents and dtypes, before anything is mapped
    tensors = _tensors(files)
    try:
        diffusers = tensors if path.is_dir() else from_native(tensors, config)
        spec = checkpoint_tensors(model, plans)
        check_names(diffusers, spec)
        for name, tensor in diffusers.items():
            check_tensor(name, tensor, *spec[name])
        native = to_native(diffusers, config) if path.is_dir() else tensors
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return NativeCheckpoint(native, native_plans(config, plans), quantization, config)


def native_plans(config: Mapping[str, Any], plans: list[SitePlan]) -> dict[str, SitePlan]:
    """Native linear → its site in the diffusers model of `config`, for the quantized ones."""
    owners = {n: plan for plan in plans for n in plan.linears}
    return {f.native: owners[f.parts[0]] for f in fusions(config) if f.parts[0] in owners}


def read_layout(config: Mapping[str, Any], path: Path) -> tuple[DiRotQConfig, list[SitePlan], torch.nn.Module]:
    """Of a config.json: resolved quantization, sites, and the dense model on the meta device.

    Raises CheckpointError, which names `path`, if it is not a DiRotQ checkpoint's.
    """
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "dirotq":
        what = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{path} is not a DiRotQ checkpoint: "
            + (f"its quant_method is {what!r}" if what else "its config.json has no quantization_config")
        )
    return sites_of(dict(config), path)


def read_metadata(path: Path) -> tuple[dict[str, str], list[str]]:
    """Metadata and tensor names in the header of a single file. CheckpointError says what it is if it has none."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise CheckpointError(f"{path} is missing or no regular file")
    with path.open("rb") as f:
        start = f.read(9)
    if start[:4] == b"GGUF":
        raise CheckpointError(f"{path} is a GGUF file, not a DiRotQ checkpoint")
    # safetensors begins with a length of eight bytes, which may be any, and the brace of its header.
    pickled = start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"))
    if pickled and start[8:] != b"{":
        raise CheckpointError(f"{path} is a pickle, which is never opened; DiRotQ checkpoints are .safetensors files")
    try:
        with safe_open(path, framework="pt") as f:
            return f.metadata() or {}, list(f.keys())
    except SafetensorError as error:
        read_headers([path])  # its message names what is wrong, where it finds it
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The config.json in the header of a single file. CheckpointError says what the file is instead."""
    metadata, names = read_metadata(path)
    if METADATA_KEY not in metadata:
        raise CheckpointError(f"{path} is not a DiRotQ checkpoint, but {_guess(names)}")
    try:
        config = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the configuration in its header is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: the configuration in its header must be a JSON object")
    return config


def _guess(names: list[str]) -> str:
    if any(".input_site." in n for n in names):
        return (
            "tensors of one without their configuration, as ComfyUI's ModelSave and CheckpointSave write them; it is "
            "in the original file's header or in config.json"
        )
    if looks_packed(names):
        return "an SVDQuant checkpoint of Nunchaku's; `dirotq convert` makes one of it, if it is FLUX.1 in INT4"
    if any(n.endswith((".weight_scale", ".comfy_quant", ".scale_weight", "scaled_fp8", ".qweight")) for n in names):
        return "a model quantized in another way; use the loader that is made for it, such as 'Load Diffusion Model'"
    return "a model that is not quantized; use 'Load Diffusion Model' for it"


def _tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}
    return tensors
