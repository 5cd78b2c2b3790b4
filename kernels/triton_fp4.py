"""Triton kernel of `linear_nvfp4`: both operands in NVFP4, on the block-scaled FP4 units of Blackwell.

Elsewhere values and block scales are decoded to bfloat16, which holds their product exactly, and multiplied there. The
tile is computed transposed, Cᵀ = Ŵ Aᵀ, as in `triton_linear`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, on_device_of
from .triton_common import dot, low_rank_tile, narrow, tile_of

_OLDEST_FOR_NATIVE = (3, 6)


@triton.jit
def e2m1_values(codes):
    """fp32 values of int32 codes 0..15."""
    exponent = (codes >> 1) & 3
    mantissa = (codes & 1).to(tl.float32)
    power = tl.where(exponent == 3, 4.0, tl.where(exponent == 2, 2.0, 1.0))
    size = tl.where(exponent == 0, 0.5 * mantissa, power * (1.0 + 0.5 * mantissa))
    return tl.where((codes & 8) != 0, -size, size)


@triton.jit
def e4m3_values(bits):
    """fp32 values of int32 bits 0..126 of a non-negative e4m3."""
    normal = (((bits >> 3) + 120) << 23) | ((bits & 7) << 20)
    value = normal.to(tl.float32, bitcast=True)
    return tl.where(bits < 8, (bits & 7).to(tl.float32) * 0.001953125, value)


@triton.jit
def linear_nvfp4_kernel(
    codes_ptr, blocks_ptr, scale_ptr, z_ptr, weight_ptr, weight_blocks_ptr, weight_scale_ptr, low_rank_ptr, bias_ptr,
    out_ptr, M, N, K, r,
    NATIVE: tl.constexpr, HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out [M, N] = ((Σ_k β e · β' e') · s) · t + z Lᵀ + b."""
    rows, cols = tile_of(tl.program_id(0), M, N, BM, BN)
    a_row = rows.to(tl.int64)
    w_row = cols.to(tl.int64)
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        pairs = start // 2 + tl.arange(0, BK // 2)
        inside = pairs < K // 2
        w = tl.load(
            weight_ptr + w_row[:, None] * (K // 2) + pairs[None, :],
            mask=(cols[:, None] < N) & inside[None, :], other=0,
        )  # fmt: skip
        a = tl.load(
            codes_ptr + a_row[None, :] * (K // 2) + pairs[:, None],
            mask=(rows[None, :] < M) & inside[:, None], other=0,
        )  # fmt: skip
        if NATIVE:
            groups = start // 16 + tl.arange(0, BK // 16)
            some = groups < K // 16
            w_scale = tl.load(
                weight_blocks_ptr + w_row[:, None] * (K // 16) + groups[None, :],
                mask=(cols[:, None] < N) & some[None, :], other=0,
            )  # fmt: skip
            a_scale = tl.load(
                blocks_ptr + a_row[:, None] * (K // 16) + groups[None, :],
                mask=(rows[:, None] < M) & some[None, :], other=0,
            )  # fmt: skip
            w_scale = w_scale.to(tl.float8e4nv, bitcast=True)
            a_scale = a_scale.to(tl.float8e4nv, bitcast=True)
            total = tl.dot_scaled(w, w_scale, "e2m1", a, a_scale, "e2m1", total)
        else:
            # Eight bytes share a block scale; even and odd columns are multiplied apart.
            w_beta = e4m3_values(
                tl.load(
                    weight_blocks_ptr + w_row[:, None] * (K // 16) + (pairs // 8)[None, :],
                    mask=(cols[:, None] < N) & inside[None, :], other=0,
                ).to(tl.int32)
            )  # fmt: skip
            a_beta = e4m3_values(
                tl.load(
                    blocks_ptr + a_row[None, :] * (K // 16) + (pairs // 8)[:, None],
                    mask=(rows[None, :] < M) & inside[:, None], other=0,
                ).to(tl.int32)
            )  # fmt: skip
            w_codes = w.to(tl.int32)
            a_codes = a.to(tl.int32)
            w_even = narrow(e2m1_values(w_codes & 15) * w_beta, tl.bfloat16)
            a_even = narrow(e2m1_values(a_codes & 15) * a_beta, tl.bfloat16)
            total = dot(w_even, a_even, total)
            w_odd = narrow(e2m1_values(w_codes >> 4) * w_beta, tl.bfloat16)
            a_odd = narrow(e2m1_values(a_codes >> 4) * a_beta, tl.bfloat16)
            total = dot(w_odd, a_odd, total)

    scale = tl.load(scale_ptr + rows, mask=rows < M, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + cols, mask=cols < N, other=0.0)
    y = total * scale[None, :] * weight_scale[:, None]
    if HAS_LOW_RANK:
        y += low_rank_tile(z_ptr, low_rank_ptr, rows, cols, M, N, r, BM, BN, BR)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + a_row[None, :] * N + cols[:, None]
    tl.store(out_at, narrow(y, out_ptr.dtype.element_ty), mask=(rows[None, :] < M) & (cols[:, None] < N))


def blocks(m: int, native: bool) -> dict[str, int]:
    """Tile sizes and launch options for M tokens."""
    if native:  # what the block-scaled instructions of sm_100 and sm_120 take
        return {"BM": 128 if m > 64 else 64, "BN": 128, "BK": 128, "BR": 32, "num_warps": 8, "num_stages": 3}
    return {"BM": 64 if m > 16 else 16, "BN": 64, "BK": 64, "BR": 32, "num_warps": 4, "num_stages": 3}


@cache
def has_native(kind: str, index: int | None) -> bool:
    """Whether the device multiplies NVFP4 itself, and this Triton knows how."""
    if kind != "cuda" or torch.version.hip or torch.cuda.get_device_capability(index)[0] < 10:
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= _OLDEST_FOR_NATIVE


def linear_nvfp4(
    codes: Tensor, block_scale: Tensor, scale: Tensor, z: Tensor | None, weight: Tensor, weight_blocks: Tensor,
    weight_scale: Tensor, low_rank: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    m, n, k = codes.shape[0], weight.shape[0], 2 * codes.shape[1]
    out = torch.empty((m, n), dtype=out_dtype, device=codes.device)
    if not out.numel():
        return out
    native = has_native(codes.device.type, codes.device.index)
    tile = blocks(m, native)
    grid = (cdiv(m, tile["BM"]) * cdiv(n, tile["BN"]),)
    weight_scale = weight_scale.contiguous()
    rank = 0 if z is None or low_rank is None else z.shape[1]
    # Absent tensors are never read; any pointer stands in for them.
    z_or_any = weight_scale if z is None else z.contiguous()
    low_rank_or_any = weight_scale if low_rank is None else low_rank.contiguous()
    bias_or_any = weight_scale if bias is None else bias.contiguous()
    with on_device_of(codes):
        launch(
            linear_nvfp4_kernel, grid,
            codes.contiguous(), block_scale.contiguous(), scale.contiguous(), z_or_any, weight.contiguous(),
            weight_blocks.contiguous(), weight_scale, low_rank_or_any, bias_or_any, out, m, n, k, rank,
            NATIVE=native, HAS_LOW_RANK=rank > 0, HAS_BIAS=bias is not None, **tile,
        )  # fmt: skip
    return out
