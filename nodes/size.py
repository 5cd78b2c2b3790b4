"""The bytes of a MODEL with its LoRAs, which ComfyUI counts once, before there are any."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy.patcher_extension import CallbacksMP

#: Attachment of a patcher: bytes of the branches that `DiRotQLoRA` nodes put beside its linears.
BRANCHES = "dirotq_branch_bytes"


def branch_bytes(patcher: Any) -> int:
    return patcher.attachments.get(BRANCHES, 0)


def add_branch_bytes(patcher: Any, size: int) -> None:
    """Count `size` more bytes of branches that `patcher` injects."""
    patcher.set_attachments(BRANCHES, branch_bytes(patcher) + size)
    patcher.size = patcher.model_size() + size


def count_when_loaded(patcher: Any) -> None:
    """Have ComfyUI's figures corrected whenever `patcher` or a clone of it is loaded.

    Only then it is known what core's LoRAs have become, which are inside the weights; those of our nodes are beside.
    """
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, "dirotq", _count)


def _count(patcher: Any, device: Any, budget: int, force: bool, full: bool) -> None:
    """ComfyUI's callback. budget, force: of the load. full: all of it went to the device."""
    weights = comfy.model_management.module_size(patcher.model)
    patcher.size = weights + branch_bytes(patcher)
    if full:
        patcher.model.model_loaded_weight_memory = weights  # branches count themselves when they are injected
