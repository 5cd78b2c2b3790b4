"""Triton kernel of `linear_a16` for one token in bf16, as modulation layers see: it should take what reading takes.

Each value of x is an integer of 16 bits times a power of two, which 32 neighbours share: values down to a 128th of the
largest of them are exact, smaller ones keep 2⁻¹⁵ of it, which is below the output's own rounding unless that one dwarfs
all others and its weight is 0. A byte product of the chip (`dp4a`) then multiplies four codes at a time, with the upper
and the lower byte of x apart, where fp32 would take one.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, early, launch, multiprocessors
from .triton_common import INTERPRETED, add_rest, begin, by_code, decode, expansion, table_words

CHUNK = tl.constexpr(1024)  # columns of a warp at a time: 32 of each thread, 16 bytes of codes
MOST_CHUNKS = 4  # whose x the registers hold
# Found by measurement.
BLOCKS = {"BN": 2, "STAGES": 3, "BR": 16, "num_warps": 1, "num_stages": 2}
PROGRAMS = 12  # on a multiprocessor

# x · inverse, rounded, of four values: their upper bytes and their lower bytes.
_SPLIT = tl.constexpr("""
{
.reg .b32 a, b, c, d;
fma.rn.f32 a, $2, $6, 0f4B400000;
fma.rn.f32 b, $3, $6, 0f4B400000;
fma.rn.f32 c, $4, $6, 0f4B400000;
fma.rn.f32 d, $5, $6, 0f4B400000;
prmt.b32 a, a, b, 0x5410;
prmt.b32 c, c, d, 0x5410;
prmt.b32 $0, a, c, 0x7531;
prmt.b32 $1, a, c, 0x6420;
}
""")

# Σ of eight codes' table values times x; codes are expanded as in `gluon_packed`.
_PRODUCT = tl.constexpr("""
{
.reg .b32 c, w, v, less, upper, lower;
and.b32 c, $1, 0x77777777;
prmt.b32 v, $8, $9, c;
prmt.b32 less, $6, $7, $1;
mad.lo.s32 v, less, -2, v;
dp4a.s32.s32 upper, v, $2, 0;
dp4a.s32.u32 lower, v, $3, 0;
shr.u32 c, c, 16;
shr.u32 w, $1, 16;
prmt.b32 v, $8, $9, c;
prmt.b32 less, $6, $7, w;
mad.lo.s32 v, less, -2, v;
dp4a.s32.s32 upper, v, $4, upper;
dp4a.s32.u32 lower, v, $5, lower;
mad.lo.s32 $0, upper, 256, lower;
}
""")


@triton.jit
def _split_four(a, b, c, d, inverse, ASM: tl.constexpr):
    if ASM:
        values = [a, b, c, d, inverse]
        return tl.inline_asm_elementwise(_SPLIT, "=&r,=&r,r,r,r,r,r", values, (tl.int32, tl.int32), True, 1)
    else:
        upper, lower = _bytes(a * inverse, 0)
        for i in tl.static_range(1, 4):
            more_upper, more_lower = _bytes((b if i == 1 else c if i == 2 else d) * inverse, 8 * i)
            upper |= more_upper
            lower |= more_lower
        return upper, lower


@triton.jit
def _bytes(x, SHIFT: tl.constexpr):
    """The two bytes of x, rounded, at a place of a word each."""
    whole = tl.floor(x + 0.5).to(tl.int32)
    return ((whole >> 8) & 255) << SHIFT, (whole & 255) << SHIFT


@triton.jit
def _product(words, upper_0, lower_0, upper_1, lower_1, t0, t1, t2, t3, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            _PRODUCT, "=&r,r,r,r,r,r,r,r,r,r", [words, upper_0, lower_0, upper_1, lower_1, t0, t1, t2, t3],
            tl.int32, True, 1,
        )  # fmt: skip
    else:
        total = tl.zeros_like(words)
        for i in tl.static_range(8):
            value = decode((words >> (4 * i)) & 15, t0, t1, t2, t3).to(tl.int32)
            upper = upper_0 if i < 4 else upper_1
            lower = lower_0 if i < 4 else lower_1
            x = ((upper >> (8 * (i % 4))) << 24 >> 16) + ((lower >> (8 * (i % 4))) & 255)
            total += value * x
        return total


@triton.jit
def _size(x):
    """The bits of |x|: integers in the order of the sizes."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _x_of(x_ptr, start, K, ASM: tl.constexpr):
    """x from column `start` on, for words [1, 32, 4] of codes: bytes that meet the lower and the upper four codes of a
    word, and the power of two [1, 32, 1] they are multiples of."""
    k = start + tl.arange(0, CHUNK)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    x0, x1, x2, x3, x4, x5, x6, x7 = by_code(tl.reshape(x, (1, 32, 4, 2, 2, 2)))
    # As integers, of which that of NaN is the largest.
    most = tl.maximum(tl.maximum(_size(x0), _size(x1)), tl.maximum(_size(x2), _size(x3)))
    most = tl.maximum(most, tl.maximum(tl.maximum(_size(x4), _size(x5)), tl.maximum(_size(x6), _size(x7))))
    exponent = tl.maximum(tl.max(most, 2, keep_dims=True) >> 23, 15)
    inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    unit = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    unit = tl.where(exponent == 255, float("nan"), unit)  # x is not finite
    upper_0, lower_0 = _split_four(x0, x1, x2, x3, inverse, ASM)
    upper_1, lower_1 = _split_four(x4, x5, x6, x7, inverse, ASM)
    return upper_0, lower_0, upper_1, lower_1, unit


