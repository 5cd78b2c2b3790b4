"""Twin-Log Quantization of weights (LRQ-DiT, arXiv 2508.03485): uniform steps of log2(|w| + η), a scale for each sign.

A row has 2ᵇ levels: zero, 2ᵇ⁻¹ − 1 positive ones and 2ᵇ⁻¹ negative ones. Counted with zero on either side these are the
paper's 2ᵇ⁻¹ and 2ᵇ⁻¹ + 1; the zero point of both signs is log2 η, so that they share it and a code has b bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: η as a share of a row's largest weight, and the quantiles of |w| that a sign's levels reach: the search's grid.
ETAS = tuple(2.0**-i for i in range(9))
QUANTILES = (1.0, 0.999, 0.995, 0.99, 0.98, 0.96)


@dataclass(frozen=True)
class TwinLog:
    """codes uint8 [N, K]; levels float32 [N, 2ᵇ], the value of each code in each row."""

    codes: torch.Tensor
    levels: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Ŵ [N, K] float32."""
        return self.levels.gather(1, self.codes.long())


def twin_log_levels(eta: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels [N, 2ᵇ] by code, for η > 0 and the largest magnitude of either sign, each [N, 1].

    Code i < 2ᵇ⁻¹ stands for 2^(log2 η + i s₊) − η, code 2ᵇ − j for −(2^(log2 η + j s₋) − η); the scales s are such that
    the last level of a sign is its largest magnitude.
    """
    half = 2 ** (bits - 1)
    up = torch.arange(half, device=eta.device, dtype=eta.dtype)
    down = torch.arange(half, 0, -1, device=eta.device, dtype=eta.dtype)
    above = eta * torch.expm1(up * torch.log1p(positive / eta) / (half - 1))
    below = eta * torch.expm1(down * torch.log1p(negative / eta) / half)
    return torch.cat([above, -below], 1)


def twin_log_encode(
    w: torch.Tensor, eta: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, bits: int
) -> torch.Tensor:
    """Codes uint8 [N, K]: log2(|w| + η) rounded to the steps of its sign; arguments as in `twin_log_levels`."""
    half = 2 ** (bits - 1)
    steps = torch.where(w >= 0, half - 1.0, float(half))
    top = torch.log1p(torch.where(w >= 0, positive, negative) / eta)
    # A sign without a range has one level, zero.
    index = torch.where(top > 0, torch.log1p(w.abs() / eta) / top.clamp(min=1e-30) * steps, 0).round()
    index = torch.minimum(index, steps).long()
    return torch.where(w >= 0, index, (2 * half - index) % (2 * half)).to(torch.uint8)


def round_twin_log(w: torch.Tensor, bits: int) -> TwinLog:
    """The η and the quantile of the grid with the least squared error, for each row of w [N, K].

    Raises ValueError unless b is 2, 3 or 4.
    """
    if bits not in (2, 3, 4):
        raise ValueError(f"codes of {bits} bits; 2, 3 or 4 are needed")
    w = w.float()
    largest = w.abs().amax(1, keepdim=True)
    signs = [torch.where(keep, w.abs(), torch.nan) for keep in (w > 0, w < 0)]
    best_error = w.new_full((len(w), 1), torch.inf)
    best = (torch.ones_like(largest), torch.zeros_like(largest), torch.zeros_like(largest))
    for quantile in QUANTILES:
        up, down = (t.nanquantile(quantile, 1, keepdim=True).nan_to_num(0.0) for t in signs)
        for share in ETAS:
            eta = torch.where(largest > 0, share * largest, 1.0)
            tried = TwinLog(twin_log_encode(w, eta, up, down, bits), twin_log_levels(eta, up, down, bits))
            error = (tried.dequantize() - w).square().sum(1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = (
                torch.where(better, eta, best[0]),
                torch.where(better, up, best[1]),
                torch.where(better, down, best[2]),
            )
    eta, up, down = best
    return TwinLog(twin_log_encode(w, eta, up, down, bits), twin_log_levels(eta, up, down, bits))
