"""Where checkpoints are written, and whether files have changed."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from .choices import FOLDER


def checkpoint_root() -> Path:
    """The folder of diffusion models that the user made the default in extra_model_paths.yaml, or ComfyUI's own.

    ComfyUI's list of them has the default first, but the old models/unet before its own models/diffusion_models.
    """
    folders = [Path(f) for f in folder_paths.get_folder_paths(FOLDER)]
    old = Path(folder_paths.models_dir, "unet").resolve()
    return next((f for f in folders if f.resolve() != old), folders[0])


def stamp(path: Path) -> list[tuple[str, int, int]]:
    """Time and size of a file, or of a checkpoint folder's JSON and weights: beside them downloads leave notes."""
    files = [f for kind in ("*.json", "*.safetensors") for f in path.rglob(kind)] if path.is_dir() else [path]
    files = [f for f in files if f.is_file()]
    visible = [f for f in sorted(files) if not any(p.startswith(".") for p in f.relative_to(path).parts)]
    return [(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in visible]
