"""Load DiRotQ Model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .choices import ACTIVATION_BITS, BACKENDS, FOLDER, LORA_MODES
from .folders import checkpoint_root, stamp

NONE = "(none)"
_DEPTH = 4


def choices() -> list[str]:
    """Files and folders in the diffusers layout below models/diffusion_models, files of such folders left out."""
    folders = _folders()
    inside = tuple(f"{name}{os.sep}" for name in folders)
    files = [n for n in folder_paths.get_filename_list(FOLDER) if not n.startswith(inside)]
    return [NONE, *sorted(folders), *files]


def _folders() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        pattern = "*/" * _DEPTH
        for depth in range(1, _DEPTH):
            for config in root.glob(pattern[: 2 * depth] + "config.json"):
                folder = config.parent.parent if config.parent.name == "transformer" else config.parent
                if folder != root and _is_ours(config):
                    found.setdefault(str(folder.relative_to(root)), folder)
    return found


def _is_ours(config: Path) -> bool:
    from ..dirotq_core.loading import is_ours

    try:
        return is_ours(json.loads(config.read_bytes()))
    except (OSError, ValueError):
        return False


def locate(name: str) -> Path:
    """The path of one of `choices`; FileNotFoundError says where it was looked for."""
    folders = _folders()
    if name in folders:
        return folders[name]
    full = folder_paths.get_full_path(FOLDER, name)
    if full is None:
        roots = ", ".join(folder_paths.get_folder_paths(FOLDER))
        raise FileNotFoundError(f"{name!r} is not in {roots}")
    return Path(full)


#: Folder of a download → (its stamp, the fingerprint that stands for it).
_downloads: dict[Path, tuple[object, object]] = {}


def _fingerprint(folder: Path) -> object:
    """What changes if the files in `folder` change, except by our own download, which the loaded model already is."""
    now = stamp(folder)
    known, fingerprint = _downloads.get(folder, (None, None))
    if known != now:
        fingerprint = now
    _downloads[folder] = (now, fingerprint)
    return fingerprint


def _downloaded(folder: Path) -> None:
    """Have the files that are in `folder` now be the ones of its last fingerprint."""
    if folder in _downloads:
        _downloads[folder] = (stamp(folder), _downloads[folder][1])


def _revision(text: str) -> str:
    return text.strip() or "main"


class LoadModel(io.ComfyNode):
    """A quantized checkpoint as MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiRotQLoadModel",
            display_name="Load DiRotQ Model",
            category="DiRotQ",
            description=(
                "Loads a 4-bit DiRotQ checkpoint of FLUX.1 or PixArt-Σ, from disk or from the Hugging Face Hub."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    choices(),
                    tooltip=(
                        "A checkpoint in models/diffusion_models: a single .safetensors file or a diffusers folder."
                    ),
                ),
                io.String.Input(
                    "repo_id",
                    default="",
                    tooltip=(
                        "A repository on the Hugging Face Hub, such as name/flux-dev-dirotq. When set it takes "
                        "precedence; it is downloaded once, into the models folder."
                    ),
                ),
                io.String.Input("revision", default="main", tooltip="Branch, tag or commit of the repository."),
                io.Combo.Input(
                    "activation_bits",
                    list(ACTIVATION_BITS),
                    tooltip=(
                        "Bits of the activations: default takes what the checkpoint says, 4 is the paper's "
                        "setting, 8 is closer to 16 bit, 16 leaves activations as they are."
                    ),
                ),
                io.Combo.Input(
                    "backend",
                    list(BACKENDS),
                    tooltip=(
                        "Which kernels compute the 4-bit layers: auto uses Triton where it can run, pytorch is "
                        "slower and runs everywhere."
                    ),
                ),
                io.Combo.Input(
                    "lora",
                    list(LORA_MODES),
                    tooltip=(
                        "How ComfyUI's own LoRA loaders act on 4-bit layers: side branch keeps the LoRA exact in "
                        "16 bit, requantize rounds it into the 4-bit weights."
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model, to be connected to a sampler.")],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None, repo_id: str | None = None) -> bool | str:
        """Before a graph is queued. In place of ComfyUI's own check of the list, which also a repo_id would not pass.

        A value is None where the graph computes it.
        """
        if repo_id is None or repo_id.strip() or model_name is None or model_name in choices():
            return True
        roots = ", ".join(folder_paths.get_folder_paths(FOLDER))
        return f"{model_name!r} is not in {roots}; choose another model_name, or give the repo_id to download it from"

    @classmethod
    def fingerprint_inputs(
        cls, model_name: str | None, repo_id: str | None, revision: str | None, **_: str | None
    ) -> object:
        """A value is None where the graph computes it; then it is ComfyUI that notices that it changes."""
        from .hub_folder import folder_of

        if repo_id is None:
            return None
        try:
            if repo_id.strip():
                if revision is None:
                    return repo_id
                folder = folder_of(repo_id.strip(), _revision(revision), checkpoint_root())
                return repo_id, revision, _fingerprint(folder)
            return None if model_name is None else stamp(locate(model_name))
        except OSError:  # execute says what is wrong
            return model_name

    @classmethod
    def execute(
        cls, model_name: str, repo_id: str, revision: str, activation_bits: str, backend: str, lora: str
    ) -> io.NodeOutput:
        from ..dirotq_core.single_file import read_native
        from .hub import download
        from .hub_folder import folder_of
        from .model import make_model, make_settings

        if repo_id.strip():
            path = download(repo_id.strip(), _revision(revision), checkpoint_root())
            _downloaded(folder_of(repo_id.strip(), _revision(revision), checkpoint_root()))
        elif model_name == NONE:
            raise ValueError("choose a model_name or give a repo_id")
        else:
            path = locate(model_name)
        checkpoint = read_native(path)
        settings = make_settings(checkpoint, activation_bits, backend, lora)
        return io.NodeOutput(make_model(checkpoint, settings))
