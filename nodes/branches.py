"""LoRAs beside the weights, never in them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from comfy.patcher_extension import PatcherInjection

from .operations import DiRotQLinear
from .side_lora import Branch, branch_of
from .size import add_branch_bytes

logger = logging.getLogger(__name__)


def side_branches(
    patches: Mapping[Any, Any], shapes: Mapping[str, tuple[int, int]], strength: float
) -> tuple[dict[str, list[Branch]], dict[Any, Any]]:
    """LoRAs as branches of their linears, and the patches that are none.

    Args:
        patches: from `comfy.lora.load_lora`: key, or (key, (dimension, start, length)) for a slice of fused rows.
        shapes: module → (N, K) of the linears that can hold a branch. strength: factor of all.

    Raises:
        ValueError: a LoRA's shape does not fit its linear.
    """
    branches: dict[str, list[Branch]] = {}
    others: dict[Any, Any] = {}
    for key, patch in patches.items():
        name, part = (key, None) if isinstance(key, str) else (key[0], key[1])
        reshaping = not isinstance(key, str) and len(key) > 2
        module = name.removesuffix(".weight")
        branch = None
        if module in shapes and not reshaping:
            branch = branch_of(name, patch, part, shapes[module], strength)
        if branch is None:
            others[key] = patch
        else:
            branches.setdefault(module, []).append(branch)
    return branches, others


class _Injection:
    """Puts branches into their modules while a model with this LoRA is loaded, and takes them out again."""

    def __init__(self, branches: Mapping[str, list[Branch]]):
        self.branches = branches
        self.key = object()

    def inject(self, patcher: Any) -> None:
        for name, branches in self.branches.items():
            module: DiRotQLinear = comfy.utils.get_attr(patcher.model, name)
            if self.key not in module.side_loras:
                patcher.model.model_loaded_weight_memory += sum(b.nbytes for b in branches)
            module.side_loras[self.key] = [b.to(patcher.load_device) for b in branches]

    def eject(self, patcher: Any) -> None:
        for name in self.branches:
            branches = comfy.utils.get_attr(patcher.model, name).side_loras.pop(self.key, ())
            patcher.model.model_loaded_weight_memory -= sum(b.nbytes for b in branches)


def apply_lora(patcher: Any, lora: Mapping[str, torch.Tensor], strength: float) -> Any:
    """A clone of `patcher` with a LoRA of any format ComfyUI reads.

    Raises:
        ValueError: no key of the LoRA belongs to this model, or a shape does not fit.
    """
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), key_map)
    if not patches:
        raise ValueError("no key of this LoRA belongs to this model; is it for another architecture?")
    linears = {n: m for n, m in patcher.model.named_modules() if isinstance(m, DiRotQLinear)}
    shapes = {n: (m.out_features, m.in_features) for n, m in linears.items()}
    branches, others = side_branches(patches, shapes, strength)
    clone = patcher.clone()
    if others:
        names = ", ".join(str(k if isinstance(k, str) else k[0]) for k in list(others)[:3])
        logger.info("%d patches of this LoRA are no plain LoRA or LoKr and go into the weights: %s", len(others), names)
        clone.add_patches(others, strength)
    if branches:
        injection = _Injection(branches)
        add_branch_bytes(clone, sum(b.nbytes for one in branches.values() for b in one))
        clone.set_injections(f"dirotq_lora_{uuid.uuid4()}", [PatcherInjection(injection.inject, injection.eject)])
    return clone
