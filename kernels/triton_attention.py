"""Triton kernels between the projections of queries, keys and values and that of the result: RMS norm per head and
rotation by position, text and image put side by side, in one pass; attention where Hopper's kernel is in doubt."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .launch import cdiv, early, is_hopper, launch, on_device_of
from .triton_common import begin, dot, narrow


@triton.jit
def _places(start, heads, here, D: tl.constexpr, BH: tl.constexpr):
    """Where heads of a token from `start` on lie [1, BH, D], and which of each token's there are [BS, BH, 1]."""
    head = start + tl.arange(0, BH)
    at = head[None, :, None] * D + tl.arange(0, D)[None, None, :]
    return at, here[:, None, None] & (head < heads)[None, :, None]


@triton.jit
def _heads(x_row, start, heads, here, D: tl.constexpr, BH: tl.constexpr):
    """Heads of each token from `start` on, [BS, BH, D]."""
    at, inside = _places(start, heads, here, D, BH)
    return tl.load(x_row + at, mask=inside, other=0.0)


@triton.jit
def qk_norm_rope_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    tokens, heads, first, q_batch, q_token, k_batch, k_token, v_batch, v_token, out_batch, eps, query_scale,
    D: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Queries (program_id(2) = 0), keys (1) or values (2), which are copied, of one part [tokens, heads, D], to `out`
    from its token `first` on; queries times query_scale."""
    begin(OVERLAP)
    token = tl.program_id(0) * BS + tl.arange(0, BS)
    here = token < tokens
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, D)
    place = (first + token).to(tl.int64)
    if tl.program_id(2) == 2:
        v_row = v_ptr + batch * v_batch + token.to(tl.int64)[:, None, None] * v_token
        v_out_row = v_out_ptr + batch * out_batch + place[:, None, None] * (heads * D)
        for start in range(0, heads, BH):
            at, inside = _places(start, heads, here, D, BH)
            tl.store(v_out_row + at, tl.load(v_row + at, mask=inside), mask=inside)
        return
    factor = tl.where(tl.program_id(2) == 0, query_scale, 1.0)
    if tl.program_id(2) == 0:
        x_ptr, weight_ptr, out_ptr, x_token = q_ptr + batch * q_batch, q_weight_ptr, q_out_ptr, q_token
    else:
        x_ptr, weight_ptr, out_ptr, x_token = k_ptr + batch * k_batch, k_weight_ptr, k_out_ptr, k_token
    x_row = x_ptr + token.to(tl.int64)[:, None, None] * x_token
    out_row = out_ptr + batch * out_batch + place[:, None, None] * (heads * D)
    ahead = _heads(x_row, 0, heads, here, D, BH)
    angles = place[:, None] * D + column[None, :]
    cos = tl.load(cos_ptr + angles, mask=here[:, None], other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angles, mask=here[:, None], other=0.0).to(tl.float32)
    cos_even, cos_odd = tl.split(tl.reshape(cos, (BS, 1, D // 2, 2)))
    sin_even, sin_odd = tl.split(tl.reshape(sin, (BS, 1, D // 2, 2)))
    weight = tl.load(weight_ptr + column).to(tl.float32)[None, None, :]
    for start in range(0, heads, BH):
        x = ahead.to(tl.float32)
        ahead = _heads(x_row, start + BH, heads, here, D, BH)  # the next ones, on their way meanwhile
        mean = tl.sum(x * x, 2) / D
        x = x * (1 / tl.sqrt(mean + eps))[:, :, None] * weight
        x = narrow(x, out_ptr.dtype.element_ty).to(tl.float32)  # the norm's result is a tensor of that dtype
        even, odd = tl.split(tl.reshape(x, (BS, BH, D // 2, 2)))
        y = tl.join(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd) * factor
        at, inside = _places(start, heads, here, D, BH)
        tl.store(out_row + at, narrow(tl.reshape(y, (BS, BH, D)), out_ptr.dtype.element_ty), mask=inside)


# Tile sizes and launch options, found by measurement: a token at a time, eight heads of it.
TILE = {"BS": 1, "BH": 8, "num_warps": 2, "num_stages": 2}


def qk_norm_rope(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    query_weights: Sequence[Tensor],
    key_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    query_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x = queries[0]
    batch, _, heads, d = x.shape
    length = sum(part.shape[1] for part in queries)
    with on_device_of(x):
        q_out = torch.empty((batch, length, heads, d), dtype=x.dtype, device=x.device)
        k_out = torch.empty_like(q_out)
        v_out = torch.empty_like(q_out) if values else torch.empty(0, dtype=x.dtype, device=x.device)
        cos, sin = cos.contiguous(), sin.contiguous()
        first = 0
        parts = queries, keys, values or keys, query_weights, key_weights  # the keys are not read as values
        for q, k, v, q_weight, k_weight in zip(*parts, strict=True):
            q, k = _rows(q), _rows(k)
            v = _rows(v) if values else k
            tokens = q.shape[1]
            if q.numel():
                launch(
                    qk_norm_rope_kernel, (cdiv(tokens, TILE["BS"]), batch, 3 if values else 2),
                    q, k, v, q_weight.contiguous(), k_weight.contiguous(), cos, sin,
                    q_out, k_out, v_out if values else k_out, tokens, heads, first,
                    *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], q_out.stride(0), eps, query_scale,
                    D=d, **TILE, **early(x.device),
                )  # fmt: skip
            first += tokens
    return q_out, k_out, v_out


def _rows(x: Tensor) -> Tensor:
    """x [B, S, H, D] with the heads of a token next to one another, at any distance from those of the next."""
    d = x.shape[3]
    return x if x.stride(3) == 1 and x.stride(2) == d else x.contiguous()


@triton.jit
def doubtful_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, doubt_ptr, S, keys, heads, tiles, q_row, k_row, v_row,
    D: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [B S, heads D] = softmax(ln 2 · q kᵀ) v in those tiles of BQ queries of an image and a head of which
    doubt [tiles, 2] is not zero (FlashAttention-2, arXiv 2307.08691, algorithm 1); rows of q, k and v lie q_row, k_row
    and v_row apart."""
    begin(OVERLAP)
    per_head = tl.cdiv(S, BQ)
    column = tl.arange(0, D)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if tl.load(doubt_ptr + 2 * tile) + tl.load(doubt_ptr + 2 * tile + 1) > 0:
            image = (tile // per_head // heads).to(tl.int64)
            head = tile // per_head % heads
            token = tile % per_head * BQ + tl.arange(0, BQ)
            row = (image * S + token)[:, None]
            here = (token < S)[:, None]
            q = tl.load(q_ptr + row * q_row + head * D + column[None, :], mask=here, other=0.0)
            most = tl.full([BQ], float("-inf"), tl.float32)
            total = tl.zeros([BQ], tl.float32)
            o = tl.zeros([BQ, D], tl.float32)
            for start in range(0, keys, BS):
                key = start + tl.arange(0, BS)
                there = (key < keys)[:, None]
                at = (image * keys + key)[:, None]
                k = tl.load(k_ptr + at * k_row + head * D + column[None, :], mask=there, other=0.0)
                v = tl.load(v_ptr + at * v_row + head * D + column[None, :], mask=there, other=0.0)
                s = dot(q, tl.trans(k), tl.zeros([BQ, BS], tl.float32))
                s = tl.where((key < keys)[None, :], s, float("-inf"))
                before = most
                most = tl.maximum(most, tl.max(s, 1))
                p = tl.exp2(s - most[:, None])
                shrink = tl.exp2(before - most)
                total = total * shrink + tl.sum(p, 1)
                o = dot(narrow(p, v.dtype), v, o * shrink[:, None])
            out = out_ptr + row * (heads * D) + head * D + column[None, :]
            tl.store(out, narrow(o / total[:, None], out_ptr.dtype.element_ty), mask=here)


# Tiles of `gluon_wide_attention`, which marks them.
DOUBTFUL = {"D": 128, "BQ": 128, "BS": 32, "num_warps": 8, "num_stages": 2}


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    if query.numel() and is_hopper(query.device):
        from . import hopper_attention  # Gluon's tools for Hopper are not in older Triton

        if hopper_attention.takes(query, bias, scale):
            return hopper_attention.attend(query, key, value, bias, scale)
    return reference.attend(query, key, value, bias, scale)
