"""Where checkpoints are written."""

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
