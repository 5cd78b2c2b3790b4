"""Weight formats of 2 to 4 bits: codes, what scales them, and how both are stored.

A dequantized weight of most is ``table[code] * scale``. Their tables hold integers that int8 represents exactly (the
default one also float8 e4m3), so a checkpoint multiplies exactly on 8-bit tensor cores (docs/how-it-works.md). Formats
of another kind are dequantized before a product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import torch

from ..kernels import CODEBOOK16, INT4, lasting, pack_bits, pack_int4, table_like, unpack_bits, unpack_int4, widen

GROUP_SIZE = 64
#: Candidate factors on the initial scale, tried in `WeightFormat.search_scales`.
SCALE_FACTORS = tuple(0.60 + 0.06 * i for i in range(16))


#: Tensor of a linear → (shape after the rows, dtype).
Scales = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Rounded:
    """Weights of N rows in some format.

    Attributes:
        codes: uint8 [N, K]. scale: float32 [N, …], the format's `weight_scale`. block_scale: uint8 [N, …], or None.
        fallback: why GPTQ was not used or had to be damped more.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    fallback: str | None = None
    block_scale: torch.Tensor | None = None

    @property
    def scales(self) -> dict[str, torch.Tensor]:
        """Scales by the names of `PackedFormat.scales`."""
        blocks = {} if self.block_scale is None else {"block_scale": self.block_scale}
        return {"weight_scale": self.scale, **blocks}


