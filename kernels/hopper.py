"""`linear_a8` on Hopper: the weights are unpacked once to 8 bit, then one product with everything else in its epilogue."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .gluon_hopper import BK, BM, RANKS, linear_a8_hopper_kernel
from .triton_common import OPTIONS
from .triton_unpack import unpack

_GLUON = {
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _GLUON[dtype])


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = _layout(rows, columns, tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns], layout)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def blocks(m: int, n: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile width, ring depth and slices of the output tile."""
    if dtype == torch.float32:
        return {"BN": 128, "STAGES": 4, "PARTS": 2}
    return {"BN": 256, "STAGES": 4, "PARTS": 2}


def multiply(
    codes: Tensor, scale: Tensor, z: Tensor | None, w: Tensor, weight_scale: Tensor,
    low_rank: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype, tile: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """`linear_a8` for unpacked weights w [N, K] of the dtype of the codes, int8 or e4m3."""
    m, k = codes.shape
    n = w.shape[0]
    tile = tile or blocks(m, n, out_dtype)
    out = torch.empty((m, n), dtype=out_dtype, device=codes.device)
    rank = 0 if z is None or low_rank is None else z.shape[1]
    half, bk, ranks = BM.value // 2, BK.value, RANKS.value
    any_16 = codes.view(torch.bfloat16)  # never read: stands in for an absent branch
    a_desc, w_desc = _descriptor(codes, half, bk), _descriptor(w, tile["BN"], bk)
    z_desc = _descriptor(z if rank else any_16, half, ranks)
    l_desc = _descriptor(low_rank if rank else any_16, tile["BN"], ranks)
    out_desc = _descriptor(out, half, tile["BN"] // tile["PARTS"])
    tiles = triton.cdiv(m, BM.value) * triton.cdiv(n, tile["BN"])
    total: Any = gl.int32 if codes.dtype == torch.int8 else gl.float32
    linear_a8_hopper_kernel[(min(tiles, _multiprocessors(codes.device.index)),)](
        a_desc, w_desc, z_desc, l_desc, out_desc, scale, weight_scale, weight_scale if bias is None else bias,
        m, n, k, rank, TOTAL=total, HAS_BIAS=bias is not None, **tile, num_warps=4, **OPTIONS,
    )  # fmt: skip
    return out


def applies(codes: Tensor, z: Tensor | None, weight: Tensor) -> bool:
    """Whether the tensor memory accelerator can address the operands: rows of a multiple of 16 bytes."""
    rank = 0 if z is None else z.shape[1]
    return rank % 8 == 0 and weight.shape[0] % 8 == 0


def linear_a8(
    codes: Tensor,
    scale: Tensor,
    z: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    low_rank: Tensor | None,
    bias: Tensor | None,
    table: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    w = unpack(weight, table, codes.dtype)
    return multiply(codes, scale, z, w, weight_scale, low_rank, bias, out_dtype)
