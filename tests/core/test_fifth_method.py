"""A new method takes its own file and a row in `METHODS`: it then quantizes, runs, saves, loads, converts."""

import importlib.util
from pathlib import Path

import pytest
import torch

import dirotq
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.inspect import inspect_checkpoint
from dirotq.dirotq_core.methods import METHODS
from dirotq.dirotq_core.single_file import convert

FILE = Path(__file__).with_name("fifth_method.py")


@pytest.fixture
def fifth(monkeypatch):
    """The method, with its row in the table."""
    spec = importlib.util.spec_from_file_location("dirotq_fifth_method", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "fifth", module.METHOD)
    return module


def test_it_is_short():
    assert len(FILE.read_text().splitlines()) < 80


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_it_runs_saves_loads_and_converts(fifth, quantized, run, reload, tmp_path, family):
    model, plans = quantized(family, method="fifth", activation_bits=4)
    expected = run(model)
    assert expected.isfinite().all()
    plan = next(p for p in plans if p.method)
    linear = quantized_linears(model)[plan.owner]
    assert linear.weight.shape == (linear.out_features, linear.in_features * 3 // 8)
    model.save_pretrained(tmp_path / "folder")
    assert torch.equal(run(reload(model, tmp_path / "folder")), expected)
    assert "W3A4" in {row.scheme for row in inspect_checkpoint(tmp_path / "folder").rows}
    convert(tmp_path / "folder", tmp_path / "file.safetensors")
    convert(tmp_path / "file.safetensors", tmp_path / "back")
    assert torch.equal(run(reload(model, tmp_path / "back")), expected)
    dirotq.set_activation_bits(model, 16)
    dense = run(model)
    model.dequantize()
    torch.testing.assert_close(run(model), dense, rtol=1e-3, atol=1e-3)


def test_while_loading_and_calibrated(fifth, tiny, run, tmp_path):
    tiny("pixart").save_pretrained(tmp_path)
    config = dirotq.DiRotQConfig(method="fifth")
    model = type(tiny("pixart")).from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.float32)
    reference, y = run(tiny("pixart")), run(model)
    assert 10 * torch.log10(reference.square().sum() / (y - reference).square().sum()) > 15
    assert dirotq.DiRotQConfig(method="fifth").resolved(calibrated=True).rounding == "gptq"
