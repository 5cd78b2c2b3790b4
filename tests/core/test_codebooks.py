import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.dirotq_core.codebooks import WEIGHT_FORMATS, weight_format

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


def test_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'nf4'.*codebook, codebook_g64, int4_g64, lloyd4"):
        weight_format("nf4")
