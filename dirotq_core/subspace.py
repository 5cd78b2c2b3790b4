"""Orthonormal bases of the 16-bit subspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

#: Published damping of the covariance, relative to its mean diagonal (DiRotQ code and paper).
COVARIANCE_DAMPING = 0.01
#: Widths up to which eigenvectors are found by eigh, in float64.
EXACT_WIDTH = 1024
#: Where a wide site's joint basis stops: a gain, in the logarithm of the error, far below what a decibel shows.
IMPLICIT_TOLERANCE = 1e-4
#: Rounds of subspace iteration at most; steep spectra need about ten.
ITERATIONS = 60


def eigenvectors_ascending(moment: torch.Tensor) -> torch.Tensor:
    """V [K, K] of C + 0.01·mean(diag C)·I = V Λ Vᵀ, eigenvalues ascending, in float64."""
    c = moment.double()
    damping = COVARIANCE_DAMPING * c.diagonal().mean()
    return torch.linalg.eigh((c + c.T) / 2 + damping * torch.eye(len(c), dtype=c.dtype, device=c.device))[1]


def _exact(width: int, rank: int) -> bool:
    return width <= EXACT_WIDTH or 8 * rank >= width


def top_eigenvectors(matrix: torch.Tensor, rank: int, start: torch.Tensor | None = None) -> torch.Tensor:
    """An orthonormal basis U [K, r] of the top-`rank` eigenvectors of a symmetric, positive matrix [K, K].

    Small or nearly full problems are solved by eigh in float64, the others by `iterate_subspace` in the matrix's dtype.
    """
    k = len(matrix)
    if _exact(k, rank):
        return torch.linalg.eigh(matrix.double())[1][:, k - rank :]
    return iterate_subspace(lambda q: matrix @ q, matrix.new_empty(k, 0), rank, start)


def iterate_subspace(
    product: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor, rank: int, start: torch.Tensor | None = None,
    tolerance: float = 1e-7,
) -> torch.Tensor:  # fmt: skip
    """The top-`rank` eigenvectors U [K, r], float64, of the symmetric positive A that `product(q)` = A q applies.

    Subspace iteration with Rayleigh–Ritz (Halko, Martinsson, Tropp, arXiv 0909.4061) on twice the columns, until
    another round gains less than `tolerance` of the captured trace: eigh of one float64 matrix of FLUX.1's width 15360
    takes minutes on a data-centre GPU.

    Args:
        like: an empty tensor [K, 0] with the dtype and the device to compute in.
        start: [K, ≤ 2r], where to begin; random directions fill it up.
    """
    return _ritz(product, _start(like, rank, start), rank, tolerance)[:, -rank:].double()


def _start(like: torch.Tensor, rank: int, start: torch.Tensor | None = None) -> torch.Tensor:
    """2r directions [K, 2r]: those of `start`, filled up with random ones."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(like), 2 * rank, generator=generator, dtype=torch.float64).to(like)
    if start is not None:
        block[:, : start.shape[1]] = start.to(block)
    return block


def _ritz(
    product: Callable[[torch.Tensor], torch.Tensor], block: torch.Tensor, rank: int, tolerance: float
) -> torch.Tensor:
    """All Ritz vectors [K, 2r], ascending; the last r are the answer, the others a good start for a similar matrix."""
    q = torch.linalg.qr(block)[0]
    captured = 0.0
    for _ in range(ITERATIONS):
        image = product(q)
        # Small, and LAPACK is faster at it than a GPU.
        values, vectors = torch.linalg.eigh((q.T @ image).cpu().double())
        gained, captured = float(values[-rank:].sum()) - captured, float(values[-rank:].sum())
        if gained <= tolerance * captured:
            break
        q = torch.linalg.qr(image)[0]
    return q @ vectors.to(q)


def pca_basis(moment: torch.Tensor, rank: int) -> torch.Tensor:
    """Top-`rank` eigenvectors U [K, r] of C [K, K], float64 (DiRotQ, the high-variance directions).

    The published damping of C shifts all eigenvalues alike and leaves its eigenvectors as they are.
    """
    if _exact(len(moment), rank):
        moment = (moment + moment.T) / 2  # wide ones would need the memory twice, for a difference in the last bit
    return top_eigenvectors(moment, rank)


