"""Small constant tables on the device of the tensors they are used with.

A table made from host values is a copy that the host waits for: nothing for a forward pass, and not allowed at all
while a CUDA graph is captured. `table_like` makes each once for a device and keeps it. Where nothing can be kept (in a
graph that is traced or captured) it fills one on the device itself.
"""

import torch
from torch import Tensor

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
    """Whether what is made from `like` may be kept: it is data, nothing is traced, no CUDA graph is captured."""
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return False
    return like.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _filled(values: tuple[int | float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table without a copy: one entry after the other, as arguments of kernels."""
    index = torch.arange(len(values), device=device)
    table = torch.full((len(values),), values[0], dtype=dtype, device=device)
    for i, value in enumerate(values[1:], 1):
        table = table.masked_fill(index == i, value)
    return table
