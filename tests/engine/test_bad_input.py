"""What cannot be quantized ends in one clear message, before anything is written."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.engine import quantize_checkpoint

from .conftest import CAPTIONS

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(flux, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(flux.model.folder, folder)
    return folder


def quantize(capsys, source, out, *extra):
    status = main(["quantize", str(source), "--out", str(out), "--device", "cpu", *extra])
    return status, capsys.readouterr().err


def refused(capsys, source, out, message, *extra):
    status, err = quantize(capsys, source, out, *extra)
    assert status == 1 and message in err and err.count("\n") == 1, err
    assert not out.exists() and not (out.parent / f".{out.name}.partial").exists()


def change_config(source, **fields):
    file = source / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_a_truncated_shard(capsys, source, tmp_path):
    file = source / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    refused(capsys, source, tmp_path / "out", "it is truncated")


@pytest.mark.parametrize("extra", [[], ["--data-free"]])
def test_a_truncated_text_encoder(capsys, source, tmp_path, extra):
    file = source / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(capsys, source, tmp_path / "out", "it is truncated", *extra)


def test_variants_beside_a_text_encoder(flux, source, tmp_path):
    file = source / "text_encoder" / "model.safetensors"
    shutil.copyfile(file, file.with_name("model.fp16.safetensors"))
    assert flux.run(tmp_path / "out", source=source, prompts=CAPTIONS[:1], timesteps=1).linears


def test_a_part_that_cannot_be_loaded_is_not_in_the_way_when_mended(flux, source, tmp_path):
    """What is refused before anything is finished leaves nothing behind that another run is compared with."""
    file = source / "vae" / WEIGHTS
    data = file.read_bytes()
    file.unlink()
    with pytest.raises(OSError, match="vae"):
        flux.run(tmp_path / "out", source=source)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    file.write_bytes(data)
    assert flux.run(tmp_path / "out", source=source, prompts=CAPTIONS[:1], timesteps=1).linears


def test_a_file_instead_of_a_folder(capsys, source, tmp_path):
    refused(capsys, source / "transformer" / WEIGHTS, tmp_path / "out", "is a file; give the pipeline's folder")


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\n  \n", "holds no prompt"), ("Käse".encode("latin-1"), "is not UTF-8 (byte 1)"), (None, "No such file")],
)
def test_prompts_file(capsys, source, tmp_path, data, message):
    file = tmp_path / "prompts.txt"
    if data is not None:
        file.write_bytes(data)
    refused(capsys, source, tmp_path / "out", message, "--prompts", str(file))


def test_no_write_permission(capsys, source, tmp_path, monkeypatch):
    def mkdir(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)  # modes do not stop root
    refused(capsys, source, tmp_path / "out", "Permission denied: ")


def test_a_missing_shard(capsys, source, tmp_path):
    index = {"weight_map": {"x_embedder.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (source / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refused(capsys, source, tmp_path / "out", "00001-of-00002.safetensors is missing")


def test_a_missing_tensor(capsys, source, tmp_path):
    file = source / "transformer" / WEIGHTS
    tensors = load_file(file)
    del tensors["proj_out.weight"]
    save_file(tensors, file)
    refused(capsys, source, tmp_path / "out", "1 missing tensor: 'proj_out.weight'")


def test_another_shape(capsys, source, tmp_path):
    change_config(source, num_attention_heads=2)
    refused(capsys, source, tmp_path / "out", "has shape")


def test_another_architecture(capsys, source, tmp_path):
    change_config(source, _class_name="SD3Transformer2DModel")
    refused(capsys, source, tmp_path / "out", "SD3Transformer2DModel")


def test_eight_bit_floats(capsys, source, tmp_path):
    file = source / "transformer" / WEIGHTS
    tensors = load_file(file)
    name = "transformer_blocks.0.attn.to_q.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file)
    refused(capsys, source, tmp_path / "out", "float8_e4m3fn; dirotq quantizes bfloat16, float16 or float32")


def test_a_weight_that_is_not_a_number(capsys, source, tmp_path):
    file = source / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors["single_transformer_blocks.2.proj_out.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    status, err = quantize(capsys, source, tmp_path / "out", "--data-free")
    assert status == 1 and "single_transformer_blocks.2.proj_out.weight holds NaN or infinity" in err
    assert not (tmp_path / "out").exists()


def test_quantized_already(capsys, source, tmp_path):
    change_config(source, quantization_config={"quant_method": "dirotq"})
    refused(capsys, source, tmp_path / "out", "is quantized already; give the original model")


def test_a_transformer_alone(capsys, source, tmp_path):
    refused(capsys, source / "transformer", tmp_path / "out", "without its pipeline, which calibration runs")
    status, err = quantize(capsys, source / "transformer", tmp_path / "out", "--data-free")
    assert status == 0, err
    assert (tmp_path / "out" / "config.json").is_file()


def test_nowhere_to_write(capsys, source, tmp_path):
    (tmp_path / "file").touch()
    status, err = quantize(capsys, source, tmp_path / "file" / "out")
    assert status == 1 and err.count("\n") == 1 and "file" in err


def test_options_that_exclude_each_other(capsys, source, tmp_path):
    refused(capsys, source, tmp_path / "out", "--samples and --in-memory exclude", "--in-memory", "--samples", "3")
    refused(capsys, source, tmp_path / "out", "--data-free and --parallel exclude", "--data-free", "--parallel")


@pytest.mark.parametrize(
    ("call", "message"), [({"prompt": "x"}, "must not hold 'prompt'"), ({"image": object()}, "a number or a string")]
)
def test_bad_call(flux, tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        flux.run(tmp_path / "out", call=call)
    with pytest.raises(ValueError, match="list of strings"):
        flux.run(tmp_path / "out", prompts=CAPTIONS[0])


@pytest.mark.parametrize(
    ("calibration", "prompts", "message"),
    [
        ("all", ["a"], "must be 'prompts' or 'none'"),
        ("none", ["a"], "exclude each other"),
        ("prompts", [], "needs prompts"),
    ],
)
def test_calibration_that_contradicts_the_prompts(source, tmp_path, calibration, prompts, message):
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "out", prompts=prompts, calibration=calibration)
    assert not (tmp_path / "out").exists()


def test_what_has_no_effect_is_said(flux, tmp_path, caplog):
    flux.run(tmp_path / "out", prompts=["a red circle"], max_gpu_memory=8.0, samples=1)
    assert "no output SQNR" in caplog.text and "max_gpu_memory has no effect on device cpu" in caplog.text
