"""What the Triton kernels share: the 4-bit decode, the low-rank branch, tile order, a table as kernel arguments."""

import os
import struct
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from .launch import OPTIONS as OPTIONS


def table_words(table: Sequence[int]) -> tuple[int, ...]:
    """The 16 int8 values of a table as four little-endian 32-bit words."""
    return struct.unpack("<4i", struct.pack("<16b", *table))


@cache
def expansion(table: tuple[int, ...]) -> tuple[int, ...] | None:
    """The four words from which two byte permutes expand codes by `table`, or None if they cannot.

    A code c below 8 becomes high[c] - 2 less[c], a code of 8 or more high[c - 8], in bytes modulo 256: that holds all
    tables whose entry i + 8, as such a byte, exceeds entry i by an even number. INT4 and CODEBOOK16 do.
    """
    low, high = [[value % 256 for value in half] for half in (table[:8], table[8:])]
    differences = [b - a for a, b in zip(low, high, strict=True)]
    if any(difference < 0 or difference % 2 for difference in differences):
        return None
    return struct.unpack("<4i", bytes([*(difference // 2 for difference in differences), *high]))


# Triton's interpreter keeps a bfloat16 as its 16 bits, truncates when it makes one, and multiplies the bits in a
# dot; `narrow` and `dot` give it the arithmetic of a GPU.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def has_ptx() -> bool:
    """Whether kernels may hold PTX: they are compiled for NVIDIA."""
    return not INTERPRETED.value and torch.version.hip is None


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 x rounded to nearest even in DTYPE."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, total):
    """total + a b of 16- or 32-bit floats, accumulated in fp32; fp32 operands are not rounded."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def decode(codes, t0, t1, t2, t3):
    """int8 table values of int32 `codes` in 0..15; t0..t3 hold the table, four bytes each (`table_words`)."""
    low = tl.where((codes & 4) != 0, t1, t0)
    high = tl.where((codes & 4) != 0, t3, t2)
    word = tl.where((codes & 8) != 0, high, low)
    return (word >> ((codes & 3) * 8)).to(tl.int8)


def permute(t0: int, t1: int, t2: int, t3: int) -> str:
    """PTX: the eight codes of operand 2 to two words of four table bytes, operands 0 and 1.

    t0..t3: the operands that hold the table. Its low and its high half are permuted by bits 0 to 2 of each code, then
    bit 3 picks between them.
    """
    four = f"prmt.b32 a, ${t0}, ${t1}, c;\nprmt.b32 b, ${t2}, ${t3}, c;\nprmt.b32 %s, a, b, s;\n"
    return (
        "{\n.reg .b32 c, s, a, b;\nand.b32 c, $2, 0x77777777;\n"
        "shr.b32 s, $2, 1;\nand.b32 s, s, 0x44444444;\nor.b32 s, s, 0x32103210;\n"
        + four % "$0" + "shr.b32 c, c, 16;\nshr.b32 s, s, 16;\n" + four % "$1" + "}\n"
    )  # fmt: skip


# Of four bytes at a time: the table is then an argument per byte.
_PERMUTE_FOUR = tl.constexpr(permute(3, 7, 11, 15))
_PERMUTE_FOUR_OPERANDS = tl.constexpr("=&r,=&r,r" + ",r" * 16)


@triton.jit
def decode_pairs(packed, t0, t1, t2, t3, ASM: tl.constexpr):
    """int8 table values of the low and of the high code of each byte of uint8 `packed`.

    Code by code, that is ten times as many instructions as multiply the values. ASM (NVIDIA) looks four up at once.
    """
    if ASM:
        pairs = tl.inline_asm_elementwise(
            _PERMUTE_FOUR, _PERMUTE_FOUR_OPERANDS, [packed, t0, t1, t2, t3], tl.int16, True, 4
        )
        return pairs.to(tl.int8), (pairs >> 8).to(tl.int8)
    else:
        codes = packed.to(tl.int32)
        return decode(codes & 15, t0, t1, t2, t3), decode(codes >> 4, t0, t1, t2, t3)


@triton.jit
def by_code(x):
    """x [..., 2, 2, 2] as eight [...]: of eight neighbours that meet the codes of a word, the first, and so on."""
    even, odd = tl.split(x)
    even_0, even_1 = tl.split(even)
    odd_0, odd_1 = tl.split(odd)
    x0, x4 = tl.split(even_0)
    x2, x6 = tl.split(even_1)
    x1, x5 = tl.split(odd_0)
    x3, x7 = tl.split(odd_1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """What a kernel of `launch.early` calls first: the next one may start, and the one before is over from here on."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


# −2 √(2 / π) log₂ e, and 0.044715 times that.
GELU_LINEAR, GELU_CUBIC = tl.constexpr(-2.302208198), tl.constexpr(-0.10294324)


@triton.jit
def gelu(y):
    """GELU of fp32 y in its tanh form: y / (1 + exp(−2 u)), u = √(2 / π) (y + 0.044715 y³)."""
    return y / (1.0 + tl.exp2(y * (y * y * GELU_CUBIC + GELU_LINEAR)))


@triton.jit
def low_rank_tile(z_ptr, low_rank_ptr, rows, cols, M, N, r, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """The tile [BN, BM] of (z Lᵀ)ᵀ in fp32, for z [M, r] and L [N, r] in bf16; zeros if r = 0."""
    total = tl.zeros((BN, BM), tl.float32)
    for start in range(0, r, BR):
        ranks = start + tl.arange(0, BR)
        z = tl.load(
            z_ptr + rows[None, :].to(tl.int64) * r + ranks[:, None],
            mask=(rows[None, :] < M) & (ranks[:, None] < r),
            other=0.0,
        )
        low_rank = tl.load(
            low_rank_ptr + cols[:, None].to(tl.int64) * r + ranks[None, :],
            mask=(cols[:, None] < N) & (ranks[None, :] < r),
            other=0.0,
        )
        total = dot(low_rank, z, total)
    return total


@triton.jit
def add_rest(
    total, z_ptr, low_rank_ptr, bias_ptr, out_ptr, token, cols, M, N, r,
    HAS_LOW_RANK: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out of one token: total [BN, …, …], summed over a row's words, plus the low-rank branch and the bias."""
    y = tl.sum(tl.sum(total, 2), 1)
    inside = (cols < N) & (token + tl.zeros_like(cols) < M)
    if HAS_LOW_RANK:
        branch = tl.zeros((BN, BR), tl.float32)
        for start in range(0, r, BR):
            ranks = start + tl.arange(0, BR)
            z = tl.load(z_ptr + tl.minimum(token, M - 1).to(tl.int64) * r + ranks, mask=ranks < r, other=0.0)
            low_rank = tl.load(
                low_rank_ptr + cols[:, None].to(tl.int64) * r + ranks[None, :],
                mask=(cols[:, None] < N) & (ranks[None, :] < r),
                other=0.0,
            )
            branch = tl.fma(low_rank.to(tl.float32), tl.broadcast_to(z.to(tl.float32)[None, :], (BN, BR)), branch)
        y += tl.sum(branch, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * N + cols, narrow(y, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tile_of(program, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and columns of a program's output tile, in bands of eight row tiles: a band's operands stay in L2."""
    band_rows: tl.constexpr = 8
    row_tiles = tl.cdiv(M, BM)
    per_band = band_rows * tl.cdiv(N, BN)
    first = program // per_band * band_rows
    height = tl.minimum(row_tiles - first, band_rows)
    row_tile = first + program % per_band % height
    col_tile = program % per_band // height
    return row_tile * BM + tl.arange(0, BM), col_tile * BN + tl.arange(0, BN)
