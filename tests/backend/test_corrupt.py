"""A broken checkpoint raises one clear error that names the tensor, and no model comes back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(flux_case, tmp_path):
    """Copy the quantized checkpoint with `change(tensors)` applied, and return its folder."""

    def make(change=lambda tensors: None, config=lambda c: None):
        folder = tmp_path / "copy"
        shutil.copytree(flux_case.quantized, folder)
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE, metadata={"format": "pt"})
        raw = json.loads((folder / "config.json").read_text())
        config(raw["quantization_config"])
        (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return make


WEIGHT = "single_transformer_blocks.0.proj_out.weight"
SCALE = "single_transformer_blocks.0.proj_out.weight_scale"
SIGNS = "transformer_blocks.0.attn.to_q.input_site.signs"


def set_to(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name])

    return change


def poison(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(WEIGHT), f"1 missing tensor: '{WEIGHT}'"),
        (lambda t: t.pop("x_embedder.bias"), "1 missing tensor: 'x_embedder.bias'"),
        (lambda t: t.update(surplus=torch.zeros(3)), "1 unexpected tensor: 'surplus'"),
        (set_to(WEIGHT, lambda w: w.to(torch.int32)), f"'{WEIGHT}' has dtype torch.int32, expected torch.uint8"),
        (set_to(SCALE, lambda s: s.to(torch.bfloat16)), f"'{SCALE}' has dtype torch.bfloat16, expected torch.float32"),
        (set_to(WEIGHT, lambda w: w[:, :-1].contiguous()), f"'{WEIGHT}' has shape"),
        (set_to(SCALE, lambda s: s[:-1]), f"'{SCALE}' has shape"),
        (set_to(SCALE, poison), f"'{SCALE}' holds NaN or infinity"),
        (set_to(SCALE, lambda s: -s), f"'{SCALE}' holds a negative scale"),
        (set_to(SIGNS, lambda s: s * 2), f"'{SIGNS}' holds values other than"),
    ],
)
def test_tensors(flux_case, copy, change, message):
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
