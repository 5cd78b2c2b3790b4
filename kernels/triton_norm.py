"""Triton kernel between a block's modulation and its projections: layer norm, scale and shift, text and image put side
by side, in one pass."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .launch import cdiv, early, launch, on_device_of
from .triton_common import begin, narrow


@triton.jit
def norm_modulate_kernel(
    a_ptr, b_ptr, scale_ptr, shift_ptr, out_ptr,
    a_tokens, b_tokens, first, a_batch, a_token, b_batch, b_token, scale_batch, shift_batch, out_batch, eps,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Two neighbouring parts, a [a_tokens, D] and b [b_tokens, D], to `out` from its token `first` on."""
    begin(OVERLAP)
    batch = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    a_blocks = tl.cdiv(a_tokens, BS)
    if block < a_blocks:
        token = block * BS + tl.arange(0, BS)
        here = token < a_tokens
        x_row = a_ptr + batch * a_batch + token.to(tl.int64) * a_token
        place = first + token
    else:
        token = (block - a_blocks) * BS + tl.arange(0, BS)
        here = token < b_tokens
        x_row = b_ptr + batch * b_batch + token.to(tl.int64) * b_token
        place = first + a_tokens + token
    column = tl.arange(0, BD)
    real = column < D
    inside = here[:, None] & real[None, :]
    x = tl.load(x_row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    # Asked for before the sums, which wait for x: both ways to memory pass at once.
    scale = tl.load(scale_ptr + batch * scale_batch + column, mask=real, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * shift_batch + column, mask=real, other=0.0).to(tl.float32)
    x = tl.where(real[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
    # The rounded mean of a row far from zero leaves a rest, which is no small part of a narrow spread: it is summed
    # beside the squares and taken out of both.
    rest, square = tl.split(tl.sum(tl.join(x, x * x), 1))
    rest = rest / D
    factor = 1 / tl.sqrt(tl.maximum(square / D - rest * rest, 0.0) + eps)
    x = tl.fma(x, factor[:, None], (-rest * factor)[:, None])
    y = tl.fma(x, (1 + scale)[None, :], shift[None, :])
    out_row = out_ptr + batch * out_batch + place.to(tl.int64) * D
    tl.store(out_row[:, None] + column[None, :], narrow(y, out_ptr.dtype.element_ty), mask=inside)


_WIDEST = 16384  # columns of a token that a program holds in registers; the reference computes wider ones


def blocks(d: int) -> dict[str, int]:
    """Tile sizes and launch options: a token a program, up to 32 columns a thread (in warps of 32).

    In 16 bit, all warps together hold 256 · num_warps neighbouring columns, then as many of the next, and so on. The
    rounds of the block, a power of two, that lie past D cost nothing: 3072 columns are three rounds of four warps.
    """
    width = triton.next_power_of_2(d)
    return {"BS": 1, "BD": width, "num_warps": min(max(width // 1024, 1), 16), "num_stages": 1}


def norm_modulate(parts: Sequence[Tensor], scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    batch, _, d = parts[0].shape
    if d > _WIDEST:
        return reference.norm_modulate(parts, scale, shift, eps)
    tile = blocks(d)
    with on_device_of(scale):
        out = scale.new_empty((batch, sum(x.shape[1] for x in parts), d))
        parts, scale, shift = [_rows(x) for x in parts if x.numel()], _rows(scale), _rows(shift)
        first = 0
        for i in range(0, len(parts), 2):  # text and image in one launch
            a, b = parts[i], parts[min(i + 1, len(parts) - 1)]
            a_tokens, b_tokens = a.shape[1], b.shape[1] if i + 1 < len(parts) else 0
            launch(
                norm_modulate_kernel, (cdiv(a_tokens, tile["BS"]) + cdiv(b_tokens, tile["BS"]), batch),
                a, b, scale, shift, out,
                a_tokens, b_tokens, first, a.stride(0), a.stride(1), b.stride(0), b.stride(1),
                scale.stride(0), shift.stride(0), out.stride(0), eps, D=d, **tile, **early(out.device),
            )  # fmt: skip
            first += a_tokens + b_tokens
    return out


def _rows(x: Tensor) -> Tensor:
    """x [..., D] with the columns of a row next to one another, rows at any distance."""
    return x if x.stride(-1) == 1 else x.contiguous()
