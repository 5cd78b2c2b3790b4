"""Two- and three-bit codes: packed at their size, back again, and widened to the ops' four bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.kernels import (
    linear_a8,
    pack_bits,
    pack_int4,
    pack_trits,
    unpack_bits,
    unpack_trits,
    widen,
    widen_trits,
)

WIDTHS = (2, 3, 4)


@st.composite
def coded(draw):
    """(codes uint8 [N, K], bits), N and K possibly 0."""
    bits, rows, groups = draw(st.sampled_from(WIDTHS)), draw(st.integers(0, 4)), draw(st.integers(0, 6))
    count = rows * groups * 8
    values = draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.uint8).reshape(rows, groups * 8), bits


@settings(deadline=None, max_examples=200)
@given(coded())
def test_there_and_back(case):
    codes, bits = case
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(codes), codes.shape[1] * bits // 8)
    assert torch.equal(unpack_bits(packed, bits), codes)


@settings(deadline=None, max_examples=200)
@given(coded())
def test_widened_is_what_pack_int4_makes(case):
    codes, bits = case
    assert torch.equal(widen(pack_bits(codes, bits), bits), pack_int4(codes))


@settings(deadline=None, max_examples=100)
@given(coded())
def test_a_row_is_one_stream_of_bits(case):
    codes, bits = case
    for row, packed in zip(codes.tolist(), pack_bits(codes, bits).tolist(), strict=True):
        number = sum(code << bits * j for j, code in enumerate(row))
        assert packed == list(number.to_bytes(len(packed), "little"))


def test_four_bits_are_the_layout_of_pack_int4():
    codes = torch.randint(0, 16, (3, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack_bits(codes, 4), pack_int4(codes))


def test_leading_dimensions_are_kept():
    codes = torch.randint(0, 8, (2, 3, 16), generator=torch.Generator().manual_seed(0))
    assert pack_bits(codes, 3).shape == (2, 3, 6)
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3), codes.to(torch.uint8))


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(2, 8), 2, "integer dtype"),
        (torch.zeros(2, 8, dtype=torch.bool), 2, "integer dtype"),
        (torch.zeros(2, 9, dtype=torch.uint8), 3, "multiple of 8"),
        (torch.zeros((), dtype=torch.uint8), 3, "multiple of 8"),
        (torch.full((1, 8), 4), 2, r"0\.\.3"),
        (torch.full((1, 8), -1), 3, r"0\.\.7"),
        (torch.zeros(2, 8, dtype=torch.uint8), 5, "codes of 5 bits"),
    ],
)
def test_codes_that_cannot_be_packed(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack_bits(codes, bits)


def test_bytes_that_cannot_be_codes():
    with pytest.raises(ValueError, match="uint8"):
        unpack_bits(torch.zeros(2, 3), 3)
    with pytest.raises(ValueError, match="groups of 3 bytes"):
        widen(torch.zeros(2, 4, dtype=torch.uint8), 3)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_op_multiplies_widened_codes_exactly(bits):
    g = torch.Generator().manual_seed(bits)
    table = torch.randint(-127, 128, (2**bits,), generator=g).tolist()
    codes = torch.randint(0, 2**bits, (5, 64), generator=g)
    a = torch.randint(-127, 128, (7, 64), generator=g, dtype=torch.int8)
    wide = table * (16 // len(table))
    y = linear_a8(a, torch.ones(7), None, widen(pack_bits(codes, bits), bits), torch.ones(5), None, None, wide,
                  torch.float32)  # fmt: skip
    assert torch.equal(y.double(), a.double() @ torch.tensor(table).double()[codes].T)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 4), st.integers(1, 33), st.integers(0, 99))
def test_five_trits_to_a_byte(rows, pairs, seed):
    columns = 2 * pairs
    codes = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_trits(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-columns // 5))
    assert torch.equal(unpack_trits(packed, columns), codes)
    assert torch.equal(widen_trits(packed, columns), pack_int4(codes))


def test_trits_are_digits_in_base_three():
    assert pack_trits(torch.tensor([[1, 2, 0, 0, 2, 1]])).tolist() == [[1 + 2 * 3 + 2 * 81, 1]]
    assert pack_trits(torch.full((1, 5), 2)).item() == 242
    # A byte that no codes make still says codes.
    assert int(unpack_trits(torch.arange(256, dtype=torch.uint8)[:, None], 5).max()) == 2


def test_what_are_no_trits():
    with pytest.raises(ValueError, match=r"integers in 0\.\.2"):
        pack_trits(torch.tensor([[3]]))
    with pytest.raises(ValueError, match=r"uint8 \[\.\.\., 2\] is needed for 6 columns"):
        unpack_trits(torch.zeros(1, 1, dtype=torch.uint8), 6)
