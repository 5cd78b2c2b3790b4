"""Absorbing a LoRA into the 16-bit branch of quantized linears, exactly, and letting it go again.

A LoRA adds ΔW = B A, which 4-bit codes cannot hold and the site's basis U does not span. The branch is a product of
two factors, though: with z' = [z, x Aᵀ] and L' = [L, B], z' L'ᵀ = z Lᵀ + x (B A)ᵀ. So A's rows join the site, B's
columns join `low_rank`, the siblings get zeros there, and neither the codes nor the kernels see a difference.
"""

from __future__ import annotations

import torch
from torch import nn

from .input_site import InputSite
from .linear import DiRotQLinear

#: Kernels read rows of the branch 16 bytes at a time, so it grows by whole multiples of this.
ALIGNMENT = 8


@torch.no_grad()
def check_absorbable(linear: DiRotQLinear, down: torch.Tensor, up: torch.Tensor) -> None:
    """Raise what `absorb` would, and change nothing."""
    shapes = (linear.out_features, len(down)), (len(down), linear.in_features)
    if (tuple(up.shape), tuple(down.shape)) != shapes:
        raise ValueError(
            f"factors of shapes {shapes[0]} and {shapes[1]} are needed, got {(*up.shape,)}, {(*down.shape,)}"
        )
    if any(m.weight.is_meta for m in linear.site.members):
        raise ValueError("a LoRA can be absorbed only while the model is in memory: fuse it before enabling offload")
    if not all(torch.isfinite(t.to(torch.bfloat16)).all() for t in (down, up)):
        raise ValueError("the LoRA holds NaN or infinity, or values beyond bfloat16's range")


@torch.no_grad()
def absorb(linear: DiRotQLinear, down: torch.Tensor, up: torch.Tensor) -> int:
    """Add ΔW = up · down to what `linear` computes, and return the number that `release` wants.

    Args:
        linear: on its device (not offloaded, not on meta). down: A [q, K]. up: B [N, q], with the LoRA's scale in it.

    Raises:
        ValueError: the shapes do not fit, a value is not finite, or a linear of the site is not in memory.
    """
    check_absorbable(linear, down, up)
    site, device = linear.site, linear.weight.device
    down, up = (t.to(device, torch.bfloat16) for t in (down, up))
    padding = -len(down) % ALIGNMENT
    down, up = nn.functional.pad(down, (0, 0, 0, padding)), nn.functional.pad(up, (0, padding))
    old = site.tensor("absorbed")
    rows = down if old is None else torch.cat([old, down])
    branches = []
    for member in site.members:
        columns = up if member is linear else up.new_zeros(member.out_features, len(down))
        low_rank = member.low_rank
        branches.append(columns if low_rank is None else torch.cat([low_rank, columns.to(low_rank.device)], 1))
    number = 1 + max((n for n, _ in site.absorptions), default=-1)
    _put(site, rows, branches, [*site.absorptions, (number, len(down))])
    return number


@torch.no_grad()
def release(linear: DiRotQLinear, number: int) -> None:
    """Undo one `absorb`, in any order; without any left, every bit is as before. KeyError: there is none of it."""
    site = linear.site
    numbers = [n for n, _ in site.absorptions]
    if number not in numbers:
        raise KeyError(f"nothing numbered {number} is absorbed here")
    position = numbers.index(number)
    start = sum(width for _, width in site.absorptions[:position])
    end = start + site.absorptions[position][1]
    absorbed = site.tensor("absorbed")
    assert absorbed is not None
    rows = torch.cat([absorbed[:start], absorbed[end:]])
    branches = []
    for member in site.members:
        low_rank = member.low_rank
        assert low_rank is not None
        branches.append(torch.cat([low_rank[:, : site.rank + start], low_rank[:, site.rank + end :]], 1))
    _put(site, rows, branches, site.absorptions[:position] + site.absorptions[position + 1 :])


def _put(site: InputSite, rows: torch.Tensor, branches: list[torch.Tensor], absorptions: list[tuple[int, int]]) -> None:
    """Give the site and its members new tensors. All were made before the first is put: memory may end in between."""
    parameters = [_parameter(tensor) for tensor in (rows, *branches)]
    for module, name, new in zip(
        (site, *site.members), ("absorbed", *["low_rank"] * len(branches)), parameters, strict=True
    ):
        module.register_parameter(name, new)
    site.absorptions = absorptions
    site.memo.entry = None


def _parameter(tensor: torch.Tensor) -> nn.Parameter | None:
    return nn.Parameter(tensor, requires_grad=False) if tensor.numel() else None
