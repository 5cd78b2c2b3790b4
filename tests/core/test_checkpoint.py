"""Every way to break a checkpoint raises one error that names the tensor."""

import pytest
import torch

from dirotq import CheckpointError
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.checkpoint import check_names, check_tensor, expected_tensors

F32, BF16, U8, I8 = torch.float32, torch.bfloat16, torch.uint8, torch.int8
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("method", ["dirotq", "rtn"])
@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_a_quantized_model_has_exactly_the_expected_tensors(quantized, family, method):
    model, plans = quantized(family, method=method)
    linears = quantized_linears(model)
    spec = expected_tensors(plans, {n: m.bias is not None for n, m in linears.items()})
    state = model.state_dict()
    check_names({n for n in state if n.startswith(tuple(linears))}, spec)
    for name, (shape, dtype) in spec.items():
        check_tensor(name, state[name], shape, dtype)


@pytest.mark.parametrize(
    ("leaf", "tensor", "shape", "dtype", "parts"),
    [
        ("weight", torch.zeros(2, 32, dtype=U8), (2, 64), U8, ["(2, 32)", "(2, 64)"]),
        ("weight", torch.zeros(64, 2, dtype=U8), (2, 64), U8, ["(64, 2)", "(2, 64)"]),
        ("weight", torch.zeros(2, 64, dtype=I8), (2, 64), U8, ["int8", "uint8"]),
        ("weight", torch.zeros(2, 64), (2, 64), U8, ["float32", "uint8"]),
        ("weight_scale", torch.ones(2, dtype=BF16), (2,), F32, ["bfloat16", "float32"]),
        ("weight_scale", torch.ones(2, 1), (2,), F32, ["(2, 1)", "(2,)"]),
        ("weight_scale", torch.tensor([1, NAN]), (2,), F32, ["NaN or infinity"]),
        ("weight_scale", torch.tensor([1, INF]), (2,), F32, ["NaN or infinity"]),
        ("weight_scale", torch.tensor([1.0, -1]), (2,), F32, ["negative scale"]),
        ("low_rank", torch.tensor([[1, -INF]], dtype=BF16), (1, 2), BF16, ["NaN or infinity"]),
        ("bias", torch.zeros(2, dtype=torch.int32), (2,), F32, ["int32", "floating-point"]),
        ("bias", torch.tensor([0, NAN], dtype=BF16), (2,), F32, ["NaN or infinity"]),
        ("input_site.basis", torch.zeros(64, 4, dtype=torch.float16), (64, 4), BF16, ["float16", "bfloat16"]),
        ("input_site.basis", torch.full((64, 4), NAN, dtype=BF16), (64, 4), BF16, ["NaN or infinity"]),
        ("input_site.smooth", torch.tensor([1.0, 0]), (2,), F32, ["smoothing factor that is not positive"]),
        ("input_site.smooth", torch.tensor([1.0, -1]), (2,), F32, ["smoothing factor that is not positive"]),
        ("input_site.signs", torch.tensor([1, 0, -1], dtype=I8), (3,), I8, ["other than +1 and -1"]),
        ("input_site.signs", torch.tensor([1, 1, -3], dtype=I8), (3,), I8, ["other than +1 and -1"]),
    ],
)
def test_a_bad_tensor_is_named(leaf, tensor, shape, dtype, parts):
    name = f"transformer_blocks.0.ff.net.2.{leaf}"
    with pytest.raises(CheckpointError) as error:
        check_tensor(name, tensor, shape, dtype)
    assert all(part in str(error.value) for part in [repr(name), *parts])


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_a_bias_may_have_any_float_dtype(dtype):
    check_tensor("a.bias", torch.zeros(2, dtype=dtype), (2,), F32)


def test_a_zero_scale_is_a_zero_row():
    check_tensor("a.weight_scale", torch.zeros(2), (2,), F32)


def test_missing_and_unexpected_tensors_are_named_together():
    with pytest.raises(CheckpointError) as error:
        check_names({"a", "x"}, {"a", "b"})
    assert "1 missing tensor: 'b'" in str(error.value)
    assert "1 unexpected tensor: 'x'" in str(error.value)


def test_many_missing_tensors_are_counted():
    with pytest.raises(CheckpointError, match=r"12 missing tensors: 't00', 't01', 't02' and 9 more"):
        check_names([], [f"t{i:02}" for i in range(12)])


def test_fitting_names_pass_in_any_order():
    check_names(iter(["b", "a"]), ("a", "b"))
