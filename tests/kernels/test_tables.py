"""Constant tables: the same bits however they are made, kept where they can be."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dirotq.dirotq_core.activations import ACTIVATION_FORMATS
from dirotq.dirotq_core.float4 import NF4
from dirotq.kernels import CODEBOOK16, decode, table_like
from dirotq.kernels.fp4 import E2M1_BY_CODE

TABLES = [NF4, E2M1_BY_CODE, tuple(CODEBOOK16), ACTIVATION_FORMATS["lloyd6"].table]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.untraced
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", TABLES, ids=["nf4", "e2m1", "codebook", "lloyd6"])
def test_a_traced_table_holds_what_a_kept_one_does(values, dtype):
    like, expected = torch.empty(1), torch.tensor(values, dtype=dtype)
    kept = table_like(values, like, dtype)
    assert torch.equal(kept.view(torch.uint8), expected.view(torch.uint8))  # with the sign of e2m1's second zero
    torch.compiler.reset()
    traced = torch.compile(lambda x: table_like(values, x, dtype).clone(), fullgraph=True)
    assert torch.equal(traced(like), expected)


def test_a_table_is_made_once():
    first = table_like((1, 2, 3), torch.empty(1), torch.int8)
    assert table_like((1, 2, 3), torch.empty(7, dtype=torch.uint8), torch.int8) is first
    assert table_like((1, 2, 3), torch.empty(1), torch.float32) is not first


def test_a_table_made_in_inference_mode_serves_training():
    values = (0.25, 0.5, 4.0)
    with torch.inference_mode():
        table_like(values, torch.empty(1), torch.float32)
    x = torch.ones(3, requires_grad=True)
    (x * table_like(values, x, torch.float32)).sum().backward()
    assert x.grad.tolist() == list(values)


def test_stand_ins_are_not_kept():
    """A fake tensor that stayed would break every later call."""
    values = (7, 5, 3)
    with FakeTensorMode():
        fake = table_like(values, torch.empty(1), torch.int16)
    real = table_like(values, torch.empty(1), torch.int16)
    assert type(fake) is not torch.Tensor and real.tolist() == list(values)
    with FakeTensorMode() as mode:
        table_like(values, mode.from_tensor(torch.empty(1)), torch.int16)
    assert table_like(values, copy.deepcopy(torch.empty(1)), torch.int16) is real


@pytest.mark.parametrize("table", [list(CODEBOOK16), list(range(-127, -111)), [*range(8), *range(-8, 0)]])
def test_decode_looks_up_every_code(table):
    packed = torch.arange(256, dtype=torch.uint8)
    expected = [table[c] for byte in range(256) for c in (byte & 15, byte >> 4)]
    assert decode(packed, table).tolist() == expected
