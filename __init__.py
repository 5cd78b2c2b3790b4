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
    "push": ".dirotq_core.hub",
}

__all__ = ["__version__", *_LAZY]

#: ComfyUI serves the nodes' help pages from here.
WEB_DIRECTORY = "./web"

_register()


async def comfy_entrypoint() -> Any:
    """ComfyUI asks this for the node pack: an extension, without nodes where something they need is missing."""
    import logging

    from comfy_api.latest import ComfyExtension

    from .nodes import requirements

    obstacle = requirements.obstacle()
    if obstacle is None:
        try:
            from .nodes.extension import DiRotQExtension

            return DiRotQExtension()
        except ImportError as error:
            obstacle = f"{error}; ComfyUI 0.33 or newer and the pack's requirements.txt are needed"
    logging.getLogger(__name__).error("DiRotQ's nodes are not available: %s", obstacle)

    class WithoutNodes(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return []

    return WithoutNodes()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
