"""Writing folders that appear only when complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Call `write(folder)` on a temporary sibling of `target` and rename it: the name appears only when complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(folder)
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    target.chmod(0o755)  # mkdtemp made it private
