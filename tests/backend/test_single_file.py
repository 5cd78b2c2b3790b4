"""`from_single_file`, whose files have no configuration: dense weights are quantized while they load."""

import inspect

import pytest
import torch
from diffusers.loaders import single_file_model
from safetensors.torch import load_file, save_file

import dirotq

NAME = "diffusion_pytorch_model.safetensors"
PREFIX = "model.diffusion_model."


def load(case, file, config=None, **kwargs):
    return case.cls.from_single_file(
        str(file), config=str(case.dense), quantization_config=config or dirotq.DiRotQConfig(),
        **{"torch_dtype": torch.bfloat16, **kwargs},
    )  # fmt: skip


def test_a_dense_file_is_quantized(flux_case, helpers, tmp_path, caplog):
    model = load(flux_case, flux_case.dense / NAME)
    assert "without calibration data" in caplog.text
    expected = helpers.run(flux_case.load())
    assert torch.equal(helpers.run(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(helpers.run(flux_case.load(tmp_path)), expected)


@pytest.fixture
def other_layout(flux_case, tmp_path, monkeypatch):
    """Write `flux_case`'s tensors under other names, with a converter; diffusers' own takes only FLUX.1's width."""
    row = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]

    def convert(checkpoint, **kwargs):
        return {k.removeprefix(PREFIX): v for k, v in checkpoint.items()}

    def write(*without):
        tensors = load_file(flux_case.dense / NAME)
        save_file({PREFIX + k: v for k, v in tensors.items() if k not in without}, tmp_path / NAME)
        return tmp_path / NAME

    monkeypatch.setitem(row, "checkpoint_mapping_fn", convert)
    return write


def test_another_layout_is_converted_first(flux_case, helpers, other_layout):
    assert torch.equal(helpers.run(load(flux_case, other_layout())), helpers.run(flux_case.load()))


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.to_q.weight", "x_embedder.bias"])
def test_a_missing_tensor_is_named(flux_case, other_layout, name):
    with pytest.raises(ValueError, match=rf"checkpoint lacks 1 tensors, among them '{name}'"):
        load(flux_case, other_layout(name))


def test_default_dtype_is_bfloat16(flux_case):
    assert load(flux_case, flux_case.dense / NAME, torch_dtype=None).dtype == torch.bfloat16


@pytest.mark.parametrize("config", [{"method": "paper"}, {"rank": 32}, {"rounding": "gptq"}])
def test_what_needs_data_says_so(flux_case, config):
    with pytest.raises(ValueError, match=r"needs calibration data: use dirotq\.quantize"):
        load(flux_case, flux_case.dense / NAME, dirotq.DiRotQConfig(**config))


@pytest.mark.skipif(
    "maybe_update_state_dict" not in inspect.getsource(single_file_model), reason="needs diffusers 0.42"
)
def test_a_quantized_file_points_to_its_folder(flux_case):
    with pytest.raises(ValueError, match="part of a dirotq checkpoint"):
        load(flux_case, flux_case.quantized / NAME)


def test_eight_bit_floats_are_refused(flux_case, tmp_path):
    tensors = load_file(flux_case.dense / NAME)
    save_file({k: v.to(torch.float8_e4m3fn) if v.dim() == 2 else v for k, v in tensors.items()}, tmp_path / NAME)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float8_e4m3fn; dirotq quantizes bfloat16"):
        load(flux_case, tmp_path / NAME)
