"""`linear_a8` on Hopper: weights are unpacked to 8 bit, then one product with everything else in its epilogue."""

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .addend import Addend
from .gluon_hopper import BK, BM, RANKS, linear_a8_hopper_kernel
from .hopper_costs import unpacked_columns
from .launch import cdiv, launch, multiprocessors
from .triton_unpack import unpack

# Plain numbers: reading a constant of Triton's takes host time at every launch.
HALF, COLUMNS, RANK = BM.value // 2, BK.value, RANKS.value

_GLUON = {
    torch.int8: gl.int8,
    torch.int16: gl.int16,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _GLUON[dtype])


def descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the memory accelerator needs to copy tiles [rows, columns] of a matrix that is `aligned`.

    Its constructor would check that again, which takes longer than a launch.
    """
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.block_shape = tensor, [rows, columns]
    made.shape, made.strides = list(tensor.shape), list(tensor.stride())
    made.layout = _layout(rows, columns, tensor.dtype)
    return made


def blocks(m: int, n: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile width, ring depth and slices of the output tile."""
    if dtype == torch.float32:
        return {"BN": 128, "STAGES": 4, "PARTS": 2}
    if unpacked_columns(m, n) == 128:
        return {"BN": 128, "STAGES": 5, "PARTS": 1}
    return {"BN": 256, "STAGES": 4, "PARTS": 2}


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at an address the memory accelerator takes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def rows_aligned(x: Tensor) -> Tensor:
    """x [M, K], or a copy of it whose rows the memory accelerator takes: at multiples of 16 bytes and apart."""
    if x.shape[0] == 1:  # a single row may have any stride
        x = x.flatten().unsqueeze(0)
    if x.stride(1) != 1 or x.stride(0) < x.shape[1] or x.stride(0) % 8 or x.data_ptr() % 16:
        x = aligned(x)  # expanded rows, at distance 0, are copied too
    return x


def multiply(
    codes: Tensor, scale: Tensor, z: Tensor | None, w: Tensor, weight_scale: Tensor,
    low_rank: Tensor | None, bias: Tensor | None, gelu: bool, out: Tensor, tile: dict[str, int] | None = None,
    add: Addend | None = None,
) -> Tensor:  # fmt: skip
    """out [M, N] of `linear_a8` for unpacked weights w [N, K] of the dtype of the codes, int8 or e4m3.

    The rows of out may be strided. add: one that `fits` the rows of a warpgroup; out is of its dtype, which is 16-bit.
    """
    m, k = codes.shape
    n = w.shape[0]
    tile = tile or blocks(m, n, out.dtype)
    rank = 0
    left = right = codes.view(torch.bfloat16)  # never read if the branch is absent
    if z is not None and low_rank is not None and z.shape[1]:
        rank, left, right = z.shape[1], z, low_rank
    a_desc, w_desc = descriptor(codes, HALF, COLUMNS), descriptor(w, tile["BN"], COLUMNS)
    z_desc = descriptor(left, HALF, RANK)
    l_desc = descriptor(right, tile["BN"], RANK)
    out_desc = descriptor(out, HALF, tile["BN"] // tile["PARTS"])
    tiles = cdiv(m, 2 * HALF) * cdiv(n, tile["BN"])
    residual, gate, image = (None, None, 1) if add is None else add
    gate_step = 0 if add is None else add.gate_step
    residual_desc = out_desc if residual is None else descriptor(aligned(residual), HALF, tile["BN"] // tile["PARTS"])
    total: Any = gl.int32 if codes.dtype == torch.int8 else gl.float32
    launch(
        linear_a8_hopper_kernel, (min(tiles, multiprocessors(codes.device)),),
        a_desc, w_desc, z_desc, l_desc, out_desc, scale, weight_scale, weight_scale if bias is None else bias,
        residual_desc, scale if gate is None else gate, m, n, k, rank, image, gate_step,
        TOTAL=total, HAS_BIAS=bias is not None, GELU=gelu, ADD=add is not None, GATED=gate is not None, **tile,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out


def takes(weights: Sequence[Tensor], gelu: Sequence[bool]) -> bool:
    """Whether each product (one for siblings of equal `gelu`) begins at a multiple of 16 bytes in the output's rows."""
    return len(set(gelu)) == 1 or all(weight.shape[0] % 8 == 0 for weight in weights)


def linear_a8(
    codes: Tensor,
    scale: Tensor,
    z: Tensor | None,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    low_ranks: Sequence[Tensor],
    biases: Sequence[Tensor],
    table: Sequence[int],
    gelu: Sequence[bool],
    out: Tensor,
    add: Addend | None = None,
) -> Tensor:
    """`linear_a8_siblings` into `out`, for what this module `takes`; with `add` of a single one.

    Weights are unpacked anyway, so siblings that end alike meet in one matrix at no cost.
    """
    codes, scale, z = aligned(codes), scale.contiguous(), None if z is None else aligned(z)
    first = begin = 0
    for curved, run in groupby(gelu):
        last = first + len(list(run))
        end = begin + sum(weight.shape[0] for weight in weights[first:last])
        low_rank = _stacked(low_ranks[first:last]) if z is not None and low_ranks else None
        bias = _stacked(biases[first:last]) if biases else None
        weight_scale = _stacked(weight_scales[first:last])
        w = torch.empty((end - begin, codes.shape[1]), dtype=codes.dtype, device=codes.device)
        row = 0
        for weight in weights[first:last]:  # right before the product: each waits for the kernel before it
            unpack(aligned(weight), table, codes.dtype, overlap=True, out=w[row : row + weight.shape[0]])
            row += weight.shape[0]
        multiply(codes, scale, z, w, weight_scale, low_rank, bias, curved, out[:, begin:end], add=add)
        first, begin = last, end
    return out


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return aligned(tensors[0]) if len(tensors) == 1 else torch.cat(list(tensors))
