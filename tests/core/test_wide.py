"""Sites too wide for float64 and full eigendecompositions, tried at widths that a test can also solve the other way."""

import pytest
import torch

from dirotq.dirotq_core import rounding, solve, subspace, transforms
from dirotq.dirotq_core.codebooks import WEIGHT_FORMATS
from dirotq.dirotq_core.config import DiRotQConfig
from dirotq.dirotq_core.layout import SitePlan
from dirotq.dirotq_core.rounding import round_gptq
from dirotq.dirotq_core.solve import solve_site


@pytest.fixture
def wide(monkeypatch):
    """Take every width for a wide one."""
    for module in (subspace, solve):
        monkeypatch.setattr(module, "EXACT_WIDTH", 0)
    for module in (rounding, transforms):
        monkeypatch.setattr(module, "DOUBLE_WIDTH", 0)
    monkeypatch.setattr(transforms, "MOMENT_ROWS", 100)


def site(k=320, rank=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9 * k, k, generator=generator) * torch.arange(1, k + 1).float() ** -0.5
    weights = [torch.randn(n, k, generator=generator).bfloat16() * 0.02 for n in (64, 96)]
    plan = SitePlan(("a", "b"), k, (64, 96), rank, True, "dirotq", 1)
    return plan, weights, x.T @ x / len(x), len(x)


@pytest.mark.parametrize("basis", ["pca", "joint"])
def test_float32_solves_as_well(basis, request):
    plan, weights, moment, tokens = site()
    config = DiRotQConfig(rank=16, basis=basis).resolved(calibrated=True)
    exact = solve_site(plan, config, weights, moment, tokens).reports
    request.getfixturevalue("wide")
    before = moment.clone()
    found = solve_site(plan, config, weights, moment, tokens).reports
    assert torch.equal(moment, before)
    for a, b in zip(exact, found, strict=True):
        assert abs(a.weight_db - b.weight_db) < 0.1 and abs(a.energy - b.energy) < 1e-3 and b.note is None


def test_float64_where_float32_cannot_factorize(wide, monkeypatch):
    k = 128
    w, h = torch.randn(32, k), torch.eye(k)
    seen, real = [], torch.linalg.cholesky_ex

    def cholesky(matrix, **kwargs):
        seen.append(matrix.dtype)
        factor, info = real(matrix, **kwargs)
        return factor, info + (matrix.dtype == torch.float32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky)
    rounded = round_gptq(w, WEIGHT_FORMATS["codebook"], h)
    assert rounded.fallback is None and seen == [torch.float32, torch.float64, torch.float64]


def test_taking_a_moment_frees_it():
    from dirotq.dirotq_core.moments import SecondMoment

    moment = SecondMoment(4)
    moment.update(torch.ones(3, 4))
    assert torch.equal(moment.take(), torch.ones(4, 4))
    with pytest.raises(ValueError, match="no calibration tokens"):
        moment.take()
