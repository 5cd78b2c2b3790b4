"""`solve_site` and the transforms' preconditions."""

import pytest
import torch

from dirotq import DiRotQConfig
from dirotq.dirotq_core.layout import SitePlan
from dirotq.dirotq_core.methods import METHODS
from dirotq.dirotq_core.solve import TOKENS_PER_COLUMN, solve_site
from dirotq.dirotq_core.transforms import (
    TRANSFORMS,
    SiteStatistics,
    aligned_rank,
    hadamard_block,
    random_signs,
)


def moment_of(k):
    x = torch.randn(8 * k, k, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 4, k)
    return x.T @ x / len(x)


def solve(method="dirotq", k=128, moment=True, tokens=10**6, weights=None, **config):
    resolved = DiRotQConfig(method=method, **config).resolved(calibrated=moment)
    g = torch.Generator().manual_seed(1)
    if weights is None:
        weights = [torch.randn(33, k, generator=g), torch.randn(8, k, generator=g)]
    plan = SitePlan(("a", "b"), k, tuple(len(w) for w in weights), resolved.site_rank(k), True, method, seed=5)
    return plan, weights, solve_site(plan, resolved, weights, moment_of(k) if moment else None, tokens)


@pytest.mark.parametrize("k", [64, 128, 192])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_tensors_are_as_the_plan_says(method, k):
    plan, _, solved = solve(method, k)
    assert {n: (tuple(t.shape), t.dtype) for n, t in solved.site.items()} == plan.site_spec()
    for rows, tensors in zip(plan.out_features, solved.linears, strict=True):
        assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == plan.linear_spec(rows)
        assert all(t.is_contiguous() for t in tensors.values())
    assert plan.low_features % 64 == 0


@pytest.mark.parametrize("fraction", [0.01, 0.125, 0.25, 0.4, 0.5])
@pytest.mark.parametrize("k", [64, 128, 192, 320, 512])
def test_the_dense_rotation_leaves_whole_groups(k, fraction):
    """As published: the low part must be a multiple of 64."""
    config = DiRotQConfig(method="paper", high_fraction=fraction)
    assert (k - config.site_rank(k)) % 64 == 0


def test_the_same_inputs_give_the_same_bytes():
    first, second = solve()[2], solve()[2]
    for a, b in zip([first.site, *first.linears], [second.site, *second.linears], strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_is_named(bad):
    weights = [torch.ones(3, 128), torch.ones(3, 128)]
    weights[1][2, 3] = bad
    with pytest.raises(ValueError, match=r"b\.weight holds NaN or infinity"):
        solve(weights=weights)


def test_report_of_a_site():
    plan, _, solved = solve(basis="pca")
    assert [r.name for r in solved.reports] == ["a", "b"]
    values = torch.linalg.eigvalsh(moment_of(128).double())
    for r in solved.reports:
        assert 15 < r.weight_db < 40
        assert r.energy == pytest.approx(float(values[-plan.rank :].sum() / values.sum()), abs=1e-4)
        assert r.note is None and r.output_db is None


def test_few_tokens_are_remarked():
    assert "1023 calibration tokens for 128 columns" in solve(tokens=TOKENS_PER_COLUMN * 128 - 1)[2].reports[0].note
    assert solve(tokens=TOKENS_PER_COLUMN * 128)[2].reports[0].note is None


def test_calibration_helps_the_weights():
    """Error under the moment of the input: GPTQ with a subspace above nearest without data."""
    assert solve()[2].reports[0].weight_db > solve(rounding="nearest")[2].reports[0].weight_db + 1


def test_data_free_has_no_subspace():
    plan, _, solved = solve(moment=False, tokens=0)
    assert set(solved.site) == {"signs"}
    assert plan.rank == 0
    assert all(set(t) == {"weight", "weight_scale"} for t in solved.linears)
    assert solved.reports[0].energy is None


def test_zero_weights_stay_zero():
    _, _, solved = solve(weights=[torch.zeros(3, 128), torch.ones(2, 128)])
    assert (solved.linears[0]["weight_scale"] == 0).all()
    assert (solved.linears[0]["low_rank"] == 0).all()
    assert (solved.linears[1]["low_rank"] != 0).any()


@pytest.mark.parametrize(("name", "rank"), [("subspace_hadamard", 16), ("dense_pca", 64), ("smooth_svd", 32)])
def test_transforms_that_need_data_say_so(name, rank):
    statistics = SiteStatistics(128, [torch.ones(2, 128)], 0, rank, "pca", None)
    with pytest.raises(ValueError, match=r"needs? calibration data"):
        TRANSFORMS[name].prepare(statistics)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_shapes_are_declared(name):
    moment = torch.eye(192) * torch.linspace(1, 3, 192)
    tensors = TRANSFORMS[name].prepare(SiteStatistics(192, [torch.ones(70, 192)], 0, 64, "pca", moment))
    assert {n: tuple(t.shape) for n, t in tensors.items()} == TRANSFORMS[name].shapes(192, 64)


def test_hadamard_block_divides_the_width():
    widths = {64: 64, 192: 64, 320: 64, 512: 128, 1152: 128, 3072: 128, 4608: 128, 12288: 128, 15360: 128}
    assert {k: hadamard_block(k) for k in widths} == widths


def test_signs_are_balanced_and_seeded():
    signs = random_signs(4096, 3)
    assert signs.dtype == torch.int8
    assert set(signs.tolist()) == {-1, 1}
    assert abs(int(signs.sum())) < 300
    assert torch.equal(signs, random_signs(4096, 3))
    assert not torch.equal(signs, random_signs(4096, 4))


def test_aligned_rank_is_the_published_rule():
    assert [aligned_rank(k, 0.125) for k in (1152, 3072, 4608, 12288, 15360)] == [192, 384, 576, 1536, 1920]
    assert aligned_rank(1152, 0) == 0
