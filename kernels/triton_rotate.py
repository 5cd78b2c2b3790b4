"""Triton kernels of `rotate` and `rotate_quantize`: project, then rotate and quantize.

Two passes over x: z = bf16(x U) with the energies of x and of x U in every row, which give the scales; the codes. v
lives in registers only. Each partial sum is written by one program and combined in a fixed order, so results do not
vary from run to run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, on_device_of
from .reference import SMALLEST_SHARE, scale_of_rms
from .triton_common import dot, narrow

# bf16 parts that hold an operand: exactly in the dtypes of x, to fp32's precision in the Hadamard product.
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}

# A scale below the smallest normal number has no finite reciprocal; such a row counts as zero (as in `reference`).
SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)
_SMALLEST_SHARE = tl.constexpr(SMALLEST_SHARE)


@triton.jit
def scale_of(energy, explained, K, factor):
    """factor · rms of v from ‖x‖² and ‖x U‖² of rows (see `reference.row_scale`)."""
    residual = tl.maximum(energy - explained, energy * _SMALLEST_SHARE)
    scale = tl.sqrt(residual / K) * factor
    return tl.where(scale >= SMALLEST_SCALE, scale, 0.0)


@triton.jit
def _split_dot(a, b, total, PARTS: tl.constexpr):
    """total + a b for fp32 a and bf16 b: a is split into bf16 parts, each of which multiplies exactly."""
    part = narrow(a, tl.bfloat16)
    total = dot(part, b, total)
    for _ in tl.static_range(PARTS - 1):
        a -= part.to(tl.float32)
        part = narrow(a, tl.bfloat16)
        total = dot(part, b, total)
    return total


@triton.jit
def project_kernel(
    x_ptr, basis_ptr, z_ptr, energy_ptr, M, K, r, stride_x,
    PROJECT: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """z [M, r] = bf16(x U); energy [1 + ⌈r / BR⌉, M] fp32: ‖x‖², then Σ (x U)² over BR columns of U at a time."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    x_row = x_ptr + rows[:, None].to(tl.int64) * stride_x
    total = tl.zeros((BM, BR), tl.float32)
    energy = tl.zeros((BM,), tl.float32)
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        x = tl.load(x_row + cols[None, :], mask=rows[:, None] < M, other=0.0)
        x = x.to(tl.float32)
        energy += tl.sum(x * x, 1)
        if PROJECT:
            u = tl.load(basis_ptr + cols[:, None] * r + ranks[None, :], mask=ranks[None, :] < r, other=0.0)
            total = _split_dot(x, u, total, PARTS)
    if tl.program_id(1) == 0:
        tl.store(energy_ptr + rows, energy, mask=rows < M)
    explained_at = energy_ptr + (tl.program_id(1).to(tl.int64) + 1) * M + rows
    tl.store(explained_at, tl.sum(total * total, 1), mask=rows < M)
    if PROJECT:
        z = z_ptr + rows[:, None].to(tl.int64) * r + ranks[None, :]
        tl.store(z, narrow(total, tl.bfloat16), mask=(rows[:, None] < M) & (ranks[None, :] < r))


