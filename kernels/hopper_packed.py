"""`linear_a8` on Hopper straight from packed weights."""

import struct
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .gluon_packed import BK, BN, RANKS, linear_a8_packed_kernel, siblings_packed_kernel
from .hopper import aligned, descriptor, multiprocessors
from .launch import cdiv, launch

# Plain numbers: reading a constant of Triton's takes host time at every launch.
COLUMNS, WIDTH, RANK = BN.value, BK.value, RANKS.value
SIBLINGS = 4  # of one launch

# Tokens of a tile: the time of one tile of weights by that many tokens against the largest, measured on an H200.
COST = {256: 1.0, 128: 0.6, 64: 0.45}
STAGES = {256: 4, 128: 6, 64: 8}


@cache
def blocks(m: int, col_tiles: int, processors: int, dtype: torch.dtype) -> dict[str, int]:
    """Tokens of a tile, ring depth and slices of the output tile: what keeps the slowest multiprocessor least busy."""
    rows = min(COST, key=lambda rows: cdiv(cdiv(m, rows) * col_tiles, processors) * COST[rows])
    return {"BM": rows, "STAGES": STAGES[rows], "PARTS": max(1, rows * dtype.itemsize // 256)}


@cache
def expansion(table: tuple[int, ...]) -> tuple[int, ...] | None:
    """The four words from which the kernel expands codes by `table`, or None if it cannot.

    A code c below 8 becomes high[c] - 2 less[c], a code of 8 or more high[c - 8], in bytes modulo 256: that holds all
    tables whose entry i + 8, as such a byte, exceeds entry i by an even number. INT4 and CODEBOOK16 do.
    """
    low, high = [[value % 256 for value in half] for half in (table[:8], table[8:])]
    differences = [b - a for a, b in zip(low, high, strict=True)]
    if any(difference < 0 or difference % 2 for difference in differences):
        return None
    return struct.unpack("<4i", bytes([*(difference // 2 for difference in differences), *high]))


def takes(weights: Sequence[Tensor], table: Sequence[int]) -> bool:
    """Whether the kernel can expand by `table`, and begin each weight's output columns at a multiple of 16 bytes."""
    return expansion(tuple(table)) is not None and all(weight.shape[0] % 8 == 0 for weight in weights)


def linear_a8(
    codes: Tensor, scale: Tensor, z: Tensor | None, weights: Sequence[Tensor], weight_scales: Sequence[Tensor],
    low_ranks: Sequence[Tensor], biases: Sequence[Tensor], table: Sequence[int], out: Tensor,
) -> Tensor:  # fmt: skip
    """`linear_a8_siblings` into `out`, for what this module `takes`: up to four weights in one launch."""
    codes, scale, z = aligned(codes), scale.contiguous(), None if z is None else aligned(z)
    start = 0
    first = 0
    while first < len(weights):
        last = first + 1
        # A tile of columns that reaches past its weight's last row would write to those of the next.
        while last < min(len(weights), first + SIBLINGS) and weights[last - 1].shape[0] % COLUMNS == 0:
            last += 1
        end = start + sum(weight.shape[0] for weight in weights[first:last])
        _multiply(
            codes, scale, z, weights[first:last], weight_scales[first:last], low_ranks[first:last], biases[first:last],
            table, out[:, start:end],
        )  # fmt: skip
        start, first = end, last
    return out


def _multiply(
    codes: Tensor, scale: Tensor, z: Tensor | None, weights: Sequence[Tensor], weight_scales: Sequence[Tensor],
    low_ranks: Sequence[Tensor], biases: Sequence[Tensor], table: Sequence[int], out: Tensor,
    tile: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """One launch into `out`, whose rows may be strided."""
    m, k = codes.shape
    ns = [weight.shape[0] for weight in weights]
    col_tiles = sum(cdiv(n, COLUMNS) for n in ns)
    processors = multiprocessors(codes.device.index)
    tile = tile or blocks(m, col_tiles, processors, out.dtype)
    rows = tile["BM"]
    rank = 0
    left, rights = codes.view(torch.bfloat16), [codes.view(torch.bfloat16)]  # never read if the branch is absent
    if z is not None and low_ranks and z.shape[1]:
        rank, left, rights = z.shape[1], z, [aligned(low_rank) for low_rank in low_ranks]
    packed = [aligned(weight).view(torch.int16) for weight in weights]
    columns = [
        [descriptor(weight, COLUMNS, WIDTH // 4) for weight in packed],
        [descriptor(right, COLUMNS, RANK) for right in rights],
        [weight_scale.contiguous() for weight_scale in weight_scales],
        [bias.contiguous() for bias in biases] or [weight_scales[0]],
    ]
    kernel = linear_a8_packed_kernel
    if len(weights) > 1:
        kernel = siblings_packed_kernel
        columns = [[*column, *[column[-1]] * (SIBLINGS - len(column))] for column in columns]
        ns += [0] * (SIBLINGS - len(ns))
    words = expansion(tuple(table))
    assert words is not None, f"the table {table} has no such words; `takes` says so"
    launch(
        kernel, (min(cdiv(m, rows) * col_tiles, processors),),
        descriptor(codes, rows, WIDTH), descriptor(left, rows, RANK),
        descriptor(out, rows // tile["PARTS"], COLUMNS // 2), scale,
        *columns[0], *columns[1], *columns[2], *columns[3], m, *ns, k, rank, *words,
        HAS_BIAS=len(biases) > 0, **tile, num_warps=4, launch_pdl=True,
    )  # fmt: skip
