"""Kernels of `rotate_quantize` for the common site: bf16, rank up to 64, Hadamard blocks in 128 columns.

First x U and the scales, then v = x (D H) − z G with G = Uᵀ D H. In the second pass a program keeps D H and G of its
128 columns in shared memory and passes over many rows, so a tile of v is a few matrix products and x is the only large
operand. x, D H and z are exact in bf16; G is held as the sum of two bf16 parts. Hopper has kernels of its own
(`hopper_site`).
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, is_hopper, launch, multiprocessors
from .reference import scale_of_rms
from .triton_common import begin, dot, narrow
from .triton_rotate import _codebook, _int8, scale_of

COLUMNS = tl.constexpr(128)
RANKS = tl.constexpr(64)


@triton.jit
def partial_project_kernel(
    x_ptr, basis_ptr, partial_ptr, squares_ptr, M, K, r, stride_x, chunk,
    PROJECT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial [chunks, M, 64] and squares [chunks, M], fp32: x U and ‖x‖² over each chunk of columns."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.arange(0, RANKS)
    first = tl.program_id(1) * chunk
    x_at = x_ptr + rows[:, None].to(tl.int64) * stride_x + first + tl.arange(0, BK)[None, :]
    u_at = basis_ptr + (first + tl.arange(0, BK)[:, None]) * r + ranks[None, :]
    total = tl.zeros((BM, RANKS), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    for _ in range(first, tl.minimum(first + chunk, K), BK):
        x = tl.load(x_at, mask=rows[:, None] < M, other=0.0)
        if PROJECT:
            u = tl.load(u_at, mask=ranks[None, :] < r, other=0.0)
            total = dot(x, u, total)
        single = x.to(tl.float32)
        squares += tl.sum(single * single, 1)
        x_at += BK
        u_at += BK * r
    row_at = tl.program_id(1).to(tl.int64) * M + rows
    tl.store(squares_ptr + row_at, squares, mask=rows < M)
    if PROJECT:
        tl.store(partial_ptr + row_at[:, None] * RANKS + ranks[None, :], total, mask=rows[:, None] < M)


@triton.jit
def sum_project_kernel(
    partial_ptr, squares_ptr, z_ptr, scale_ptr, M, K, r, factor,
    CHUNKS: tl.constexpr, PROJECT: tl.constexpr, OVERLAP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """z [M, r] and scale [M] from the partial sums; OVERLAP: launched while those may still be computed."""
    begin(OVERLAP)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows[:, None] < M
    ranks = tl.arange(0, RANKS)
    squares = tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, RANKS), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        row_at = tl.cast(chunk, tl.int64) * M + rows
        squares += tl.load(squares_ptr + row_at, mask=rows < M, other=0.0)
        if PROJECT:
            total += tl.load(partial_ptr + row_at[:, None] * RANKS + ranks[None, :], mask=inside, other=0.0)
    if PROJECT:
        z_at = z_ptr + rows[:, None] * r + ranks[None, :]
        tl.store(z_at, narrow(total, tl.bfloat16), mask=inside & (ranks[None, :] < r))
    tl.store(scale_ptr + rows, scale_of(squares, tl.sum(total * total, 1), K, factor), mask=rows < M)


@triton.jit
def _operators(basis_ptr, signs_ptr, cols, start, r, PROJECT: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr):
    """OUT columns from `start` of D H [128, 128] and of the two bf16 parts of −G [64, 128], shuffled for `_in_order`.

    A thread q of a matrix instruction holds columns 8i + 2q and 8i + 2q + 1 of a tile, i = 0..OUT/8. These are
    computed as its OUT/4 neighbouring columns, so that it can store them at once.
    """
    i = tl.arange(0, COLUMNS)[:, None]
    slot = tl.arange(0, OUT)[None, :]
    j = start + slot % 8 // 2 * (OUT // 4) + slot // 8 * 2 + slot % 2
    bits = i & j & (BLOCK - 1)
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    hadamard = tl.where(i // BLOCK == j // BLOCK, 1 - 2 * (bits & 1), 0)
    signs = tl.load(signs_ptr + cols).to(tl.int32)
    signed = (hadamard * signs[:, None]).to(tl.float32).to(tl.bfloat16)
    ranks = tl.arange(0, RANKS)
    high = tl.zeros((RANKS, OUT), tl.bfloat16)
    low = tl.zeros((RANKS, OUT), tl.bfloat16)
    if PROJECT:
        u = tl.load(basis_ptr + cols[None, :] * r + ranks[:, None], mask=ranks[:, None] < r, other=0.0)
        g = -dot(u, signed, tl.zeros((RANKS, OUT), tl.float32))
        high = narrow(g, tl.bfloat16)
        low = narrow(g - high.to(tl.float32), tl.bfloat16)
    return signed, high, low


@triton.jit
def _in_order(v, BM: tl.constexpr, OUT: tl.constexpr):
    return tl.reshape(tl.permute(tl.reshape(v, (BM, OUT // 8, 4, 2)), (0, 2, 1, 3)), (BM, OUT))


@triton.jit
def _tile(
    x_ptr, z_ptr, rows, cols, M, r, stride_x, signed, high, low,
    PROJECT: tl.constexpr, BM: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """v · √block, fp32 [BM, OUT], its columns shuffled."""
    inside = rows[:, None] < M
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_x + cols[None, :], mask=inside, other=0.0)
    v = dot(x, signed, tl.zeros((BM, OUT), tl.float32))
    if PROJECT:
        ranks = tl.arange(0, RANKS)
        z = tl.load(z_ptr + rows[:, None] * r + ranks[None, :], mask=inside & (ranks[None, :] < r), other=0.0)
        v = dot(z, high, v)
        v = dot(z, low, v)
    return v


@triton.jit
def _int4(units, BM: tl.constexpr, OUT: tl.constexpr):
    grouped = tl.reshape(units, (BM, OUT // 64, 64))
    low = tl.maximum(tl.min(grouped, 2, keep_dims=True), -128.0)
    high = tl.minimum(tl.max(grouped, 2, keep_dims=True), 127.0)
    step = tl.minimum(tl.maximum(tl.floor((high - low) / 15 + 0.5), 1.0), 17.0)
    offset = tl.floor((low + high) / 2 - 7.5 * step + 0.5)
    offset = tl.minimum(tl.maximum(offset, -128.0), 127 - 15 * step)
    inverse = 1 / step
    q = tl.minimum(tl.maximum(tl.floor(grouped * inverse + (0.5 - offset * inverse)), 0.0), 15.0)
    return tl.reshape(step * q + offset, (BM, OUT))


@triton.jit
def site_quantize_kernel(
    x_ptr, z_ptr, basis_ptr, signs_ptr, scale_ptr, codes_ptr, M, K, r, stride_x, norm, tiles,
    PROJECT: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr, BM: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """codes [M, K] int8 for scale [M] and z [M, r]."""
    cols = tl.program_id(0) // (COLUMNS // OUT) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(0) % (COLUMNS // OUT) * OUT
    signed, high, low = _operators(basis_ptr, signs_ptr, cols, part, r, PROJECT, BLOCK, OUT)
    out_cols = tl.program_id(0) * OUT + tl.arange(0, OUT)
    first = tl.program_id(1) * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(M, BM))):
        rows = tile * BM + tl.arange(0, BM)
        v = _tile(x_ptr, z_ptr, rows, cols, M, r, stride_x, signed, high, low, PROJECT, BM, OUT)
        scale = tl.load(scale_ptr + rows, mask=rows < M, other=0.0)
        inverse = tl.where(scale > 0, norm / tl.where(scale > 0, scale, 1.0), 0.0)
        units = _in_order(v, BM, OUT) * inverse[:, None]
        if MODE == "codebook":
            codes = _codebook(units)
        elif MODE == "int4":
            codes = _int4(units, BM, OUT)
        else:
            codes = _int8(units)
        codes_at = codes_ptr + rows[:, None].to(tl.int64) * K + out_cols[None, :]
        tl.store(codes_at, codes.to(tl.int8), mask=rows[:, None] < M)


def applies(x: Tensor, basis: Tensor | None, signs: Tensor, block: int) -> bool:
    """Whether these kernels compute this site; those of `triton_rotate` compute every site. x: all of it, or a part."""
    rank = 0 if basis is None else basis.shape[1]
    return (
        x.dtype == torch.bfloat16
        and block <= COLUMNS.value
        and signs.shape[0] % COLUMNS.value == 0
        and rank <= RANKS.value
        and torch.version.hip is None
    )


def site_blocks(m: int) -> dict[str, int]:
    """Tile sizes and launch options of `site_quantize_kernel` for M tokens."""
    if m <= 64:
        return {"BM": 16, "OUT": 64, "num_warps": 4, "num_stages": 2}
    return {"BM": 64, "OUT": 64, "num_warps": 4, "num_stages": 2}  # of all 128 columns the registers would spill


@cache
def tiles_per_program(row_tiles: int, parts: int, resident: int, operators: float = 1.0) -> int:
    """Row tiles of one program, for `parts` programs side by side and `resident` at a time on the chip.

    The least time where a program costs its tiles and as much as `operators` more, and programs run in full rounds.
    """
    rounds = {tiles: -(-parts * -(-row_tiles // tiles) // resident) for tiles in range(1, row_tiles + 1)}
    return min(rounds, key=lambda tiles: rounds[tiles] * (tiles + operators))


def project_blocks(m: int) -> dict[str, int]:
    """Tile sizes and launch options of `partial_project_kernel`."""
    if m <= 64:
        return {"BM": 16, "BK": 128, "num_warps": 4, "num_stages": 3}
    return {"BM": 64, "BK": 64, "num_warps": 4, "num_stages": 4}


PROGRAMS = 264  # of the projection: two per multiprocessor of the largest chips


def _on_hopper(x: Tensor, basis: Tensor | None) -> bool:
    """Whether the kernels of `hopper_site` compute a site to which these apply."""
    rank = 0 if basis is None else basis.shape[1]
    return is_hopper(x.device) and x.shape[0] > 0 and rank % 8 == 0


def reads_apart(parts: Sequence[Tensor], basis: Tensor | None, signs: Tensor, block: int) -> bool:
    """Whether `rotate_quantize` takes x in these parts [M, K_i] rather than side by side in one matrix.

    The kernels of `hopper_site` choose between two parts wherever they read columns, which are 128 at a time.
    """
    x = parts[0]
    split = x.shape[1]
    divided = len(parts) == 2 and 0 < split < signs.shape[0] and split % COLUMNS.value == 0
    return divided and applies(x, basis, signs, block) and _on_hopper(x, basis)


def rotate_quantize(
    parts: Sequence[Tensor], basis: Tensor | None, signs: Tensor, block: int, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and z of x: a single part, or those of which `reads_apart` says so."""
    x = parts[0]
    m, k = x.shape[0], signs.shape[0]
    rank = 0 if basis is None else basis.shape[1]
    z = torch.empty((m, rank), dtype=torch.bfloat16, device=x.device)
    if _on_hopper(x, basis):
        from . import hopper_site

        codes, scale = hopper_site.rotate_quantize(parts, basis, signs, block, mode, z, multiprocessors(x.device))
        return codes, scale, z
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if not m:
        return codes, scale, z
    if x.stride(1) != 1:
        x = x.contiguous()
    basis = x if basis is None or not rank else basis.contiguous()  # never read if absent
    tile, site = project_blocks(m), site_blocks(m)
    row_tiles, columns = cdiv(m, tile["BM"]), k // COLUMNS.value
    chunk = cdiv(columns, min(columns, cdiv(PROGRAMS, row_tiles))) * COLUMNS.value
    chunks = cdiv(k, chunk)
    squares = torch.empty((chunks, m), dtype=torch.float32, device=x.device)
    partial = torch.empty((chunks, m, RANKS.value), dtype=torch.float32, device=x.device) if rank else squares
    launch(
        partial_project_kernel, (row_tiles, chunks),
        x, basis, partial, squares, m, k, rank, x.stride(0), chunk, PROJECT=rank > 0, **tile,
    )  # fmt: skip
    launch(
        sum_project_kernel, (cdiv(m, 16),),
        partial, squares, z, scale, m, k, rank, scale_of_rms(mode, k),
        CHUNKS=chunks, PROJECT=rank > 0, OVERLAP=False, BM=16, num_warps=4,
    )  # fmt: skip
    row_tiles, strips = cdiv(m, site["BM"]), k // site["OUT"]
    tiles = tiles_per_program(row_tiles, strips, multiprocessors(x.device))
    launch(
        site_quantize_kernel, (strips, cdiv(row_tiles, tiles)),
        x, z, basis, signs.contiguous(), scale, codes, m, k, rank, x.stride(0), block**-0.5, tiles,
        PROJECT=rank > 0, BLOCK=block, MODE=mode, **site,
    )  # fmt: skip
    return codes, scale, z
