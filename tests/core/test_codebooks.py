import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.dirotq_core import codebooks
from dirotq.dirotq_core.codebooks import WEIGHT_FORMATS, weight_format
from dirotq.dirotq_core.methods import METHODS
from dirotq.kernels import dequantize

FORMATS = sorted(WEIGHT_FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_of_table_entries_are_themselves(name):
    fmt = WEIGHT_FORMATS[name]
    codes = torch.arange(len(fmt.table), dtype=torch.uint8).reshape(2, -1)
    encoded = fmt.encode(fmt.decode(codes))
    assert encoded.dtype == torch.uint8
    assert torch.equal(encoded, codes)


@pytest.mark.parametrize("name", FORMATS)
def test_a_tie_goes_to_one_of_its_neighbours(name):
    fmt = WEIGHT_FORMATS[name]
    values = torch.tensor(fmt.table, dtype=torch.float32).sort().values
    ties = (values[1:] + values[:-1]) / 2
    distance = (fmt.decode(fmt.encode(ties)) - ties).abs()
    assert torch.equal(distance, (values[1:] - values[:-1]) / 2)


@settings(deadline=None)
@given(st.lists(st.floats(-200, 200, width=32), min_size=2, max_size=32), st.sampled_from(FORMATS))
def test_rounding_is_monotone_and_saturates(values, name):
    fmt = WEIGHT_FORMATS[name]
    x = torch.tensor(sorted(values))
    decoded = fmt.decode(fmt.encode(x))
    assert (decoded.diff() >= 0).all()
    assert min(fmt.table) <= decoded.min() and decoded.max() <= max(fmt.table)


@pytest.mark.parametrize(("name", "columns"), [("codebook", 1), ("codebook_g64", 3), ("int4_g64", 3)])
def test_scales_expand_to_their_columns(name, columns):
    fmt = WEIGHT_FORMATS[name]
    assert fmt.scale_columns(192) == columns
    scale = torch.arange(2.0 * columns).reshape(2, columns)
    expanded = fmt.expand(scale, 192)
    assert expanded.shape == (2, 192)
    assert all(torch.equal(expanded[:, k], scale[:, k * columns // 192]) for k in range(192))


@pytest.mark.parametrize("name", FORMATS)
def test_decode_keeps_shape_and_takes_the_dtype(name):
    codes = torch.zeros(2, 3, 4, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        decoded = WEIGHT_FORMATS[name].decode(codes, dtype)
        assert decoded.shape == codes.shape
        assert decoded.dtype == dtype


#: Every format that a method has.
ALL = {m.weights.name: m.weights for m in METHODS.values()} | WEIGHT_FORMATS


@pytest.mark.parametrize("name", sorted(ALL))
@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 5), groups=st.integers(1, 4), seed=st.integers(0, 99), size=st.sampled_from([1e-12, 1.0, 1e8])
)
def test_what_is_stored_says_the_weights(name, rows, groups, seed, size):
    """Packed and back; rows alone say what they say together; the ops' table, where there is one, says the same."""
    fmt, k = ALL[name], 64 * groups
    w = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * size
    w[0, :64] = 0
    got = fmt.nearest(w, None)
    packed = fmt.pack(got.codes)
    assert packed.shape == (rows, fmt.packed_columns(k)) and torch.equal(fmt.unpack(packed, k), got.codes)
    stored = {n: got.scales[n].reshape(rows, *tail).to(dtype) for n, (tail, dtype) in fmt.scales(k).items()}
    values = fmt.values(got.codes, stored)
    assert values.shape == w.shape and values.isfinite().all()
    assert (values - w).square().sum() <= 0.6 * w.square().sum()
    one = fmt.values(got.codes[-1:], {n: t[-1:] for n, t in stored.items()})
    assert torch.equal(one[0], values[-1])
    if fmt.table16 is not None:
        dense = dequantize(fmt.widened(packed, k), stored["weight_scale"], fmt.table16, torch.float32)
        torch.testing.assert_close(dense, values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_looking_up_finds_what_searching_finds(name, monkeypatch):
    """Ties and their neighbours, what is beyond every table, and what is no number."""
    fmt, quarters = WEIGHT_FORMATS[name], torch.arange(-600, 601) / 4
    beyond = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([quarters, *(torch.nextafter(quarters, torch.tensor(t)) for t in (1e3, -1e3)), beyond])
    codes, entries = fmt.encode(x), fmt._rounded(x)
    monkeypatch.setattr(codebooks, "lasting", lambda like: False)  # as in a graph
    assert torch.equal(fmt.encode(x), codes) and torch.equal(fmt._rounded(x), entries)
    assert torch.equal(fmt.decode(codes), entries)


def test_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'nf4'.*codebook, codebook_g64, int4_g64, uint4_g64, lloyd4"):
        weight_format("nf4")
