"""Loading, saving and converting through diffusers' own methods."""

import json
import logging

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL

import dirotq
from dirotq.dirotq_core import backend
from dirotq.dirotq_core.build import quantized_linears

from .versions import writes_flashpack


def test_on_the_fly_is_close_and_says_so(case, helpers, caplog):
    with caplog.at_level(logging.WARNING):
        model = case.on_the_fly()
    assert "without calibration data" in caplog.text and "8-bit activations" in caplog.text
    assert helpers.sqnr(helpers.run(model), helpers.run(case.load(case.dense))) > 30
    assert model.dtype == torch.bfloat16
    assert {m.activation_bits for m in quantized_linears(model).values()} <= {8, 16}


def test_round_trip_is_exact(case, helpers, tmp_path):
    model = case.load()
    expected = helpers.run(model)
    assert torch.equal(helpers.run(case.on_the_fly()), expected)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(helpers.run(case.load(tmp_path)), expected)


def test_every_byte_needed_is_in_the_file(case, helpers, monkeypatch):
    """No seed is consulted when loading."""
    expected = helpers.run(case.load())
    import dirotq.dirotq_core.transforms as transforms

    monkeypatch.setattr(transforms, "random_signs", None)
    assert torch.equal(helpers.run(case.load()), expected)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(case, helpers, device_map):
    expected = helpers.run(case.load())
    assert torch.equal(helpers.run(case.load(device_map=device_map)), expected)
    assert torch.equal(helpers.run(case.on_the_fly(device_map=device_map)), expected)


def test_float32_and_float16(case, helpers):
    for dtype in (torch.float32, torch.float16):
        model = case.load(torch_dtype=dtype)
        assert model.dtype == dtype
        assert all(m.weight_scale.dtype == s for m, s in _scales(model))
        dense = case.load(case.dense, torch_dtype=dtype)
        assert helpers.sqnr(helpers.run(model), helpers.run(dense)) > 35
    with pytest.raises(ValueError, match="torch_dtype must be"):
        case.load(torch_dtype=torch.float64)


def _scales(model):
    """Each linear and the dtype its scales are stored in, whatever the model computes in."""
    return [(m, torch.float32 if m.plan.quantize_input else torch.bfloat16) for m in quantized_linears(model).values()]


def test_default_dtype_is_bfloat16(case):
    assert case.cls.from_pretrained(case.quantized).dtype == torch.bfloat16


def test_activation_bits_is_a_run_time_choice(case, helpers):
    model, dense = case.load(), helpers.run(case.load(case.dense))
    before = {n: p.clone() for n, p in model.named_parameters()}
    quality = {}
    for bits in (4, 8, 16):
        dirotq.set_activation_bits(model, bits)
        quality[bits] = helpers.sqnr(helpers.run(model), dense)
    assert quality[4] < quality[8] - 1 and quality[16] > quality[8] - 1
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for bits in (5, 8.0, True, "8"):
        with pytest.raises(ValueError, match=rf"activation_bits must be one of \(4, 8, 16\), got {bits!r}"):
            dirotq.set_activation_bits(model, bits)
    with pytest.raises(ValueError, match="no DiRotQ linears"):
        dirotq.set_activation_bits(case.load(case.dense), 8)


def test_saved_bits_are_loaded(case, tmp_path):
    model = case.load()
    dirotq.set_activation_bits(model, 4)
    model.save_pretrained(tmp_path)
    assert {m.activation_bits for m in quantized_linears(case.load(tmp_path)).values()} <= {4, 16}


def test_dequantize(case, helpers, tmp_path):
    model = case.load()
    dirotq.set_activation_bits(model, 16)
    expected = helpers.run(model)
    dense = model.dequantize()
    assert not quantized_linears(dense) and not dense.is_quantized
    assert dense._repeated_blocks == case.cls._repeated_blocks and not dense._forward_pre_hooks
    assert dense._skip_layerwise_casting_patterns == case.cls._skip_layerwise_casting_patterns
    assert helpers.sqnr(helpers.run(dense), expected) > 40
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(helpers.run(case.load(tmp_path)), helpers.run(dense))


