"""Inputs, shapes and comparisons that the kernel tests share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dirotq import kernels
from dirotq.kernels import reference

MODES = ("codebook", "int4", "int8")
PIXART = ((1152, 1152), (1152, 4608), (4608, 1152))
FLUX = ((3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072), (15360, 3072))
TOKENS = (1, 7, 77, 512, 4608)

# Spacing of neighbouring numbers relative to their size: an output may round the other way.
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}


@dataclass
class Site:
    x: Tensor
    basis: Tensor | None
    signs: Tensor | None
    block: int

    @property
    def arguments(self):
        return self.x, self.basis, self.signs, self.block


def site(
    m: int,
    k: int,
    rank: int = 0,
    *,
    block: int = 128,
    signs: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seed: int = 0,
) -> Site:
    """A site whose x has decaying variance, a zero row, a row with one huge value, and strided rows."""
    make = torch.Generator(device).manual_seed(seed)
    x = torch.randn(m, k, generator=make, device=device) * torch.logspace(0.5, -0.5, k, device=device)
    if m > 2:
        x[2] = 0
    if m > 3:
        x[3, k // 3] = 1000.0
    wide = torch.zeros(m, k + 64, dtype=dtype, device=device)
    wide[:, :k] = x.to(dtype)
    basis = None
    if rank:
        basis = torch.linalg.qr(torch.randn(k, rank, generator=make, device=device))[0].bfloat16()
    flips = torch.randint(0, 2, (k,), generator=make, device=device) * 2 - 1
    return Site(wide[:, :k], basis, flips.to(torch.int8) if signs else None, block)


@dataclass
class Weights:
    weight: Tensor
    row_scale: Tensor
    group_scale: Tensor
    low_rank: Tensor | None
    bias: Tensor


def weights(n: int, k: int, rank: int = 0, *, dtype=torch.bfloat16, device="cpu", seed=1) -> Weights:
    make = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    return Weights(
        torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, **make),
        (0.5 + torch.rand(n, **make)) / (36 * k**0.5),
        (0.5 + torch.rand(n, k // 64, **make)) / (36 * k**0.5),
        (torch.randn(n, rank, **make) / k**0.5).bfloat16() if rank else None,
        torch.randn(n, **make).to(dtype),
    )


def lattice(m: int, k: int, device="cpu", seed=2) -> tuple[Tensor, Tensor]:
    """Codes over all of int8, the extremes included, and scales; one row is zero."""
    make = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    codes = torch.randint(-128, 128, (m, k), dtype=torch.int16, **make).to(torch.int8)
    codes[0] = -128
    scale = torch.rand(m, **make) + 0.01
    if m > 2:
        scale[2] = 0
    return codes, scale


def steps_apart(a: Tensor, b: Tensor, mode: str) -> Tensor:
    """How many neighbouring lattice values lie between codes a and b."""
    if mode != "codebook":
        return (a.int() - b.int()).abs()
    entries = torch.tensor(sorted(kernels.CODEBOOK16), device=a.device)
    return (torch.bucketize(a.int(), entries) - torch.bucketize(b.int(), entries)).abs()


def assert_same_quantization(case: Site, mode: str, codes: Tensor, scale: Tensor, z: Tensor) -> None:
    """Against the reference: equal but for roundings near a tie.

    z may round the other way; v, and so the codes, are then judged for the z and the scale that were returned.
    """
    # z cancels over K terms, so its error is relative to the row of x rather than to z.
    size = case.x.float().norm(dim=1, keepdim=True)
    expected_z = reference.project(case.x, case.basis).float()
    assert ((z.float() - expected_z).abs() <= 2**-7 * expected_z.abs() + 1e-5 * size).all()

    wide = case.basis is not None and case.basis.shape[1] > 64 and case.x.dtype == torch.bfloat16 and case.x.is_cuda
    expected_scale = reference.row_scale(case.x.double(), case.basis, mode).float()
    # That of a wide subspace is the energy of v for the rounded z, and its residual has passed through bf16: a row that
    # is one value, nearly, shows all of that value's rounding.
    torch.testing.assert_close(scale, expected_scale, rtol=2**-9 if wide else 1e-4, atol=1e-30)
    v = reference.residual(case.x, z, case.basis, case.signs, case.block)
    expected = reference.quantize(v, scale, mode)
    differing = int((codes != expected).sum())
    # In int4 a step or an offset near a tie moves a group of 64 by a step of at most 17. A kernel for 4-bit modes may
    # hold an operator of the rotation in bf16, which moves v by some 2⁻⁹ of z Uᵀ; the error must not grow by it.
    few, share, step = {"int4": (128, 1e-2, 17), "codebook": (8, 2e-3, 1), "int8": (4, 1e-3, 1)}[mode]
    share = 0.05 if wide else share
    assert differing <= max(few, share * codes.numel()), f"{differing} of {codes.numel()} codes differ"
    assert int(steps_apart(codes, expected, mode).max()) <= step
    error, least = ((scale[:, None] * c - v).norm() for c in (codes, expected))
    assert error <= 1.01 * least


def assert_close(y: Tensor, expected: Tensor) -> None:
    """Equal up to one rounding of the output and the order of fp32 sums."""
    assert y.dtype == expected.dtype and y.shape == expected.shape
    peak = float(expected.float().abs().max())
    torch.testing.assert_close(y, expected, rtol=ULP[y.dtype], atol=1e-5 * max(peak, 1e-20))