@triton.jit
def _hadamard(BLOCK: tl.constexpr, BK: tl.constexpr):
    """Block-diagonal Sylvester Hadamard matrix [BK, BK] of ±1 and 0: (-1)^popcount(i & j) inside a block."""
    i = tl.arange(0, BK)[:, None]
    j = tl.arange(0, BK)[None, :]
    bits = i & j & (BLOCK - 1)
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    signs = tl.where(i // BLOCK == j // BLOCK, 1 - 2 * (bits & 1), 0)
    return signs.to(tl.float32).to(tl.bfloat16)


@triton.jit
def _rotated_tile(
    x_ptr, z_ptr, basis_ptr, signs_ptr, hadamard, rows, cols, M, r, stride_x, norm,
    PROJECT: tl.constexpr, ROTATE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """v = (x − z Uᵀ) D H of rows × cols, fp32."""
    inside = rows[:, None] < M
    v = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_x + cols[None, :], mask=inside, other=0.0)
    v = v.to(tl.float32)
    if PROJECT:
        explained = tl.zeros((BM, BK), tl.float32)
        for start in range(0, r, BR):
            ranks = start + tl.arange(0, BR)
            z_at = z_ptr + rows[:, None].to(tl.int64) * r + ranks[None, :]
            z = tl.load(z_at, mask=inside & (ranks[None, :] < r), other=0.0)
            u = tl.load(basis_ptr + cols[None, :] * r + ranks[:, None], mask=ranks[:, None] < r, other=0.0)
            explained = dot(z, u, explained)
        v -= explained
    if ROTATE:
        v *= tl.load(signs_ptr + cols).to(tl.float32)[None, :]
        v = _split_dot(v, hadamard, tl.zeros((BM, BK), tl.float32), 3) * norm
    return v


@triton.jit
def rotate_kernel(
    x_ptr, z_ptr, basis_ptr, signs_ptr, v_ptr, M, K, r, stride_x, norm,
    PROJECT: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """v [M, K] in the dtype of x."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    hadamard = _hadamard(BLOCK, BK)
    first = tl.program_id(1) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, K), BK):
        cols = start + tl.arange(0, BK)
        v = _rotated_tile(
            x_ptr, z_ptr, basis_ptr, signs_ptr, hadamard, rows, cols, M, r, stride_x, norm, PROJECT, ROTATE, BM, BK, BR
        )
        v_at = v_ptr + rows[:, None].to(tl.int64) * K + cols[None, :]
        tl.store(v_at, narrow(v, v_ptr.dtype.element_ty), mask=rows[:, None] < M)


@triton.jit
def _codebook(units):
    size = tl.abs(units)
    magnitude = tl.where(size > 8.5, 13, 4)
    magnitude = tl.where(size > 17.5, 22, magnitude)
    magnitude = tl.where(size > 27.0, 32, magnitude)
    magnitude = tl.where(size > 38.0, 44, magnitude)
    magnitude = tl.where(size > 50.0, 56, magnitude)
    magnitude = tl.where(size > 64.0, 72, magnitude)
    magnitude = tl.where(size > 84.0, 96, magnitude)
    return tl.where(units < 0, -magnitude, magnitude)


@triton.jit
def _int4(units, BM: tl.constexpr, BK: tl.constexpr):
    grouped = tl.reshape(units, (BM, BK // 64, 64))
    low = tl.maximum(tl.min(grouped, 2, keep_dims=True), -128.0)
    high = tl.minimum(tl.max(grouped, 2, keep_dims=True), 127.0)
    step = tl.minimum(tl.maximum(tl.floor((high - low) / 15 + 0.5), 1.0), 17.0)
    offset = tl.floor((low + high) / 2 - 7.5 * step + 0.5)
    offset = tl.minimum(tl.maximum(offset, -128.0), 127 - 15 * step)
    q = tl.minimum(tl.maximum(tl.floor((grouped - offset) / step + 0.5), 0.0), 15.0)
    return tl.reshape(step * q + offset, (BM, BK))


@triton.jit
def _int8(units):
    return tl.minimum(tl.maximum(tl.floor(units + 0.5), -127.0), 127.0)


@triton.jit
def quantize_kernel(
    x_ptr, z_ptr, basis_ptr, signs_ptr, energy_ptr, codes_ptr, scale_ptr, M, K, r, stride_x, norm, parts, factor,
    PROJECT: tl.constexpr, ROTATE: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """codes [M, K] int8 and scale [M] fp32 from the energies of `project_kernel`, `parts` of them explained."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    energy = tl.load(energy_ptr + rows, mask=rows < M, other=0.0)
    explained = tl.zeros((BM,), tl.float32)
    for part in range(1, parts + 1):
        explained += tl.load(energy_ptr + tl.cast(part, tl.int64) * M + rows, mask=rows < M, other=0.0)
    scale = scale_of(energy, explained, K, factor)
    inverse = tl.where(scale > 0, 1 / tl.where(scale > 0, scale, 1.0), 0.0)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + rows, scale, mask=rows < M)

    hadamard = _hadamard(BLOCK, BK)
    first = tl.program_id(1) * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, K), BK):
        cols = start + tl.arange(0, BK)
        v = _rotated_tile(
            x_ptr, z_ptr, basis_ptr, signs_ptr, hadamard, rows, cols, M, r, stride_x, norm, PROJECT, ROTATE, BM, BK, BR
        )
        units = v * inverse[:, None]
        if MODE == "codebook":
            codes = _codebook(units)
        elif MODE == "int4":
            codes = _int4(units, BM, BK)
        else:
            codes = _int8(units)
        codes_at = codes_ptr + rows[:, None].to(tl.int64) * K + cols[None, :]
        tl.store(codes_at, codes.to(tl.int8), mask=rows[:, None] < M)


