"""`rotate_quantize` of a common site on Hopper: x U in parts, their sum and the scales, then the codes.

Rows enough to fill the chip are not divided into parts; there is no sum then. Each kernel is launched while the one
before it ends, and waits for it where it needs its results. The last reads x before it waits: the first has waited for
x when it lets others start.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .gluon_site import BM, COLUMNS, RANKS, site_project_hopper_kernel, site_quantize_hopper_kernel
from .hopper import aligned, descriptor
from .launch import cdiv, launch
from .reference import scale_of_rms
from .triton_site import sum_project_kernel, tiles_per_program

ROWS, WIDTH, RANK = BM.value, COLUMNS.value, RANKS.value  # plain numbers, quick to read

# Found by measurement (benchmarks/site_tiles.py).
PROJECT_PROGRAMS = 216
PROJECT_WIDTH = 2  # of a step, in units of 64 columns; two at most, so that the columns lie in one part of x
PROJECT_STAGES = 3
MOST_CHUNKS = 12  # parts of x U for whose sum it is not too slow
STAGES = 2
RESIDENT = 2  # programs of the second pass on a multiprocessor
# A single bf16 part of G is within a part in 500 of z G: far below a step of 4 bits, not of 8.
PARTS = {"codebook": 1, "int4": 1, "int8": 2}


def project_chunks(row_tiles: int, blocks: int) -> int:
    """Programs of the projection that share the rows of a tile, for `blocks` of 128 columns in K."""
    return min(blocks, max(1, PROJECT_PROGRAMS // row_tiles), MOST_CHUNKS)


def _rows_aligned(x: Tensor) -> Tensor:
    """x [M, K], or a copy of it whose rows the memory accelerator takes: at multiples of 16 bytes and apart."""
    if x.shape[0] == 1:  # a single row may have any stride
        x = x.flatten().unsqueeze(0)
    if x.stride(1) != 1 or x.stride(0) < x.shape[1] or x.stride(0) % 8 or x.data_ptr() % 16:
        x = aligned(x)  # expanded rows, at distance 0, are copied too
    return x


def rotate_quantize(
    parts: Sequence[Tensor], basis: Tensor | None, signs: Tensor, block: int, mode: str, z: Tensor, multiprocessors: int
) -> tuple[Tensor, Tensor]:
    """Codes [M, K] and scale [M]; fills z [M, r], r a multiple of 8.

    x is one part, or two side by side (see `triton_site.reads_apart`).
    """
    m, rank = z.shape
    k, split = signs.shape[0], parts[0].shape[1]
    codes = torch.empty((m, k), dtype=torch.int8, device=z.device)
    scale = torch.empty(m, dtype=torch.float32, device=z.device)
    x_desc = descriptor(_rows_aligned(parts[0]), ROWS, RANK)
    x1_desc = descriptor(_rows_aligned(parts[1]), ROWS, RANK) if len(parts) > 1 else None
    basis_desc = x_desc if basis is None or not rank else descriptor(aligned(basis), RANK, RANK)
    row_tiles, blocks = cdiv(m, ROWS), k // WIDTH
    chunks = project_chunks(row_tiles, blocks)
    alone, factor = chunks == 1, scale_of_rms(mode, k)
    squares = scale if alone else torch.empty((chunks, m), dtype=torch.float32, device=z.device)
    partial = scale if alone else torch.empty((chunks, m, RANK), dtype=torch.float32, device=z.device)
    launch(
        site_project_hopper_kernel, (chunks, row_tiles),
        x_desc, x1_desc, split, basis_desc, partial, squares, z, scale, m, k, rank, factor,
        PROJECT=rank > 0, ALONE=alone, WIDTH=PROJECT_WIDTH, STAGES=PROJECT_STAGES,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    if not alone:
        launch(
            sum_project_kernel, (cdiv(m, 16),),
            partial, squares, z, scale, m, k, rank, factor,
            CHUNKS=chunks, PROJECT=rank > 0, OVERLAP=True, BM=16, num_warps=4, launch_pdl=True,
        )  # fmt: skip
    tiles = tiles_per_program(row_tiles, blocks, RESIDENT * multiprocessors)
    z_desc = descriptor(z, ROWS, RANK) if rank else x_desc
    launch(
        site_quantize_hopper_kernel, (blocks, cdiv(row_tiles, tiles)),
        x_desc, x1_desc, split, z_desc, basis_desc, signs.contiguous(), scale, codes, m, k, block**-0.5,
        PROJECT=rank > 0, BLOCK=block, MODE=mode, PARTS=PARTS[mode], STAGES=STAGES,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return codes, scale
