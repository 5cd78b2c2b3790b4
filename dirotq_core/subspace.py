"""Orthonormal bases of the 16-bit subspace."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Published damping of the covariance, relative to its mean diagonal (DiRotQ code and paper).
COVARIANCE_DAMPING = 0.01


def eigenvectors_ascending(moment: torch.Tensor) -> torch.Tensor:
    """V [K, K] of C + 0.01·mean(diag C)·I = V Λ Vᵀ, eigenvalues ascending, in float64."""
    c = moment.double()
    damping = COVARIANCE_DAMPING * c.diagonal().mean()
    return torch.linalg.eigh((c + c.T) / 2 + damping * torch.eye(len(c), dtype=c.dtype, device=c.device))[1]


def pca_basis(moment: torch.Tensor, rank: int) -> torch.Tensor:
    """Top-`rank` eigenvectors U [K, r] of C [K, K], float64 (DiRotQ, the high-variance directions)."""
    return eigenvectors_ascending(moment)[:, moment.shape[0] - rank :]


def joint_basis(moment: torch.Tensor, weights: Sequence[torch.Tensor], rank: int, iterations: int = 20) -> torch.Tensor:
    """The subspace that minimizes E‖v‖²·‖W_res‖², U [K, r], float64.

    Activation and weight error of the residual are both proportional to that product, so its minimizer serves
    both. With P = I − UUᵀ it is tr(PC)·tr(PG), G = Σ WᵀW over the siblings. Its logarithm is concave in P, hence
    replacing it by its tangent, U ← top-r eigenvectors of C / tr(PC) + G / tr(PG), never increases it.

    Args:
        moment: C [K, K]. weights: the siblings' W [N, K]. rank: r.
    """
    c = moment.double()
    g = torch.zeros_like(c)
    for w in weights:
        w = w.to(c.device, torch.float64)
        g += w.T @ w
    u = pca_basis(moment, rank)
    previous = float("inf")
    for _ in range(iterations):
        c_res = (c.trace() - (u.T @ c @ u).trace()).clamp(min=1e-30)
        g_res = (g.trace() - (u.T @ g @ u).trace()).clamp(min=1e-30)
        objective = float(c_res.log() + g_res.log())
        if previous - objective < 1e-6:
            break
        previous = objective
        u = torch.linalg.eigh(c / c_res + g / g_res)[1][:, len(c) - rank :]
    return u


def captured_energy(moment: torch.Tensor, basis: torch.Tensor) -> float:
    """Share of the activations' energy inside the basis, tr(UᵀCU) / tr(C), in [0, 1]."""
    u = basis.to(moment.device, torch.float64)
    c = moment.double()
    return float((u.T @ c @ u).trace() / c.trace().clamp(min=1e-300))
