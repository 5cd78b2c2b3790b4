"""Small constant tables on the device of the tensors they are used with.

A table made from host values is a copy that the host waits for: nothing for a forward pass, and not allowed at all
while a CUDA graph is captured. `table_like` makes each once for a device and keeps it. Where nothing can be kept (in a
graph that is traced or captured) it fills one on the device itself.
"""

import struct

import torch
from torch import Tensor

from . import rehearsal

_kept: dict[tuple, Tensor] = {}


def table_like(values: tuple[int | float, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as `dtype` on the device of `like`, shared with other callers: not to be written to."""
    if not lasting(like):
        return _filled(values, like.device, dtype)
    key = (values, like.device, dtype)
    table = _kept.get(key)
    if table is None:
        # The copy ends before this returns, so every stream may read it. Made in inference mode it could not be
        # part of a graph of gradients later.
        with torch.inference_mode(False):
            table = _kept[key] = torch.tensor(values, dtype=dtype, device=like.device)
    return table


def lasting(like: Tensor) -> bool:
    """Whether what is made from `like` may be kept: it is data, nothing is traced, rehearsed or captured as a graph."""
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return False
    if rehearsal.current() is not None:
        return False
    return like.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _filled(values: tuple[int | float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table without a copy: its entries are arguments of kernels, four to a word where they are whole or half."""
    index = torch.arange(len(values), device=device)
    doubled = [round(2 * v) for v in values]
    if any(d != 2 * v for d, v in zip(doubled, values, strict=True)):
        return _chosen(values, index, dtype)
    doubled += [0] * (-len(doubled) % 4)
    words = struct.unpack(f"<{len(doubled) // 4}q", struct.pack(f"<{len(doubled)}h", *doubled))
    entries = (_chosen(words, index >> 2, torch.int64) >> 16 * (index & 3)).to(torch.int16)
    return (entries.to(torch.float32) / 2).to(dtype)


def _chosen(values: tuple[int | float, ...], index: Tensor, dtype: torch.dtype) -> Tensor:
    table = torch.full(index.shape, values[0], dtype=dtype, device=index.device)
    for i, value in enumerate(values[1:], 1):
        table = table.masked_fill(index == i, value)
    return table
