"""Orthonormal bases of the 16-bit subspace."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import torch

#: Published damping of the covariance, relative to its mean diagonal (DiRotQ code and paper).
COVARIANCE_DAMPING = 0.01
#: Widths up to which eigenvectors are found by eigh, in float64.
EXACT_WIDTH = 1024
#: Where iteration stops: a round that lowers what is outside of the subspace by less than this share (0.0001 dB).
TOLERANCE = 2e-5
#: The same for the joint objective from tangent to tangent.
TANGENT_TOLERANCE = 1e-4
#: Rounds of subspace iteration at most; steep spectra need about five.
ITERATIONS = 30
#: Rounds on one tangent of the joint objective, before the next tangent is taken.
TANGENT_ITERATIONS = 3
#: Widest projected problem that is solved on the host, on one thread: more of them, or a GPU, spend their time waiting.
SMALL = 512
_ONE_THREAD = threading.Lock()


def eigenvectors_ascending(moment: torch.Tensor) -> torch.Tensor:
    """V [K, K] of C + 0.01·mean(diag C)·I = V Λ Vᵀ, eigenvalues ascending, in float64."""
    c = moment.double()
    damping = COVARIANCE_DAMPING * c.diagonal().mean()
    return torch.linalg.eigh((c + c.T) / 2 + damping * torch.eye(len(c), dtype=c.dtype, device=c.device))[1]


def _exact(width: int, rank: int) -> bool:
    return width <= EXACT_WIDTH or 3 * rank >= width


def top_eigenvectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """An orthonormal basis U [K, r] of the top-`rank` eigenvectors of a symmetric, positive matrix [K, K], float64.

    Small or nearly full problems are solved by eigh in float64, the others by subspace iteration in the matrix's dtype.
    """
    k = len(matrix)
    if _exact(k, rank):
        return torch.linalg.eigh(matrix.double())[1][:, k - rank :]
    start, trace = random_directions(matrix, rank), float(matrix.diagonal().sum(dtype=torch.float64))
    return iterate_subspace(lambda q: matrix @ q, start, rank, trace, ITERATIONS)[:, -rank:].double()


def random_directions(like: torch.Tensor, rank: int) -> torch.Tensor:
    """Where iteration begins: r columns and some more [K, > r] with the dtype and device of `like` [K, …]."""
    generator = torch.Generator().manual_seed(0)
    columns = min(len(like), rank + max(64, rank // 4))
    return torch.randn(len(like), columns, generator=generator, dtype=torch.float64).to(like)


def iterate_subspace(
    product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, rank: int, trace: float, iterations: int
) -> torch.Tensor:
    """All Ritz vectors [K, columns of `start`], ascending, of the symmetric positive A that `product(q)` = A q applies.

    Subspace iteration with Rayleigh–Ritz (Halko, Martinsson, Tropp, arXiv 0909.4061): the last `rank` columns span the
    answer, the others make a better start for a similar matrix. It stops where another round lowers the part of
    `trace` outside of the subspace by less than `TOLERANCE` of it. Among directions of nearly equal variance it does
    not decide, and need not: eigh would take seconds to minutes at FLUX.1's widths (docs/quantize.md).
    """
    q = torch.linalg.qr(start)[0]
    inside = 0.0
    for i in range(iterations):
        image = product(q)
        projected = q.T @ image
        values, vectors = _small_eigh(projected) if len(projected) <= SMALL else torch.linalg.eigh(projected.double())
        before, inside = inside, float(values[-rank:].sum())
        if i == iterations - 1 or inside - before <= TOLERANCE * max(trace - inside, 0.0):
            break
        q = torch.linalg.qr(image)[0]
    return q @ vectors.to(q)


def _small_eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues ascending and eigenvectors in float64, on the host."""
    matrix = matrix.cpu().double()
    # The number of threads is the process's: two at once would take each other's one thread for what was set before.
    with _ONE_THREAD:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return torch.linalg.eigh(matrix)
        finally:
            torch.set_num_threads(threads)


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
    problem = (_ExactPair if _exact(len(moment), rank) else _ImplicitPair)(moment, weights, rank)
    previous = float("inf")
    for _ in range(iterations):
        c_res, g_res = problem.residuals()
        objective = math.log(c_res) + math.log(g_res)
        if previous - objective < problem.tolerance:
            break
        previous = objective
        problem.improve(c_res, g_res)
    return problem.basis


