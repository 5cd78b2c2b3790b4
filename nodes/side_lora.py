"""A LoRA or a LoKr as thin products beside a linear."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from comfy.weight_adapter import LoKrAdapter, LoRAAdapter

_B = TypeVar("_B", bound="_Factors")


class _Factors:
    """What branches of two factors, tensors among their fields, have in common."""

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def to(self: _B, device: torch.device) -> _B:
        """The same on another device."""
        return dataclasses.replace(self, **{name: t.to(device) for name, t in self._tensors().items()})  # type: ignore

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tensors().values())


@dataclass(frozen=True)
class SideLoRA(_Factors):
    """y[:, start : start + n] += factor · x[:, first : first + k] downᵀ upᵀ; down [R, k], up [n, R], any dtype."""

    down: torch.Tensor
    up: torch.Tensor
    start: int
    first: int
    factor: float

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add this branch to y [..., N] for x [..., K], in y's dtype."""
        part = x[..., self.first : self.first + self.down.shape[1]]
        h = torch.nn.functional.linear(part, self.down.to(x.device, x.dtype))
        delta = torch.nn.functional.linear(h, self.up.to(x.device, x.dtype))
        y[..., self.start : self.start + self.up.shape[0]].add_(delta, alpha=self.factor)


@dataclass(frozen=True)
class SideLoKr(_Factors):
    """y[:, start : start + a c] += factor · x[:, first : first + b d] (outer ⊗ inner)ᵀ; outer [a, b], inner [c, d].

    A Kronecker product has full rank where both factors have, so it is no LoRA; but W₁ X W₂ᵀ, with x as X [b, d], is as
    exact and as cheap beside the weight.
    """

    outer: torch.Tensor
    inner: torch.Tensor
    start: int
    first: int
    factor: float

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add this branch to y [..., N] for x [..., K], in y's dtype."""
        (a, b), (c, d) = self.outer.shape, self.inner.shape
        part = x[..., self.first : self.first + b * d].unflatten(-1, (b, d))
        h = torch.nn.functional.linear(part, self.inner.to(x.device, x.dtype))
        delta = (self.outer.to(x.device, x.dtype) @ h).flatten(-2)
        y[..., self.start : self.start + a * c].add_(delta, alpha=self.factor)


Branch = SideLoRA | SideLoKr


def branch_of(
    name: str, patch: Any, part: tuple[int, int, int] | None, shape: tuple[int, int], strength: float
) -> Branch | None:
    """A patch of a linear's weight as a branch; None if it is no plain LoRA or LoKr.

    Args:
        patch: of `comfy.lora.load_lora`. part: (dimension, start, length) of a slice of the weight. shape: (N, K).

    Raises:
        ValueError: the patch's shape does not fit the linear `name`.
    """
    n, k = shape
    start, length = (part[1], part[2]) if part and part[0] == 0 else (0, n)
    first, columns = (part[1], part[2]) if part and part[0] == 1 else (0, k)
    if isinstance(patch, LoRAAdapter):
        up, down, alpha, *others = patch.weights  # a middle (convolutions), magnitudes (DoRA), another shape
        if any(w is not None for w in others):
            return None
        up, down = up.flatten(1), down.flatten(1)
        if (up.shape[0], down.shape[1]) != (length, columns) or up.shape[1] != down.shape[0]:
            what = f"LoRA for {name} has up {tuple(up.shape)} and down {tuple(down.shape)}"
            raise ValueError(_misfit(what, length, columns))
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        return SideLoRA(down, up, start, first, strength * scale)
    if isinstance(patch, LoKrAdapter):
        pair = _kronecker(patch.weights)
        if pair is None:
            return None
        outer, inner, scale = pair
        if (outer.shape[0] * inner.shape[0], outer.shape[1] * inner.shape[1]) != (length, columns):
            what = f"LoKr for {name} has factors {tuple(outer.shape)} and {tuple(inner.shape)}"
            raise ValueError(_misfit(what, length, columns))
        return SideLoKr(outer, inner, start, first, strength * scale)
    return None


def _misfit(what: str, length: int, columns: int) -> str:
    return f"the {what}, but the linear there is {length} × {columns}; it was made for another model"


def _kronecker(weights: tuple) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Both factors of a LoKr and their scale, α over the rank of the last factor that is itself a product."""
    outer, inner, alpha, outer_a, outer_b, inner_a, inner_b, *others = weights  # a Tucker core, magnitudes (DoRA)
    whole = all(f is not None or (a is not None and b is not None)
                for f, a, b in ((outer, outer_a, outer_b), (inner, inner_a, inner_b)))  # fmt: skip
    if not whole or any(w is not None for w in others):
        return None
    rank = None
    if outer is None:
        outer, rank = outer_a.float() @ outer_b.float(), outer_b.shape[0]
    if inner is None:
        inner, rank = inner_a.float() @ inner_b.float(), inner_b.shape[0]
    if outer.ndim != 2 or inner.ndim != 2:  # convolutions
        return None
    return outer, inner, 1.0 if alpha is None or rank is None else float(alpha) / rank


def branches_of(patch: Any, shape: tuple[int, int]) -> list[Branch] | None:
    """What a `LowVramPatch` of ComfyUI adds to a weight (N, K), as branches; None if one of its patches is none.

    Its entries are (strength, patch, strength of the weight itself, slice, function of the patched weight).
    """
    found = []
    for strength, adapter, strength_model, part, function in patch.patches[patch.key]:
        branch = branch_of(patch.key, adapter, part, shape, strength)
        if branch is None or strength_model != 1.0 or function is not None:
            return None
        found.append(branch)
    return found
