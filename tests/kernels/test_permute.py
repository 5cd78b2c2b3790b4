"""The PTX that looks codes up in a table, computed by what its instructions are defined to do."""

import os
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton does not compile while it interprets", allow_module_level=True)

import triton.language as tl  # noqa: E402

from dirotq.kernels import triton_common  # noqa: E402
from dirotq.kernels.triton_common import decode_pairs  # noqa: E402

from .offline import TARGETS, compile_for  # noqa: E402

WORDS = st.integers(0, 2**32 - 1)
TABLES = st.lists(st.integers(-128, 127), min_size=16, max_size=16)


def prmt(a, b, selector):
    """PTX ISA, 9.7.9.7, default mode: each nibble of the selector picks a byte of {b, a}, or its sign."""
    found = 0
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = ((b << 32 | a) >> (8 * (nibble & 7))) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        found |= byte << (8 * i)
    return found


STEPS = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "shr": lambda a, b: a >> b, "prmt": prmt}


def run(ptx, values):
    """The values of all names after PTX of 32-bit steps without branches, from some at first."""
    values = dict(values)
    for name, arguments in re.findall(r"^\s*(and|or|shr|prmt)\.[bu]32\s+(.*);$", ptx, re.M):
        target, *operands = arguments.split(", ")
        values[target] = STEPS[name](*(values[x] if x in values else int(x.rstrip("U"), 0) for x in operands))
    return values


def words_of(table):
    return [int(x) for x in np.array(table, np.int8).view(np.uint32)]


def bytes_of(*words):
    return np.array(words, np.uint32).view(np.int8).tolist()


@given(WORDS, TABLES)
@pytest.mark.parametrize("places", [(3, 4, 5, 6), (3, 7, 11, 15)])
def test_every_code_becomes_its_value(places, word, table):
    names = [f"${place}" for place in places]
    before = {"$2": word, **dict(zip(names, words_of(table), strict=True))}
    after = run(triton_common.permute(*places), before)
    assert bytes_of(after["$0"], after["$1"]) == [table[word >> (4 * i) & 15] for i in range(8)]


@triton.jit
def pairs_kernel(packed_ptr, low_ptr, high_ptr, t0, t1, t2, t3, ASM: tl.constexpr):
    at = tl.arange(0, 128)
    low, high = decode_pairs(tl.load(packed_ptr + at), t0, t1, t2, t3, ASM)
    tl.store(low_ptr + at, low)
    tl.store(high_ptr + at, high)


@pytest.fixture(scope="module")
def pairs():
    """Of a thread that decodes four bytes: what it loads, the table's arguments, what it stores, and its PTX."""
    types = {"packed_ptr": "u8", "low_ptr": "i8", "high_ptr": "i8"}
    values = {"ASM": True, "num_warps": 1, "num_stages": 1}
    ptx = compile_for(TARGETS["sm_89"][0], pairs_kernel, types, values).asm["ptx"]
    (loaded,) = re.findall(r"ld\.global\S*\s+\{ (%r\d+) \}", ptx)
    table = [re.search(rf"ld\.param\.[bu]32\s+(%r\d+), \[pairs_kernel_param_{i}\]", ptx)[1] for i in (3, 4, 5, 6)]
    stored = re.findall(r"st\.global\S*\s+\[ \S+ \+ 0 \], \{ (%r\d+) \}", ptx)
    assert len(stored) == 2
    return loaded, table, stored, ptx[ptx.index("ld.global") : ptx.rindex("st.global")]


@given(WORDS, TABLES)
def test_the_compiler_keeps_bytes_in_order(pairs, word, table):
    loaded, names, stored, ptx = pairs
    after = run(ptx, {loaded: word, **dict(zip(names, words_of(table), strict=True))})
    low, high = (bytes_of(after[name]) for name in stored)
    assert low == [table[word >> (8 * i) & 15] for i in range(4)]
    assert high == [table[word >> (8 * i + 4) & 15] for i in range(4)]


def test_a_table_is_its_words():
    table = list(range(-8, 8))
    assert bytes_of(*(word % 2**32 for word in triton_common.table_words(table))) == table