class _ExactPair:
    """C and G as matrices, in float64. `basis` begins as that of C alone."""

    tolerance = 1e-6

    def __init__(self, moment: torch.Tensor, weights: Sequence[torch.Tensor], rank: int):
        c = moment.double()
        self.c = (c + c.T) / 2
        self.g = torch.zeros_like(c)
        for w in weights:
            w = w.to(c)
            self.g.addmm_(w.T, w)
        self.rank = rank
        self.basis = top_eigenvectors(self.c, rank)

    def residuals(self) -> tuple[float, float]:
        """tr(PC) and tr(PG)."""
        u = self.basis
        return _residual(self.c.trace(), u, self.c @ u), _residual(self.g.trace(), u, self.g @ u)

    def improve(self, c_res: float, g_res: float) -> None:
        """U ← top eigenvectors of C / c_res + G / g_res."""
        self.basis = top_eigenvectors(self.c / c_res + self.g / g_res, self.rank)


class _ImplicitPair:
    """C as it is and G as a product of factors, in float32: no second matrix of C's size, no slow float64.

    A tangent's subspace is only approached, from the last one: each round raises what it captures, so the objective
    falls all the same.
    """

    tolerance = TANGENT_TOLERANCE

    def __init__(self, moment: torch.Tensor, weights: Sequence[torch.Tensor], rank: int):
        self.c = moment.float()
        self.factors = [w.to(self.c) for w in weights]
        self.rank = rank
        self.c_trace = self.c.diagonal().sum(dtype=torch.float64)
        self.g_trace = torch.stack([w.square().sum(dtype=torch.float64) for w in self.factors]).sum()
        self.ritz = random_directions(self.c, rank)
        self._iterate(self._c_product, float(self.c_trace), ITERATIONS)

    @property
    def basis(self) -> torch.Tensor:
        return self.ritz[:, -self.rank :].double()

    def residuals(self) -> tuple[float, float]:
        """tr(PC) and tr(PG)."""
        u = self.ritz[:, -self.rank :]
        return _residual(self.c_trace, u, self._c_product(u)), _residual(self.g_trace, u, self._g_product(u))

    def improve(self, c_res: float, g_res: float) -> None:
        """U ← nearer to the top eigenvectors of C / c_res + G / g_res."""
        trace = float(self.c_trace) / c_res + float(self.g_trace) / g_res
        self._iterate(
            lambda q: self._c_product(q) / c_res + self._g_product(q) / g_res, trace, TANGENT_ITERATIONS
        )  # fmt: skip

    def _iterate(self, product: Callable[[torch.Tensor], torch.Tensor], trace: float, iterations: int) -> None:
        self.ritz = iterate_subspace(product, self.ritz, self.rank, trace, iterations)

    def _c_product(self, q: torch.Tensor) -> torch.Tensor:
        return self.c @ q

    def _g_product(self, q: torch.Tensor) -> torch.Tensor:
        return torch.stack([w.T @ (w @ q) for w in self.factors]).sum(0)


def _residual(trace: torch.Tensor, u: torch.Tensor, image: torch.Tensor) -> float:
    """tr(PA) for P = I − UUᵀ, of tr(A) and A U."""
    return max(float(trace - (u * image).sum(dtype=torch.float64)), 1e-30)


def captured_energy(moment: torch.Tensor, basis: torch.Tensor) -> float:
    """Share of the activations' energy inside the basis, tr(UᵀCU) / tr(C), in [0, 1]."""
    u = basis.to(moment.device, torch.float64)
    inside = (u * (moment @ u.to(moment.dtype))).sum(dtype=torch.float64)
    return float(inside / moment.diagonal().double().sum().clamp(min=1e-300))