@triton.jit
def _all_x(x_ptr, K, ASM, CHUNKS):
    xs = ()
    for chunk in tl.static_range(CHUNKS):
        xs += (_x_of(x_ptr, chunk * CHUNK, K, ASM),)  # type: ignore[assignment]
    return xs


@triton.jit
def _all_scales(scale_ptr, cols, last, K, groups, scale_step, CHUNKS):
    """Of each chunk the scales [BN, 32, 1] of the rows' groups."""
    scales = ()
    for chunk in tl.static_range(CHUNKS):
        group = chunk * (CHUNK // 64) + tl.arange(0, 32)[None, :, None] // 2
        inside = (cols < last)[:, None, None] & (group < K // 64)
        scale_at = scale_ptr + cols[:, None, None].to(tl.int64) * groups + group * scale_step
        scales += (tl.load(scale_at, mask=inside, other=0.0),)  # type: ignore[assignment]
    return scales


@triton.jit(do_not_specialize=["t0", "t1", "t2", "t3"])
def one_token_kernel(
    x_ptr, z_ptr, words_ptr, scale_ptr, low_rank_ptr, bias_ptr, out_ptr,
    N, K, words, r, groups, rows, t0, t1, t2, t3,
    HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr, CHUNKS: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [N]: `rows` weight rows of a program, BN at a time, each of `words` 32-bit words in CHUNKS parts."""
    begin(OVERLAP)
    word = tl.arange(0, 32)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    scale_step = tl.where(groups == 1, 0, 1)  # with one scale per row every group reads the same
    token = tl.program_id(1)  # 0
    first = tl.program_id(0) * rows
    last = tl.minimum(first + rows, N)
    cols = first + tl.arange(0, BN)
    scales = _all_scales(scale_ptr, cols, last, K, groups, scale_step, CHUNKS)
    xs = _all_x(x_ptr, K, ASM, CHUNKS)
    for start in tl.range(first, first + rows, BN, num_stages=STAGES):
        cols = start + tl.arange(0, BN)
        inside = cols < last
        word_at = words_ptr + cols[:, None, None].to(tl.int64) * words + word
        total = tl.zeros((BN, 32, 4), tl.float32)
        following = _all_scales(scale_ptr, cols + BN, last, K, groups, scale_step, CHUNKS)  # on their way meanwhile
        for chunk in tl.static_range(CHUNKS):
            here = inside[:, None, None] & (word + chunk * (CHUNK // 8) < words)
            packed = tl.load(word_at + chunk * (CHUNK // 8), mask=here, other=0, eviction_policy="evict_first")
            upper_0, lower_0, upper_1, lower_1, unit = xs[chunk]
            part = _product(packed, upper_0, lower_0, upper_1, lower_1, t0, t1, t2, t3, ASM).to(tl.float32)
            total = tl.fma(part * unit, tl.broadcast_to(scales[chunk].to(tl.float32), (BN, 32, 4)), total)
        scales = following
        add_rest(total, z_ptr, low_rank_ptr, bias_ptr, out_ptr, token, cols, 1, last, r, HAS_LOW_RANK, HAS_BIAS, BN, BR)


def takes(x: Tensor, table: Sequence[int]) -> bool:
    """Whether `linear_a16` here computes it for x [1, K]."""
    return (
        x.shape[0] == 1
        and x.dtype == torch.bfloat16  # others keep more digits
        and x.shape[1] <= CHUNK.value * MOST_CHUNKS
        and torch.version.hip is None
        and expansion(tuple(table)) is not None
    )


def linear_a16(
    x: Tensor, z: Tensor, weight: Tensor, weight_scale: Tensor, low_rank: Tensor, bias: Tensor, out: Tensor,
    rank: int, table: Sequence[int], has: dict[str, bool],
) -> None:  # fmt: skip
    """`linear_a16` into `out` [1, N], for what this module `takes`; every tensor is contiguous, and any stands in for
    one that is absent."""
    k = x.shape[1]
    n, groups = weight_scale.shape
    rows = cdiv(cdiv(n, PROGRAMS * multiprocessors(x.device)), BLOCKS["BN"]) * BLOCKS["BN"]
    asm = not INTERPRETED.value
    words = expansion(tuple(table)) if asm else table_words(table)
    assert words is not None, f"the table {table} has no such words; `takes` says so"
    launch(
        one_token_kernel, (cdiv(n, rows),),
        x, z, weight.view(torch.int32), weight_scale, low_rank, bias, out,
        n, k, k // 8, rank, groups, rows, *words,
        ASM=asm, CHUNKS=cdiv(k, CHUNK.value), **has, **BLOCKS, **early(x.device),
    )  # fmt: skip
