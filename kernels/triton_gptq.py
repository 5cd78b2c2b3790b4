"""Triton kernel of GPTQ's inner loop: a few columns of all rows, one after the other, in a single launch.

Rows do not depend on each other, so each program takes some of them through all columns in its registers. As single
operations of PyTorch the columns of FLUX.1, a million and a half, would be fifteen million launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, on_device_of


def blocks(columns: int, entries: int = 16) -> dict[str, int]:
    """Tile sizes and launch options for B columns and a table of `entries` values."""
    return {"ROWS": 16, "BLOCK": triton.next_power_of_2(columns), "MIDPOINTS": entries - 1, "num_warps": 4,
            "num_stages": 1}  # fmt: skip


@triton.jit
def round_columns_kernel(
    work_ptr, factor_ptr, scale_ptr, midpoints_ptr, values_ptr, entries_ptr, errors_ptr, N, B, stride_work,
    stride_factor, stride_scale, ROWS: tl.constexpr, BLOCK: tl.constexpr, MIDPOINTS: tl.constexpr,
):  # fmt: skip
    """Entries and errors [N, B] of the columns of work [N, B]."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (cols < B)[None, :]
    work = tl.load(work_ptr + rows[:, None] * stride_work + cols[None, :], mask=inside, other=0.0)
    for i in range(0, B):
        column = tl.sum(tl.where(cols[None, :] == i, work, 0.0), 1)
        scale = tl.load(scale_ptr + rows * stride_scale + i, mask=rows < N, other=0.0)
        # Of an all-zero row the scale is zero, and so is what is divided.
        scaled = tl.where(scale > 0, tl.div_rn(column, tl.where(scale > 0, scale, 1.0)), 0.0)
        entry = tl.zeros((ROWS,), tl.int32)
        for m in tl.static_range(MIDPOINTS):
            entry += (scaled > tl.load(midpoints_ptr + m)).to(tl.int32)
        value = tl.load(values_ptr + entry)
        pivot = tl.load(factor_ptr + i * stride_factor + i)
        error = tl.div_rn(column - value * scale, tl.zeros((ROWS,), tl.float32) + pivot)
        tl.store(entries_ptr + rows * B + i, entry.to(tl.uint8), mask=rows < N)
        tl.store(errors_ptr + rows * B + i, error, mask=rows < N)
        later = tl.load(factor_ptr + i * stride_factor + cols, mask=(cols > i) & (cols < B), other=0.0)
        work -= error[:, None] * later[None, :]


def round_columns(
    work: Tensor, factor: Tensor, scale: Tensor, midpoints: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """As `reference.round_columns`; `work` stays as it is."""
    n, b = work.shape
    factor = factor.contiguous()  # Cholesky factors come column by column
    assert work.stride(1) == scale.stride(1) == 1 and len(midpoints) == len(values) - 1
    entries = torch.empty((n, b), dtype=torch.uint8, device=work.device)
    errors = torch.empty((n, b), dtype=torch.float32, device=work.device)
    sizes = blocks(b, len(values))
    with on_device_of(work):
        launch(
            round_columns_kernel, (cdiv(n, sizes["ROWS"]),), work, factor, scale, midpoints, values, entries, errors,
            n, b, work.stride(0), factor.stride(0), scale.stride(0), **sizes,
        )  # fmt: skip
    return entries, errors
