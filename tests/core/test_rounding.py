"""What rounding does with Hessians and weights that are not as they should be."""

import pytest
import torch

from dirotq.dirotq_core.codebooks import WEIGHT_FORMATS
from dirotq.dirotq_core.rounding import round_gptq, round_nearest

FORMATS = sorted(WEIGHT_FORMATS)
pytestmark = pytest.mark.parametrize("fmt", [WEIGHT_FORMATS[n] for n in FORMATS], ids=FORMATS)


@pytest.fixture
def w():
    return torch.randn(9, 128, generator=torch.Generator().manual_seed(0)) * 0.02


def hessian(tokens, k=128):
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x *= torch.linspace(0.3, 3, k)
    return x.T @ x / tokens


def dequantized(rounded, fmt):
    return fmt.decode(rounded.codes) * fmt.expand(rounded.scale, rounded.codes.shape[1])


def loss(rounded, fmt, w, h):
    e = (dequantized(rounded, fmt) - w).double()
    return float(((e @ h) * e).sum())


def test_singular_hessian(w, fmt):
    """Fewer tokens than columns: damping is enough, and GPTQ is still worth it."""
    h = hessian(20)
    got = round_gptq(w, fmt, h)
    assert got.fallback is None
    assert loss(got, fmt, w, h) < loss(round_nearest(w, fmt, h.diagonal().float()), fmt, w, h)


@pytest.mark.parametrize(
    ("value", "reason"), [(0.0, "zero"), (float("nan"), "not finite"), (float("inf"), "not finite")]
)
def test_useless_hessian_falls_back_to_nearest(w, fmt, value, reason):
    got = round_gptq(w, fmt, torch.full((128, 128), value))
    assert reason in got.fallback and "nearest" in got.fallback
    assert torch.isfinite(got.scale).all() and (got.scale > 0).all()
    assert torch.equal(got.codes, fmt.encode(w / fmt.expand(got.scale, 128)))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_fallback_is_as_good_as_rounding_without_data(w, fmt, value):
    """A moment that says nothing must not make the weights worse than no moment."""
    got = round_gptq(w, fmt, torch.full((128, 128), value))
    plain = round_nearest(w, fmt)
    error = [float((dequantized(r, fmt) - w).square().sum()) for r in (got, plain)]
    assert error[0] <= 1.001 * error[1]


def test_one_bad_entry_is_enough_to_fall_back(w, fmt):
    h = hessian(400)
    h[3, 5] = h[5, 3] = float("nan")
    got = round_gptq(w, fmt, h)
    assert "not finite" in got.fallback
    assert torch.isfinite(got.scale).all()


def test_slightly_indefinite_hessian_is_damped_more(w, fmt):
    h = hessian(400)
    h -= 0.03 * h.diagonal().mean() * torch.eye(128) + torch.linalg.eigvalsh(h)[0] * torch.eye(128)
    got = round_gptq(w, fmt, h)
    assert got.fallback == "damping raised to 0.1"
    assert loss(got, fmt, w, hessian(400)) < loss(round_nearest(w, fmt), fmt, w, hessian(400))


def test_hopeless_hessian_says_so(w, fmt):
    h = torch.eye(128, dtype=torch.float64)
    h[0, 1] = h[1, 0] = 1e4
    got = round_gptq(w, fmt, h)
    assert "no Cholesky factor up to damping 10" in got.fallback
    assert torch.equal(got.codes, round_nearest(w, fmt).codes)


def test_zero_rows_stay_zero(w, fmt):
    w[2] = 0
    for got in (round_gptq(w, fmt, hessian(400)), round_nearest(w, fmt)):
        assert torch.isfinite(got.scale).all()
        assert (got.codes <= 15).all()
        assert (dequantized(got, fmt)[2] == 0).all()
        assert dequantized(got, fmt)[3].abs().sum() > 0


def test_a_zero_group_beside_a_live_one(w, fmt):
    w[2, :64] = 0
    got = round_gptq(w, fmt, hessian(400))
    assert torch.isfinite(dequantized(got, fmt)).all()
    live = (dequantized(got, fmt) - w)[2, 64:].square().sum() / w[2, 64:].square().sum()
    assert live < {4: 0.1, 3: 0.2, 2: 0.4}[fmt.bits]


def test_dead_columns_are_rounded_by_themselves(w, fmt):
    """Nothing ever came through them: they compensate no error and disturb no other column."""
    h = hessian(400)
    dead = torch.tensor([0, 7, 100])
    h[dead] = 0
    h[:, dead] = 0
    got = round_gptq(w, fmt, h)
    assert got.fallback is None
    s = fmt.expand(got.scale, 128)
    assert torch.equal(got.codes[:, dead], fmt.encode(w / s)[:, dead])
    changed = w.clone()
    changed[:, dead] *= -1  # neither the rms nor the weighted errors that make the scale see this
    again = round_gptq(changed, fmt, h)
    alive = [k for k in range(128) if k not in dead]
    assert torch.equal(again.scale, got.scale)
    assert torch.equal(again.codes[:, alive], got.codes[:, alive])


def test_a_dead_group_is_not_clipped(w, fmt):
    """Columns that calibration never excited keep the scales they would have without weighting."""
    dead = slice(64, 128) if fmt.grouped else slice(0, 128)  # all that has one scale
    importance = torch.ones(128)
    importance[dead] = 0
    plain, got = round_nearest(w, fmt), round_nearest(w, fmt, importance)
    error = [(dequantized(r, fmt) - w)[:, dead].square().sum() for r in (got, plain)]
    assert error[0] < 1.2 * error[1]


def test_rows_are_independent(w, fmt):
    """Stacked siblings give what each gives alone; formats of fused and split layers convert without loss."""
    h = hessian(400)
    together = round_gptq(w, fmt, h)
    for rows in (slice(0, 4), slice(4, 9)):
        alone = round_gptq(w[rows], fmt, h)
        assert torch.equal(alone.codes, together.codes[rows])
        assert torch.equal(alone.scale, together.scale[rows])


def test_rounding_follows_the_scale_of_the_weights(w, fmt):
    """A power of two on the weights moves the scales, never the codes; one on the Hessian moves nothing."""
    h = hessian(400)
    got, larger, heavier = round_gptq(w, fmt, h), round_gptq(w * 1024, fmt, h), round_gptq(w, fmt, h * 1024)
    assert torch.equal(got.codes, larger.codes)
    assert torch.equal(got.scale * 1024, larger.scale)
    assert torch.equal(got.codes, heavier.codes)


def test_inputs_are_left_alone(w, fmt):
    h = hessian(400)
    copies = w.clone(), h.clone()
    round_gptq(w, fmt, h)
    fmt.search_scales(w, h.diagonal())
    assert torch.equal(w, copies[0]) and torch.equal(h, copies[1])


def test_bfloat16_weights(w, fmt):
    low = w.bfloat16()
    got, same = round_gptq(low, fmt, hessian(400)), round_gptq(low.float(), fmt, hessian(400))
    assert torch.equal(got.codes, same.codes)
    assert got.codes.dtype == torch.uint8 and got.scale.dtype == torch.float32
    assert got.scale.shape == (9, fmt.scale_columns(128))
