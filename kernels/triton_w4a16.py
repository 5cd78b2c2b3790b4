"""Triton kernels of `linear_a16`: 16-bit activations times 4-bit weights, the scales applied to sums over 64 columns.

One token in bf16, as modulation layers see it, takes `triton_one_token`. Few tokens, or one of another kind, take a
memory-bound kernel without matrix instructions: each thread reads 16 bytes of a row at once, turns its 32 codes into
fp32 and multiplies them by every token. More tokens take a tiled product of table values, which the dtype of x holds
exactly.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_one_token
from .launch import cdiv, early, launch, on_device_of
from .triton_common import (
    add_rest,
    begin,
    by_code,
    decode,
    decode_pairs,
    dot,
    has_ptx,
    low_rank_tile,
    narrow,
    table_words,
    tile_of,
)  # fmt: skip

FEW_TOKENS = 4

# Eight codes of a word to fp32. Two byte permutes look codes up in the halves of the table and a third picks between
# them by bit 3, as in `triton_unpack`; a fourth puts the byte, biased by 128, under the exponent of 2^23.
_TO_FLOAT = tl.constexpr(
    """
{
.reg .b32 c, s, a, b, v, e;
mov.b32 e, 0x4B000000;
and.b32 c, $8, 0x77777777;
shr.b32 s, $8, 1;
and.b32 s, s, 0x44444444;
or.b32 s, s, 0x32103210;
"""
    + "".join(
        ("shr.b32 c, c, 16;\nshr.b32 s, s, 16;\n" if half else "")
        + "prmt.b32 a, $9, $10, c;\nprmt.b32 b, $11, $12, c;\nprmt.b32 v, a, b, s;\n"
        + "".join(f"prmt.b32 ${4 * half + i}, v, e, 0x754{i};\n" for i in range(4))
        + "".join(f"add.rn.f32 ${4 * half + i}, ${4 * half + i}, 0fCB000080;\n" for i in range(4))
        for half in (0, 1)
    )
    + "}\n"
)


@triton.jit
def _value(words, i: tl.constexpr, t0, t1, t2, t3):
    return decode((words >> (4 * i)) & 15, t0, t1, t2, t3).to(tl.float32)


@triton.jit
def _eight(words, t0, t1, t2, t3, ASM: tl.constexpr):
    """Table values, fp32, of the eight codes of each word; with ASM the table's bytes are biased by 128."""
    if ASM:
        return tl.inline_asm_elementwise(
            _TO_FLOAT,
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r,r,r,r",
            [words, t0, t1, t2, t3],
            (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            True,
            1,
        )
    else:
        return (
            _value(words, 0, t0, t1, t2, t3),
            _value(words, 1, t0, t1, t2, t3),
            _value(words, 2, t0, t1, t2, t3),
            _value(words, 3, t0, t1, t2, t3),
            _value(words, 4, t0, t1, t2, t3),
            _value(words, 5, t0, t1, t2, t3),
            _value(words, 6, t0, t1, t2, t3),
            _value(words, 7, t0, t1, t2, t3),
        )


@triton.jit
def _x_of(x_ptr, token, M, stride_x, start, K, GROUPS: tl.constexpr):
    """x of a token from `start` on, fp32, as eight [1, GROUPS, 8]: what meets the first code of each word, and so on.

    Read as it lies in memory: a load for each of the eight would touch every line eight times.
    """
    k = start + tl.arange(0, 64 * GROUPS)
    at = x_ptr + tl.minimum(token, M - 1).to(tl.int64) * stride_x  # a token past the end is computed and not stored
    x = tl.load(at + k, mask=k < K, other=0.0).to(tl.float32)
    return by_code(tl.reshape(x, (1, GROUPS, 8, 2, 2, 2)))


@triton.jit
def _sum_of_groups(w, x, scale):
    """Σ over 8 codes of w x, times the scale of the group; w and x as `_eight` and `_x_of` give them."""
    part = w[0] * x[0]
    for i in tl.static_range(1, 8):
        # The product is exact for 16-bit x, so that nothing is lost or gained by rounding it apart.
        part = tl.fma(w[i], tl.broadcast_to(x[i], w[i].shape), part)
    return part * scale


@triton.jit(do_not_specialize=["t0", "t1", "t2", "t3"])
def few_tokens_kernel(
    x_ptr, z_ptr, words_ptr, scale_ptr, low_rank_ptr, bias_ptr, out_ptr,
    M, N, K, words, r, groups, stride_x, t0, t1, t2, t3,
    HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [M, N]: BM tokens, 1, 2 or 4, times BN weight rows of `words` 32-bit words, GROUPS groups at a time.

    Weights and scales of the next STAGES − 1 times are on their way meanwhile.
    """
    begin(OVERLAP)
    token = tl.program_id(1) * BM
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    # Three dimensions, row × group of 64 columns × word of 8, so that a group has one scale.
    row = cols[:, None, None]
    at = tl.arange(0, GROUPS)[None, :, None]
    word = at * 8 + tl.arange(0, 8)[None, None, :]
    word_at = words_ptr + row.to(tl.int64) * words + word
    scale_step = tl.where(groups == 1, 0, 1)  # with one scale per row every group reads the same
    scale_at = scale_ptr + row.to(tl.int64) * groups + at * scale_step
    total_0 = tl.zeros((BN, GROUPS, 8), tl.float32)
    total_1, total_2, total_3 = total_0, total_0, total_0
    for start in tl.range(0, K, 64 * GROUPS, num_stages=STAGES):
        within = start // 8 + word < words
        packed = tl.load(word_at + start // 8, mask=(row < N) & within, other=0, eviction_policy="evict_first")
        group = start // 64
        scale = tl.load(scale_at + group * scale_step, mask=(row < N) & (group + at < K // 64), other=0.0)
        scale = scale.to(tl.float32)
        w = _eight(packed, t0, t1, t2, t3, ASM)
        total_0 += _sum_of_groups(w, _x_of(x_ptr, token, M, stride_x, start, K, GROUPS), scale)
        if BM > 1:
            total_1 += _sum_of_groups(w, _x_of(x_ptr, token + 1, M, stride_x, start, K, GROUPS), scale)
        if BM > 2:
            total_2 += _sum_of_groups(w, _x_of(x_ptr, token + 2, M, stride_x, start, K, GROUPS), scale)
            total_3 += _sum_of_groups(w, _x_of(x_ptr, token + 3, M, stride_x, start, K, GROUPS), scale)
    add_rest(total_0, z_ptr, low_rank_ptr, bias_ptr, out_ptr, token, cols, M, N, r, HAS_LOW_RANK, HAS_BIAS, BN, BR)
    if BM > 1:
        add_rest(
            total_1, z_ptr, low_rank_ptr, bias_ptr, out_ptr, token + 1, cols, M, N, r, HAS_LOW_RANK, HAS_BIAS, BN, BR
        )
    if BM > 2:
        add_rest(
            total_2, z_ptr, low_rank_ptr, bias_ptr, out_ptr, token + 2, cols, M, N, r, HAS_LOW_RANK, HAS_BIAS, BN, BR
        )
        add_rest(
            total_3, z_ptr, low_rank_ptr, bias_ptr, out_ptr, token + 3, cols, M, N, r, HAS_LOW_RANK, HAS_BIAS, BN, BR
        )


@triton.jit(do_not_specialize=["t0", "t1", "t2", "t3"])
def many_tokens_kernel(
    x_ptr, z_ptr, weight_ptr, scale_ptr, low_rank_ptr, bias_ptr, out_ptr,
    M, N, K, r, groups, stride_x, t0, t1, t2, t3,
    HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out [M, N], tiled, BK = 64; weights are the left operand, as in `triton_linear`."""
    rows, cols = tile_of(tl.program_id(0), M, N, BM, BN)
    x_at = x_ptr + rows[None, :].to(tl.int64) * stride_x + tl.arange(0, BK)[:, None]
    w_at = weight_ptr + cols[:, None].to(tl.int64) * (K // 2) + tl.arange(0, BK // 2)[None, :]
    scale_at = scale_ptr + cols.to(tl.int64) * groups
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        packed = tl.load(w_at + start // 2, mask=cols[:, None] < N, other=0)
        low, high = decode_pairs(packed, t0, t1, t2, t3, ASM)
        w = tl.reshape(tl.join(low, high), (BN, BK)).to(tl.float32)
        x = tl.load(x_at + start, mask=rows[None, :] < M, other=0.0)
        scale = tl.load(scale_at + tl.where(groups == 1, 0, start // BK), mask=cols < N, other=0.0).to(tl.float32)
        part = dot(narrow(w, x_ptr.dtype.element_ty), x, tl.zeros((BN, BM), tl.float32))
        total += part * scale[:, None]
    if HAS_LOW_RANK:
        total += low_rank_tile(z_ptr, low_rank_ptr, rows, cols, M, N, r, BM, BN, BR)
    if HAS_BIAS:
        total += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + rows[None, :].to(tl.int64) * N + cols[:, None]
    tl.store(out_at, narrow(total, out_ptr.dtype.element_ty), mask=(rows[None, :] < M) & (cols[:, None] < N))


def _biased(table: Sequence[int]) -> list[int]:
    """Each value plus 128, an unsigned byte, written as a signed one."""
    return [t + 128 if t < 0 else t - 128 for t in table]


def few_tokens_blocks(m: int) -> dict[str, int]:
    """Tile sizes and launch options of `few_tokens_kernel`, the fastest of a search on an H200."""
    tokens = 1 if m == 1 else 2 if m == 2 else 4
    rows, warps = (8, 4) if m == 2 else (4, 2)
    return {"BM": tokens, "BN": rows, "GROUPS": 8, "STAGES": 4, "BR": 16, "num_warps": warps, "num_stages": 2}


def many_tokens_blocks(m: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options of `many_tokens_kernel`."""
    if m <= 16:
        return {"BM": 16, "BN": 32, "BK": 64, "BR": 32, "num_warps": 4, "num_stages": 4}
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
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    rank = 0 if z is None or low_rank is None else z.shape[1]
    # Absent tensors are never read; any pointer stands in for them.
    z_or_any = weight_scale if z is None else z.contiguous()
    low_rank_or_any = weight_scale if low_rank is None else low_rank.contiguous()
    bias_or_any = weight_scale if bias is None else bias.contiguous()
    has = {"HAS_LOW_RANK": rank > 0, "HAS_BIAS": bias is not None}
    with on_device_of(x):
        if triton_one_token.takes(x, table):
            triton_one_token.linear_a16(
                x, z_or_any, weight, weight_scale, low_rank_or_any, bias_or_any, out, rank, table, has
            )
        elif m <= FEW_TOKENS:
            tile = few_tokens_blocks(m)
            asm = has_ptx()
            launch(
                few_tokens_kernel, (cdiv(n, tile["BN"]), cdiv(m, tile["BM"])),
                x, z_or_any, weight.view(torch.int32), weight_scale, low_rank_or_any, bias_or_any, out,
                m, n, k, k // 8, rank, groups, x.stride(0), *table_words(_biased(table) if asm else table),
                ASM=asm, **has, **tile, **early(x.device),
            )  # fmt: skip
        else:
            tile = many_tokens_blocks(m, x.dtype)
            launch(
                many_tokens_kernel, (cdiv(m, tile["BM"]) * cdiv(n, tile["BN"]),),
                x, z_or_any, weight, weight_scale, low_rank_or_any, bias_or_any, out,
                m, n, k, rank, groups, x.stride(0), *table_words(table), ASM=has_ptx(), **has, **tile,
            )  # fmt: skip
    return out
