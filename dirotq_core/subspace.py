"""Orthonormal bases of the 16-bit subspace."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

#: Published damping of the covariance, relative to its mean diagonal (DiRotQ code and paper).
COVARIANCE_DAMPING = 0.01
#: Widths up to which eigenvectors are found by eigh.
EXACT_WIDTH = 4096
#: Rounds of subspace iteration at most; steep spectra need about ten.
ITERATIONS = 60


def eigenvectors_ascending(moment: torch.Tensor) -> torch.Tensor:
    """V [K, K] of C + 0.01·mean(diag C)·I = V Λ Vᵀ, eigenvalues ascending, in float64."""
    c = moment.double()
    damping = COVARIANCE_DAMPING * c.diagonal().mean()
    return torch.linalg.eigh((c + c.T) / 2 + damping * torch.eye(len(c), dtype=c.dtype, device=c.device))[1]


def top_eigenvectors(matrix: torch.Tensor, rank: int, start: torch.Tensor | None = None) -> torch.Tensor:
    """An orthonormal basis U [K, r] of the top-`rank` eigenvectors of a symmetric, positive matrix [K, K].

    Small or nearly full problems are solved by eigh in float64. The others take subspace iteration with Rayleigh–Ritz
    (Halko, Martinsson, Tropp, arXiv 0909.4061) on twice the columns, until another round gains less than 1e-7 of the
    captured trace: eigh of one float64 matrix of FLUX.1's width 15360 takes minutes on a data-centre GPU.

    Args:
        start: [K, ≤ 2r], where to begin; random directions fill it up.
    """
    k = len(matrix)
    if k <= EXACT_WIDTH or 8 * rank >= k:
        return torch.linalg.eigh(matrix.double())[1][:, k - rank :]
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(k, 2 * rank, generator=generator, dtype=torch.float64).to(matrix.device, matrix.dtype)
    if start is not None:
        block[:, : start.shape[1]] = start.to(block)
    q = torch.linalg.qr(block)[0]
    captured = 0.0
    for _ in range(ITERATIONS):
        image = matrix @ q
        values, vectors = torch.linalg.eigh((q.T @ image).double())
        gained, captured = float(values[-rank:].sum()) - captured, float(values[-rank:].sum())
        u = q @ vectors[:, -rank:].to(q.dtype)
        if gained <= 1e-7 * captured:
            break
        q = torch.linalg.qr(image)[0]
    return u.double()


def pca_basis(moment: torch.Tensor, rank: int) -> torch.Tensor:
    """Top-`rank` eigenvectors U [K, r] of C [K, K], float64 (DiRotQ, the high-variance directions).

    The published damping of C shifts all eigenvalues alike and leaves its eigenvectors as they are.
    """
    return top_eigenvectors((moment + moment.T) / 2, rank)


def joint_basis(moment: torch.Tensor, weights: Sequence[torch.Tensor], rank: int, iterations: int = 20) -> torch.Tensor:
    """The subspace that minimizes E‖v‖²·‖W_res‖², U [K, r], float64.

    Activation and weight error of the residual are both proportional to that product, so its minimizer serves
    both. With P = I − UUᵀ it is tr(PC)·tr(PG), G = Σ WᵀW over the siblings. Its logarithm is concave in P, hence
    replacing it by its tangent, U ← top-r eigenvectors of C / tr(PC) + G / tr(PG), never increases it.

    Args:
        moment: C [K, K]. weights: the siblings' W [N, K]. rank: r.
    """
    # float64 has 1/64 of the speed on consumer GPUs; the wide sites are where that would hurt, and eigh is not used.
    c = moment.double() if len(moment) <= EXACT_WIDTH else moment.float()
    c = (c + c.T) / 2
    g = torch.zeros_like(c)
    for w in weights:
        w = w.to(c)
        g.addmm_(w.T, w)
    u = pca_basis(c, rank)
    previous = float("inf")
    for _ in range(iterations):
        c_res, g_res = _residual(c, u), _residual(g, u)
        objective = math.log(c_res) + math.log(g_res)
        if previous - objective < 1e-6:
            break
        previous = objective
        u = top_eigenvectors(c / c_res + g / g_res, rank, start=u)
    return u


def _residual(matrix: torch.Tensor, u: torch.Tensor) -> float:
    """tr(PA) for the symmetric A [K, K] and P = I − UUᵀ."""
    inside = (u * (matrix @ u.to(matrix.dtype))).sum(dtype=torch.float64)
    return max(float(matrix.diagonal().double().sum() - inside), 1e-30)


def captured_energy(moment: torch.Tensor, basis: torch.Tensor) -> float:
    """Share of the activations' energy inside the basis, tr(UᵀCU) / tr(C), in [0, 1]."""
    u = basis.to(moment.device, torch.float64)
    inside = (u * (moment @ u.to(moment.dtype))).sum(dtype=torch.float64)
    return float(inside / moment.diagonal().double().sum().clamp(min=1e-300))
