"""Where checkpoints are written."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from .choices import FOLDER


def checkpoint_root() -> Path:
    """ComfyUI's models/diffusion_models. Its list of such folders also has models/unet, which it names first."""
    folders = [Path(f) for f in folder_paths.get_folder_paths(FOLDER)]
    return next((f for f in folders if f.name == FOLDER), folders[0])