def joint_basis(moment: torch.Tensor, weights: Sequence[torch.Tensor], rank: int, iterations: int = 20) -> torch.Tensor:
    """The subspace that minimizes E‖v‖²·‖W_res‖², U [K, r], float64.

    Activation and weight error of the residual are both proportional to that product, so its minimizer serves
    both. With P = I − UUᵀ it is tr(PC)·tr(PG), G = Σ WᵀW over the siblings. Its logarithm is concave in P, hence
    replacing it by its tangent, U ← top-r eigenvectors of C / tr(PC) + G / tr(PG), never increases it.

    Args:
        moment: C [K, K]. weights: the siblings' W [N, K]. rank: r.
    """
    find = _exact_pair if _exact(len(moment), rank) else _implicit_pair
    (c, c_trace), (g, g_trace), top = find(moment, weights, rank)
    u = pca_basis(moment.double() if find is _exact_pair else moment, rank)
    previous = float("inf")
    for _ in range(iterations):
        c_res, g_res = _residual(c, c_trace, u), _residual(g, g_trace, u)
        objective = math.log(c_res) + math.log(g_res)
        if previous - objective < 1e-6:
            break
        previous = objective
        u = top(c_res, g_res, u)
    return u


#: q ↦ A q, and tr(A).
_Operator = tuple[Callable[[torch.Tensor], torch.Tensor], float]
#: (c_res, g_res, U) ↦ the top eigenvectors of C / c_res + G / g_res.
_Top = Callable[[float, float, torch.Tensor], torch.Tensor]


def _exact_pair(moment: torch.Tensor, weights: Sequence[torch.Tensor], rank: int) -> tuple[_Operator, _Operator, _Top]:
    """C and G as matrices, in float64."""
    c = moment.double()
    c = (c + c.T) / 2
    g = torch.zeros_like(c)
    for w in weights:
        w = w.to(c)
        g.addmm_(w.T, w)

    def top(c_res: float, g_res: float, u: torch.Tensor) -> torch.Tensor:
        return top_eigenvectors(c / c_res + g / g_res, rank, start=u)

    return (lambda q: c @ q, float(c.diagonal().sum())), (lambda q: g @ q, float(g.diagonal().sum())), top


def _implicit_pair(
    moment: torch.Tensor, weights: Sequence[torch.Tensor], rank: int
) -> tuple[_Operator, _Operator, _Top]:
    """C as it is and G as a product of factors, in float32: no second matrix of C's size, no slow float64."""
    c = moment.float()
    factors = [w.to(c) for w in weights]

    def c_product(q: torch.Tensor) -> torch.Tensor:
        return c @ q.to(c)

    def g_product(q: torch.Tensor) -> torch.Tensor:
        q = q.to(c)
        return torch.stack([w.T @ (w @ q) for w in factors]).sum(0)

    def top(c_res: float, g_res: float, u: torch.Tensor) -> torch.Tensor:
        return iterate_subspace(
            lambda q: c_product(q) / c_res + g_product(q) / g_res, c.new_empty(len(c), 0), rank, start=u
        )

    g_trace = sum(float(w.square().sum(dtype=torch.float64)) for w in factors)
    return (c_product, float(c.diagonal().sum(dtype=torch.float64))), (g_product, g_trace), top


def _residual(product: Callable[[torch.Tensor], torch.Tensor], trace: float, u: torch.Tensor) -> float:
    """tr(PA) for the symmetric A and P = I − UUᵀ."""
    inside = float((u * product(u)).sum(dtype=torch.float64))
    return max(trace - inside, 1e-30)


def captured_energy(moment: torch.Tensor, basis: torch.Tensor) -> float:
    """Share of the activations' energy inside the basis, tr(UᵀCU) / tr(C), in [0, 1]."""
    u = basis.to(moment.device, torch.float64)
    inside = (u * (moment @ u.to(moment.dtype))).sum(dtype=torch.float64)
    return float(inside / moment.diagonal().double().sum().clamp(min=1e-300))
