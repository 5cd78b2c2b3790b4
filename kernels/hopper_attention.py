"""`attend` with narrow heads on Hopper."""

import math

import torch
from torch import Tensor

from .gluon_attention import BQ, BS, REST, WIDE, narrow_attention_kernel
from .hopper import descriptor
from .launch import cdiv, launch, multiprocessors, on_device_of

# Plain numbers: reading a constant of Triton's takes host time at every launch.
QUERIES, KEYS, FIRST, SECOND = BQ.value, BS.value, WIDE.value, REST.value
STAGES = 4


def takes(query: Tensor) -> bool:
    """Whether this kernel is for queries [B, S, H, D]."""
    return query.dtype in (torch.bfloat16, torch.float16) and FIRST < query.shape[3] <= FIRST + SECOND


def _matrix(x: Tensor) -> Tensor:
    """x [B, S, H, D] as [B S, H D], copied unless the memory accelerator can read it where it lies."""
    batch, length, heads, d = x.shape
    rows = x.stride(1)
    if x.stride(3) != 1 or x.stride(2) != d or rows % 8 or rows < heads * d or x.data_ptr() % 16:
        x = x.contiguous()
    elif batch > 1 and x.stride(0) != length * rows:
        x = x.contiguous()
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    return x.as_strided((batch * length, heads * d), (x.stride(1), 1))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    batch, length, heads, d = query.shape
    keys = key.shape[1]
    out = torch.empty((batch, length, heads, d), dtype=query.dtype, device=query.device)
    with on_device_of(query):
        tiles = batch * heads * cdiv(length, 2 * QUERIES)
        described = [
            descriptor(x, rows, columns)
            for x, rows in ((_matrix(query), QUERIES), (_matrix(key), KEYS), (_matrix(value), KEYS))
            for columns in (FIRST, SECOND)
        ]
        launch(
            narrow_attention_kernel, (min(tiles, multiprocessors(query.device)),),
            *described, query if bias is None else bias.contiguous(), out,
            length, keys, heads, tiles, math.log2(math.e) / math.sqrt(d),
            D=d, BIAS=bias is not None, MASK=keys % KEYS != 0, STAGES=STAGES, num_warps=4, launch_pdl=True,
        )  # fmt: skip
    return out
