"""Packing, decoding and the Hadamard matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq import kernels

from . import oracle

shapes = st.lists(st.integers(0, 5), max_size=2).flatmap(
    lambda lead: st.integers(0, 40).map(lambda half: (*lead, 2 * half))
)
tables = st.lists(st.integers(-127, 127), min_size=16, max_size=16)


@settings(deadline=None)
@given(shapes, st.integers(0, 2**31), st.sampled_from((torch.uint8, torch.int8, torch.int32, torch.int64)))
def test_unpack_inverts_pack(shape, seed, dtype):
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = kernels.pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(kernels.unpack_int4(packed), codes.to(torch.uint8))


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), tables, st.integers(0, 2**31))
def test_decode_matches_the_oracle(n, half, table, seed):
    packed = torch.randint(0, 256, (n, half), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    expected = torch.from_numpy(oracle.unpack(packed.numpy(), table))
    assert torch.equal(kernels.decode(packed, table).double(), expected)
    assert torch.equal(torch.tensor(table)[kernels.unpack_int4(packed).long()].double(), expected)


def test_nibble_order():
    assert kernels.pack_int4(torch.tensor([[1, 2, 15, 0]])).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize(
    ("codes", "rule"),
    [
        (torch.tensor([1, 16]), "0..15"),
        (torch.tensor([-1, 2]), "0..15"),
        (torch.tensor([1, 2, 3]), "even"),
        (torch.tensor([1.0, 2.0]), "integer"),
    ],
)
def test_pack_rejects(codes, rule):
    with pytest.raises(ValueError, match=rule):
        kernels.pack_int4(codes)


def test_tables():
    assert kernels.CODEBOOK16[:8] == tuple(oracle.MAGNITUDES) and kernels.CODEBOOK16[8:] == tuple(-oracle.MAGNITUDES)
    assert [value % 16 for value in kernels.INT4] == list(range(16))
    middle = (oracle.MAGNITUDES[1:] + oracle.MAGNITUDES[:-1]) / 2
    assert list(kernels.MIDPOINTS) == middle.tolist()
    # Exact in float8 e4m3 too: the same codes multiply exactly on FP8 units.
    lattice = torch.tensor(kernels.CODEBOOK16, dtype=torch.float32)
    assert torch.equal(lattice.to(torch.float8_e4m3fn).float(), lattice)


@pytest.mark.parametrize("n", [1, 2, 16, 128, 512])
def test_hadamard(n):
    matrix = kernels.hadamard_matrix(n, dtype=torch.float64)
    torch.testing.assert_close(matrix, torch.from_numpy(oracle.hadamard(n)))
    v = torch.randn(3, 2 * n, dtype=torch.float64)
    torch.testing.assert_close(kernels.block_hadamard(v, n)[:, n:], v[:, n:] @ matrix)
    torch.testing.assert_close(kernels.block_hadamard(kernels.block_hadamard(v, n), n), v)


def test_hadamard_rejects():
    with pytest.raises(ValueError, match=r"96.*power of two"):
        kernels.hadamard_matrix(96)
    with pytest.raises(ValueError, match=r"100.*multiple of the block 64"):
        kernels.block_hadamard(torch.zeros(2, 100), 64)
