"""Activation formats.

The lattice formats are integers in int8 with one scale per token, and the kernels multiply them exactly; most are also
computed by a fused kernel, those with a table of their own in PyTorch. The others carry a floating-point scale per
token, or per token and 64 columns, as most papers do: they are quantized and dequantized in PyTorch and multiplied in
16 bit, which is slower and no less exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels import dequantize_nvfp4, quantize_nvfp4
from .codebooks import GROUP_SIZE, nearest_entry, symmetric


@dataclass(frozen=True)
class ActivationFormat:
    """One activation format.

    Attributes:
        lattice: int8 values with one scale per token; the rest go through `fake_quantize`.
        symmetric: of the rest, those without an offset. grouped: those with a scale per 64 columns.
        float4: NVFP4, with the float32 scale of each token instead of a tensor.
        table: the 2ᵇ int8 values of a lattice format that is no mode of the op `rotate_quantize`.
        rms: that table's units per root mean square of a token.
    """

    bits: int
    lattice: bool
    symmetric: bool = False
    table: tuple[int, ...] = ()
    rms: float = 0.0
    grouped: bool = True
    float4: bool = False

    @property
    def op_mode(self) -> bool:
        """Whether `rotate_quantize` computes it."""
        return self.lattice and not self.table


ACTIVATION_FORMATS: dict[str, ActivationFormat] = {
    "codebook": ActivationFormat(4, lattice=True),
    "int4": ActivationFormat(4, lattice=True),
    "int8": ActivationFormat(8, lattice=True),
    "asym_g64": ActivationFormat(4, lattice=False),
    "asym_g64_8": ActivationFormat(8, lattice=False),
    "sym_g64": ActivationFormat(4, lattice=False, symmetric=True),
    "sym_g64_8": ActivationFormat(8, lattice=False, symmetric=True),
    **{f"asym_token_{bits}": ActivationFormat(bits, lattice=False, grouped=False) for bits in (4, 6, 8)},
    "nvfp4": ActivationFormat(4, lattice=False, symmetric=True, float4=True),
    # Uniform and symmetric without zero: odd integers, at the step that distorts a Gaussian least (Max 1960).
    **{
        f"uniform_{bits}": ActivationFormat(bits, lattice=True, table=symmetric(*range(1, 2**bits, 2)), rms=2 / step)
        for bits, step in ((1, 1.5958), (2, 0.9957), (3, 0.5860), (4, 0.3352))
    },
    # Lloyd-Max on a Gaussian, rounded to integers at the rms where that costs least: 0.005 and 0.12 dB.
    "lloyd3": ActivationFormat(3, lattice=True, table=symmetric(6, 18, 32, 52), rms=24.08),
    "lloyd6": ActivationFormat(
        6, lattice=True, rms=28.71,
        table=symmetric(
            1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 32,
            34, 37, 39, 42, 45, 48, 51, 54, 58, 62, 66, 71, 77, 84, 93, 107,
        ),
    ),
}  # fmt: skip


def quantize_to_table(v: torch.Tensor, fmt: ActivationFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Table values int8 [M, K] nearest to v [M, K] / s, and s = rms(v) / `fmt.rms`, float32 [M]; 0 for a zero row."""
    v = v.float()
    scale = v.square().mean(1).sqrt() / fmt.rms
    inverse = torch.where(scale >= torch.finfo(torch.float32).tiny, 1 / scale, 0)
    return nearest_entry(fmt.table, v * inverse[:, None]), torch.where(inverse > 0, scale, 0)


def fake_quantize(v: torch.Tensor, fmt: ActivationFormat, shift: torch.Tensor | None = None) -> torch.Tensor:
    """v [M, K] rounded to `fmt` per token, or per token and 64 columns, in v's dtype; gradients pass straight through.

    Asymmetric: step (max − min)/(2ᵇ − 1) from min (DiRotQ, per-group min/max). Symmetric: step max|v|/(2ᵇ⁻¹ − 1).
    NVFP4: see `quantize_nvfp4`.

    Args:
        shift: c [K], for symmetric formats: groups of columns where it is positive are rounded as v + c to codes
            without a sign, step max|v + c|/(2ᵇ − 1), and c is taken off again (SVDQuant, for inputs behind GELU).
    """
    if fmt.float4:
        codes, blocks, scale = quantize_nvfp4(v.detach().reshape(-1, v.shape[-1]))
        rounded = (dequantize_nvfp4(codes, blocks) * scale[:, None]).reshape(v.shape).to(v.dtype)
        return v + (rounded - v).detach() if v.requires_grad else rounded
    groups = v.detach().float().unflatten(-1, (-1, GROUP_SIZE if fmt.grouped else v.shape[-1]))
    if fmt.symmetric:
        top = 2 ** (fmt.bits - 1) - 1
        step = groups.abs().amax(-1, keepdim=True) / top
        rounded = torch.round(groups / step.clamp(min=1e-30)).clamp(-top - 1, top) * step
        if shift is not None:
            columns = shift.float().unflatten(0, (-1, GROUP_SIZE))
            moved, most = groups + columns, 2**fmt.bits - 1
            step = moved.abs().amax(-1, keepdim=True) / most
            unsigned = torch.round(moved / step.clamp(min=1e-30)).clamp(0, most) * step - columns
            rounded = torch.where((columns > 0).all(1, keepdim=True), unsigned, rounded)
    else:
        low = groups.amin(-1, keepdim=True)
        step = (groups.amax(-1, keepdim=True) - low) / (2**fmt.bits - 1)
        rounded = torch.round((groups - low) / step.clamp(min=1e-30)) * step + low
    rounded = rounded.flatten(-2).to(v.dtype)
    return v + (rounded - v).detach() if v.requires_grad else rounded
