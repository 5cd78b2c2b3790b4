"""Input transforms: what a linear's input goes through before it is quantized.

Each is a pair of functions over the tensors of an input site. ``prepare`` makes those tensors from statistics;
``apply`` maps tokens x [M, K] to the 4-bit part v [M, K'] and the 16-bit part z [M, r]. Both are linear in x, and
``fold`` gives the weights that undo them: x Wᵀ = z Lᵀ + v W_resᵀ, exactly (DiRotQ, arXiv 2605.16732).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..kernels import block_hadamard, hadamard_matrix
from .codebooks import GROUP_SIZE
from .rounding import DOUBLE_WIDTH
from .subspace import eigenvectors_ascending, joint_basis, pca_basis

Tensors = Mapping[str, torch.Tensor]
MAX_HADAMARD_BLOCK = 128
#: Rows of a wide second moment that are transformed at a time.
MOMENT_ROWS = 1024


@dataclass(frozen=True)
class SiteStatistics:
    """What is known of a site when its transform is made.

    Attributes:
        features: K. weights: the siblings' W [N, K]. seed: for random signs and rotations; results are stored.
        moment: C [K, K], or None without calibration. rank: r, 0 for no 16-bit subspace. basis: "pca" or "joint".
    """

    features: int
    weights: Sequence[torch.Tensor]
    seed: int
    rank: int
    basis: str
    moment: torch.Tensor | None


def widest_block(features: int) -> int:
    """The largest power of two that divides K."""
    return features & -features


def hadamard_block(features: int) -> int:
    """The largest power of two that divides K, at most 128."""
    return min(widest_block(features), MAX_HADAMARD_BLOCK)


@dataclass(frozen=True)
class Transform:
    """`prepare`, `apply`, `fold` as the module docstring says.

    `kernel` says that the fused ops of `dirotq.kernels` compute `apply` (of x[:, permutation] if that is one of its
    tensors), with Hadamard blocks of `block(K)` columns; the others run as PyTorch operations.
    Without a moment `prepare` must not look at the weights: `from_pretrained` quantizes siblings one at a time.
    `subspace` says that it has a 16-bit part, so that a rank makes sense.
    `derive` computes tensors from those of the site, for `apply` to find among them instead of computing them itself;
    they are kept (see `derived`), so they must be small.
    `shapes(K, r)` gives the stored tensors' shapes, `low_features(K, r)` the width K' of v.
    """

    prepare: Callable[[SiteStatistics], Tensors]
    apply: Callable[[torch.Tensor, Tensors], tuple[torch.Tensor, torch.Tensor]]
    fold: Callable[[torch.Tensor, Tensors], tuple[torch.Tensor, torch.Tensor]]
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    low_features: Callable[[int, int], int]
    kernel: bool
    subspace: bool
    fast_unfold: Callable[[torch.Tensor, torch.Tensor | None, Tensors], torch.Tensor] | None = None
    block: Callable[[int], int] = hadamard_block
    derive: Callable[[Tensors], dict[str, torch.Tensor]] | None = None

    @property
    def identity(self) -> bool:
        """Whether v is x and z empty, so that nothing needs to run."""
        return self.apply is _apply_identity

    def unfold(self, w: torch.Tensor, low_rank: torch.Tensor | None, t: Tensors) -> torch.Tensor:
        """The dense W [N, K] float32 that w [N, K'] and L [N, r] stand for, with x Wᵀ = z Lᵀ + v wᵀ for every x."""
        if self.fast_unfold is not None:
            return self.fast_unfold(w, low_rank, t)
        # Both are linear in x: W is the output on the identity's rows, transposed. Its width is K, or V's rows.
        features = len(next(iter(t.values()))) if t else w.shape[1]
        v, z = self.apply(torch.eye(features, dtype=w.dtype, device=w.device), t)
        dense = v @ w.T
        return (dense if low_rank is None else dense + z @ low_rank.to(w.dtype).T).T


def random_signs(features: int, seed: int) -> torch.Tensor:
    """D: ±1 int8 [K]. Without it a constant component collapses into single Hadamard coefficients (13 dB)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (features,), generator=generator) * 2 - 1).to(torch.int8)


def rotate_signed(v: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """v D H for rows v [M, K], H the normalized block-diagonal Hadamard."""
    block = hadamard_block(v.shape[1])
    h = hadamard_matrix(block, dtype=v.dtype, device=v.device)
    return ((v * signs.to(v.device, v.dtype)).reshape(-1, block) @ h).reshape(v.shape)


def _empty_z(x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(len(x), 0)


# --- identity: plain round-to-nearest -------------------------------------------------------------------------


def _prepare_identity(s: SiteStatistics) -> Tensors:
    return {}


def _apply_identity(x: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return x, _empty_z(x)


# --- subspace + Hadamard: v = (x − zUᵀ) D H, z = xU; rank 0 is the plain Hadamard ---------------------------------


def _prepare_hadamard(s: SiteStatistics) -> Tensors:
    tensors: dict[str, torch.Tensor] = {"signs": random_signs(s.features, s.seed)}
    if s.rank:
        if s.moment is None:
            raise ValueError(f"rank {s.rank} needs calibration data; without it the rank must be 0")
        u = joint_basis(s.moment, s.weights, s.rank) if s.basis == "joint" else pca_basis(s.moment, s.rank)
        tensors["basis"] = u.to(torch.bfloat16)
    return tensors


def _apply_hadamard(x: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    if "basis" not in t:
        return rotate_signed(x, t["signs"]), _empty_z(x)
    u = t["basis"].to(x.device, x.dtype)
    z = x @ u
    return rotate_signed(x - z @ u.T, t["signs"]), z


def _fold_hadamard(w: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    if "basis" not in t:
        return rotate_signed(w, t["signs"]), _empty_z(w)
    u = t["basis"].to(w.device, w.dtype)
    # Uᵀ's pseudo-inverse rather than U: bfloat16 rounding leaves U not quite orthonormal, and this keeps
    # the factorization exact for the basis as stored.
    low_rank = torch.linalg.solve(u.T @ u, (w @ u).T).T
    return rotate_signed(w - low_rank @ u.T, t["signs"]), low_rank


def _unfold_hadamard(w: torch.Tensor, low_rank: torch.Tensor | None, t: Tensors) -> torch.Tensor:
    # v = x (I − UUᵀ) D H, so W = w H D (I − UUᵀ) + L Uᵀ: no K × K matrix, which at K = 15360 would take a gigabyte.
    block = hadamard_block(w.shape[1])
    h = hadamard_matrix(block, dtype=w.dtype, device=w.device)
    dense = (w.reshape(-1, block) @ h).reshape(w.shape) * t["signs"].to(w.device, w.dtype)
    if "basis" not in t:
        return dense
    u = t["basis"].to(w.device, w.dtype)
    low = -(dense @ u) if low_rank is None else low_rank.to(w.dtype) - dense @ u
    return dense.addmm_(low, u.T)


# --- randomized permuted block Hadamard (OrbitQuant, arXiv 2607.02461): v = x P D H, as wide a block as divides K ----


def _prepare_permuted(s: SiteStatistics) -> Tensors:
    generator = torch.Generator().manual_seed(s.seed + 1)  # not the signs' own stream
    permutation = torch.randperm(s.features, generator=generator).to(torch.int32)
    return {"signs": random_signs(s.features, s.seed), "permutation": permutation}


def _apply_permuted(x: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    v = x.index_select(1, t["permutation"].to(x.device)) * t["signs"].to(x.device, x.dtype)
    return block_hadamard(v, widest_block(v.shape[1])), _empty_z(x)


def _unfold_permuted(w: torch.Tensor, low_rank: torch.Tensor | None, t: Tensors) -> torch.Tensor:
    dense = block_hadamard(w, widest_block(w.shape[1])) * t["signs"].to(w.device, w.dtype)
    return dense.index_select(1, t["permutation"].to(w.device).argsort())


# --- dense PCA rotation, as published: [z, v] = x V R -------------------------------------------------------------


def _prepare_dense(s: SiteStatistics) -> Tensors:
    if s.moment is None:
        raise ValueError("the published construction needs calibration data")
    v = eigenvectors_ascending(s.moment)
    low = s.features - s.rank
    generator = torch.Generator().manual_seed(s.seed)
    gaussian = torch.randn(low, low, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    rotation = (q * r.diagonal().sign()).to(v.device)  # Haar distributed
    return {"rotation": (v[:, :low] @ rotation).to(torch.bfloat16), "basis": v[:, low:].to(torch.bfloat16)}


def _apply_dense(x: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return x @ t["rotation"].to(x.device, x.dtype), x @ t["basis"].to(x.device, x.dtype)


# --- smoothing + SVD branch (SVDQuant, arXiv 2411.05007) ----------------------------------------------------------

SMOOTHING_STRENGTH = 0.5


def _prepare_smooth(s: SiteStatistics) -> Tensors:
    w = torch.cat([w.double() for w in s.weights])
    if s.moment is None:
        raise ValueError("smoothing needs calibration data")
    x_size = s.moment.double().diagonal().clamp(min=1e-12).sqrt().to(w.device)
    w_size = w.abs().amax(0).clamp(min=1e-8)
    smooth = x_size**SMOOTHING_STRENGTH / w_size ** (1 - SMOOTHING_STRENGTH)
    smooth = (smooth / smooth.log().mean().exp()).float()
    w = w * smooth.double()
    right = torch.linalg.eigh(w.T @ w)[1]  # right singular vectors, ascending; also where r exceeds the rows of w
    return {"smooth": smooth, "basis": right[:, s.features - s.rank :].to(torch.bfloat16)}


def _apply_smooth(x: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    v = x / t["smooth"].to(x.device, x.dtype)
    return v, v @ t["basis"].to(x.device, x.dtype)


def _fold_smooth(w: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    w = w * t["smooth"].to(w.device, w.dtype)
    a = t["basis"].to(w.device, w.dtype)
    low_rank = torch.linalg.solve(a.T @ a, (w @ a).T).T
    return w - low_rank @ a.T, low_rank


# --- the same with the branch on the input as it is: z = x A, which is how Nunchaku stores it ------------------------


def _prepare_smooth_input(s: SiteStatistics) -> Tensors:
    t = _prepare_smooth(s)
    basis = (t["basis"].float() / t["smooth"][:, None]).to(torch.bfloat16)
    return {"smooth": t["smooth"], "basis": basis, "shift": torch.zeros_like(t["smooth"])}


def _apply_smooth_input(x: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return x / t["smooth"].to(x.device, x.dtype), x @ t["basis"].to(x.device, x.dtype)


def _fold_smooth_input(w: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    smooth = t["smooth"].to(w.device, w.dtype)
    a = t["basis"].to(w.device, w.dtype) * smooth[:, None]  # as v sees it
    w = w * smooth
    # Imported bases have columns of zeros, which a solver would not take.
    inverse = torch.linalg.pinv((a.T @ a).double(), hermitian=True).to(w.dtype)
    low_rank = (w @ a) @ inverse
    return w - low_rank @ a.T, low_rank


def _unfold_smooth_input(w: torch.Tensor, low_rank: torch.Tensor | None, t: Tensors) -> torch.Tensor:
    dense = w / t["smooth"].to(w.device, w.dtype)
    return dense if low_rank is None else dense.addmm_(low_rank.to(w.dtype), t["basis"].to(w.device, w.dtype).T)


TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(
        _prepare_identity, _apply_identity, _apply_identity,
        shapes=lambda k, r: {}, low_features=lambda k, r: k, kernel=True, subspace=False,
    ),
    "subspace_hadamard": Transform(
        _prepare_hadamard, _apply_hadamard, _fold_hadamard,
        shapes=lambda k, r: {"signs": (k,), **({"basis": (k, r)} if r else {})},
        low_features=lambda k, r: k, kernel=True, subspace=True, fast_unfold=_unfold_hadamard,
    ),
    "permuted_hadamard": Transform(
        _prepare_permuted, _apply_permuted, _apply_permuted,
        shapes=lambda k, r: {"signs": (k,), "permutation": (k,)},
        low_features=lambda k, r: k, kernel=True, subspace=False, fast_unfold=_unfold_permuted, block=widest_block,
    ),
    "dense_pca": Transform(
        _prepare_dense, _apply_dense, _apply_dense,
        shapes=lambda k, r: {"rotation": (k, k - r), "basis": (k, r)},
        low_features=lambda k, r: k - r, kernel=False, subspace=True,
    ),
    "smooth_svd": Transform(
        _prepare_smooth, _apply_smooth, _fold_smooth,
        shapes=lambda k, r: {"smooth": (k,), "basis": (k, r)},
        low_features=lambda k, r: k, kernel=False, subspace=True,
    ),
    "smooth_svd_input": Transform(
        _prepare_smooth_input, _apply_smooth_input, _fold_smooth_input,
        shapes=lambda k, r: {"smooth": (k,), "basis": (k, r), "shift": (k,)},
        low_features=lambda k, r: k, kernel=False, subspace=True, fast_unfold=_unfold_smooth_input,
    ),
}  # fmt: skip

#: Stored dtype of every site tensor.
SITE_DTYPES = {
    "basis": torch.bfloat16,
    "signs": torch.int8,
    "permutation": torch.int32,
    "steps": torch.uint8,
    "rotation": torch.bfloat16,
    "smooth": torch.float32,
    "shift": torch.float32,  # of v before it is rounded without a sign; see `fake_quantize`
}


def transformed_moment(transform: Transform, moment: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Second moment of v, Tᵀ C T [K', K'], for v = x T; in float64, where K is wider than `DOUBLE_WIDTH` in float32."""
    if len(moment) <= DOUBLE_WIDTH:
        half = transform.apply(moment.double(), tensors)[0]
        return transform.apply(half.T.contiguous(), tensors)[0]
    # Some rows at a time: what `apply` holds on the way would be several matrices of the moment's size.
    half = torch.cat([transform.apply(rows.float(), tensors)[0] for rows in moment.split(MOMENT_ROWS)])
    return torch.cat([transform.apply(part.T.contiguous(), tensors)[0] for part in half.split(MOMENT_ROWS, dim=1)])


def aligned_rank(features: int, high_fraction: float) -> int:
    """K·fraction rounded up to the group size, as published (the low part must be whole groups)."""
    return -(-round(features * high_fraction) // GROUP_SIZE) * GROUP_SIZE
