"""RobuQ's parts that a checkpoint has (arXiv 2509.23582): ternary weights, and a 16-bit branch from the SVD.

y = v̂ Ŵ_resᵀ + z Lᵀ + b with v = x D H, z = x U, Ŵ_res = γ · {−1, 0, 1}: U the leading right singular vectors of a
site's weights, L = W U, γ the mean magnitude of a row of W_res = (W − L Uᵀ) D H. Training starts from there
(`ternary_training`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..kernels import TRITS, block_hadamard, pack_trits, unpack_trits, widen_trits
from .codebooks import WeightFormat
from .transforms import SiteStatistics, Tensors, Transform, hadamard_block, random_signs


@dataclass(frozen=True)
class Ternary(WeightFormat):
    """−1, 0 and 1 times the mean magnitude of a row; five to a byte, 1.6 bits each (1.58 in name)."""

    name: str = "ternary"
    table: tuple[int, ...] = field(default=(0, 1, -1), repr=False)
    rms: float = 1.0
    grouped: bool = False
    searched: bool = False

    @property
    def label(self) -> str:
        return "1.58"

    @property
    def table16(self) -> list[int]:
        return [*self.table, *[0] * 5] * 2  # halves alike: such a table Hopper's kernel expands in the product

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        return pack_trits(codes)

    def unpack(self, packed: torch.Tensor, in_features: int) -> torch.Tensor:
        return unpack_trits(packed, in_features)

    def packed_columns(self, in_features: int) -> int:
        return -(-in_features // TRITS)

    def widened(self, packed: torch.Tensor, in_features: int) -> torch.Tensor:
        return widen_trits(packed, in_features)

    def search_scales(self, w: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """γ = mean|w| of each row, float32 [N, 1]; nothing is searched."""
        return w.float().abs().mean(1, keepdim=True)


def rotate(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """x D H of rows [M, K] in x's dtype, computed in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    return block_hadamard(wide * signs.to(x.device, wide.dtype), hadamard_block(x.shape[1])).to(x.dtype)


def _prepare(s: SiteStatistics) -> Tensors:
    tensors = {"signs": random_signs(s.features, s.seed)}
    if s.rank:
        w = torch.cat([w.double() for w in s.weights])
        right = torch.linalg.eigh(w.T @ w)[1]  # right singular vectors, ascending
        tensors["basis"] = right[:, s.features - s.rank :].to(torch.bfloat16)
    return tensors


def _apply(x: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    v = rotate(x, t["signs"])
    return v, x @ t["basis"].to(x.device, x.dtype) if "basis" in t else x.new_zeros(len(x), 0)


def _fold(w: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    if "basis" not in t:
        return rotate(w, t["signs"]), w.new_zeros(len(w), 0)
    u = t["basis"].to(w.device, w.dtype)
    low_rank = torch.linalg.solve(u.T @ u, (w @ u).T).T  # exact for the basis as stored, which is not quite orthonormal
    return rotate(w - low_rank @ u.T, t["signs"]), low_rank


SVD_BRANCH = Transform(
    _prepare, _apply, _fold,
    shapes=lambda k, r: {"signs": (k,), **({"basis": (k, r)} if r else {})},
    low_features=lambda k, r: k, kernel=False, subspace=True,
)  # fmt: skip
