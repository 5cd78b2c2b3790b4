"""A broken checkpoint raises one clear error that names the tensor, and no model comes back."""

import json

import pytest
import torch
from diffusers.quantizers.base import DiffusersQuantizer
from safetensors.torch import load_file, save_file


def test_tensors(flux_case, copy, broken):
    change, message = broken
    with pytest.raises(ValueError) as error:
        flux_case.load(copy(change))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 2, "format_version 2 is newer than this version of dirotq reads (1); upgrade dirotq"),
        ("format_version", "1", "format_version must be an integer at least 1, got '1'"),
        ("method", "magic", "unknown method 'magic'"),
        ("rank", -1, "rank must be an integer between 0 and 4096, got -1"),
        ("surprise", 1, "unknown fields in the dirotq quantization_config: surprise"),
        ("rank", 32, "missing tensor"),
    ],
)
def test_config(flux_case, copy, key, value, message):
    with pytest.raises(ValueError) as error:
        flux_case.load(copy(config=lambda c: c.update({key: value})))
    assert message in str(error.value)


def test_a_newer_version_is_named_before_its_unknown_fields(flux_case, copy):
    folder = copy(config=lambda c: c.update(format_version=7, novelty=True))
    with pytest.raises(ValueError, match="format_version 7 is newer"):
        flux_case.load(folder)


def test_not_finite_weights_are_not_quantized(flux_case, tmp_path):
    model = flux_case.load(flux_case.dense)
    model.transformer_blocks[0].attn.to_q.weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path)
    import dirotq

    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_q\.weight holds NaN or infinity"):
        flux_case.cls.from_pretrained(tmp_path, quantization_config=dirotq.DiRotQConfig())


def test_a_tensor_that_the_index_does_not_name(flux_case, tmp_path):
    flux_case.load().save_pretrained(tmp_path, max_shard_size="200KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    save_file(load_file(shard) | {"surplus": torch.zeros(3)}, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected tensor: 'surplus'"):
        flux_case.load(tmp_path)


@pytest.mark.skipif(not hasattr(DiffusersQuantizer, "maybe_update_loaded_keys"), reason="needs diffusers 0.39")
def test_pickles_are_not_read(flux_case, tmp_path):
    tensors = load_file(flux_case.quantized / "diffusion_pytorch_model.safetensors")
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text((flux_case.quantized / "config.json").read_text())
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is no safetensors file"):
        flux_case.load(tmp_path)


@pytest.mark.parametrize("how", ["relative", "absolute"])
def test_an_index_that_leads_out_of_the_folder(flux_case, tmp_path, how):
    folder = tmp_path / "model"
    flux_case.load().save_pretrained(folder, max_shard_size="200KB")
    for shard in folder.glob("*.safetensors"):
        shard.rename(tmp_path / shard.name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    body = json.loads(index.read_text())
    prefix = "../" if how == "relative" else f"{tmp_path}/"
    body["weight_map"] = {n: prefix + f for n, f in body["weight_map"].items()}
    index.write_text(json.dumps(body))
    with pytest.raises(ValueError, match=r"which is no \.safetensors file of its own folder"):
        flux_case.load(folder)
