"""Weight formats of 4-bit floating-point codes: NVFP4, and NF4 (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..kernels import FP4_BLOCK, decode_e2m1, decode_e4m3, nvfp4_scale, quantize_nvfp4, table_like, unpack_int4
from .codebooks import GROUP_SIZE, PackedFormat, Rounded, Scales

#: NF4's levels by code: quantiles of a Gaussian, seven below 0 and eight above it, as shares of the largest.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NVFP4(PackedFormat):
    """e2m1 codes; block_scale uint8 [N, K/16], the bits of e4m3; weight_scale float32 [N].

    The format's one float32 scale for a tensor is stored in each of its rows, so that rows stay independent.
    """

    name: str = "nvfp4"

    @property
    def bits(self) -> int:
        return 4

    def scales(self, in_features: int) -> Scales:
        return {
            "weight_scale": ((), torch.float32),
            "block_scale": ((in_features // FP4_BLOCK,), torch.uint8),
        }

    def values(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        blocks = decode_e4m3(scales["block_scale"].to(codes.device), dtype)
        scale = blocks * scales["weight_scale"].to(codes.device, dtype)[:, None]
        return (decode_e2m1(codes, dtype).unflatten(1, (-1, FP4_BLOCK)) * scale[:, :, None]).flatten(1)

    def nearest(self, w: torch.Tensor, importance: torch.Tensor | None) -> Rounded:
        """One scale for all of w [N, K]: the linears of a site that are quantized together share it."""
        codes, blocks, scale = quantize_nvfp4(w, nvfp4_scale(w.abs().max()).expand(len(w)))
        return Rounded(unpack_int4(codes), scale.clone(), block_scale=blocks)


@dataclass(frozen=True)
class NormalFloat4(PackedFormat):
    """Codes of `NF4`; weight_scale bfloat16 [N, K/64], the largest magnitude of 64 columns."""

    name: str = "nf4"

    @property
    def bits(self) -> int:
        return 4

    def scales(self, in_features: int) -> Scales:
        return {"weight_scale": ((in_features // GROUP_SIZE,), torch.bfloat16)}

    def values(
        self, codes: torch.Tensor, scales: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        levels = table_like(NF4, codes, dtype)[codes.int()].unflatten(1, (-1, GROUP_SIZE))
        return (levels * scales["weight_scale"].to(codes.device, dtype)[:, :, None]).flatten(1)

    def nearest(self, w: torch.Tensor, importance: torch.Tensor | None) -> Rounded:
        groups = w.float().unflatten(1, (-1, GROUP_SIZE))
        # Codes are chosen for the scales that will be used.
        scale = groups.abs().amax(2).bfloat16().float()
        levels = table_like(NF4, w, torch.float32)
        middles = (levels[1:] + levels[:-1]) / 2
        scaled = torch.where(scale > 0, 1 / scale, 0)[:, :, None] * groups
        return Rounded(torch.bucketize(scaled, middles).to(torch.uint8).flatten(1), scale)
