"""Weight formats of 2 to 4 bits: a table of 2ᵇ integers and how its scales are laid out.

A dequantized weight is ``table[code] * scale``. Tables hold integers that int8 represents exactly (the default
one also float8 e4m3), so a checkpoint multiplies exactly on 8-bit tensor cores (docs/how-it-works.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from ..kernels import CODEBOOK16, INT4, pack_bits, pack_int4, unpack_bits, unpack_int4

GROUP_SIZE = 64


@dataclass(frozen=True)
class WeightFormat:
    """One weight format.

    Attributes:
        name: key in `WEIGHT_FORMATS`, stored in checkpoints.
        table: 2ᵇ integers in [-127, 127], b = 2, 3 or 4; code c stands for ``table[c]``.
        rms: the root mean square of the table's values under a unit Gaussian input, in table units: a row of
            standard deviation σ gets scale σ / rms before any search.
        grouped: one scale per row and 64 columns instead of one per row.
        searched: scales are searched by weight error; False takes σ / rms as it is.
    """

    name: str
    table: tuple[int, ...] = field(repr=False)
    rms: float
    grouped: bool
    searched: bool = True

    @property
    def bits(self) -> int:
        """b, the width of a stored code."""
        return (len(self.table) - 1).bit_length()

    @property
    def table16(self) -> list[int]:
        """The table as the ops want it, for codes widened to 4 bits; what no code reaches repeats the table."""
        return list(self.table) * (16 // len(self.table))

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [N, K] at their size, uint8 [N, K·b/8]."""
        return pack_int4(codes) if self.bits == 4 else pack_bits(codes, self.bits)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [N, K] of `packed`."""
        return unpack_int4(packed) if self.bits == 4 else unpack_bits(packed, self.bits)

    def packed_columns(self, in_features: int) -> int:
        """Bytes of a row of `in_features` codes."""
        return in_features * self.bits // 8

    def encode(self, scaled: torch.Tensor) -> torch.Tensor:
        """Codes uint8 of the nearest table entries to `scaled` (any shape, in table units)."""
        midpoints, codes, _ = _decision(self.table, scaled.device)
        return codes[torch.bucketize(scaled.float(), midpoints)]

    def decision(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Midpoints [2ᵇ − 1] between the sorted table entries, and those entries' codes and values [2ᵇ]."""
        return _decision(self.table, device)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Table entries of `codes` (any shape, uint8) as `dtype`, in table units."""
        return torch.tensor(self.table, dtype=dtype, device=codes.device)[codes.long()]

    def scale_columns(self, in_features: int) -> int:
        """How many scales a row of `in_features` columns has."""
        return in_features // GROUP_SIZE if self.grouped else 1

    def expand(self, scale: torch.Tensor, in_features: int) -> torch.Tensor:
        """Scales [N, G] repeated to one per column, [N, in_features]."""
        return scale.repeat_interleave(in_features // scale.shape[1], dim=1)


@lru_cache(maxsize=32)
def _decision(table: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values, codes = torch.tensor(table, dtype=torch.float32, device=device).sort()
    return (values[1:] + values[:-1]) / 2, codes.to(torch.uint8), values


def nearest_entry(table: tuple[int, ...], scaled: torch.Tensor) -> torch.Tensor:
    """The table entries int8 nearest to `scaled` (any shape, in table units)."""
    # Not `_decision`: torch.compile traces this, and would not keep its cache.
    values = torch.tensor(sorted(table), dtype=torch.float32, device=scaled.device)
    midpoints = (values[1:] + values[:-1]) / 2
    return values.to(torch.int8)[torch.bucketize(scaled, midpoints)]


def symmetric(*magnitudes: int) -> tuple[int, ...]:
    """The table ±magnitudes: the highest bit of a code is the sign."""
    return magnitudes + tuple(-m for m in magnitudes)


WEIGHT_FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        # ±{4, 13, 22, 32, 44, 56, 72, 96} / 36: within 0.05 dB of Lloyd-Max on a Gaussian.
        WeightFormat("codebook", tuple(CODEBOOK16), 36.0, grouped=False),
        WeightFormat("codebook_g64", tuple(CODEBOOK16), 36.0, grouped=True),
        # Two's complement −8..7, as integer GEMMs and the published checkpoints have it.
        WeightFormat("int4_g64", tuple(INT4), 7 / 2.6, grouped=True),
        # AWQ's unsigned codes with the zero point 7, as Nunchaku's modulation layers have them.
        WeightFormat("uint4_g64", tuple(range(-7, 9)), 7 / 2.6, grouped=True),
        # Lloyd-Max on a Gaussian, rounded to integers that float8 e4m3 holds too, at the rms where that costs least:
        # 0.03, 0.005 and 0.00002 dB. The row's norm is its scale (OrbitQuant, arXiv 2607.02461).
        WeightFormat("lloyd4", tuple(CODEBOOK16), 34.79, grouped=False, searched=False),
        WeightFormat("lloyd3", symmetric(6, 18, 32, 52), 24.08, grouped=False, searched=False),
        WeightFormat("lloyd2", symmetric(36, 120), 79.45, grouped=False, searched=False),
    )
}


def weight_format(name: str) -> WeightFormat:
    """The format called `name`; ValueError names the known ones."""
    if name not in WEIGHT_FORMATS:
        raise ValueError(f"unknown weight format {name!r}; known: {', '.join(WEIGHT_FORMATS)}")
    return WEIGHT_FORMATS[name]
