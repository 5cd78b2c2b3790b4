"""Rounding weights to a format of few bits: scales, round to nearest, GPTQ."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..kernels import round_columns
from .codebooks import PackedFormat, Rounded, WeightFormat

GPTQ_BLOCK = 128
GPTQ_DAMPING = 0.01
#: Widths up to which the Hessian is factorized in float64. Wider ones are in float32, where they take half the memory
#: and, on GPUs for games, a fraction of the time; float64 is then for those that float32 cannot factorize.
DOUBLE_WIDTH = 4096
#: Damping is raised tenfold this often before GPTQ gives up on a matrix.
GPTQ_RETRIES = 3


def round_nearest(w: torch.Tensor, fmt: PackedFormat, importance: torch.Tensor | None = None) -> Rounded:
    """Each weight of w [N, K] to the nearest value of the format, scales searched; importance [K] as in `nearest`."""
    return fmt.nearest(w, importance)


def round_gptq(w: torch.Tensor, fmt: WeightFormat, moment: torch.Tensor) -> Rounded:
    """GPTQ (arXiv 2210.17323) with act-order, damping 0.01, blocks of 128 and scales fixed beforehand.

    Columns are rounded by descending diag(H); the error of each is compensated in those not yet rounded through
    the Cholesky factor of the inverse Hessian. A Hessian that cannot be factorized is damped ten times more, up to
    three times; after that the weights are rounded to nearest and the result says so.

    Args:
        w: [N, K]; the rows of all linears that share the input can be stacked.
        moment: H [K, K], second moment of the input as the weights see it.
    """
    h = moment.to(w.device)
    importance = h.diagonal().float()
    factor, order, note = _inverse_cholesky(h)
    if factor is None:
        return replace(round_nearest(w, fmt, importance), fallback=note)
    scale = fmt.search_scales(w, importance)
    columns = fmt.expand(scale, w.shape[1])[:, order].contiguous()
    midpoints, codes, values = fmt.decision(w)
    work = w.float()[:, order].contiguous()
    chosen = torch.empty(work.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, work.shape[1], GPTQ_BLOCK):
        stop = min(start + GPTQ_BLOCK, work.shape[1])
        entries, errors = round_columns(
            work[:, start:stop], factor[start:stop, start:stop], columns[:, start:stop], midpoints, values
        )
        chosen[:, start:stop] = entries
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return Rounded(codes[chosen.int()][:, order.argsort()], scale, note)


def _inverse_cholesky(h: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, str | None]:
    """Upper Cholesky factor of (H + damping)⁻¹ in act-order as float32, the order, and a note if it was hard."""
    order = h.diagonal().argsort(descending=True, stable=True)
    mean = float(h.diagonal().double().mean())
    if not (math.isfinite(mean) and torch.isfinite(h).all()):
        return None, order, "second moment not finite; rounded to nearest"
    if mean <= 0:
        return None, order, "second moment is zero; rounded to nearest"
    for attempt in range(GPTQ_RETRIES + 1):
        damping = GPTQ_DAMPING * 10**attempt
        for dtype in (torch.float64,) if len(h) <= DOUBLE_WIDTH else (torch.float32, torch.float64):
            upper = _damped_factor(h, order, damping * mean, dtype)
            if upper is not None:
                return upper.float(), order, f"damping raised to {damping:g}" if attempt else None
    return None, order, f"no Cholesky factor up to damping {damping:g}; rounded to nearest"


def _damped_factor(h: torch.Tensor, order: torch.Tensor, damping: float, dtype: torch.dtype) -> torch.Tensor | None:
    """Upper Cholesky factor of (H + damping·I)⁻¹ in `order`, None if there is none; at most three K × K at a time."""
    damped = h[order][:, order].to(dtype)
    damped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(damped)
    del damped
    if int(info):
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
    return upper if int(info) == 0 and torch.isfinite(upper).all() else None
