"""Triton kernel of the sum that ends `linear_a8_add` where no product does: residual + gate · y."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addend import Addend
from .launch import cdiv, launch
from .triton_common import narrow

BLOCK = 1024


@triton.jit
def add_kernel(y_ptr, residual_ptr, gate_ptr, out_ptr, N, image, gate_step, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """out [M, N], BLOCK columns of a row."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * N + cols
    y = tl.load(y_ptr + at, mask=cols < N, other=0.0).to(tl.float32)
    if GATED:
        y *= tl.load(gate_ptr + (row // image).to(tl.int64) * gate_step + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = tl.load(residual_ptr + at, mask=cols < N, other=0.0).to(tl.float32) + y
    tl.store(out_ptr + at, narrow(y, out_ptr.dtype.element_ty), mask=cols < N)


def add(y: Tensor, addend: Addend) -> Tensor:
    """residual + gate · y for y [M, N] of the residual's dtype, in fp32 and rounded once."""
    m, n = y.shape
    out = torch.empty_like(y)
    if out.numel():
        gate = y if addend.gate is None else addend.gate  # never read if absent
        launch(
            add_kernel, (m, cdiv(n, BLOCK)), y, addend.residual, gate, out, n, addend.image, addend.gate_step,
            GATED=addend.gate is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out
