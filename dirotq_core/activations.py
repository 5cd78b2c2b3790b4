"""Activation formats.

The lattice formats are integers in int8 with one scale per token; the fused kernels compute them and multiply them
exactly. The others carry a floating-point scale per token and 64 columns, as most papers do: they are quantized and
dequantized in PyTorch and multiplied in 16 bit, which is slower and no less exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .codebooks import GROUP_SIZE


@dataclass(frozen=True)
class ActivationFormat:
    """`lattice` formats are modes of the op `rotate_quantize`; the rest go through `fake_quantize`."""

    bits: int
    lattice: bool
    symmetric: bool = False


ACTIVATION_FORMATS: dict[str, ActivationFormat] = {
    "codebook": ActivationFormat(4, lattice=True),
    "int4": ActivationFormat(4, lattice=True),
    "int8": ActivationFormat(8, lattice=True),
    "asym_g64": ActivationFormat(4, lattice=False),
    "asym_g64_8": ActivationFormat(8, lattice=False),
    "sym_g64": ActivationFormat(4, lattice=False, symmetric=True),
    "sym_g64_8": ActivationFormat(8, lattice=False, symmetric=True),
}


def fake_quantize(v: torch.Tensor, fmt: ActivationFormat) -> torch.Tensor:
    """v [M, K] rounded to `fmt` per token and 64 columns, in v's dtype; gradients pass straight through.

    Asymmetric: step (max − min)/(2ᵇ − 1) from min (DiRotQ, per-group min/max). Symmetric: step max|v|/(2ᵇ⁻¹ − 1).
    """
    groups = v.detach().float().unflatten(-1, (-1, GROUP_SIZE))
    if fmt.symmetric:
        top = 2 ** (fmt.bits - 1) - 1
        step = groups.abs().amax(-1, keepdim=True) / top
        rounded = torch.round(groups / step.clamp(min=1e-30)).clamp(-top - 1, top) * step
    else:
        low = groups.amin(-1, keepdim=True)
        step = (groups.amax(-1, keepdim=True) - low) / (2**fmt.bits - 1)
        rounded = torch.round((groups - low) / step.clamp(min=1e-30)) * step + low
    rounded = rounded.flatten(-2).to(v.dtype)
    return v + (rounded - v).detach() if v.requires_grad else rounded
