"""`linear_a8` on Hopper straight from packed weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import hopper_costs
from .addend import Addend
from .gluon_packed import BK, BN, RANKS, linear_a8_packed_kernel, siblings_packed_kernel
from .hopper import aligned, descriptor
from .hopper_costs import tiles_shared
from .launch import cdiv, launch, multiprocessors
from .triton_common import expansion

# Plain numbers: reading a constant of Triton's takes host time at every launch.
COLUMNS, WIDTH, RANK = BN.value, BK.value, RANKS.value
SIBLINGS = 4  # of one launch

STAGES = {256: 4, 128: 6, 64: 8}  # of the ring, by the tokens of a tile


def block(rows: int, shared: bool, dtype: torch.dtype) -> dict[str, int]:
    """Tokens of a tile, ring depth, slices of the output tile, and whether programs share tiles."""
    return {"BM": rows, "STAGES": STAGES[rows], "PARTS": max(1, rows * dtype.itemsize // 512), "SHARED": shared}


def takes(weights: Sequence[Tensor], table: Sequence[int]) -> bool:
    """Whether the kernel can expand by `table`, and begin each weight's output columns at a multiple of 16 bytes."""
    return expansion(tuple(table)) is not None and all(weight.shape[0] % 8 == 0 for weight in weights)


def choose(codes: Tensor, weights: Sequence[Tensor], table: Sequence[int]) -> tuple[int, bool] | None:
    """Tiles for `linear_a8`, or None if another strategy should be faster or must be taken."""
    if not takes(weights, table):
        return None
    m, k = codes.shape
    ns = tuple(weight.shape[0] for weight in weights)
    return hopper_costs.choose(m, k, ns, multiprocessors(codes.device))


def linear_a8(
    codes: Tensor, scale: Tensor, z: Tensor | None, weights: Sequence[Tensor], weight_scales: Sequence[Tensor],
    low_ranks: Sequence[Tensor], biases: Sequence[Tensor], table: Sequence[int], gelu: Sequence[bool],
    tile: tuple[int, bool], out: Tensor, add: Addend | None = None,
) -> Tensor:  # fmt: skip
    """`linear_a8_siblings` into `out`, for what this module `takes`: up to four weights in one launch.

    tile: tokens of a tile, one of `STAGES`, and whether programs share tiles. add: as in `multiply`.
    """
    codes, scale, z = aligned(codes), scale.contiguous(), None if z is None else aligned(z)
    start = 0
    first = 0
    while first < len(weights):
        last = first + 1
        # A tile of columns that reaches past its weight's last row would write to those of the next.
        while last < min(len(weights), first + SIBLINGS) and weights[last - 1].shape[0] % COLUMNS == 0:
            last += 1
        end = start + sum(weight.shape[0] for weight in weights[first:last])
        multiply(
            codes, scale, z, weights[first:last], weight_scales[first:last], low_ranks[first:last], biases[first:last],
            table, gelu[first:last], tile, out[:, start:end], add,
        )  # fmt: skip
        start, first = end, last
    return out


def multiply(
    codes: Tensor, scale: Tensor, z: Tensor | None, weights: Sequence[Tensor], weight_scales: Sequence[Tensor],
    low_ranks: Sequence[Tensor], biases: Sequence[Tensor], table: Sequence[int], gelu: Sequence[bool],
    tile: tuple[int, bool], out: Tensor, add: Addend | None = None,
) -> None:  # fmt: skip
    """One launch of `linear_a8` into `out`, whose rows may be strided.

    add: of a single weight, one that `fits` the tile; out is of its dtype, which is 16-bit.
    """
    m, k = codes.shape
    ns = [weight.shape[0] for weight in weights]
    rows = tile[0]
    tiles = cdiv(m, rows) * sum(cdiv(n, COLUMNS) for n in ns)
    programs = multiprocessors(codes.device)
    shared = tiles_shared(tiles, programs) if tile[1] else 0
    programs = min(programs, max(tiles, shared * cdiv(k, 2 * WIDTH)))
    constants = block(rows, shared > 0, out.dtype)
    space = scale  # never read if nothing is shared
    if shared:
        space = torch.empty(programs * (COLUMNS * rows + 4), dtype=torch.int32, device=codes.device)
    rank = 0
    left, rights = codes.view(torch.bfloat16), [codes.view(torch.bfloat16)]  # never read if the branch is absent
    if z is not None and low_ranks and z.shape[1]:
        rank, left, rights = z.shape[1], z, [aligned(low_rank) for low_rank in low_ranks]
    packed = [aligned(weight).view(torch.int16) for weight in weights]
    columns: list[list] = [
        [descriptor(weight, COLUMNS, WIDTH // 4) for weight in packed],
        [descriptor(right, COLUMNS, RANK) for right in rights],
        [weight_scale.contiguous() for weight_scale in weight_scales],
        [bias.contiguous() for bias in biases] or [weight_scales[0]],
    ]
    words = expansion(tuple(table))
    assert words is not None, f"the table {table} has no such words; `takes` says so"
    out_desc = descriptor(out, rows // constants["PARTS"], COLUMNS // 2)
    constants |= {"HAS_BIAS": len(biases) > 0, "GELU": sum(curved << i for i, curved in enumerate(gelu))}
    before = descriptor(codes, rows, WIDTH), descriptor(left, rows, RANK), out_desc, scale, space
    if len(weights) > 1:
        ns += [0] * (SIBLINGS - len(ns))
        siblings = [tensor for column in columns for tensor in (*column, *[column[-1]] * (SIBLINGS - len(column)))]
        launch(
            siblings_packed_kernel, (programs,), *before, *siblings, m, *ns, k, rank, shared, *words,
            **constants, num_warps=4, launch_pdl=True,
        )  # fmt: skip
        return
    residual, gate, image = (None, None, m) if add is None else add
    gate_step = 0 if add is None else add.gate_step
    residual_desc = out_desc if residual is None else descriptor(aligned(residual), rows, COLUMNS // 2)
    launch(
        linear_a8_packed_kernel, (programs,), *before, *(column[0] for column in columns),
        residual_desc, scale if gate is None else gate, m, *ns, k, rank, image, gate_step, shared, *words,
        **constants, ADD=add is not None, GATED=gate is not None, num_warps=4, launch_pdl=True,
    )  # fmt: skip
