"""Methods with weights of 2 and 3 bits, activations of 3 and 6, and a permutation, in whole models."""

import logging
import math

import pytest
import torch

import dirotq
from dirotq.dirotq_core import input_site
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.checkpoint import CheckpointError, check_values
from dirotq.dirotq_core.inspect import inspect_checkpoint
from dirotq.dirotq_core.methods import METHODS as ROWS
from dirotq.dirotq_core.single_file import convert

from ..marks import thorough

METHODS = {
    "orbitquant": 4,
    "orbitquant_w3": 3,
    "orbitquant_w2": 2,
    "lrq": 4,
    "lrq_w3": 3,
    "nvfp4": 4,
    "nf4": 4,
    "robuq": 1.6,
}


def decibels(y, reference):
    return float(10 * torch.log10(reference.square().sum() / (y - reference).square().sum()))


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("family", ["flux", thorough("pixart")])
def test_round_trips_are_exact(quantized, run, reload, tmp_path, family, method):
    activation = 4 if ROWS[method].activations else 16
    model, plans = quantized(family, method=method, activation_bits=activation)
    expected, bits = run(model), METHODS[method]
    for plan in (p for p in plans if p.method):
        for name, n in zip(plan.linears, plan.out_features, strict=True):
            assert quantized_linears(model)[name].weight.shape == (n, math.ceil(plan.in_features * bits / 8))
    model.save_pretrained(tmp_path / "folder")
    assert torch.equal(run(reload(model, tmp_path / "folder")), expected)
    assert f"W{ROWS[method].weights.label}A{activation}" in {
        row.scheme for row in inspect_checkpoint(tmp_path / "folder").rows
    }
    convert(tmp_path / "folder", tmp_path / "file.safetensors")
    convert(tmp_path / "file.safetensors", tmp_path / "back")
    assert torch.equal(run(reload(model, tmp_path / "back")), expected)


def test_modulation_is_int4_in_groups(quantized):
    model, plans = quantized("flux", method="orbitquant_w2")
    modulation = [p for p in plans if p.method is None]
    assert modulation and {p.format.name for p in modulation} == {"int4_g64"}
    assert quantized_linears(model)[modulation[0].owner].activation_bits == 16


def test_more_bits_are_closer(quantized, tiny, run):
    reference, quality = run(tiny("pixart")), {}
    for method, bits in ((m, b) for m, b in METHODS.items() if m.startswith("orbitquant")):
        model, _ = quantized("pixart", method=method)
        for activation in (3, 4, 6, 8, 16):
            dirotq.set_activation_bits(model, activation)
            quality[bits, activation] = decibels(run(model), reference)
    for activation in (3, 4, 6, 8, 16):
        assert quality[2, activation] < quality[3, activation] < quality[4, activation]
    assert quality[4, 3] < quality[4, 4] < quality[4, 6] < quality[4, 16]


def test_every_site_has_bits_of_its_own(quantized, run, reload, tmp_path):
    """They come from the file, and `set_activation_bits` makes them equal again."""
    uniform, plans = quantized("pixart", method="robuq", activation_bits=4)
    sites = [p for p in plans if p.quantize_input]
    digits = "".join(str(1 + i % 4) for i in range(len(sites)))
    model, _ = quantized("pixart", method="robuq", activation_bits=4, site_activation_bits=digits)
    expected = run(model)
    assert not torch.equal(expected, run(uniform))
    model.save_pretrained(tmp_path / "folder")
    again = reload(model, tmp_path / "folder")
    assert [quantized_linears(again)[p.owner].activation_bits for p in sites] == [int(d) for d in digits]
    assert torch.equal(run(again), expected)
    schemes = {r.name: r.scheme for r in inspect_checkpoint(tmp_path / "folder").rows}
    assert [schemes[p.owner] for p in sites] == [f"W1.58A{d}" for d in digits]
    convert(tmp_path / "folder", tmp_path / "file.safetensors")
    assert {r.scheme for r in inspect_checkpoint(tmp_path / "file.safetensors").rows} >= {"W1.58A1", "W1.58A3"}
    convert(tmp_path / "file.safetensors", tmp_path / "back")
    assert torch.equal(run(reload(model, tmp_path / "back")), expected)
    dirotq.set_activation_bits(model, 4)
    assert torch.equal(run(model), run(uniform))
    assert model.hf_quantizer.quantization_config.site_activation_bits is None


