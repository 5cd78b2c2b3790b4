"""The Adaptive Rotation Scheme (LRQ-DiT, arXiv 2508.03485): a Hadamard, or an outlier-aware rotation where that pays.

J = ‖X‖_F / √(BNC) is the root mean square of a site's input. Below 1, v = x D H. From 1 on, v = x R̂₁ P R̂₂ with two
block-diagonal rotations R̂ made of greedy steps that each spread the largest column of a block over it, and a zigzag
permutation P that deals the columns, sorted by size, to the blocks (the construction is DuQuant's, arXiv 2406.01721).

One step on a block of n columns is R = E D H E: E swaps column d with the first, D the site's signs, H the normalized
Hadamard, whose first row is constant in magnitude, so that column d ends up in all columns alike. A column's size is
its root mean square over the calibration tokens, known for any rotation from the second moment C: diag(Rᵀ C R).
"""

from __future__ import annotations

import torch

from ..kernels import hadamard_matrix
from .transforms import SiteStatistics, Tensors, Transform, hadamard_block, random_signs

THRESHOLD = 1.0
#: Greedy steps tried in each rotation; the best number of them, for each block, is kept.
GREEDY_STEPS = 16
#: In `steps`: no step. Any number that is no column of a block means this.
NO_STEP = 255


def fluctuation(moment: torch.Tensor) -> float:
    """J of a site whose input has second moment C [K, K]: ‖X‖_F / √(BNC) = √(tr C / K)."""
    return float((moment.diagonal().double().mean()).sqrt())


def swaps(columns: torch.Tensor, block: int) -> torch.Tensor:
    """Orders [B, n] in which column `columns` [B] and the first change places; as they are where it is none."""
    order = torch.arange(block, device=columns.device).repeat(len(columns), 1)
    columns = torch.where(columns < block, columns.long(), 0)[:, None]
    order.scatter_(1, columns, 0)
    order[:, :1] = columns
    return order


def block_rotation(steps: torch.Tensor, signs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """R̂'s blocks [B, n, n], the product of the steps uint8 [B, S], for signs [B n]."""
    blocks = len(steps)
    block = len(signs) // blocks
    signed = signs.to(dtype).reshape(blocks, 1, block)
    hadamard = hadamard_matrix(block, dtype=dtype, device=signs.device)
    rotation = torch.eye(block, dtype=dtype, device=signs.device).repeat(blocks, 1, 1)
    for columns in steps.unbind(1):
        order = swaps(columns, block)[:, None].expand_as(rotation)
        moved = ((rotation.gather(2, order) * signed) @ hadamard).gather(2, order)
        rotation = torch.where((columns < block)[:, None, None], moved, rotation)
    return rotation


def greedy_steps(blocks: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Steps uint8 [B, S] for the second moments [B, n, n] of the blocks' columns: the largest column each time.

    A block keeps as many steps, or none, as leave its largest column smallest.
    """
    columns, largest = [], [blocks.diagonal(dim1=1, dim2=2).amax(1)]
    for _ in range(GREEDY_STEPS):
        column = blocks.diagonal(dim1=1, dim2=2).argmax(1)
        step = block_rotation(column[:, None], signs, blocks.dtype)
        blocks = step.mT @ blocks @ step
        columns.append(column)
        largest.append(blocks.diagonal(dim1=1, dim2=2).amax(1))
    kept = torch.stack(largest, 1).argmin(1, keepdim=True)
    used = torch.arange(GREEDY_STEPS, device=kept.device) < kept
    return torch.where(used, torch.stack(columns, 1), NO_STEP).to(torch.uint8)


def zigzag(sizes: torch.Tensor, blocks: int) -> torch.Tensor:
    """Order [K] that deals the columns, largest first, to the blocks, forwards and backwards in turn."""
    dealt = sizes.argsort(descending=True, stable=True).reshape(-1, blocks)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.flatten()


def _diagonal_blocks(moment: torch.Tensor, block: int) -> torch.Tensor:
    return torch.stack([moment[i : i + block, i : i + block] for i in range(0, len(moment), block)])


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """x [M, K] times the block-diagonal rotation of blocks [B, n, n]."""
    return torch.einsum("mbi,bij->mbj", x.unflatten(1, rotation.shape[:2]), rotation).flatten(1)


def _prepare(s: SiteStatistics) -> Tensors:
    block = hadamard_block(s.features)
    signs = random_signs(s.features, s.seed)
    steps = torch.full((2, s.features // block, GREEDY_STEPS), NO_STEP, dtype=torch.uint8)
    permutation = torch.arange(s.features, dtype=torch.int32)
    if s.moment is None or fluctuation(s.moment) < THRESHOLD:
        steps[0, :, 0] = 0  # one step that swaps nothing: D H
        return {"signs": signs, "permutation": permutation, "steps": steps}
    moment = s.moment.double()
    signed = signs.to(moment.device)
    first = greedy_steps(_diagonal_blocks(moment, block), signed)
    rotation = block_rotation(first, signed, moment.dtype)
    moment = _rotate(_rotate(moment, rotation).T, rotation)
    order = zigzag(moment.diagonal(), len(first))
    second = greedy_steps(_diagonal_blocks(moment[order][:, order], block), signed)
    return {"signs": signs, "permutation": order.int().cpu(), "steps": torch.stack([first, second]).cpu()}


def _apply(x: torch.Tensor, t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    work = x if x.dtype == torch.float64 else x.float()
    signs = t["signs"].to(x.device)
    if "hadamard" in t:
        v = ((work * signs).unflatten(1, (-1, len(t["hadamard"]))) @ t["hadamard"].to(work.dtype)).flatten(1)
    else:
        first, second = _rotations(t, signs, work.dtype)
        v = _rotate(_rotate(work, first).index_select(1, t["permutation"].to(x.device)), second)
    return v.to(x.dtype), x.new_zeros(len(x), 0)


def _rotations(t: Tensors, signs: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The blocks of R̂₁ and R̂₂, each [B, n, n]: derived before, or made for this call from their steps."""
    if "first" in t:
        return t["first"].to(dtype), t["second"].to(dtype)
    return tuple(block_rotation(steps, signs, dtype) for steps in t["steps"].to(signs.device))


def _derive(t: Tensors) -> dict[str, torch.Tensor]:
    """H where the site's rotation is D H, else the blocks of R̂₁ and R̂₂, 4 n bytes a column each. Reads values."""
    steps, permutation = t["steps"], t["permutation"]
    block = len(permutation) // steps.shape[1]
    plain = torch.full_like(steps, NO_STEP)
    plain[0, :, 0] = 0
    in_order = torch.arange(len(permutation), device=permutation.device, dtype=permutation.dtype)
    if torch.equal(steps, plain) and torch.equal(permutation, in_order):
        return {"hadamard": hadamard_matrix(block, device=steps.device)}
    first, second = _rotations(t, t["signs"], torch.float32)
    return {"first": first, "second": second}


ADAPTIVE_ROTATION = Transform(
    _prepare, _apply, _apply,
    shapes=lambda k, r: {
        "signs": (k,), "permutation": (k,), "steps": (2, k // hadamard_block(k), GREEDY_STEPS),
    },
    low_features=lambda k, r: k, kernel=False, subspace=False, derive=_derive,
)  # fmt: skip
