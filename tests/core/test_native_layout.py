"""The single-file layout: names, round trips, and every way to hand in the wrong file."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import dirotq
from dirotq.dirotq_core.checkpoint import CheckpointError
from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.inspect import format_table, inspect_checkpoint
from dirotq.dirotq_core.single_file import (
    convert,
    from_native,
    fusions,
    infer_config,
    inspect_native,
    read_native,
    to_native,
    write_native,
)

CONFIG = {"_class_name": "FluxTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 128}


def flux(**changes):
    shape = dict(  # noqa: C408
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=128, num_attention_heads=1,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    return FluxTransformer2DModel(**(shape | changes)).to(torch.bfloat16)


def pixart(**changes):
    shape = dict(  # noqa: C408
        num_attention_heads=16, attention_head_dim=8, num_layers=2, cross_attention_dim=128, caption_channels=64,
        sample_size=128, use_additional_conditions=False, interpolation_scale=2,
    )  # fmt: skip
    return PixArtTransformer2DModel(**(shape | changes)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Quantized checkpoints in the diffusers layout, by family."""
    out = {}
    for name, model in (("flux", flux()), ("pixart", pixart())):
        torch.manual_seed(0)
        dense, folder = tmp_path_factory.mktemp(f"{name}-dense"), tmp_path_factory.mktemp(name)
        model.save_pretrained(dense)
        config = dirotq.DiRotQConfig()
        quantized = type(model).from_pretrained(dense, quantization_config=config, torch_dtype=torch.bfloat16)
        quantized.save_pretrained(folder)
        out[name] = folder
    return out


def described(model):
    return {"_class_name": type(model).__name__, **model.config}


@pytest.mark.parametrize(
    "model", [flux(), flux(guidance_embeds=False), pixart(), pixart(use_additional_conditions=True)]
)
def test_every_tensor_has_a_name_and_comes_back(model):
    state, config = model.state_dict(), described(model)
    native = to_native(state, config)
    back = from_native(native, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], t) for n, t in state.items())


@pytest.mark.parametrize(
    "model", [flux(), flux(guidance_embeds=False), pixart(), pixart(use_additional_conditions=True)]
)
def test_configuration_is_inferred_from_shapes(model):
    shapes = {n: tuple(t.shape) for n, t in to_native(model.state_dict(), described(model)).items()}
    inferred = infer_config(shapes)
    known = {k: list(v) if isinstance(v, tuple) else v for k, v in described(model).items()}
    assert inferred == {k: known[k] for k in inferred}


