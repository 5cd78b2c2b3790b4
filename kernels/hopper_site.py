"""`rotate_quantize` of a common site on Hopper: x U in parts, their sum and the scales, then the codes.

Rows enough to fill the chip are not divided into parts; there is no sum then. Each kernel is launched while the one
before it ends, and waits for it where it needs its results. The last reads x before it waits: the first has waited for
x when it lets others start.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .gluon_site import BM, COLUMNS, RANKS, site_project_hopper_kernel, site_quantize_hopper_kernel
from .gluon_site_wide import WIDE, site_quantize_wide_kernel
from .hopper import aligned, descriptor, rows_aligned
from .launch import cdiv, launch
from .reference import scale_of_rms
from .triton_site import sum_project_kernel, tiles_per_program

ROWS, WIDTH, RANK, WIDE_COLUMNS = BM.value, COLUMNS.value, RANKS.value, WIDE.value  # plain numbers, quick to read

# Found by measurement on an H200, plans of the projection and widths of the second pass with benchmarks/site_tiles.py.
# Share of the multiprocessors that programs of the projection, one on each, must fill, if K has parts enough; and their
# number for each multiprocessor where there are two on most. Parts of x U for whose sum it is not too slow, of both.
FULL, TWO = 0.9, 1.64
MOST_CHUNKS, TWO_MOST_CHUNKS = 32, 12
SUM_ROWS, MANY_SUM_ROWS, MANY_SUMS = 4, 16, 2048  # rows of a program of the sum, of up to MANY_SUMS rows and of more
STAGES = 2
RESIDENT = 2  # programs of the second pass on a multiprocessor
WIDE_STAGES = 3
WIDE_ELEMENTS = 10_000_000  # of x, from which on 256 columns at a time are faster
OPERATORS = 2.5  # what they cost a program of the second pass, in tiles
# A single bf16 part of G is within a part in 500 of z G: far below a step of 4 bits, not of 8.
PARTS = {"codebook": 1, "int4": 1, "int8": 2}


def project_plan(m: int, blocks: int, multiprocessors: int) -> tuple[dict[str, int], int]:
    """Rows of a program of the projection, columns of its steps, in units of 64, and steps on their way; and how many
    programs share the rows of a tile, for `blocks` of 128 columns in K.

    At most two units, so that they lie in one part of x. A program alone on a multiprocessor can have more on its way
    than each of two. Every program reads U, from the cache: fewer do where there are rows for all multiprocessors.
    """
    tiles = cdiv(m, ROWS)
    chunks = multiprocessors // tiles
    if chunks * tiles >= FULL * multiprocessors:
        return {"ROWS": ROWS, "WIDTH": 2, "STAGES": 4}, min(blocks, chunks, MOST_CHUNKS)
    programs = round(TWO * multiprocessors)
    if tiles > programs:
        return {"ROWS": 2 * ROWS, "WIDTH": 1, "STAGES": 4}, 1
    return {"ROWS": ROWS, "WIDTH": 2, "STAGES": 3}, min(blocks, programs // tiles, TWO_MOST_CHUNKS)


def sum_rows(m: int) -> int:
    """Rows of a program that sums the parts."""
    return SUM_ROWS if m <= MANY_SUMS else MANY_SUM_ROWS


def takes_wide(k: int, split: int, mode: str) -> bool:
    """Whether `site_quantize_wide_kernel` reads x, whose first part has `split` columns, and computes `mode`."""
    return mode == "int4" and k % WIDE_COLUMNS == 0 and split % WIDE_COLUMNS == 0


def _described(parts: Sequence[Tensor], rows: int) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Descriptors of one part or two, by tiles of `rows` rows."""
    return descriptor(parts[0], rows, RANK), descriptor(parts[1], rows, RANK) if len(parts) > 1 else None


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
    parts, signs = [rows_aligned(part) for part in parts], signs.contiguous()
    x_desc, x1_desc = _described(parts, ROWS)
    basis_desc = x_desc if basis is None or not rank else descriptor(aligned(basis), RANK, RANK)
    blocks = k // WIDTH
    tile, chunks = project_plan(m, blocks, multiprocessors)
    high = tile["ROWS"]
    read = (x_desc, x1_desc) if high == ROWS else _described(parts, high)
    alone, factor = chunks == 1, scale_of_rms(mode, k)
    squares = scale if alone else torch.empty((chunks, m), dtype=torch.float32, device=z.device)
    partial = scale if alone else torch.empty((chunks, m, RANK), dtype=torch.float32, device=z.device)
    launch(
        site_project_hopper_kernel, (chunks, cdiv(m, high)),
        *read, split, basis_desc, partial, squares, z, scale, m, k, rank, factor,
        PROJECT=rank > 0, ALONE=alone, **tile, num_warps=high // 16, launch_pdl=True,
    )  # fmt: skip
    if not alone:
        launch(
            sum_project_kernel, (cdiv(m, sum_rows(m)),),
            partial, squares, z, scale, m, k, rank, factor,
            CHUNKS=chunks, PROJECT=rank > 0, OVERLAP=True, BM=sum_rows(m), num_warps=4, launch_pdl=True,
        )  # fmt: skip
    row_tiles = cdiv(m, ROWS)
    z_desc = descriptor(z, ROWS, RANK) if rank else x_desc
    rest = x_desc, x1_desc, split, z_desc, basis_desc, signs, scale, codes, m, k, block**-0.5
    if rank and m * k >= WIDE_ELEMENTS and takes_wide(k, split, mode):
        tiles = tiles_per_program(row_tiles, k // WIDE_COLUMNS, multiprocessors, OPERATORS)
        launch(
            site_quantize_wide_kernel, (k // WIDE_COLUMNS, cdiv(row_tiles, tiles)),
            *rest, BLOCK=block, STAGES=WIDE_STAGES, num_warps=4, launch_pdl=True,
        )  # fmt: skip
    else:
        tiles = tiles_per_program(row_tiles, blocks, RESIDENT * multiprocessors, OPERATORS)
        launch(
            site_quantize_hopper_kernel, (blocks, cdiv(row_tiles, tiles)),
            *rest, PROJECT=rank > 0, BLOCK=block, MODE=mode, PARTS=PARTS[mode], STAGES=STAGES,
            num_warps=4, launch_pdl=True,
        )  # fmt: skip
    return codes, scale