def test_bits_of_sites_must_fit_the_model(quantized):
    with pytest.raises(ValueError, match=r"site_activation_bits has 2 digits; the model has \d+ sites"):
        quantized("pixart", method="robuq", site_activation_bits="34")
    for digits in ("5", "3x", "", 34):
        with pytest.raises(ValueError, match=r"site_activation_bits must be digits out of \(1, 2, 3, 4\).*got"):
            dirotq.DiRotQConfig(method="robuq", site_activation_bits=digits)


def test_bits_that_a_method_has_no_format_for(quantized):
    model, _ = quantized("pixart", method="orbitquant")
    with pytest.raises(ValueError, match=r"one of \(3, 4, 6, 8, 16\), got 5"):
        dirotq.set_activation_bits(model, 5)
    model, _ = quantized("pixart", method="hadamard")
    with pytest.raises(ValueError, match=r"one of \(4, 8, 16\), got 6"):
        dirotq.set_activation_bits(model, 6)


@pytest.mark.parametrize(
    ("method", "activation"), [(m, b) for m in sorted(METHODS) for b in (*ROWS[m].activations, 16)]
)
def test_gradients_pass_straight_through(quantized, method, activation):
    model, plans = quantized("pixart", method=method, activation_bits=activation)
    module = quantized_linears(model)[plans[0].owner]
    x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = module(x)
    with torch.no_grad():
        torch.testing.assert_close(y, module(x), rtol=1e-3, atol=1e-3)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * g).sum().backward()
    torch.testing.assert_close(x.grad, g @ module.dequantized_weight(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrong", [[0, 1, 1], [1, 2, 3], [0, -1, 2]])
def test_what_is_no_permutation_is_refused(wrong):
    check_values("a.input_site.permutation", torch.tensor([2, 0, 1], dtype=torch.int32))
    with pytest.raises(CheckpointError, match=r"a\.input_site\.permutation.*not a permutation of 0 to 2"):
        check_values("a.input_site.permutation", torch.tensor(wrong, dtype=torch.int32))


@pytest.mark.parametrize("wrong", [0x7F, 0x80, 0xFF])
def test_block_scales_are_finite_and_not_negative(wrong):
    check_values("a.block_scale", torch.tensor([[0, 0x7E]], dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=r"a\.block_scale.*negative or NaN in float8 e4m3"):
        check_values("a.block_scale", torch.tensor([[0, wrong]], dtype=torch.uint8))


def test_the_slower_path_says_so_once(caplog):
    input_site._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            input_site.say_slower("cuda", "2-bit weights are widened to 4 bits before every product")
        input_site.say_slower("cpu", "nothing")
    assert [r.message.count("2-bit") for r in caplog.records] == [1]
    input_site._say_once.cache_clear()


@pytest.mark.untraced
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("method", "activation"),
    [
        ("orbitquant_w2", 6), ("lrq", 4), ("nvfp4", 4),
        *(thorough(*kind) for kind in (("orbitquant", 4), ("orbitquant_w3", 3), ("nf4", 16))),
    ],
)  # fmt: skip
def test_one_graph_in_every_dtype(quantized, method, activation, dtype):
    model, plans = quantized("pixart", method=method, activation_bits=activation)
    plan = next(p for p in plans if len(p.linears) == 1)
    module = quantized_linears(model)[plan.owner]
    x = torch.randn(5, plan.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.compiler.reset()
    with torch.no_grad():
        y = module(x)
        compiled = torch.compile(module, backend="eager", fullgraph=True)(x)
    assert y.dtype == dtype and torch.equal(compiled, y)


@pytest.mark.parametrize("method", ["orbitquant_w3", "lrq", "nvfp4"])
def test_a_model_partly_on_disk(quantized, run, tmp_path, method):
    model, _ = quantized("pixart", method=method, activation_bits=4)
    model.save_pretrained(tmp_path / "model")
    parts = {name: "cpu" for name, _ in model.named_children()} | {"scale_shift_table": "cpu"}
    again = type(model).from_pretrained(
        tmp_path / "model",
        torch_dtype=torch.float32,
        device_map=parts | {"transformer_blocks": "disk"},
        offload_folder=str(tmp_path / "disk"),
    )
    torch.testing.assert_close(run(again), run(model), rtol=1e-4, atol=1e-4)
