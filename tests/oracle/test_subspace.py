"""`pca_basis` and `joint_basis` against singular vectors and the fixed-point equation."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dirotq.dirotq_core import subspace
from dirotq.dirotq_core.subspace import captured_energy, joint_basis, pca_basis


def projector(u):
    return u @ u.T


@pytest.mark.parametrize(("k", "r"), [(64, 1), (64, 16), (96, 40), (192, 64)])
def test_pca_projects_on_the_leading_singular_vectors(oracle, activations, k, r):
    x = activations(4 * k, k)
    u = pca_basis(torch.from_numpy(x.T @ x / len(x)), r).numpy()
    np.testing.assert_allclose(u.T @ u, np.eye(r), atol=1e-12)
    np.testing.assert_allclose(projector(u), projector(oracle.principal(x, r)), atol=1e-8)


def test_pca_of_a_float32_moment_is_as_good_as_its_precision(oracle, activations):
    x = activations(512, 128)
    u = pca_basis(torch.from_numpy(x.T @ x / len(x)).float(), 32).double().numpy()
    np.testing.assert_allclose(projector(u), projector(oracle.principal(x, 32)), atol=1e-3)


def test_a_cut_between_degenerate_groups_is_unique(activations):
    """Eigenvalues 9 ×4, 4 ×12, 1 ×48: a basis inside a group is arbitrary, the projector at a gap is not."""
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((64, 64)))[0]
    c = rotation @ np.diag([9.0] * 4 + [4.0] * 12 + [1.0] * 48) @ rotation.T
    for r in (4, 16):
        u = pca_basis(torch.from_numpy(c), r).numpy()
        np.testing.assert_allclose(projector(u), projector(rotation[:, :r]), atol=1e-10)
    u = pca_basis(torch.from_numpy(c), 10).numpy()  # cuts through the second group: only the energy is determined
    assert np.trace(u.T @ c @ u) == pytest.approx(9 * 4 + 4 * 6, rel=1e-12)
    assert captured_energy(torch.from_numpy(c), torch.from_numpy(u)) == pytest.approx(60 / 132, rel=1e-12)


def test_pca_of_a_rank_deficient_moment(oracle, activations):
    x = activations(10, 64)
    c = torch.from_numpy(x.T @ x / len(x))
    u = pca_basis(c, 16)
    np.testing.assert_allclose((u.T @ u).numpy(), np.eye(16), atol=1e-12)
    assert captured_energy(c, u) == pytest.approx(1, abs=1e-12)


@pytest.fixture
def iterative(monkeypatch):
    """Subspace iteration also at widths that a test can check."""
    monkeypatch.setattr(subspace, "EXACT_WIDTH", 0)


@pytest.mark.parametrize("steep", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("k", "r"), [(192, 8), (511, 32), (192, 40)])
def test_iteration_captures_what_eigh_captures(oracle, activations, iterative, steep, k, r):
    x = activations(4 * k, k, steep=steep)
    c = torch.from_numpy(x.T @ x / len(x))
    for moment, tolerance in ((c, 1e-6), (c.float(), 1e-5)):
        u = pca_basis(moment, r)
        np.testing.assert_allclose((u.T @ u).numpy(), np.eye(r), atol=tolerance)
        best = oracle.principal(x, r)
        outside, least = (np.trace(c.numpy()) - np.trace(b.T @ c.numpy() @ b) for b in (u.numpy(), best))
        assert outside < least * (1 + 1e-3)  # 0.004 dB


def test_joint_basis_by_iteration_is_as_good(activations, monkeypatch):
    c, weights, g = problem(activations, 1.0, k=256)
    arguments = torch.from_numpy(c), [torch.from_numpy(w) for w in weights], 16
    exact = joint_basis(*arguments).numpy()
    monkeypatch.setattr(subspace, "EXACT_WIDTH", 0)
    found = joint_basis(*arguments).numpy()

    def product(u):
        p = np.eye(256) - u @ u.T
        return np.trace(p @ c) * np.trace(p @ g)

    assert product(found) < product(exact) * (1 + 1e-3)


def problem(activations, steep, k=96):
    rng = np.random.default_rng(5)
    x = activations(4 * k, k, seed=3, steep=steep)
    weights = [rng.standard_normal((n, k)) @ np.diag(np.linspace(0.2, 3, k)) for n in (33, 64)]
    return x.T @ x / len(x), weights, sum(w.T @ w for w in weights)


@pytest.mark.parametrize("steep", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("r", [4, 24])
def test_joint_basis_beats_pca_and_is_a_fixed_point(oracle, activations, steep, r):
    c, weights, g = problem(activations, steep)
    u = joint_basis(torch.from_numpy(c), [torch.from_numpy(w) for w in weights], r, iterations=200).numpy()
    pca = pca_basis(torch.from_numpy(c), r).numpy()
    np.testing.assert_allclose(u.T @ u, np.eye(r), atol=1e-12)
    assert oracle.residual_product(c, g, u) < oracle.residual_product(c, g, pca)
    again = oracle.joint_step(c, g, u)
    gain = np.log(oracle.residual_product(c, g, u)) - np.log(oracle.residual_product(c, g, again))
    assert -1e-12 <= gain < 1e-6


def test_joint_basis_is_the_oracle_s_iteration(oracle, activations):
    c, weights, g = problem(activations, 0.5)
    tensors = [torch.from_numpy(w) for w in weights]
    u = oracle.joint_step(c, g, np.linalg.eigh(c)[1][:, -12:])
    for steps in (1, 2, 3):
        ours = joint_basis(torch.from_numpy(c), tensors, 12, iterations=steps).numpy()
        np.testing.assert_allclose(projector(ours), projector(u), atol=1e-8)
        u = oracle.joint_step(c, g, u)


def test_joint_objective_never_increases_with_iterations(oracle, activations):
    c, weights, g = problem(activations, 0.3)
    tensors = [torch.from_numpy(w).float() for w in weights]
    values = [
        oracle.residual_product(c, g, joint_basis(torch.from_numpy(c), tensors, 16, iterations=n).numpy())
        for n in range(12)
    ]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(values))
    assert values[-1] < 0.98 * values[0]


def test_joint_basis_is_pca_for_white_weights(activations):
    c, _, _ = problem(activations, 1.5)
    u = joint_basis(torch.from_numpy(c), [torch.eye(96)], 16).numpy()
    np.testing.assert_allclose(projector(u), projector(pca_basis(torch.from_numpy(c), 16).numpy()), atol=1e-8)


def test_two_threads_at_once_leave_the_number_of_threads_alone(monkeypatch):
    """It is the process's: the one that began second must not put back the first one's single thread."""
    count, inside, eigh = [8], [], torch.linalg.eigh

    def slow(matrix):
        inside.append(count[0])
        time.sleep(0.002 * (len(inside) % 3))
        return eigh(matrix)

    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: count.__setitem__(0, n))
    monkeypatch.setattr(torch.linalg, "eigh", slow)
    matrices = [torch.eye(8) * (i + 1) for i in range(24)]
    with ThreadPoolExecutor(6) as pool:
        values = [v[0] for v, _ in pool.map(subspace._small_eigh, matrices)]
    assert [float(v) for v in values] == [i + 1 for i in range(24)]
    assert count == [8] and inside == [1] * 24


def test_an_error_leaves_the_number_of_threads_alone():
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        subspace._small_eigh(torch.ones(3))
    assert torch.get_num_threads() == threads and subspace._small_eigh(torch.eye(2))[0].tolist() == [1, 1]
