"""Four-bit codes on an eight-bit lattice: the tables, and two codes to a byte.

A code is 0..15; a *table* gives the int8 value of each code. Lattice values multiply exactly on 8-bit units, so
a quantized matmul is one integer GEMM with one scale per row on either side.
"""

import struct
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

GROUP = 64
"""Columns that share one step in the int4 prologue and one scale in a grouped W4A16 weight."""

CODEBOOK_RMS = 36
"""Lattice units per standard deviation of the Gaussian codebook."""

MAGNITUDES = (4, 13, 22, 32, 44, 56, 72, 96)
"""Magnitudes of the Gaussian codebook in lattice units; a unit Gaussian is distorted by 0.00962 (best: 0.00950)."""

MAGNITUDE_STEPS = tuple(b - a for a, b in pairwise(MAGNITUDES))

MIDPOINTS = (8.5, 17.5, 27.0, 38.0, 50.0, 64.0, 84.0)
"""Decision thresholds between neighbouring magnitudes; a value on a threshold takes the smaller one."""

CODEBOOK16 = MAGNITUDES + tuple(-m for m in MAGNITUDES)
"""Table of the Gaussian codebook: bit 3 of a code is the sign, bits 0-2 the index of the magnitude."""

INT4 = (*range(8), *range(-8, 0))
"""Table of two's complement 4-bit integers."""


def pack_int4(codes: Tensor) -> Tensor:
    """Pack integer codes [..., K], 0..15, into uint8 [..., K/2]: column 2j low nibble, column 2j+1 high.

    Raises ValueError if K is odd, the dtype is no integer, or a code is outside 0..15.
    """
    if codes.dtype.is_floating_point or codes.dtype.is_complex or codes.dtype == torch.bool:
        raise ValueError(f"codes have dtype {codes.dtype}; an integer dtype is needed")
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; the last dimension must be even")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > 15):
        raise ValueError(f"codes span {int(codes.min())}..{int(codes.max())}; they must lie in 0..15")
    pairs = codes.to(torch.uint8)
    return pairs[..., 0::2] | (pairs[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Codes uint8 [..., K] of `packed` uint8 [..., K/2]; the inverse of `pack_int4`."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes have dtype {packed.dtype}; uint8 is needed")
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode(packed: Tensor, table: Sequence[int]) -> Tensor:
    """Lattice values int8 [..., K] of `packed` uint8 [..., K/2] under `table`, 16 integers in [-127, 127]."""
    byte = torch.arange(256, device=packed.device)
    # One look-up of 16 bits gives both values of a byte. The table is made on the device, of two words of eight
    # values: a copy from the host would be waited for.
    pairs = torch.stack((_entries(table, byte & 15), _entries(table, byte >> 4)), dim=-1)
    return pairs.view(torch.int16).flatten()[packed.int()].view(torch.int8)


def _entries(table: Sequence[int], codes: Tensor) -> Tensor:
    """The int8 values of int64 `codes` 0..15."""
    low, high = struct.unpack("<2q", struct.pack("<16b", *table))
    word = torch.where(codes < 8, low, high)
    return (word >> 8 * (codes & 7)).to(torch.int8)
