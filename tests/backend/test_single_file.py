"""`from_single_file`, whose files have no configuration: dense weights are quantized while they load."""

import inspect

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders import single_file_model
from safetensors.torch import load_file, save_file

import dirotq
from dirotq import CheckpointError
from dirotq.dirotq_core.single_file import convert

from .. import processes

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
    with pytest.raises(ValueError, match="part of a dirotq checkpoint: load its folder"):
        load(flux_case, flux_case.quantized / NAME)


@pytest.mark.parametrize("given", ["", "config", "quantization_config"])
@pytest.mark.parametrize("method", [None, "rtn"], ids=["", "without sites"])
def test_comfyui_s_file_points_to_convert(flux_case, tmp_path, given, method):
    """Before diffusers converts it, which asks the Hub for a configuration or splits rows that are fused otherwise."""
    folder = flux_case.quantized
    if method:
        folder = tmp_path / "other"
        flux_case.on_the_fly(dirotq.DiRotQConfig(method=method)).save_pretrained(folder)
    file = convert(folder, tmp_path / "one.safetensors")
    options = {"config": str(flux_case.dense)} if given else {}
    if given == "quantization_config":
        options[given] = dirotq.DiRotQConfig()
    with pytest.raises(CheckpointError, match=r"`dirotq convert .*one\.safetensors --out FOLDER`"):
        flux_case.cls.from_single_file(str(file), torch_dtype=torch.bfloat16, **options)
    with pytest.raises(CheckpointError, match="dirotq convert"):
        FluxPipeline.from_single_file(str(file), torch_dtype=torch.bfloat16)


@pytest.mark.parametrize("before", ["", "import diffusers.loaders.single_file_model, diffusers.loaders.single_file"])
def test_whichever_is_imported_first(flux_case, tmp_path, before):
    file = convert(flux_case.quantized, tmp_path / "one.safetensors")
    script = f"""
import sys
{before}
import dirotq
from diffusers import FluxTransformer2DModel
FluxTransformer2DModel.from_single_file(sys.argv[1])
"""
    done = processes.run(script, file)
    assert "run `dirotq convert" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(
    "maybe_update_state_dict" not in inspect.getsource(single_file_model), reason="needs diffusers 0.42"
)
def test_tensors_of_one_are_refused_as_well(flux_case, tmp_path):
    file = convert(flux_case.quantized, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="`dirotq convert FILE --out FOLDER`"):
        flux_case.cls.from_single_file(load_file(file), quantization_config=dirotq.DiRotQConfig())


def test_eight_bit_floats_are_refused(flux_case, tmp_path):
    tensors = load_file(flux_case.dense / NAME)
    save_file({k: v.to(torch.float8_e4m3fn) if v.dim() == 2 else v for k, v in tensors.items()}, tmp_path / NAME)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float8_e4m3fn; dirotq quantizes bfloat16"):
        load(flux_case, tmp_path / NAME)
