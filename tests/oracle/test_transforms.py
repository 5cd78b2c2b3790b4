"""Every transform is an exact factorization, x Wᵀ = z Lᵀ + v W_resᵀ, for the tensors as stored."""

import numpy as np
import pytest
import torch

from dirotq.dirotq_core.transforms import TRANSFORMS, SiteStatistics, transformed_moment
from dirotq.kernels import rotate, rotate_quantize

K = 192
CASES = [
    ("identity", 0, "pca"),
    ("subspace_hadamard", 0, "pca"),
    ("subspace_hadamard", 24, "pca"),
    ("subspace_hadamard", 24, "joint"),
    ("dense_pca", 64, "pca"),
    ("smooth_svd", 32, "pca"),
]


@pytest.fixture(scope="module")
def data(activations):
    x = activations(4 * K, K, seed=9)
    w = np.random.default_rng(2).standard_normal((33, K)) * np.linspace(0.5, 2, K)
    return torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(x.T @ x / len(x))


def prepared(name, rank, basis, data, k=K):
    _, w, moment = data
    return TRANSFORMS[name].prepare(SiteStatistics(k, [w[:20], w[20:]], 3, rank, basis, moment))


def stored(oracle, tensors):
    return {name: oracle.array(t) for name, t in tensors.items()}


@pytest.mark.parametrize(("name", "rank", "basis"), CASES)
def test_factorization(oracle, data, name, rank, basis):
    x, w, _ = data
    tensors = prepared(name, rank, basis, data)
    (v, z), (w_res, low_rank) = TRANSFORMS[name].apply(x, tensors), TRANSFORMS[name].fold(w, tensors)
    assert v.shape[1] == TRANSFORMS[name].low_features(K, rank)
    assert z.shape[1] == low_rank.shape[1] == rank
    y = v.numpy() @ w_res.numpy().T + z.numpy() @ low_rank.numpy().T
    reference = x.numpy() @ w.numpy().T
    # The dense rotation must be orthogonal, and is so to the precision of bfloat16.
    tolerance = 2**-8 if name == "dense_pca" else 1e-12
    assert np.linalg.norm(y - reference) <= tolerance * np.linalg.norm(reference)


@pytest.mark.parametrize(("name", "rank", "basis"), CASES)
def test_v_and_z_are_the_equations(oracle, data, name, rank, basis):
    """In float64; the oracle rounds z to bfloat16 and subtracts what it rounded to."""
    x = data[0][:50]
    tensors = prepared(name, rank, basis, data)
    v, z = (t.numpy() for t in TRANSFORMS[name].apply(x, tensors))
    expected_v, expected_z, _ = oracle.split(x.numpy(), stored(oracle, tensors))
    np.testing.assert_array_equal(oracle.bf16(z), expected_z)
    difference = np.linalg.norm(v - expected_v, axis=1)
    rounded_away = 2**-8 * np.linalg.norm(z, axis=1) if name == "subspace_hadamard" else 0
    assert (difference <= rounded_away + 1e-12).all()


@pytest.mark.parametrize(("rank", "basis"), [(24, "pca"), (24, "joint"), (0, "pca")])
def test_the_op_computes_the_transform(oracle, data, rank, basis):
    """`rotate` on float32 tokens: v and z of the equations with z rounded to bfloat16."""
    x = data[0][:50].float()
    tensors = prepared("subspace_hadamard", rank, basis, data)
    v, z = rotate(x, tensors.get("basis"), tensors["signs"], 64)
    expected_v, expected_z, margin = oracle.split(oracle.array(x), stored(oracle, tensors))
    np.testing.assert_allclose(oracle.array(z), expected_z, rtol=2**-7)
    clear = margin > 1e-4
    assert clear.mean() > 0.8
    np.testing.assert_allclose(oracle.array(v)[clear], expected_v[clear], atol=1e-5)


@pytest.mark.parametrize(("name", "rank", "basis"), CASES)
def test_moment_of_v_is_the_empirical_one(data, name, rank, basis):
    x, _, moment = data
    tensors = prepared(name, rank, basis, data)
    v = TRANSFORMS[name].apply(x, tensors)[0]
    expected = (v.T @ v / len(v)).numpy()
    got = transformed_moment(TRANSFORMS[name], moment, tensors).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-12 * np.trace(moment.numpy()))


