"""The dense model on disk: where its files are, what they hold, and its tensors one group at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..backend import DENSE_DTYPES
from ..base_model import CARD_NAME
from ..checkpoint import CheckpointError
from ..files import TensorEntry, check_headers, checkpoint_files, read_headers, read_json
from ..hub_errors import hub_errors, reading_sentence
from ..inspect import find_transformer, skeleton

logger = logging.getLogger(__name__)

#: Kinds of files that diffusers loads a component from; pickles and other frameworks' weights stay where they are.
COMPONENT_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
#: Bytes of each tensor that the source's identity is told by, beside size and time of the files.
SAMPLED_BYTES = 4096


@dataclass(frozen=True)
class Source:
    """A dense transformer and the pipeline around it.

    Attributes:
        root: the pipeline's folder; None for a transformer on its own. folder: the transformer's.
        config: its config.json. entries: its tensors; empty if only the configuration was asked for.
    """

    root: Path | None
    folder: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]

    def model(self, dtype: torch.dtype) -> Any:
        """The transformer in `dtype`, its parameters on the meta device.

        As in `from_pretrained`, buffers that are in no file (position embeddings) keep the precision they are made in.
        """
        model = skeleton(self.config).eval()
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    empty = torch.empty_like(p, dtype=dtype if p.is_floating_point() else p.dtype)
                    module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
        return model

    def check(self, model: torch.nn.Module) -> None:
        """Raise CheckpointError unless the files hold the tensors of `model`, as floats of 16 or 32 bit.

        Tensors that the model has no use for are reported and left out, as `from_pretrained` does.
        """
        state = model.state_dict()
        unused = self.entries.keys() - state.keys()
        if unused:
            logger.warning("%d tensors of %s are not used, among them %r", len(unused), self.folder, min(unused))
        used = {name: entry for name, entry in self.entries.items() if name in state}
        check_headers(used, {name: (tuple(t.shape), None) for name, t in state.items()})
        for name, entry in used.items():
            if entry.dtype not in DENSE_DTYPES:
                raise CheckpointError(
                    f"tensor {name!r} has dtype {entry.dtype}; dirotq quantizes bfloat16, float16 or float32 weights, "
                    "so give it the original model"
                )

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors called `names` in `dtype`, on the host; those already in it may be views of the files."""
        return read_tensors({name: self.entries[name] for name in names}, dtype)

    def files(self) -> list[Path]:
        """Every file that the result depends on."""
        folders = [self.folder] if self.root is None else [self.root / c for c in self.components()]
        found = {f for folder in folders for pattern in COMPONENT_FILES for f in folder.glob(pattern)}
        if self.root is not None:
            found.add(self.root / "model_index.json")
        return sorted(found)

    def components(self) -> list[str]:
        """Names of the pipeline's folders."""
        assert self.root is not None
        index = read_json(self.root / "model_index.json")
        return sorted(name for name in index if not name.startswith("_") and (self.root / name).is_dir())

    def other_parts(self) -> list[dict[str, tuple[int, ...]]]:
        """Tensor name → shape, for each part of the pipeline beside the transformer.

        Variants of a part, the same tensors in another precision, count once. Raises CheckpointError if a file is
        truncated.
        """
        if self.root is None:
            return []
        folders = [self.root / c for c in self.components() if self.root / c != self.folder]
        return [
            {
                name: entry.shape
                for file in sorted(f.glob("*.safetensors"))
                for name, entry in read_headers([file]).items()
            }
            for f in folders
        ]

    def identity(self) -> dict[str, str]:
        """File name → a short text that changes with the file: size, time, and for tensors a sample of their bytes."""
        base = self.root or self.folder
        seen = {}
        for file in self.files():
            stat = file.stat()
            seen[file.relative_to(base).as_posix()] = f"{stat.st_size} bytes, {stat.st_mtime_ns}"
        for file, digest in self._samples().items():
            seen[file.relative_to(base).as_posix()] += f", {digest}"
        return seen

    def _samples(self) -> dict[Path, str]:
        by_file: dict[Path, list[TensorEntry]] = {}
        for entry in self.entries.values():
            by_file.setdefault(entry.file, []).append(entry)
        digests = {}
        for file, entries in by_file.items():
            digest = hashlib.sha256()
            with file.open("rb") as f:
                start = 8 + int.from_bytes(f.read(8), "little")
                f.seek(0)
                digest.update(f.read(start))
                for entry in sorted(entries, key=lambda e: e.begin):
                    f.seek(start + (entry.begin + entry.end) // 2)
                    digest.update(f.read(min(SAMPLED_BYTES, entry.bytes)))
            digests[file] = digest.hexdigest()[:16]
        return digests


def read_tensors(entries: dict[str, TensorEntry], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors of `entries` by name, floating ones cast to `dtype` if one is given."""
    out = {}
    for file in sorted({e.file for e in entries.values()}):
        with safe_open(file, framework="pt") as f:
            for name, entry in entries.items():
                if entry.file == file:
                    tensor = f.get_tensor(name)
                    out[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return {name: out[name] for name in entries}


def open_source(model: str | Path, weights: bool = True) -> Source:
    """The dense model in a folder (of a pipeline or of a transformer) or on the Hub.

    Args:
        weights: False reads the configuration only, and downloads no more than that.

    Raises:
        CheckpointError: nothing usable is there, or a file is truncated or damaged; the message names it.
        ValueError: it is quantized already.
    """
    path = Path(model)
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the pipeline's folder, or the folder of its transformer")
    if not path.is_dir():
        path = download(str(model), weights)
    folder = find_transformer(path)
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise ValueError(f"{folder} is quantized already; give the original model")
    root = path if folder != path and (path / "model_index.json").is_file() else None
    return Source(root, folder, config, read_headers(checkpoint_files(folder)) if weights else {})


def download(name: str, weights: bool) -> Path:
    """The folder of a pipeline or a transformer on the Hub; CheckpointError says why it cannot be had."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        root = Path(snapshot_download(name, allow_patterns=["*.json", "*/*.json"]))
        if weights:
            index = root / "model_index.json"
            folders = [c for c in read_json(index) if not c.startswith("_")] if index.is_file() else ["."]
            patterns = [kind if c == "." else f"{c}/{kind}" for c in folders for kind in COMPONENT_FILES]
            # Variants are copies in another precision.
            snapshot_download(name, allow_patterns=["*.json", *patterns], ignore_patterns=["*.fp16.*", "*.bf16.*"])
    except hub_errors() as error:
        raise CheckpointError(f"{name!r} is no folder, and {reading_sentence(error, name)}") from error
    if weights:
        with suppress(*hub_errors()):  # for the licence; where it is not, or not in the cache, nothing is lost
            hf_hub_download(name, CARD_NAME)
    return root
