"""Saving over an earlier checkpoint: killed or out of space on the way, the earlier one is still there and whole."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import platform
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from .diffusers_habits import is_quantized, quantized_parts
from .offloading import check_readable

CONFIG_NAME = "config.json"

#: Of the folder, inside the checkpoint's, that is written first; then come the place and the process that write it.
PREFIX = ".dirotq-saving-"

#: Folders that threads of this process write, and what is held from making one until it is listed: it is nobody's then.
_in_use: set[Path] = set()
_listing = threading.Lock()
#: Held while files move over an earlier checkpoint's, so that threads' models do not mix.
_replacing = threading.Lock()


def save_beside() -> None:
    """Let `save_pretrained` of a quantized model write everything beside an earlier checkpoint before replacing it.

    diffusers writes in place: killed, it leaves neither; and a model whose tensors are still mapped from that file
    loses them. Idempotent.
    """
    original = ModelMixin.save_pretrained
    if hasattr(original, "knows_dirotq"):
        return

    signature = inspect.signature(original)

    @functools.wraps(original)
    def save(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        if not is_quantized(self):
            return original(self, save_directory, *args, **kwargs)
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        check_savable(self, given.get("safe_serialization", True), given.get("use_flashpack", False))
        target = Path(save_directory)
        if given.get("push_to_hub"):  # which uploads the folder it is given
            return original(self, save_directory, *args, **kwargs)
        if target.is_file():
            raise ValueError(f"{target} is a file; give a folder to save the model in")
        _check_variants(self, target, given.get("variant"))
        target.mkdir(parents=True, exist_ok=True)
        with _listing:
            _clear(target)
            work = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{_place()}-{os.getpid()}-", dir=target))
            _in_use.add(work)
        try:
            original(self, work, *args, **kwargs)
            with _replacing:
                # Where several processes save, as a distributed run may, only one may tidy up.
                _replace(target, work, tidy=bool(given.get("is_main_process", True)))
        finally:
            shutil.rmtree(work, ignore_errors=True)
            _in_use.discard(work)

    save.knows_dirotq = True  # type: ignore[attr-defined]
    ModelMixin.save_pretrained = save  # type: ignore[method-assign]


def check_pipelines() -> None:
    """Let `save_pretrained` of a pipeline refuse what its transformer would, before a folder or repository is made.

    Idempotent.
    """
    original = DiffusionPipeline.save_pretrained
    if hasattr(original, "knows_dirotq"):
        return

    signature = inspect.signature(original)

    @functools.wraps(original)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        for part in quantized_parts(self).values():
            check_savable(part, given.get("safe_serialization", True))
        return original(self, *args, **kwargs)

    save.knows_dirotq = True  # type: ignore[attr-defined]
    DiffusionPipeline.save_pretrained = save  # type: ignore[method-assign]


def check_savable(model: nn.Module, safe_serialization: bool, use_flashpack: bool = False) -> None:
    """Raise ValueError for what must not be saved: not as safetensors, offloaded, or with a LoRA loaded or absorbed."""
    for said, other in (
        (f"safe_serialization={safe_serialization}", not safe_serialization),
        (f"use_flashpack={use_flashpack}", use_flashpack),  # which casts every tensor to one dtype
    ):
        if other:
            raise ValueError(f"dirotq checkpoints are safetensors only; call save_pretrained without {said}")
    names = model.state_dict().keys()
    if any(".base_layer." in name for name in names):
        raise ValueError("a LoRA is loaded; unload it (unload_lora_weights) before saving the quantized model")
    if any(name.endswith(".input_site.absorbed") for name in names):
        raise ValueError(
            "a LoRA is absorbed (fuse_lora): call unfuse_lora before unloading it and save then; the quantized "
            "model and the LoRA stay two files"
        )
    check_readable(model, "saved")


def _check_variants(model: Any, target: Path, variant: str | None) -> None:
    """Raise ValueError if weights of another variant in `target` would get this model's quantization."""
    name = f"diffusion_pytorch_model.{variant}" if variant else "diffusion_pytorch_model"
    own = re.compile(re.escape(name) + r"(-\d{5}-of-\d{5})?\.safetensors")
    others = sorted(p.name for p in target.glob("diffusion_pytorch_model*.safetensors") if not own.fullmatch(p.name))
    config = target / CONFIG_NAME
    if not others or not config.is_file():
        return
    try:
        there = json.loads(config.read_text("utf-8")).get("quantization_config")
    except (ValueError, AttributeError):
        return
    if there != json.loads(model.to_json_string()).get("quantization_config"):
        raise ValueError(
            f"{target} holds {others[0]}, a variant of another quantization or of none, and all variants of a folder "
            f"share one {CONFIG_NAME}: save this model in a folder of its own"
        )


@functools.cache
def _place() -> str:
    """Where a process number means one process: this host, and in a container only that."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:12]


def _clear(target: Path) -> None:
    """Remove what saves left that were killed here; others may be at work in this process, host, or elsewhere."""
    for left in target.glob(f"{PREFIX}*"):
        parts = left.name.removeprefix(PREFIX).split("-")
        if len(parts) < 3 or parts[0] != _place() or not parts[1].isdecimal():
            continue
        pid = int(parts[1])
        if left not in _in_use if pid == os.getpid() else not psutil.pid_exists(pid):
            shutil.rmtree(left, ignore_errors=True)  # another process may do the same


def _replace(target: Path, work: Path, tidy: bool) -> None:
    """Move the files of `work` over those of `target`.

    tidy: take away what only the earlier save of this variant had.
    """
    new = sorted(work.iterdir(), key=lambda p: (p.suffix == ".json", p.name))
    names = {p.name for p in new}
    weights = next((p.name for p in new if p.suffix == ".safetensors"), None)
    if weights is None:
        raise ValueError(
            f"dirotq checkpoints are safetensors only, and diffusers wrote {', '.join(sorted(names)) or 'nothing'}; "
            f"{target} is as it was"
        )
    # name.variant-00001-of-00003.safetensors, name.safetensors.index.variant.json; with or without these parts.
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", weights)
    name, _, variant = stem.partition(".")
    shards = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors")
    index = target / (f"{name}.safetensors.index.{variant}.json" if variant else f"{name}.safetensors.index.json")
    if tidy:
        index.unlink(missing_ok=True)  # rather no model than one of old and new shards, if killed from here on
    for file in new:
        os.replace(file, target / file.name)
    for file in list(target.iterdir()) if tidy else ():
        if shards.fullmatch(file.name) and file.name not in names:
            file.unlink(missing_ok=True)