@pytest.mark.parametrize(("columns", "rank"), [("unit", 40), ("hadamard", 16)])
def test_norms_add_up_for_an_orthonormal_basis(oracle, data, columns, rank):
    """‖v‖² = ‖x‖² − ‖z‖²; both bases are exactly orthonormal in bfloat16."""
    full = np.eye(K) if columns == "unit" else np.kron(np.eye(K // 64), oracle.hadamard(64))
    basis = full[:, 3 : 3 + rank]
    signs = prepared("subspace_hadamard", 0, "pca", data)["signs"]
    tensors = {"basis": torch.from_numpy(basis).bfloat16(), "signs": signs}
    assert np.array_equal(oracle.array(tensors["basis"]).T @ oracle.array(tensors["basis"]), np.eye(rank))
    v, z = TRANSFORMS["subspace_hadamard"].apply(data[0], tensors)
    np.testing.assert_allclose((v**2).sum(1) + (z**2).sum(1), (data[0] ** 2).sum(1), rtol=1e-12)


@pytest.mark.parametrize("k", [64, 192, 256, 320, 1152])
def test_hadamard_rotation_is_the_blockwise_sylvester_one(oracle, k):
    x = torch.from_numpy(np.random.default_rng(k).standard_normal((3, k)))
    signs = TRANSFORMS["subspace_hadamard"].prepare(SiteStatistics(k, [], 1, 0, "pca", None))["signs"]
    v, _ = TRANSFORMS["subspace_hadamard"].apply(x, {"signs": signs})
    rotation = oracle.sign_rotation(oracle.array(signs))
    np.testing.assert_allclose(v.numpy(), x.numpy() @ rotation, atol=1e-12)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(k), atol=1e-12)


def outside(u, expected):
    """Spectral norm of the part of u outside the span of the orthonormal `expected`."""
    return np.linalg.norm(u - expected @ (expected.T @ u), 2)


def test_stored_basis_is_the_rounded_pca(oracle, data):
    u = oracle.array(prepared("subspace_hadamard", 24, "pca", data)["basis"])
    assert outside(u, oracle.principal(data[0].numpy(), 24)) < 2**-8
    np.testing.assert_allclose(u.T @ u, np.eye(24), atol=2**-8)


def test_dense_rotation_splits_at_the_leading_subspace(oracle, data):
    tensors = stored(oracle, prepared("dense_pca", 64, "pca", data))
    full = np.hstack([tensors["rotation"], tensors["basis"]])
    np.testing.assert_allclose(full.T @ full, np.eye(K), atol=2**-8)
    assert outside(tensors["basis"], oracle.principal(data[0].numpy(), 64)) < 2**-8


def test_smoothing_balances_and_its_branch_is_the_svd(oracle, data):
    """λ_k ∝ rms(x_k)^½ / max|w_k|^½ (SVDQuant, strength ½), branch = leading singular vectors of W λ."""
    x, w = (t.numpy() for t in data[:2])
    tensors = stored(oracle, prepared("smooth_svd", 32, "pca", data))
    ratio = tensors["smooth"] / np.sqrt(np.sqrt((x**2).mean(0)) / np.abs(w).max(0))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert outside(tensors["basis"], oracle.principal(w * tensors["smooth"], 32)) < 2**-8


def test_signs_keep_a_constant_component_apart(oracle, data):
    """Without D a constant row falls into one coefficient per block; with it the largest one stays small."""
    signs = prepared("subspace_hadamard", 0, "pca", data)["signs"]
    row = torch.ones(1, K, dtype=torch.float64)
    assert TRANSFORMS["subspace_hadamard"].apply(row, {"signs": signs})[0].abs().max() < 4
    bare = TRANSFORMS["subspace_hadamard"].apply(row, {"signs": torch.ones_like(signs)})[0]
    assert bare.abs().max() == pytest.approx(8)


@pytest.mark.parametrize("mode", ["codebook", "int8", "int4"])
def test_quantized_activations(oracle, data, mode):
    """Every code of the op is the oracle's, unless it or the token's z is decided within rounding error."""
    x = data[0][:64].float()
    tensors = prepared("subspace_hadamard", 24, "pca", data)
    codes, scale, _ = (oracle.array(t) for t in rotate_quantize(x, tensors["basis"], tensors["signs"], 64, mode))
    site = stored(oracle, tensors)
    v, _, z_margin = oracle.split(oracle.array(x), site)
    v_hat, margin = oracle.ACTIVATIONS[mode](v, oracle.residual_rms(oracle.array(x), site))
    unclear = (margin < 1e-3) | (z_margin < 1e-3)[:, None]
    assert unclear.mean() < 0.2
    assert np.abs(codes - v_hat / scale[:, None])[~unclear].max() < 1e-2
