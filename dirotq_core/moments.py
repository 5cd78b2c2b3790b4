"""Streaming second moments of activations, C = E[xᵀx] (DiRotQ, arXiv 2605.16732, section on PCA calibration)."""

from __future__ import annotations

import torch

#: Rows added in one product; bounds the float32 copy of the activations.
CHUNK = 16384


class SecondMoment:
    """Accumulates Σ xᵀx over tokens in float32.

    Args:
        features: K, the width of x.
        diagonal: keep only the diagonal, which is what weight-only layers need.
        device: where the sum is kept; None for the device of the first batch. Products are taken on the batch's own.
    """

    def __init__(self, features: int, diagonal: bool = False, device: torch.device | str | None = None):
        self.features = features
        self.diagonal = diagonal
        self.device = device
        self.tokens = 0
        self._sum: torch.Tensor | None = None

    def update(self, x: torch.Tensor) -> None:
        """Add tokens x [..., K]. Raises ValueError on a wrong width or a non-finite value, before adding."""
        if x.shape[-1] != self.features:
            raise ValueError(f"expected activations of width {self.features}, got {x.shape[-1]}")
        x = x.detach().reshape(-1, self.features)
        part = x.new_zeros(self._shape, dtype=torch.float32)
        for rows in x.split(CHUNK):
            rows = rows.float()
            if self.diagonal:
                part += rows.square().sum(0)
            else:
                part.addmm_(rows.T, rows)
        if not torch.isfinite(part).all():
            raise ValueError("calibration activations hold NaN or infinity; is the model in a dtype it overflows?")
        if self._sum is None:
            self._sum = part.to(self.device or part.device)
        else:
            self._sum += part.to(self._sum.device)
        self.tokens += len(x)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.features,) if self.diagonal else (self.features, self.features)

    def mean(self) -> torch.Tensor:
        """C [K, K] (or its diagonal [K]) in float32. Raises ValueError before any token was seen."""
        if self._sum is None or self.tokens == 0:
            raise ValueError("no calibration tokens were seen")
        return self._sum / self.tokens
