"""Twin-Log Quantization of weights (LRQ-DiT, arXiv 2508.03485): uniform steps of log2(|w| + η), a scale for each sign.

A row has 2ᵇ levels: zero, 2ᵇ⁻¹ − 1 positive ones and 2ᵇ⁻¹ negative ones. Counted with zero on either side these are the
paper's 2ᵇ⁻¹ and 2ᵇ⁻¹ + 1; the zero point of both signs is log2 η, so that they share it and a code has b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .codebooks import PackedFormat, Rounded, Scales

#: η as a share of a row's largest weight, and the quantiles of |w| that a sign's levels reach: the search's grid.
ETAS = tuple(2.0**-i for i in range(9))
QUANTILES = (1.0, 0.999, 0.995, 0.99, 0.98, 0.96)
#: Weights that are searched at a time: a bound on memory, and below what torch takes a quantile of.
CHUNK = 2**22


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


def search_twin_log(w: torch.Tensor, bits: int) -> torch.Tensor:
    """η and the largest positive and negative magnitude of each row, float32 [N, 3]: the grid's least squared error.

    w [N, K] float32. η is common to both signs; the quantile that the levels reach is searched for each sign alone.
    """
    largest = w.abs().amax(1, keepdim=True)
    sides = (w > 0, w < 0)
    magnitudes = [torch.where(side, w.abs(), torch.nan) for side in sides]
    tops = torch.stack([
        torch.cat([m.nanquantile(q, 1, keepdim=True).nan_to_num(0.0) for m in magnitudes], 1) for q in QUANTILES
    ])  # [quantiles, N, 2]  # fmt: skip
    best, best_error = w.new_zeros(len(w), 3), w.new_full((len(w),), torch.inf)
    for share in ETAS:
        eta = torch.where(largest > 0, share * largest, 1.0)
        errors = torch.stack([_errors(w, eta, up_down, bits, sides) for up_down in tops])
        chosen = errors.argmin(0, keepdim=True)  # one for each sign
        error = errors.gather(0, chosen).sum((0, 2))
        tried = torch.cat([eta, tops.gather(0, chosen)[0]], 1)
        best = torch.where((error < best_error)[:, None], tried, best)
        best_error = torch.minimum(error, best_error)
    return best


def _errors(
    w: torch.Tensor, eta: torch.Tensor, tops: torch.Tensor, bits: int, sides: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Squared error of the positive and of the negative weights of each row, [N, 2]."""
    up, down = tops.split(1, 1)
    codes = twin_log_encode(w, eta, up, down, bits)
    error = (twin_log_levels(eta, up, down, bits).gather(1, codes.long()) - w).square()
    return torch.stack([(error * side).sum(1) for side in sides], 1)


@dataclass(frozen=True)
class TwinLog(PackedFormat):
    """Codes of 2, 3 or 4 bits; weight_scale float32 [N, 3] holds η and the largest magnitudes w₊, w₋ of each row.

    The paper's scales and zero points follow: s± = (log2(w± + η) − log2 η) / n± with n₊ = 2ᵇ⁻¹ − 1, n₋ = 2ᵇ⁻¹, and
    z = log2 η. Raises ValueError for other widths.
    """

    width: int

    def __post_init__(self) -> None:
        if self.width not in (2, 3, 4):
            raise ValueError(f"codes of {self.width} bits; 2, 3 or 4 are needed")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"twin-log {self.width}-bit"

    @property
    def bits(self) -> int:
        return self.width

    def scales(self, in_features: int) -> Scales:
        return {"weight_scale": ((3,), torch.float32)}

    def values(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        eta, up, down = scales["weight_scale"].to(codes.device, dtype).split(1, 1)
        levels = twin_log_levels(torch.where(eta > 0, eta, 1), up, down, self.width)
        return levels.gather(1, codes.long())

    def nearest(self, w: torch.Tensor, importance: torch.Tensor | None) -> Rounded:
        """The grid's best for each row; columns count alike, as in the paper."""
        codes, scales = [], []
        for rows in w.float().split(max(1, CHUNK // w.shape[1])):
            found = search_twin_log(rows, self.width)
            eta, up, down = found.split(1, 1)
            codes.append(twin_log_encode(rows, eta, up, down, self.width))
            scales.append(found)
        return Rounded(torch.cat(codes), torch.cat(scales))
