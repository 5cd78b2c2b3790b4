"""`attend` with narrow heads on Hopper."""

import math

import torch
from torch import Tensor

from .gluon_attention import BQ, BS, REST, WIDE, narrow_attention_kernel
from .hopper import descriptor, rows_aligned
from .launch import cdiv, launch, multiprocessors, on_device_of

# Plain numbers: reading a constant of Triton's takes host time at every launch.
QUERIES, KEYS, FIRST, SECOND = BQ.value, BS.value, WIDE.value, REST.value
STAGES = 4


def takes(query: Tensor) -> bool:
    """Whether this kernel is for queries [B, S, H, D]: two steps of the memory accelerator hold a head, and its bytes
    are a multiple of 16."""
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[3] in range(FIRST + 8, FIRST + SECOND + 1, 8)


def _matrix(x: Tensor) -> Tensor:
    """x [B, S, H, D] as [B S, H D], copied unless the memory accelerator can read it where it lies."""
    batch, length, heads, d = x.shape
    return rows_aligned(x.reshape(batch * length, heads * d))


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
