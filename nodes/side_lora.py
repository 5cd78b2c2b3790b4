"""A LoRA as two thin products beside a linear."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from comfy.weight_adapter import LoRAAdapter


@dataclass(frozen=True)
class SideLoRA:
    """y[:, start : start + n] += factor · x[:, first : first + k] downᵀ upᵀ; down [R, k], up [n, R], any dtype."""

    down: torch.Tensor
    up: torch.Tensor
    start: int
    first: int
    factor: float

    def to(self, device: torch.device) -> SideLoRA:
        """The same on another device."""
        return dataclasses.replace(self, down=self.down.to(device), up=self.up.to(device))

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add this branch to y [..., N] for x [..., K], in y's dtype."""
        part = x[..., self.first : self.first + self.down.shape[1]]
        h = torch.nn.functional.linear(part, self.down.to(x.device, x.dtype))
        delta = torch.nn.functional.linear(h, self.up.to(x.device, x.dtype))
        y[..., self.start : self.start + self.up.shape[0]].add_(delta, alpha=self.factor)


def branch_of(
    name: str, patch: Any, part: tuple[int, int, int] | None, shape: tuple[int, int], strength: float
) -> SideLoRA | None:
    """A patch of a linear's weight as a branch; None if it is no plain LoRA.

    Args:
        patch: of `comfy.lora.load_lora`. part: (dimension, start, length) of a slice of the weight. shape: (N, K).

    Raises:
        ValueError: the LoRA's shape does not fit the linear `name`.
    """
    weights = patch.weights if isinstance(patch, LoRAAdapter) else None
    # weights: up, down, alpha, middle (convolutions), magnitude (DoRA), another shape
    if weights is None or any(w is not None for w in weights[3:6]):
        return None
    up, down, alpha = weights[0].flatten(1), weights[1].flatten(1), weights[2]
    n, k = shape
    start, length = (part[1], part[2]) if part and part[0] == 0 else (0, n)
    first, columns = (part[1], part[2]) if part and part[0] == 1 else (0, k)
    if (up.shape[0], down.shape[1]) != (length, columns) or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"the LoRA for {name} has up {tuple(up.shape)} and down {tuple(down.shape)}, but the linear there is "
            f"{length} × {columns}; it was made for another model"
        )
    return SideLoRA(down, up, start, first, strength * (float(alpha) / down.shape[0] if alpha is not None else 1.0))


def branches_of(patch: Any, shape: tuple[int, int]) -> list[SideLoRA] | None:
    """What a `LowVramPatch` of ComfyUI adds to a weight (N, K), as branches; None if not all of it is plain LoRA.

    Its entries are (strength, patch, strength of the weight itself, slice, function of the patched weight).
    """
    found = []
    for strength, adapter, strength_model, part, function in patch.patches[patch.key]:
        branch = branch_of(patch.key, adapter, part, shape, strength)
        if branch is None or strength_model != 1.0 or function is not None:
            return None
        found.append(branch)
    return found
