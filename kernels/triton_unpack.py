"""Triton kernel that unpacks 4-bit weights to 8-bit table values, for products that read plain 8-bit matrices."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch
from .triton_common import decode, has_ptx, permute, table_words

_PERMUTE = tl.constexpr(permute(3, 4, 5, 6))


@triton.jit
def _four(codes, t0, t1, t2, t3):
    """The low four codes of a word as four bytes."""
    word = tl.zeros_like(codes)
    for i in tl.static_range(4):
        value = decode((codes >> (4 * i)) & 15, t0, t1, t2, t3).to(tl.int32) & 255
        word |= value << (8 * i)
    return word


@triton.jit(do_not_specialize=["t0", "t1", "t2", "t3"])
def unpack_kernel(
    packed_ptr, out_ptr, words, t0, t1, t2, t3, ASM: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """out, 2 words of bytes, from each of `words` 32-bit words of codes; OVERLAP: the kernel before may still run."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    packed = tl.load(packed_ptr + start + at, mask=start + at < words, other=0)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()  # `out` may lie where that kernel still reads
    if ASM:
        low, high = tl.inline_asm_elementwise(
            _PERMUTE, "=&r,=&r,r,r,r,r,r", [packed, t0, t1, t2, t3], (tl.int32, tl.int32), True, 1
        )
    else:
        low, high = _four(packed, t0, t1, t2, t3), _four(packed >> 16, t0, t1, t2, t3)
    out = tl.reshape(tl.join(low, high), (2 * BLOCK,))
    out_at = tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + 2 * start + out_at, out, mask=2 * start + out_at < 2 * words)


@lru_cache
def _as_bytes(table: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The table's bytes in an 8-bit dtype."""
    return tuple(torch.tensor(table, dtype=torch.float32).to(dtype).view(torch.int8).tolist())


def unpack(
    weight: Tensor, table: Sequence[int], dtype: torch.dtype = torch.int8, *, overlap: bool = False,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Table values [N, K] of `weight` uint8 [N, K/2], K a multiple of 8, as int8 or as float8 e4m3.

    overlap: start while the kernel before this one ends (Hopper or newer). out: contiguous rows to write to.
    """
    if out is None:
        out = torch.empty((weight.shape[0], 2 * weight.shape[1]), dtype=dtype, device=weight.device)
    words = weight.numel() // 4
    if dtype != torch.int8:
        table = _as_bytes(tuple(table), dtype)
    block = 1024
    early = {"launch_pdl": True} if overlap else {}  # unknown to some GPUs' compilers
    asm = has_ptx()
    launch(
        unpack_kernel, (cdiv(words, block),), weight.view(torch.int32), out.view(torch.int32), words,
        *table_words(table), ASM=asm, BLOCK=block, OVERLAP=overlap, num_warps=4, **early,
    )  # fmt: skip
    return out
