"""NVFP4: e2m1 values, a block scale in e4m3 for 16 of them, and one float32 scale above those.

A value is s · β · e, e one of ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}. Codes are 4 bits (bit 3 the sign, bits 0-2 the index of
the magnitude, two to a byte as `pack_int4` has them), block scales the 8 bits of a non-negative float8 e4m3. β · e has
at most six significant bits, so bfloat16 holds it exactly.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .lattice import unpack_int4
from .tables import table_like

FP4_BLOCK = 16
"""Columns that share a block scale."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by index."""

E2M1_BY_CODE = (*E2M1, *(-e for e in E2M1))

E2M1_MAX, E4M3_MAX = 6.0, 448.0
NAN_BITS = 0x7F
"""The bits of e4m3 that are no number; larger ones are negative."""


def encode_e2m1(x: Tensor) -> Tensor:
    """Codes uint8 of x (any shape, finite), rounded to nearest, ties to the even code; saturates at ±6."""
    size = x.abs()
    index = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for i, (low, high) in enumerate(pairwise(E2M1)):
        middle = (low + high) / 2
        index += (size >= middle) if i % 2 else (size > middle)
    return index | ((x < 0).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes uint8 0..15."""
    return table_like(E2M1_BY_CODE, codes, dtype)[codes.int()]


# Both directions are arithmetic on the bits of float32, equal to torch's conversions: those become Triton's in a
# compiled graph, which has none before sm_89, and what they make of values beyond 448 depends on torch's version.


def encode_e4m3(x: Tensor) -> Tensor:
    """The 8 bits of e4m3, uint8, of x float32: to nearest, ties to even; saturates at ±448, and NaN stays one."""
    bits = x.view(torch.int32)
    size = bits & 0x7FFFFFFF
    most = size.clamp(max=0x43E00000)  # 448
    normal = ((most + 0x7FFFF + (most >> 20 & 1)) >> 20) - (120 << 3)
    subnormal = (x.abs().clamp(max=2.0**-6) * 512).round().to(torch.int32)  # whole steps of 2⁻⁹, up to the first normal
    code = torch.where(size < 0x3C800000, subnormal, normal)  # below 2⁻⁶
    code = code.masked_fill(size > 0x7F800000, NAN_BITS)
    return (code | (bits >> 24 & 128)).to(torch.uint8)


def decode_e4m3(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of the 8 bits of e4m3, uint8."""
    code = bits.to(torch.int32)
    size = code & 127
    normal = ((size << 20) + (120 << 23)).view(torch.float32)
    value = torch.where(size < 8, size.to(torch.float32) / 512, normal).masked_fill(size == NAN_BITS, torch.nan)
    return torch.where(code >= 128, -value, value).to(dtype)


def nvfp4_scale(largest: Tensor) -> Tensor:
    """s float32 with which `largest` is the largest value that can be said; 0 where that has no finite reciprocal."""
    scale = largest.float() / (E2M1_MAX * E4M3_MAX)
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 0)


def quantize_nvfp4(v: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """NVFP4 of rows v [M, K]: packed codes uint8 [M, K/2], block scales uint8 [M, K/16], scales float32 [M].

    scale: s of each row; without it that of the row's largest value. β = e4m3(max|block| / 6 s), e = e2m1(v / s β).
    Raises ValueError if K is no multiple of 16.
    """
    if v.ndim != 2 or v.shape[1] % FP4_BLOCK:
        raise ValueError(f"v has shape {list(v.shape)}; [M, K] with K a multiple of {FP4_BLOCK} is needed")
    v = v.float()
    scale = nvfp4_scale(v.abs().amax(1)) if scale is None else scale
    blocks = (v * torch.where(scale > 0, 1 / scale, 0)[:, None]).unflatten(1, (-1, FP4_BLOCK))
    beta = encode_e4m3((blocks.abs().amax(2) / E2M1_MAX).clamp(max=E4M3_MAX))
    divisor = decode_e4m3(beta)[:, :, None]
    codes = encode_e2m1(torch.where(divisor > 0, blocks / divisor, 0)).flatten(1)
    # Not `pack_int4`: its check of the range would wait for the GPU, and these are 0..15 by construction.
    return codes[:, 0::2] | (codes[:, 1::2] << 4), beta, scale


def dequantize_nvfp4(codes: Tensor, blocks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """β e [M, K] of packed codes uint8 [M, K/2] and block scales uint8 [M, K/16]: exact in bfloat16 and wider."""
    values = decode_e2m1(unpack_int4(codes), dtype).unflatten(1, (-1, FP4_BLOCK))
    return (values * decode_e4m3(blocks, dtype)[:, :, None]).flatten(1)
