"""A patch of a weight as two thin matrices."""

from __future__ import annotations

import torch

#: Ranks tried, one after the other; patches of a higher rank are re-quantized.
RANKS = (64, 256)
#: Share of the patch's norm that may be lost.
TOLERANCE = 2e-3


@torch.no_grad()
def side_branch(difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(down [R, K], up [N, R]) in bfloat16 with up down = `difference` [N, K], or None if it has no low rank.

    By a random range finder (Halko, Martinsson, Tropp, arXiv 0909.4061). A difference of exactly R dimensions, as
    LoRAs have, is found whole by it.
    """
    size = difference.norm()
    if not float(size) > 0:
        return None
    n, k = difference.shape
    for rank in RANKS:
        if rank >= min(n, k) // 2:
            break
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(k, rank, generator=generator).to(difference)
        q = torch.linalg.qr(difference @ probe)[0]
        # Down once more through its own range, so that the columns come ordered and zeros can be left out.
        down = q.T @ difference
        left, values, right = torch.linalg.svd(down, full_matrices=False)
        keep = values > 1e-5 * values[0]
        lost = (difference - q @ down).norm() / size
        if float(lost) < TOLERANCE:
            root = values[keep].sqrt()
            up = (q @ left[:, keep]) * root
            return (root[:, None] * right[keep]).to(torch.bfloat16), up.to(torch.bfloat16)
    return None
