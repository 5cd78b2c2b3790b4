"""Triton kernels of `linear_a16`: 16-bit activations times 4-bit weights, which are rounded to the dtype of x.

Few tokens (modulation layers see one per image) take a memory-bound kernel that reads each weight byte once and
leaves its nibbles where they are: even and odd columns are two products. More tokens take a tiled product.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import OPTIONS, decode, dot, low_rank_tile, narrow, table_words, tile_of

FEW_TOKENS = 16


@triton.jit
def _weights(
    weight_ptr, scale_ptr, cols, start, N, K, groups, t0, t1, t2, t3,
    DTYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Even and odd columns, each [BN, BK/2] in DTYPE, of weight columns start .. start + BK."""
    # Three dimensions, row × group of 64 columns × byte, so that one scale per row and group is read.
    row = cols[:, None, None]
    group = tl.arange(0, BK // 64)[None, :, None]
    byte = group * 32 + tl.arange(0, 32)[None, None, :]
    inside = row < N
    packed = tl.load(weight_ptr + row.to(tl.int64) * (K // 2) + start // 2 + byte, mask=inside, other=0)
    packed = packed.to(tl.int32)
    # One scale per row: every group reads the same.
    column = tl.where(groups == 1, 0, start // 64 + group)
    scale = tl.load(scale_ptr + row.to(tl.int64) * groups + column, mask=inside, other=0.0)
    even = decode(packed & 15, t0, t1, t2, t3).to(tl.float32) * scale
    odd = decode(packed >> 4, t0, t1, t2, t3).to(tl.float32) * scale
    return narrow(tl.reshape(even, (BN, BK // 2)), DTYPE), narrow(tl.reshape(odd, (BN, BK // 2)), DTYPE)


@triton.jit
def _finish(
    y, z_ptr, low_rank_ptr, bias_ptr, out_ptr, rows, cols, M, N, r,
    HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Add the low-rank branch and the bias to the transposed tile y and store it."""
    if HAS_LOW_RANK:
        y += low_rank_tile(z_ptr, low_rank_ptr, rows, cols, M, N, r, BM, BN, BR)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + rows[None, :].to(tl.int64) * N + cols[:, None]
    tl.store(out_at, narrow(y, out_ptr.dtype.element_ty), mask=(rows[None, :] < M) & (cols[:, None] < N))


@triton.jit(do_not_specialize=["t0", "t1", "t2", "t3"])
def few_tokens_kernel(
    x_ptr, z_ptr, weight_ptr, scale_ptr, low_rank_ptr, bias_ptr, out_ptr,
    M, N, K, r, groups, stride_x, t0, t1, t2, t3,
    HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out [M, N] for M <= BM: one program per BN weight rows."""
    rows = tl.arange(0, BM)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    half = tl.arange(0, BK // 2)[:, None]
    x_at = x_ptr + rows[None, :].to(tl.int64) * stride_x + 2 * half
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        even, odd = _weights(
            weight_ptr, scale_ptr, cols, start, N, K, groups, t0, t1, t2, t3, x_ptr.dtype.element_ty, BN, BK
        )
        x_even = tl.load(x_at + start, mask=rows[None, :] < M, other=0.0)
        x_odd = tl.load(x_at + start + 1, mask=rows[None, :] < M, other=0.0)
        total = dot(even, x_even, total)
        total = dot(odd, x_odd, total)
    _finish(total, z_ptr, low_rank_ptr, bias_ptr, out_ptr, rows, cols, M, N, r, HAS_LOW_RANK, HAS_BIAS, BM, BN, BR)


@triton.jit(do_not_specialize=["t0", "t1", "t2", "t3"])
def many_tokens_kernel(
    x_ptr, z_ptr, weight_ptr, scale_ptr, low_rank_ptr, bias_ptr, out_ptr,
    M, N, K, r, groups, stride_x, t0, t1, t2, t3,
    HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out [M, N], tiled; weights are the left operand, as in `triton_linear`."""
    rows, cols = tile_of(tl.program_id(0), M, N, BM, BN)
    x_at = x_ptr + rows[None, :].to(tl.int64) * stride_x + tl.arange(0, BK)[:, None]
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        even, odd = _weights(
            weight_ptr, scale_ptr, cols, start, N, K, groups, t0, t1, t2, t3, x_ptr.dtype.element_ty, BN, BK
        )
        w = tl.reshape(tl.join(even, odd), (BN, BK))
        x = tl.load(x_at + start, mask=rows[None, :] < M, other=0.0)
        total = dot(w, x, total)
    _finish(total, z_ptr, low_rank_ptr, bias_ptr, out_ptr, rows, cols, M, N, r, HAS_LOW_RANK, HAS_BIAS, BM, BN, BR)


def few_tokens_blocks(k: int) -> dict[str, int]:
    """Tile sizes and launch options of `few_tokens_kernel`; each row of a tile reads BK/2 consecutive bytes."""
    width = next(width for width in (256, 128, 64) if k % width == 0)
    return {"BM": FEW_TOKENS, "BN": 32, "BK": width, "BR": 32, "num_warps": 4, "num_stages": 3}


def many_tokens_blocks(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options of `many_tokens_kernel`."""
    if dtype == torch.float32:  # multiplied without tensor cores: a smaller tile, or it spills
        return {"BM": 32, "BN": 64, "BK": 64, "BR": 32, "num_warps": 8, "num_stages": 2}
    return {"BM": 64, "BN": 128, "BK": 64, "BR": 32, "num_warps": 8, "num_stages": 2}


def linear_a16(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    table: Sequence[int],
) -> Tensor:
    m, k = x.shape
    n, groups = weight_scale.shape
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    weight_scale = weight_scale.contiguous()
    rank = 0 if z is None or low_rank is None else z.shape[1]
    # Absent tensors are never read; any pointer stands in for them.
    z_or_any = weight_scale if z is None else z.contiguous()
    low_rank_or_any = weight_scale if low_rank is None else low_rank.contiguous()
    bias_or_any = weight_scale if bias is None else bias.contiguous()
    few = m <= FEW_TOKENS
    tile = few_tokens_blocks(k) if few else many_tokens_blocks(x.dtype)
    kernel = few_tokens_kernel if few else many_tokens_kernel
    grid = (triton.cdiv(m, tile["BM"]) * triton.cdiv(n, tile["BN"]),)
    with torch.cuda.device_of(x):
        kernel[grid](
            x, z_or_any, weight.contiguous(), weight_scale, low_rank_or_any, bias_or_any, out,
            m, n, k, rank, groups, x.stride(0), *table_words(table),
            HAS_LOW_RANK=rank > 0, HAS_BIAS=bias is not None, **tile, **OPTIONS,
        )  # fmt: skip
    return out
