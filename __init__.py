"""DiRotQ: 4-bit (W4A4) diffusion transformers for diffusers and ComfyUI.

``import dirotq`` registers the diffusers backend and is light; everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from .dirotq_core.register import register as _register

__version__ = "0.1.0"

_LAZY = {
    "DiRotQConfig": ".dirotq_core.config",
    "CheckpointError": ".dirotq_core.checkpoint",
    "QuantizationReport": ".dirotq_core.report",
    "quantize": ".dirotq_core.quantize",
    "EngineOptions": ".dirotq_core.engine",
    "quantize_checkpoint": ".dirotq_core.engine",
    "set_activation_bits": ".dirotq_core.build",
}

__all__ = ["__version__", *_LAZY]

_register()


async def comfy_entrypoint() -> Any:
    """ComfyUI asks this for the node pack."""
    from .nodes import DiRotQExtension

    return DiRotQExtension()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
