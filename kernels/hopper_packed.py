"""`linear_a8` on Hopper from packed weights: no pass over the weights before the product."""

from collections.abc import Sequence
from functools import cache
import struct

import torch
from torch import Tensor

from .gluon_packed import BK, BN, RANKS, linear_a8_packed_kernel
from .hopper import _multiprocessors, aligned, descriptor
from .launch import cdiv, launch

# Plain numbers: reading a constant of Triton's takes host time at every launch.
COLUMNS, WIDTH, RANK = BN.value, BK.value, RANKS.value


def blocks(m: int, n: int, dtype: torch.dtype) -> dict[str, int]:
    if m > 1024:
        return {"BM": 256, "STAGES": 4, "PARTS": 2}
    return {"BM": 128, "STAGES": 6, "PARTS": 1}


@cache
def expansion(table: tuple[int, ...]) -> tuple[int, ...] | None:
    """The words from which the kernel expands codes by `table`, or None if it cannot.

    A code c below 8 becomes high[c] - 2 less[c], a code of 8 or more high[c - 8], in bytes modulo 256: that holds all
    tables whose entries i and i + 8 differ, as bytes, by an even number of 0 to 254.
    """
    low, high = [[value % 256 for value in half] for half in (table[:8], table[8:])]
    doubles = [b - a for a, b in zip(low, high, strict=True)]
    if any(double < 0 or double % 2 for double in doubles):
        return None
    return struct.unpack("<4i", bytes([*(double // 2 for double in doubles), *high]))


def multiply_packed(
    codes: Tensor, scale: Tensor, z: Tensor | None, weight: Tensor, weight_scale: Tensor,
    low_rank: Tensor | None, bias: Tensor | None, table: Sequence[int], out: Tensor,
    tile: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    words = expansion(tuple(table))
    m, k = codes.shape
    n = weight.shape[0]
    tile = tile or blocks(m, n, out.dtype)
    rank = 0
    left = right = codes.view(torch.bfloat16)  # never read if the branch is absent
    if z is not None and low_rank is not None and z.shape[1]:
        rank, left, right = z.shape[1], z, low_rank
    rows = tile["BM"]
    tiles = cdiv(m, rows) * cdiv(n, COLUMNS)
    launch(
        linear_a8_packed_kernel, (min(tiles, _multiprocessors(codes.device.index)),),
        descriptor(codes, rows, WIDTH), descriptor(weight.view(torch.int16), COLUMNS, WIDTH // 4),
        descriptor(left, rows, RANK), descriptor(right, COLUMNS, RANK),
        descriptor(out, rows // tile["PARTS"], COLUMNS // 2),
        scale, weight_scale, weight_scale if bias is None else bias,
        m, n, k, rank, *words, HAS_BIAS=bias is not None, **tile, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out