class PackedFormat(ABC):
    """Weights as codes of b bits, packed row by row, and scales; rows are independent."""

    name: str

    @property
    @abstractmethod
    def bits(self) -> int:
        """b, the width of a stored code."""

    @property
    def label(self) -> str:
        """b as a scheme like W4A4 names it."""
        return str(self.bits)

    @property
    def table16(self) -> list[int] | None:
        """16 integers by 4-bit code, as the ops want them; None where no op multiplies the format."""
        return None

    @property
    def lattice(self) -> bool:
        """Whether the 8-bit product serves it: integers, and one scale a row."""
        return False

    @abstractmethod
    def scales(self, in_features: int) -> Scales:
        """The tensors that scale rows of `in_features` codes."""

    @abstractmethod
    def values(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Ŵ [N, K] of codes uint8 [N, K] and the tensors of `scales`, computed in `dtype`."""

    @abstractmethod
    def nearest(self, w: torch.Tensor, importance: torch.Tensor | None) -> Rounded:
        """w [N, K] rounded to nearest; importance h [K] weighs columns where scales are searched, None for alike."""

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [N, K] at their size, uint8 [N, K·b/8]."""
        return pack_int4(codes) if self.bits == 4 else pack_bits(codes, self.bits)

    def unpack(self, packed: torch.Tensor, in_features: int) -> torch.Tensor:
        """Codes uint8 [N, K] of `packed`."""
        return unpack_int4(packed) if self.bits == 4 else unpack_bits(packed, self.bits)

    def packed_columns(self, in_features: int) -> int:
        """Bytes of a row of `in_features` codes."""
        return in_features * self.bits // 8

    def widened(self, packed: torch.Tensor, in_features: int) -> torch.Tensor:
        """The codes in the ops' layout, uint8 [N, K/2]."""
        return widen(packed, self.bits)


@dataclass(frozen=True)
class WeightFormat(PackedFormat):
    """A table of integers.

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

    @property
    def lattice(self) -> bool:
        return not self.grouped

    def scales(self, in_features: int) -> Scales:
        if self.grouped:  # many: 16 bit
            return {"weight_scale": ((self.scale_columns(in_features),), torch.bfloat16)}
        return {"weight_scale": ((), torch.float32)}  # one a row, times an exact integer sum: 32 bit

    def values(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        scale = scales["weight_scale"].to(codes.device, dtype).reshape(len(codes), -1)
        return self.decode(codes, dtype) * self.expand(scale, codes.shape[1])

    def nearest(self, w: torch.Tensor, importance: torch.Tensor | None) -> Rounded:
        scale = self.search_scales(w, importance)
        return Rounded(self.encode(_divide(w.float(), self.expand(scale, w.shape[1]))), scale)

    def search_scales(self, w: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
        """Scales [N, G] float32 that minimize Σ_k h_k (w_k − ŵ_k)² per row (and group) over a grid of factors.

        A format whose scales are not searched has those of its rms.

        Args:
            w: [N, K]. importance: h [K], the second moment's diagonal, or None for equal weights.
        """
        n, k = w.shape
        groups = self.scale_columns(k)
        w = w.float().reshape(n, groups, -1)
        h = w.new_ones(1) if importance is None else importance.to(w.device, torch.float32).reshape(1, groups, -1)
        # Where the calibration says nothing (a dead group) or nothing usable, all columns count alike.
        said = h.sum(-1, keepdim=True)
        h = torch.where((said > 0) & torch.isfinite(said), h, 1.0)
        start = w.square().mean(-1, keepdim=True).sqrt() / self.rms
        best_scale, best_error = start, torch.full_like(start, torch.inf)
        for factor in SCALE_FACTORS if self.searched else ():
            scale = start * factor
            error = (self._rounded(_divide(w, scale)) * scale - w).square().mul_(h).sum(-1, keepdim=True)
            better = error < best_error
            best_scale, best_error = (
                torch.where(better, scale, best_scale),
                torch.where(better, error, best_error),
            )
        best_scale = best_scale.squeeze(-1)
        # Grouped scales are stored in bfloat16; codes must be chosen for the scales that will be used.
        return best_scale.bfloat16().float() if self.grouped else best_scale

    def encode(self, scaled: torch.Tensor) -> torch.Tensor:
        """Codes uint8 of the nearest table entries to `scaled` (any shape, in table units)."""
        values = tuple(sorted(self.table))
        return _of_nearest(values, tuple(self.table.index(v) for v in values), scaled.float(), torch.uint8)

    def _rounded(self, scaled: torch.Tensor) -> torch.Tensor:
        """The nearest table entries themselves, float32."""
        values = tuple(sorted(self.table))
        return _of_nearest(values, values, scaled, torch.float32)

    def decision(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Midpoints [2ᵇ − 1] between the sorted table entries, and those entries' codes and values [2ᵇ].

        On the device of `like`; not to be written to.
        """
        values = tuple(sorted(self.table))
        codes = tuple(self.table.index(v) for v in values)
        return (
            table_like(_midpoints(values), like, torch.float32),
            table_like(codes, like, torch.uint8),
            table_like(values, like, torch.float32),
        )

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Table entries of `codes` (any shape, uint8) as `dtype`, in table units."""
        return table_like(self.table, codes, dtype)[codes.long()]

    def scale_columns(self, in_features: int) -> int:
        """How many scales a row of `in_features` columns has."""
        return in_features // GROUP_SIZE if self.grouped else 1

    def expand(self, scale: torch.Tensor, in_features: int) -> torch.Tensor:
        """Scales [N, G] repeated to one per column, [N, in_features]."""
        return scale.repeat_interleave(in_features // scale.shape[1], dim=1)


def _divide(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # An all-zero row has scale zero; its codes must still be finite.
    return torch.where(scale > 0, w / scale, torch.zeros_like(w))


def _midpoints(values: tuple[int, ...]) -> tuple[float, ...]:
    return tuple((a + b) / 2 for a, b in pairwise(values))  # halves: float32 holds them


def _of_nearest(
    values: tuple[int, ...], entries: tuple[int, ...], scaled: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """For each of `scaled` (any shape, float32) the one of `entries` that belongs to the nearest of sorted `values`."""
    if scaled.device.type != "cpu" or not lasting(scaled):
        places = torch.bucketize(scaled, table_like(_midpoints(values), scaled, torch.float32))
        return table_like(entries, scaled, dtype)[places]
    # A search for each number takes a CPU ten times as long. Midpoints are halves: of x only ⌈2 x⌉ counts.
    doubled = scaled.mul(2).ceil_().clamp_(-_FARTHEST, _FARTHEST).nan_to_num_(_FARTHEST).add_(_FARTHEST)
    looked_up = table_like(_by_doubled(values, entries), scaled, dtype)
    return looked_up.index_select(0, doubled.flatten().int()).reshape(scaled.shape)


#: ⌈2 x⌉ beyond which no midpoint of integers in [-127, 127] lies.
_FARTHEST = 256


@cache
def _by_doubled(values: tuple[int, ...], entries: tuple[int, ...]) -> tuple[int, ...]:
    """`_of_nearest` for ⌈2 x⌉ = -256, …, 256."""
    doubled = [a + b for a, b in pairwise(values)]
    return tuple(entries[bisect_left(doubled, number)] for number in range(-_FARTHEST, _FARTHEST + 1))


def nearest_entry(table: tuple[int, ...], scaled: torch.Tensor) -> torch.Tensor:
    """The table entries int8 nearest to `scaled` (any shape, float32, in table units)."""
    values = tuple(sorted(table))
    return _of_nearest(values, values, scaled, torch.int8)


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
