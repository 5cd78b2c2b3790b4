"""Gradients of the ops, and what they keep of the forward pass."""

from typing import Any

import torch
from torch import Tensor

from .hadamard import block_hadamard


def _rotate_backward(dv: Tensor | None, dz: Tensor | None, ctx: Any) -> Tensor | None:
    """dx of (v, z): with dv' = dv H D, dx = dv' + (dz − dv' U) Uᵀ, in fp32."""
    basis, signs = ctx.basis, ctx.signs
    dx = None
    if dv is not None:
        dx = dv.float()
        if signs is not None:
            dx = block_hadamard(dx, ctx.block) * signs
    if basis is None:
        return dx
    u = basis.float()
    if dx is None:
        return None if dz is None else dz.float() @ u.T
    inside = dx @ u if dz is None else dx @ u - dz.float()
    return dx - inside @ u.T


def _as_used(tensor: Tensor | None) -> Tensor | None:
    """`tensor` with the data of the forward pass: offloading takes a parameter's away when that has ended."""
    return None if tensor is None else tensor.detach()


def setup_rotate(ctx, inputs, output):
    x, basis, signs, block = inputs
    ctx.basis, ctx.signs, ctx.block, ctx.dtype = _as_used(basis), _as_used(signs), block, x.dtype
    ctx.set_materialize_grads(False)


def backward_rotate(ctx, dv, dz):
    dx = _rotate_backward(dv, dz, ctx)
    return None if dx is None else dx.to(ctx.dtype), None, None, None


def setup_linear_a16(ctx, inputs, output):
    _x, _z, weight, weight_scale, low_rank, _bias, ctx.table = inputs
    ctx.weight, ctx.weight_scale, ctx.low_rank = _as_used(weight), _as_used(weight_scale), _as_used(low_rank)


def backward_linear_a16(ctx, dy):
    dx = dz = None
    if ctx.needs_input_grad[0]:
        dx = dy @ torch.ops.dirotq.dequantize.default(ctx.weight, ctx.weight_scale, ctx.table, dy.dtype)
    if ctx.needs_input_grad[1] and ctx.low_rank is not None:
        dz = (dy.float() @ ctx.low_rank.float()).bfloat16()
    return dx, dz, None, None, None, None, None


def setup_linear(ctx, inputs, output):
    x, basis, signs, ctx.block, _mode, weight, weight_scale, low_rank, _bias, ctx.table = inputs
    ctx.basis, ctx.signs, ctx.dtype = _as_used(basis), _as_used(signs), x.dtype
    ctx.weight, ctx.weight_scale, ctx.low_rank = _as_used(weight), _as_used(weight_scale), _as_used(low_rank)


def backward_linear(ctx, dy):
    dv = dy @ torch.ops.dirotq.dequantize.default(ctx.weight, ctx.weight_scale, ctx.table, dy.dtype)
    dz = None if ctx.low_rank is None else dy.float() @ ctx.low_rank.float()
    dx = _rotate_backward(dv, dz, ctx)
    return None if dx is None else dx.to(ctx.dtype), *[None] * 9
