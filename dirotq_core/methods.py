"""Quantization methods as data: transform × weight format × activation formats × rounding.

A new method is a row here, with a transform and a weight format of its own where it brings them; kernels, checkpoints,
the diffusers backend and the ComfyUI nodes read the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .activations import ACTIVATION_FORMATS
from .adaptive import ADAPTIVE_ROTATION
from .codebooks import PackedFormat, WeightFormat, weight_format
from .float4 import NVFP4, NormalFloat4
from .ternary import SVD_BRANCH, Ternary
from .transforms import TRANSFORMS, Transform
from .twin_log import TwinLog

#: Format of weight-only (W4A16) linears that see no transform, such as modulation layers.
WEIGHT_ONLY_FORMAT = "codebook_g64"


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        transform: key of `TRANSFORMS`, or one of the method's own. weight_format: likewise, of `WEIGHT_FORMATS`.
        activations: activation bits → key of `ACTIVATION_FORMATS`; 16 needs no entry.
        rounding: "nearest" or "gptq" when calibrated; without calibration always "nearest".
        rank: default r; None means `high_fraction` of the width.
        basis: how the 16-bit subspace is found, "pca" or "joint".
        needs_calibration: cannot be made without activations.
        modulation_format: key of `WEIGHT_FORMATS` for modulation layers, which see no transform.
        source: where the construction is published.
    """

    transform: str | Transform
    weight_format: str | PackedFormat
    activations: Mapping[int, str]
    rounding: str
    source: str
    rank: int | None = None
    high_fraction: float | None = None
    basis: str = "pca"
    needs_calibration: bool = False
    modulation_format: str = WEIGHT_ONLY_FORMAT

    @property
    def fused(self) -> bool:
        """Whether the fused kernels run it: a kernel transform, one weight scale per row, codes on the int8 lattice."""
        return self.input_transform.kernel and self.weights.lattice

    def default_bits(self, calibrated: bool) -> int:
        """Activation bits where none are asked for: 4, without calibration 8; else the most it has a format for."""
        wanted = 4 if calibrated else 8
        return wanted if wanted in self.activations else max(self.activations, default=16)

    @property
    def gptq(self) -> bool:
        """Whether its weights can be rounded by GPTQ: one table for all."""
        return isinstance(self.weights, WeightFormat)

    @property
    def input_transform(self) -> Transform:
        """What inputs go through."""
        return TRANSFORMS[self.transform] if isinstance(self.transform, str) else self.transform

    @property
    def weights(self) -> PackedFormat:
        """What weights are rounded to."""
        return weight_format(self.weight_format) if isinstance(self.weight_format, str) else self.weight_format


METHODS: dict[str, Method] = {
    "dirotq": Method(
        "subspace_hadamard", "codebook", {4: "int4", 8: "int8"}, "gptq", rank=64, basis="joint",
        source="DiRotQ's subspace (arXiv 2605.16732) without the dense rotation; docs/how-it-works.md",
    ),
    "paper": Method(
        "dense_pca", "int4_g64", {4: "asym_g64", 8: "asym_g64_8"}, "gptq", high_fraction=0.125,
        needs_calibration=True, source="DiRotQ as published, arXiv 2605.16732",
    ),
    "hadamard": Method(
        "subspace_hadamard", "codebook", {4: "codebook", 8: "int8"}, "nearest", rank=0,
        source="randomized block Hadamard, QuaRot (arXiv 2404.00456)",
    ),
    **{
        name: Method(
            "permuted_hadamard", weights, {3: "lloyd3", 4: "codebook", 6: "lloyd6", 8: "int8"}, "nearest", rank=0,
            modulation_format="int4_g64", source=f"OrbitQuant, arXiv 2607.02461, {bits}-bit weights",
        )
        for name, weights, bits in (
            ("orbitquant", "lloyd4", 4), ("orbitquant_w3", "lloyd3", 3), ("orbitquant_w2", "lloyd2", 2),
        )
    },
    **{
        name: Method(
            ADAPTIVE_ROTATION, TwinLog(bits), {b: f"asym_token_{b}" for b in (4, 6, 8)}, "nearest", rank=0,
            source=f"LRQ-DiT, arXiv 2508.03485, {bits}-bit weights",
        )
        for name, bits in (("lrq", 4), ("lrq_w3", 3))
    },
    "svdquant": Method(
        "smooth_svd", "int4_g64", {4: "sym_g64", 8: "sym_g64_8"}, "nearest", rank=32, needs_calibration=True,
        source="SVDQuant, arXiv 2411.05007: smoothing and a low-rank branch; strength fixed at 0.5, not searched",
    ),
    "nunchaku": Method(
        "smooth_svd_input", "int4_g64", {4: "sym_g64", 8: "sym_g64_8"}, "nearest", rank=32, needs_calibration=True,
        modulation_format="uint4_g64", source="SVDQuant, arXiv 2411.05007, in the arithmetic of Nunchaku's files",
    ),
    "robuq": Method(
        SVD_BRANCH, Ternary(), {b: f"uniform_{b}" for b in (1, 2, 3, 4)}, "nearest", rank=16,
        source="RobuQ, arXiv 2509.23582: ternary weights and a 16-bit branch, trained (benchmarks/robuq.py)",
    ),
    "nvfp4": Method(
        "identity", NVFP4(), {4: "nvfp4"}, "nearest", rank=0,
        source="NVIDIA's NVFP4: e2m1 values, e4m3 scales per 16 columns, a float32 scale above them",
    ),
    "nf4": Method("identity", NormalFloat4(), {}, "nearest", rank=0, source="NF4 weights, QLoRA (arXiv 2305.14314)"),
    "rtn": Method(
        "identity", "int4_g64", {4: "sym_g64", 8: "sym_g64_8"}, "nearest", rank=0,
        source="round to nearest, groups of 64 on both sides",
    ),
}  # fmt: skip


def method(name: str) -> Method:
    """The method called `name`; ValueError names the known ones."""
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def check_activation(name: str, method_name: str) -> None:
    """Raise ValueError unless there is an activation format `name` and it can run under the method."""
    if not isinstance(name, str) or name not in ACTIVATION_FORMATS:
        raise ValueError(f"unknown activation_format {name!r}; known: {', '.join(ACTIVATION_FORMATS)}")
    fmt, row = ACTIVATION_FORMATS[name], method(method_name)
    if not (row.fused if fmt.op_mode else row.weights.lattice or not fmt.lattice):
        raise ValueError(
            f"activation_format {name!r} needs one weight scale per row and a Hadamard transform; "
            f"method {method_name!r} has neither or only one of them"
        )