def test_modules_to_not_convert(case, helpers, tmp_path):
    name = next(iter(quantized_linears(case.load())))
    config = dirotq.DiRotQConfig(modules_to_not_convert=[name, "ff"] if "Pix" in case.cls.__name__ else [name])
    model = case.on_the_fly(config)
    assert name not in quantized_linears(model)
    assert not any(".ff." in n for n in quantized_linears(model)) or "Flux" in case.cls.__name__
    model.save_pretrained(tmp_path)
    assert torch.equal(helpers.run(case.load(tmp_path)), helpers.run(model))


def test_saved_config_is_short(case):
    config = json.loads((case.quantized / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "dirotq" and config["format_version"] == 1
    assert len(json.dumps(config)) < 2000 and None not in (config["rank"], config["basis"], config["rounding"])


def test_a_config_object_is_not_changed_by_loading(case):
    config = dirotq.DiRotQConfig()
    case.on_the_fly(config)
    assert config == dirotq.DiRotQConfig()


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {"safe_serialization": False}, "safe_serialization=False"),
        ((True, None, False), {}, "safe_serialization=False"),
        ((), {"safe_serialization": None}, "safe_serialization=None"),
        pytest.param((), {"use_flashpack": True}, "use_flashpack=True", marks=writes_flashpack),
    ],
)
def test_other_files_than_safetensors_are_refused(case, tmp_path, args, kwargs, said):
    with pytest.raises(ValueError, match=f"safetensors only; call save_pretrained without {said}"):
        case.load().save_pretrained(tmp_path / "new", *args, **kwargs)
    assert not list(tmp_path.iterdir())


def test_a_save_without_weights_leaves_the_earlier_one(case, tmp_path, monkeypatch):
    """However that comes about."""
    model = case.load()
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *a, **k: None)
    with pytest.raises(ValueError, match=r"safetensors only, and diffusers wrote config\.json; .* is as it was"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_model_without_a_recipe(tmp_path):
    AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"AutoencoderKL has no DiRotQ recipe; supported: FluxTransformer2DModel, PixArt"
    ):
        AutoencoderKL.from_pretrained(tmp_path, quantization_config=dirotq.DiRotQConfig())


def test_methods_that_need_data_say_so(case):
    for config in (dirotq.DiRotQConfig(method="paper"), dirotq.DiRotQConfig(rank=32)):
        with pytest.raises(ValueError, match=r"needs calibration data: use dirotq\.quantize"):
            case.on_the_fly(config)


@pytest.mark.parametrize(
    ("gpu", "config", "said"),
    [
        (True, {"activation_bits": 4}, True),
        (True, {"activation_bits": 4, "method": "hadamard"}, True),
        (True, {"activation_bits": 8}, False),
        (True, {"activation_bits": 4, "method": "rtn"}, False),
        (False, {"activation_bits": 4}, False),
    ],
)
def test_the_hint_at_eight_bits_is_said_once(flux_case, tmp_path, monkeypatch, caplog, gpu, config, said):
    flux_case.on_the_fly(dirotq.DiRotQConfig(**config)).save_pretrained(tmp_path)
    backend._hint_at_eight_bits.cache_clear()
    caplog.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for _ in range(2):
        flux_case.load(tmp_path)
    warnings = [r for r in caplog.records if "set_activation_bits(model, 8)" in r.message]
    assert [r.levelno for r in warnings] == [logging.WARNING] * said
    backend._hint_at_eight_bits.cache_clear()


def test_a_missing_dtype_is_said(case, caplog):
    with caplog.at_level("WARNING"):
        model = case.cls.from_pretrained(case.quantized)
    assert model.dtype == torch.bfloat16 and "no torch_dtype given" in caplog.text
