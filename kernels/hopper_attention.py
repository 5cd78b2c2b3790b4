"""`attend` with heads of 72, 80 or 128 columns on Hopper."""

import math

import torch
from torch import Tensor

from .attention import POWERS_OF_TWO
from .gluon_attention import BQ, BS, REST, WIDE, narrow_attention_kernel
from .gluon_wide_attention import D, wide_attention_kernel
from .hopper import descriptor, rows_aligned
from .launch import cdiv, early, launch, multiprocessors, on_device_of
from .triton_attention import DOUBTFUL, doubtful_attention_kernel

# Plain numbers: reading a constant of Triton's takes host time at every launch.
QUERIES, KEYS, FIRST, SECOND, COLUMNS = BQ.value, BS.value, WIDE.value, REST.value, D.value
STAGES, WIDE_STAGES = 4, 5


def takes(query: Tensor, bias: Tensor | None, scale: float | None) -> bool:
    """Whether these kernels are for queries [B, S, H, D]: two steps of the memory accelerator hold a narrow head, and
    its bytes are a multiple of 16. Weights of wide ones are powers of two of the scores, beyond fp16's range."""
    if query.shape[3] == COLUMNS:
        return query.dtype == torch.bfloat16 and bias is None and scale == POWERS_OF_TWO
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[3] in range(FIRST + 8, FIRST + SECOND + 1, 8)


def _matrix(x: Tensor) -> Tensor:
    """x [B, S, H, D] as [B S, H D], copied unless the memory accelerator can read it where it lies."""
    batch, length, heads, d = x.shape
    return rows_aligned(x.reshape(batch * length, heads * d))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    batch, length, heads, d = query.shape
    keys = key.shape[1]
    out = torch.empty((batch, length, heads, d), dtype=query.dtype, device=query.device)
    with on_device_of(query):
        q, k, v = (_matrix(x) for x in (query, key, value))
        tiles = batch * heads * cdiv(length, 2 * QUERIES)
        grid = (min(tiles, multiprocessors(query.device)),)
        if d == COLUMNS:
            doubt = torch.empty((tiles, 2), dtype=torch.int32, device=query.device)
            described = [descriptor(x, rows, COLUMNS) for x, rows in ((q, QUERIES), (k, KEYS), (v, KEYS))]
            launch(
                wide_attention_kernel, grid, *described, out, doubt, length, keys, heads, tiles,
                MASK=keys % KEYS != 0, STAGES=WIDE_STAGES, num_warps=4, launch_pdl=True,
            )  # fmt: skip
            launch(
                doubtful_attention_kernel, grid, q, k, v, out, doubt, length, keys, heads, tiles,
                q.stride(0), k.stride(0), v.stride(0), **DOUBTFUL, **early(query.device),
            )  # fmt: skip
            return out
        described = [
            descriptor(x, rows, columns)
            for x, rows in ((q, QUERIES), (k, KEYS), (v, KEYS))
            for columns in (FIRST, SECOND)
        ]
        launch(
            narrow_attention_kernel, grid, *described, query if bias is None else bias.contiguous(), out,
            length, keys, heads, tiles, math.log2(math.e) * (1 / math.sqrt(d) if scale is None else scale),
            D=d, BIAS=bias is not None, MASK=keys % KEYS != 0, STAGES=STAGES, num_warps=4, launch_pdl=True,
        )  # fmt: skip
    return out
