"""What the pack needs beside ComfyUI, checked when ComfyUI loads it: one log line instead of a traceback.

Only names and versions are looked up here; nothing is imported, so the check costs milliseconds.
"""

from __future__ import annotations

import logging
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

#: Modules that requirements.txt brings and the nodes cannot do without.
NEEDED = ("accelerate", "diffusers", "huggingface_hub", "safetensors")
#: The comfy-kitchen versions whose tensor layouts the weight layout was written for: first, and first untested.
KITCHEN = ("0.2.31", "0.3")

_FILE = Path(__file__).parents[1] / "requirements.txt"
_log = logging.getLogger(__name__)


def obstacle() -> str | None:
    """Why the nodes cannot be offered, as one sentence with the command that helps, or None."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return f"missing {', '.join(missing)}; install with: {sys.executable} -m pip install -r {_FILE}"
    try:
        found = version("comfy-kitchen")
    except PackageNotFoundError:
        return "comfy-kitchen is not installed; ComfyUI 0.33 or newer brings it"
    if _numbers(found) < _numbers(KITCHEN[0]):
        return f"comfy-kitchen {found} is older than {KITCHEN[0]}; update ComfyUI to 0.33 or newer"
    return None


def log_notices(gpu: bool) -> None:
    """Log what works with a restriction. gpu: ComfyUI computes on a CUDA or ROCm device."""
    if gpu and find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        _log.warning(
            "DiRotQ: Triton is not installed, so 4-bit layers are computed in plain PyTorch, which is slower than "
            "16 bit. Install it with: %s -m pip install %s",
            sys.executable,
            package,
        )
    found = version("comfy-kitchen")
    if _numbers(found) >= _numbers(KITCHEN[1]):
        _log.warning("DiRotQ was tested with comfy-kitchen below %s; %s is installed", KITCHEN[1], found)


def _numbers(text: str) -> tuple[int, ...]:
    """The release number before any suffix: "0.2.31.dev1" → (0, 2, 31)."""
    parts = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
