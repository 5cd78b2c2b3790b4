"""Sylvester Hadamard matrices and the block-diagonal rotation made of them."""

import torch
from torch import Tensor

#: Wider blocks are computed as Kronecker products.
LARGEST_FACTOR = 128


def hadamard_matrix(n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """Normalized Sylvester Hadamard matrix [n, n], H[i, j] = (-1)^popcount(i & j) / √n: its own inverse.

    Raises ValueError unless n is a power of two.
    """
    return (_signs(n, device).to(torch.float64) * n**-0.5).to(dtype)


def block_hadamard(v: Tensor, block: int) -> Tensor:
    """v [..., K] times the block-diagonal normalized Hadamard matrix of `block` columns (its own inverse).

    Raises ValueError unless `block` is a power of two that divides K.
    """
    if v.shape[-1] % block:
        raise ValueError(f"the last dimension is {v.shape[-1]}; it must be a multiple of the block {block}")
    # The factor comes after the sum of exact ±v terms, as in the kernels.
    if block > LARGEST_FACTOR:
        # H of a·b columns is the Kronecker product of H of a and of b: a + b products per value instead of a·b.
        a, b = (_signs(n, v.device).to(v.dtype) for n in (block // LARGEST_FACTOR, LARGEST_FACTOR))
        return ((a @ (v.reshape(-1, len(a), len(b)) @ b)) * block**-0.5).view(v.shape)
    signs = _signs(block, v.device).to(v.dtype)
    return ((v.reshape(-1, block) @ signs) * block**-0.5).view(v.shape)


def _signs(n: int, device: torch.device | str | None) -> Tensor:
    if n < 1 or n & (n - 1):
        raise ValueError(f"the Hadamard size is {n}; it must be a power of two")
    signs = torch.ones(1, 1, dtype=torch.int8, device=device)
    while signs.shape[0] < n:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)), 0)
    return signs