def test_fused_rows_are_those_of_the_parts():
    model = flux()
    native = to_native(model.state_dict(), described(model))
    attention = model.single_transformer_blocks[1].attn
    expected = [attention.to_q, attention.to_k, attention.to_v, model.single_transformer_blocks[1].proj_mlp]
    assert torch.equal(native["single_blocks.1.linear1.weight"], torch.cat([m.weight for m in expected]))
    # (scale, shift) in diffusers, (shift, scale) in the original
    scale, shift = model.norm_out.linear.weight.chunk(2)
    assert torch.equal(native["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))
    assert torch.equal(
        native["double_blocks.0.img_attn.norm.query_norm.scale"], model.transformer_blocks[0].attn.norm_q.weight
    )


@given(rows=st.lists(st.integers(1, 5), min_size=1, max_size=3), depth=st.integers(0, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_any_depth_and_field_comes_back(rows, depth, seed):
    """Fields of every kind a quantized linear has; the last part of linear1 is as wide as is left."""
    g = torch.Generator().manual_seed(seed)
    config = CONFIG | {"num_layers": depth, "num_single_layers": depth}
    tensors = {}
    for fusion in fusions(config):
        for i, part in enumerate(fusion.parts):
            wide = 256 if len(fusion.parts) > 1 and i < len(fusion.parts) - 1 else 2 * sum(rows)
            tensors[f"{part}.weight"] = torch.randint(0, 256, (wide, 4), generator=g, dtype=torch.uint8)
            if not fusion.parameter:
                tensors[f"{part}.weight_scale"] = torch.rand(wide, generator=g)
                tensors[f"{part}.low_rank"] = torch.rand(wide, len(rows), generator=g)
                if i == 0:
                    tensors[f"{part}.input_site.signs"] = torch.ones(8, dtype=torch.int8)
    back = from_native(to_native(tensors, config), config)
    assert back.keys() == tensors.keys() and all(torch.equal(back[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_file_equals_folder(folders, family, tmp_path):
    folder = read_native(folders[family])
    write_native(tmp_path / "one.safetensors", folder.tensors, folder.config)
    file = read_native(tmp_path / "one.safetensors")
    assert file.tensors.keys() == folder.tensors.keys() and file.plans == folder.plans
    assert all(torch.equal(file.tensors[n], t) for n, t in folder.tensors.items())
    assert file.quantization == folder.quantization
    with pytest.raises(FileExistsError, match=r"one\.safetensors exists"):
        write_native(tmp_path / "one.safetensors", folder.tensors, folder.config)
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]


def test_parts_quantized_differently_are_refused(tmp_path):
    model = flux()
    model.save_pretrained(tmp_path / "dense")
    config = dirotq.DiRotQConfig(modules_to_not_convert=["transformer_blocks.0.attn.to_k"])
    quantized = FluxTransformer2DModel.from_pretrained(
        tmp_path / "dense", quantization_config=config, torch_dtype=torch.bfloat16
    )
    quantized.save_pretrained(tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"img_attn\.qkv.*quantize all of them or none"):
        read_native(tmp_path / "q")


OTHER_CLASS = {"_class_name": "UNet2DModel", "quantization_config": {"quant_method": "dirotq"}}


def header(metadata=None, tensors=None):
    def write(path):
        save_file(tensors or {"img_in.weight": torch.zeros(2, 2)}, path, metadata=metadata)

    return write


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda p: p.write_bytes(b"GGUF" + bytes(64)), "is a GGUF file"),
        (lambda p: torch.save({"a": torch.zeros(2)}, p), "is a pickle, which is never opened"),
        (lambda p: p.write_bytes(b"\x80\x02}q\x00." + bytes(64)), "is a pickle"),
        (lambda p: p.write_bytes(b""), "truncated or no safetensors"),
        (lambda p: p.write_bytes(bytes([255] * 64)), "truncated or no safetensors"),
        (lambda p: p.write_bytes((64).to_bytes(8, "little") + b"{" * 64), "not valid JSON"),
        (header(), "not quantized"),
        (header(tensors={"a.weight": torch.zeros(2), "a.weight_scale": torch.ones(1)}), "quantized in another way"),
        (header({"dirotq": "{"}), "not valid JSON"),
        (header({"dirotq": "[]"}), "must be a JSON object"),
        (header({"dirotq": "{}"}), "no quantization_config"),
        (header({"dirotq": json.dumps({"quantization_config": {"quant_method": "gguf"}})}), "quant_method is 'gguf'"),
        (
            header({"dirotq": json.dumps({"quantization_config": {"quant_method": "dirotq", "format_version": 99}})}),
            "99",
        ),
        (
            header({"dirotq": json.dumps(OTHER_CLASS)}),
            "recipe|made with",
        ),
    ],
)  # fmt: skip
def test_wrong_files_are_named(write, message, tmp_path):
    path = tmp_path / "model.safetensors"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        read_native(path)
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "nan"])
def test_wrong_tensors_are_named(folders, change, tmp_path):
    good = read_native(folders["flux"])
    tensors, name = dict(good.tensors), "double_blocks.0.img_attn.proj.weight_scale"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["double_blocks.0.img_attn.proj.zero"] = torch.zeros(1)
    elif change == "shape":
        tensors[name] = tensors[name][:-1]
    else:
        tensors[name] = torch.full_like(tensors[name], torch.nan)
    write_native(tmp_path / "bad.safetensors", tensors, good.config)
    with pytest.raises(CheckpointError, match=r"attn\.to_out\.0\.weight_scale|img_attn\.proj\.zero"):
        read_native(tmp_path / "bad.safetensors")


def test_neither_flux_nor_pixart():
    with pytest.raises(ValueError, match=r"neither FLUX\.1 nor PixArt"):
        infer_config({"input_blocks.0.weight": (4, 4)})
    shapes = {"double_blocks.0.img_attn.qkv.weight": (9, 3), "double_blocks.0.img_mod.lin.weight": (9, 3)}
    with pytest.raises(ValueError, match=r"not FLUX\.1"):
        infer_config(shapes)


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_convert_there_and_back(folders, family, tmp_path):
    one = convert(folders[family], tmp_path / "one.safetensors")
    back = convert(one, tmp_path / "back")
    again = convert(back, tmp_path / "again.safetensors")
    assert again.read_bytes() == one.read_bytes()
    files = {f.name: f.read_bytes() for f in folders[family].iterdir()}
    assert {f.name: f.read_bytes() for f in back.iterdir()} == files  # diffusers wrote these
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "back", "one.safetensors"]
    for wrong, target in ((one, tmp_path / "back"), (folders[family], one)):
        with pytest.raises(FileExistsError, match="exists"):
            convert(wrong, target)
    with pytest.raises(ValueError, match="becomes a folder"):
        convert(one, tmp_path / "other.safetensors")


def test_command_line_converts(folders, tmp_path, capsys):
    assert main(["convert", str(folders["flux"]), "--out", str(tmp_path / "one.safetensors")]) == 0
    assert main(["inspect", str(tmp_path / "one.safetensors"), "--limit", "9"]) == 0
    assert "W4A8" in capsys.readouterr().out
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "two.safetensors")]) == 1
    assert "holds no transformer" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_inspecting_a_file_counts_what_the_folder_has(folders, family, tmp_path):
    native = read_native(folders[family])
    name = next(iter(native.plans))
    file = tmp_path / "model.safetensors"
    write_native(file, native.tensors, native.config, {name: 21.456})
    found, folder = inspect_checkpoint(file), inspect_checkpoint(folders[family])
    assert found == inspect_native(file) and "model.safetensors" in format_table(found)
    assert (found.total_bytes, found.parameters) == (folder.total_bytes, folder.parameters)
    assert sum(r.bytes for r in found.rows) == pytest.approx(sum(r.bytes for r in folder.rows))
    assert {r.scheme for r in found.rows} == {r.scheme for r in folder.rows}
    assert {r.name: r.output_db for r in found.rows if r.output_db is not None} == {name: 21.46}


def test_inspecting_a_wrong_file(folders, tmp_path):
    native = read_native(folders["flux"])
    config = {"dirotq": json.dumps(native.config)}
    broken = tmp_path / "report.safetensors"
    save_file(native.tensors, broken, config | {"dirotq_report": "[1]"})
    with pytest.raises(CheckpointError, match="report in its header is no JSON object of numbers"):
        inspect_native(broken)
    lacking = tmp_path / "lacking.safetensors"
    save_file({n: t for n, t in native.tensors.items() if n != "img_in.bias"}, lacking, config)
    with pytest.raises(CheckpointError, match=r"lacking\.safetensors: .*x_embedder.bias"):
        inspect_native(lacking)