def blocks(m: int, block: int) -> dict[str, int]:
    """Tile sizes and launch options of the three kernels for M tokens and Hadamard blocks of `block` columns."""
    # A tile holds whole Hadamard blocks and whole groups of 64; few tokens are spread over columns instead.
    tall = m > 64
    return {
        "BM": 32 if tall else 16,
        "BK": max(block, 64),
        "BR": 32,
        "CHUNK": 512 if tall else 128,
        "num_warps": 8 if tall else 4,
        "num_stages": 2,
    }


def project(x: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """z [M, r] = bf16(x U), and energy as `project_kernel` has it."""
    m, k = x.shape
    rank = 0 if basis is None else basis.shape[1]
    tile = project_blocks(m)
    parts = max(1, cdiv(rank, tile["BR"]))
    z = torch.empty((m, rank), dtype=torch.bfloat16, device=x.device)
    energy = torch.empty((1 + parts, m), dtype=torch.float32, device=x.device)
    if m:
        grid = (cdiv(m, tile["BM"]), parts)
        basis = x if basis is None else basis  # never read if absent
        launch(
            project_kernel, grid,
            x, basis, z, energy, m, k, rank, x.stride(0), PROJECT=rank > 0, PARTS=_PARTS[x.dtype], **tile,
        )  # fmt: skip
    return z, energy


def project_blocks(m: int) -> dict[str, int]:
    """Tile sizes and launch options of `project_kernel`."""
    return {"BM": 32 if m > 16 else 16, "BR": 64, "BK": 64, "num_warps": 4, "num_stages": 3}


def rotate(x: Tensor, basis: Tensor | None, signs: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    with on_device_of(x):
        site = _Site(x, basis, signs, block)
        v = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if v.numel():
            launch(rotate_kernel, site.grid, *site.inputs, v, *site.sizes, **site.constants)
        return v, site.z


def rotate_quantize(
    x: Tensor, basis: Tensor | None, signs: Tensor | None, block: int, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_site

    with on_device_of(x):
        if signs is not None and triton_site.applies(x, basis, signs, block):
            return triton_site.rotate_quantize([x], basis, signs, block, mode)
        if signs is not None and basis is not None and triton_site.applies(x, None, signs, block):
            return _wide_site(x, basis, signs, block, mode)
        site = _Site(x, basis, signs, block)
        m = x.shape[0]
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        scale = torch.empty(m, dtype=torch.float32, device=x.device)
        if m:
            launch(
                quantize_kernel, site.grid,
                *site.inputs, site.energy, codes, scale, *site.sizes, len(site.energy) - 1,
                scale_of_rms(mode, x.shape[1]), MODE=mode, **site.constants,
            )  # fmt: skip
        return codes, scale, site.z


def rotate_quantize_parts(
    parts: Sequence[Tensor], basis: Tensor | None, signs: Tensor | None, block: int, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_site

    with on_device_of(parts[0]):
        if signs is not None and triton_site.reads_apart(parts, basis, signs, block):
            return triton_site.rotate_quantize(parts, basis, signs, block, mode)
        return rotate_quantize(torch.cat(list(parts), 1), basis, signs, block, mode)


def _wide_site(x: Tensor, basis: Tensor, signs: Tensor, block: int, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """A subspace wider than the kernels of `triton_site` hold: the library's products, then those kernels without one.

    The residual passes through bf16, which moves v by 2⁻⁹ at most, and its own energy gives the scale, without a floor.
    """
    from . import triton_site

    with torch.autocast(x.device.type, enabled=False):  # as the kernels, which know of no autocast
        z = x @ basis
        residual = torch.addmm(x, z, basis.T, alpha=-1)
    codes, scale, _ = triton_site.rotate_quantize([residual], None, signs, block, mode)
    return codes, scale, z


class _Site:
    """The arguments that the rotating kernels share, and z."""

    def __init__(self, x: Tensor, basis: Tensor | None, signs: Tensor | None, block: int):
        if x.stride(1) != 1:
            x = x.contiguous()
        basis = None if basis is None else basis.contiguous()
        self.z, self.energy = project(x, basis)
        m, k = x.shape
        block = 1 if signs is None else block
        tile = blocks(m, block)
        self.grid = (cdiv(m, tile["BM"]), cdiv(k, tile["CHUNK"]))
        # Absent tensors are never read; any pointer stands in for them.
        signs_or_x = x if signs is None else signs.contiguous()
        self.inputs = (x, self.z, x if basis is None else basis, signs_or_x)
        self.sizes = (m, k, self.z.shape[1], x.stride(0), block**-0.5)
        self.constants = {
            "PROJECT": self.z.shape[1] > 0,
            "ROTATE": signs is not None,
            "BLOCK": block,
            **tile,
        }
