"""The order in which Nunchaku stores codes, scales and low-rank factors, undone.

Tensors are stored as the lanes of a warp load them for the matrix instruction m16n8k64 (PTX ISA, "Matrix fragments for
mma.m16n8k64"); rows come in tiles of 128, columns in tiles of 64. The names of the axes below are digits of a row n or
a column k, the last one the lowest. Weight-only linears are in TinyChat's order (AWQ, arXiv 2306.00978).
"""

from __future__ import annotations

import torch

#: Rows and columns are padded to multiples of this.
TILE = 128


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Two's complement codes, uint8 [N, K], of W4A4 weights stored as int8 [N, K/2]; N and K multiples of 128."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    # n = 128 a + 16 c + 8 f + d, k = 64 b + 32 g + 8 e + h; two codes a byte, h even in the low nibble.
    both = (
        packed.contiguous().view(torch.uint8).reshape(rows // TILE, columns // 64, 8, 8, 4, 2, 2, 4)
    )  # a b c d e f g h
    codes = torch.stack((both & 15, both >> 4), -1)
    return codes.permute(0, 2, 5, 3, 1, 6, 4, 7, 8).reshape(rows, columns)


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """[N, G] of scales stored as [G, N]; [N] of a vector (smoothing factors, bias) stored as [N]."""
    rows, groups = packed.shape[-1], packed.shape[0] if packed.ndim == 2 else 1
    # n = 128 a + 16 c + 8 e + 2 d + f
    values = packed.contiguous().reshape(rows // TILE, groups, 8, 4, 2, 2)  # a b c d e f
    values = values.permute(0, 2, 4, 3, 5, 1).reshape(rows, groups)
    return values if packed.ndim == 2 else values[:, 0]


def unpack_down(packed: torch.Tensor) -> torch.Tensor:
    """The down-projection [K, r], stored as such a matrix in blocks of 16 × 16 of its transpose."""
    columns, rank = packed.shape
    blocks = _unpack_blocks(packed)  # k / 16, r / 16, r, k
    return blocks.permute(0, 3, 1, 2).reshape(columns, rank)


def unpack_up(packed: torch.Tensor) -> torch.Tensor:
    """The up-projection [N, r], stored as such a matrix in blocks of 16 × 16."""
    rows, rank = packed.shape
    blocks = _unpack_blocks(packed)  # n / 16, r / 16, n, r
    return blocks.permute(0, 2, 1, 3).reshape(rows, rank)


def _unpack_blocks(packed: torch.Tensor) -> torch.Tensor:
    """[A, B, 16, 16] of [16 A, 16 B]: each block is stored whole, in the order of the lanes."""
    outer, inner = packed.shape[0] // 16, packed.shape[1] // 16
    # row = 8 c + a, column = 8 d + 2 b + e
    lanes = packed.contiguous().reshape(outer, inner, 8, 4, 2, 2, 2)  # · · a b c d e
    return lanes.permute(0, 1, 4, 2, 5, 3, 6).reshape(outer, inner, 16, 16)


def unpack_weight_only(packed: torch.Tensor) -> torch.Tensor:
    """Unsigned codes, uint8 [N, K], of a weight-only linear stored as int32 [N/4, K/2]."""
    rows, columns = 4 * packed.shape[0], 2 * packed.shape[1]
    # Four rows take turns every 64 columns; a word of 16 bits holds columns h, 8 + h, 16 + h and 24 + h of 32.
    words = packed.contiguous().view(torch.uint8).reshape(rows // 4, columns // 64, 4, 2, 8, 2)  # a b c g h byte
    nibbles = torch.stack((words & 15, words >> 4), -1).reshape(rows // 4, columns // 64, 4, 2, 8, 4)
    return nibbles.permute(0, 2, 1, 3, 5, 4).reshape(rows, columns)
