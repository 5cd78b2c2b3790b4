"""Triton kernel of `linear_a8`: 8-bit activations times 4-bit weights on the int8 lattice.

The tile is computed transposed, Cᵀ = Ŵ Aᵀ: the weights, which are decoded in registers, are then the left operand,
the one that a matrix instruction can take from registers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_add
from .addend import Addend, addend
from .hopper_costs import FEWEST_TOKENS
from .launch import cdiv, is_hopper, launch, on_device_of
from .triton_common import decode_pairs, gelu, has_ptx, low_rank_tile, narrow, table_words, tile_of


@triton.jit(do_not_specialize=["t0", "t1", "t2", "t3"])
def linear_a8_kernel(
    codes_ptr, scale_ptr, z_ptr, weight_ptr, weight_scale_ptr, low_rank_ptr, bias_ptr, out_ptr,
    M, N, K, r, stride_out, t0, t1, t2, t3,
    HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out [M, N] = ((Σ_k a w) · s) · t + z Lᵀ + b, or GELU of it."""
    rows, cols = tile_of(tl.program_id(0), M, N, BM, BN)
    a_at = codes_ptr + rows[None, :].to(tl.int64) * K + tl.arange(0, BK)[:, None]
    w_at = weight_ptr + cols[:, None].to(tl.int64) * (K // 2) + tl.arange(0, BK // 2)[None, :]
    total = tl.zeros((BN, BM), tl.int32)
    for _ in range(0, K, BK):
        low, high = decode_pairs(tl.load(w_at, mask=cols[:, None] < N, other=0), t0, t1, t2, t3, ASM)
        w = tl.reshape(tl.join(low, high), (BN, BK))
        a = tl.load(a_at, mask=rows[None, :] < M, other=0)
        total = tl.dot(w, a, total, out_dtype=tl.int32)
        a_at += BK
        w_at += BK // 2

    scale = tl.load(scale_ptr + rows, mask=rows < M, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + cols, mask=cols < N, other=0.0)
    y = total.to(tl.float32) * scale[None, :] * weight_scale[:, None]
    if HAS_LOW_RANK:
        y += low_rank_tile(z_ptr, low_rank_ptr, rows, cols, M, N, r, BM, BN, BR)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    if GELU:
        y = gelu(y)
    out_at = out_ptr + rows[None, :].to(tl.int64) * stride_out + cols[:, None]
    tl.store(out_at, narrow(y, out_ptr.dtype.element_ty), mask=(rows[None, :] < M) & (cols[:, None] < N))


def blocks(m: int, k: int) -> dict[str, int]:
    """Tile sizes and launch options for M tokens and K columns (a multiple of 64)."""
    few = {"BK": 128 if k % 128 == 0 else 64, "BR": 32, "num_warps": 4, "num_stages": 3}
    if m <= 16:
        return {"BM": 16, "BN": 64, **few}
    if m <= 64:
        return {"BM": 64, "BN": 64, **few}
    return {"BM": 128, "BN": 128, "BK": 64, "BR": 32, "num_warps": 8, "num_stages": 3}


def on_hopper(n: int, rank: int, device: torch.device) -> bool:
    """Whether a kernel for Hopper can compute this product: rows whose bytes its memory accelerator can address
    (multiples of 16)."""
    return n % 8 == 0 and rank % 8 == 0 and is_hopper(device)


def linear_a8(
    codes: Tensor,
    scale: Tensor,
    z: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    table: Sequence[int],
    out_dtype: torch.dtype,
    gelu: bool = False,
) -> Tensor:
    low_ranks = [] if low_rank is None else [low_rank]
    biases = [] if bias is None else [bias]
    return linear_a8_siblings(codes, scale, z, [weight], [weight_scale], low_ranks, biases, table, out_dtype, [gelu])


def linear_a8_siblings(
    codes: Tensor,
    scale: Tensor,
    z: Tensor | None,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    low_ranks: Sequence[Tensor],
    biases: Sequence[Tensor],
    table: Sequence[int],
    out_dtype: torch.dtype,
    gelu: Sequence[bool] = (),
) -> Tensor:
    m, n = codes.shape[0], sum(w.shape[0] for w in weights)
    gelu = gelu or [False] * len(weights)
    out = torch.empty((m, n), dtype=out_dtype, device=codes.device)
    if not out.numel():
        return out
    with on_device_of(codes):
        if _by_hopper(codes, scale, z, weights, weight_scales, low_ranks, biases, table, gelu, out):
            return out
        start = 0
        for i, weight in enumerate(weights):
            end = start + weight.shape[0]
            low_rank, bias = low_ranks[i] if low_ranks else None, biases[i] if biases else None
            _multiply(codes, scale, z, weight, weight_scales[i], low_rank, bias, table, gelu[i], out[:, start:end])
            start = end
    return out


def linear_a8_add(
    codes: Tensor,
    scale: Tensor,
    z: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    table: Sequence[int],
    residual: Sequence[Tensor],
    gate: Tensor | None,
) -> Tensor:
    add, dtype = addend(residual, gate), residual[0].dtype
    low_ranks = [] if low_rank is None else [low_rank]
    biases = [] if bias is None else [bias]
    linear = codes, scale, z, [weight], [weight_scale], low_ranks, biases, table
    with on_device_of(codes):
        if dtype != torch.float32:
            out = torch.empty((codes.shape[0], weight.shape[0]), dtype=dtype, device=codes.device)
            if out.numel() and _by_hopper(*linear, [False], out, add):
                return out
        return triton_add.add(linear_a8_siblings(*linear, dtype), add)


def _by_hopper(
    codes: Tensor, scale: Tensor, z: Tensor | None, weights: Sequence[Tensor], weight_scales: Sequence[Tensor],
    low_ranks: Sequence[Tensor], biases: Sequence[Tensor], table: Sequence[int], gelu: Sequence[bool], out: Tensor,
    add: Addend | None = None,
) -> bool:  # fmt: skip
    """Whether one of Hopper's kernels computes it, with all that ends it; `out` then has it."""
    if not on_hopper(out.shape[1], 0 if z is None else z.shape[1], codes.device):
        return False
    from . import hopper, hopper_packed

    linear = codes, scale, z, weights, weight_scales, low_ranks, biases, table, gelu
    tile = hopper_packed.choose(codes, weights, table)
    if tile is not None and (add is None or add.fits(tile[0])):
        hopper_packed.linear_a8(*linear, tile, out, add)
    elif (
        tile is None and len(codes) >= FEWEST_TOKENS and hopper.takes(weights, gelu)
        and (add is None or add.fits(hopper.HALF))
    ):  # fmt: skip
        hopper.linear_a8(*linear, out, add)
    else:
        return False
    return True


def _multiply(
    codes: Tensor, scale: Tensor, z: Tensor | None, weight: Tensor, weight_scale: Tensor,
    low_rank: Tensor | None, bias: Tensor | None, table: Sequence[int], gelu: bool, out: Tensor,
) -> None:  # fmt: skip
    """One product into `out`, whose rows may be strided."""
    m, k = codes.shape
    n = weight.shape[0]
    tile = blocks(m, k)
    grid = (cdiv(m, tile["BM"]) * cdiv(n, tile["BN"]),)
    codes, scale, weight_scale = codes.contiguous(), scale.contiguous(), weight_scale.contiguous()
    rank = 0 if z is None or low_rank is None else z.shape[1]
    # Absent tensors are never read; any pointer stands in for them.
    z_or_any = weight_scale if z is None else z.contiguous()
    low_rank_or_any = weight_scale if low_rank is None else low_rank.contiguous()
    bias_or_any = weight_scale if bias is None else bias.contiguous()
    launch(
        linear_a8_kernel, grid,
        codes, scale, z_or_any, weight.contiguous(), weight_scale, low_rank_or_any, bias_or_any, out,
        m, n, k, rank, out.stride(0), *table_words(table),
        HAS_LOW_RANK=rank > 0, HAS_BIAS=bias is not None, GELU=gelu, ASM=has_ptx(), **tile,
    )  # fmt: skip
