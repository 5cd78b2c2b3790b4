"""Import of SVDQuant checkpoints: every code and scale, and what the layers and the model compute."""

import json

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dirotq
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.checkpoint import CheckpointError
from dirotq.dirotq_core.cli import main
from dirotq.dirotq_core.nunchaku import import_nunchaku, is_nunchaku
from dirotq.dirotq_core.nunchaku.packing import (
    unpack_codes,
    unpack_down,
    unpack_rows,
    unpack_up,
    unpack_weight_only,
)
from dirotq.dirotq_core.single_file import convert, read_native

from . import nunchaku_files as files


def flux(**changes):
    shape = dict(  # noqa: C408
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=1,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    torch.manual_seed(0)
    return FluxTransformer2DModel(**(shape | changes)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def model():
    return files.Model(flux())


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """The same model in each layout."""
    folder = tmp_path_factory.mktemp("theirs")
    return {
        "native": model.save_native(folder / "svdq-int4_r16-flux.safetensors"),
        "split": model.save_split(folder / "split"),
        "lite": model.save_lite(folder / "lite"),
    }


@pytest.fixture(scope="module", params=["native", "split", "lite"])
def imported(request, written, tmp_path_factory):
    """The checkpoint converted on the command line and loaded in float32."""
    out = tmp_path_factory.mktemp("ours") / request.param
    assert main(["convert", str(written[request.param]), "--out", str(out)]) == 0
    model = FluxTransformer2DModel.from_pretrained(out, torch_dtype=torch.float32)
    model.lite = request.param == "lite"
    return model


def inputs(dtype):
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    return {
        "hidden_states": randn(1, 16, 16), "encoder_hidden_states": randn(1, 5, 64), "pooled_projections": randn(1, 64),
        "timestep": torch.tensor([0.5], dtype=dtype), "guidance": torch.tensor([3.5], dtype=dtype),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


# --- the order of elements ---


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 3), k=st.integers(1, 3), r=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_order_is_undone(n, k, r, seed):
    g = torch.Generator().manual_seed(seed)
    n, k, r = 128 * n, 128 * k, 16 * r
    codes = torch.randint(0, 16, (n, k), generator=g)
    assert torch.equal(unpack_codes(files.pack_codes(codes.numpy())), codes.to(torch.uint8))
    assert torch.equal(unpack_weight_only(files.pack_weight_only(codes.numpy())), codes.to(torch.uint8))
    scale, down, up = (torch.randn(a, b, generator=g).bfloat16() for a, b in ((n, k // 64), (k, r), (n, r)))
    assert torch.equal(unpack_rows(files.pack_rows(scale)), scale)
    assert torch.equal(unpack_rows(files.pack_rows(scale[:, 0].clone())), scale[:, 0])
    assert torch.equal(unpack_down(files.pack_blocks(down, True)), down)
    assert torch.equal(unpack_up(files.pack_blocks(up, False)), up)


@pytest.mark.parametrize(("n", "k"), [(9216, 3072), (3072, 12288)])
def test_real_widths(n, k):
    """FLUX.1's own shapes: random bytes, and rows of them looked up address by address."""
    g = torch.Generator().manual_seed(3)
    packed = torch.randint(-128, 128, (n, k // 2), generator=g, dtype=torch.int8)
    rows = np.sort(np.random.default_rng(4).choice(n, 24, replace=False))
    at, columns = np.meshgrid(rows, np.arange(k), indexing="ij")
    byte, high = files.code_address(at, columns, k)
    expected = packed.numpy().reshape(-1).view(np.uint8)[byte] >> (4 * high) & 15
    np.testing.assert_array_equal(unpack_codes(packed)[rows].numpy(), expected)
    word, nibble = files.weight_only_address(at, columns, k)
    expected = packed.numpy().reshape(-1).view(np.uint16)[word] >> (4 * nibble) & 15
    words = torch.from_numpy(packed.numpy().reshape(n // 4, -1).view(np.int32))
    np.testing.assert_array_equal(unpack_weight_only(words)[rows].numpy(), expected)
    scales = torch.randn(k // 64, n, generator=g)
    at, groups = np.meshgrid(rows, np.arange(k // 64), indexing="ij")
    expected = scales.reshape(-1)[torch.from_numpy(files.row_address(at, groups, k // 64))]
    assert torch.equal(unpack_rows(scales)[rows], expected)


# --- a model ---


def test_codes_scales_and_weights_are_exact(model, imported):
    """The dense weight that each imported linear stands for is that of the stored numbers, in float64."""
    linears = quantized_linears(imported)
    assert set(linears) == {*model.linears, *model.modulation}
    for name, module in linears.items():
        stored = dict(module.named_parameters())
        decoded = module.plan.format.decode(
            module.plan.format.unpack(stored["weight"], module.in_features), torch.float64
        ).numpy()
        if name in model.modulation:
            linear, _ = model.modulation[name]
            np.testing.assert_array_equal(decoded, linear.codes - 7)
            np.testing.assert_array_equal(stored["weight_scale"].double().numpy(), linear.scale.double().numpy())
            np.testing.assert_array_equal(dense(module), linear.weight)
            continue
        parts = model.linears[name]
        np.testing.assert_array_equal(decoded, np.concatenate([p.codes[rows] for p, rows in parts], 1))
        scale = torch.cat([p.scale[rows] for p, rows in parts], 1)
        assert torch.equal(stored["weight_scale"].bfloat16(), scale)
        np.testing.assert_allclose(dense(module), model.weight(name), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(module.bias.double().numpy(), model.bias(name), rtol=2**-8, atol=2**-9)


def dense(module):
    """The linear's dense weight from its tensors, in float64."""
    plan, site = module.plan, module.site.tensors()
    w = plan.format.decode(plan.format.unpack(module.weight, module.in_features), torch.float64)
    w = w * plan.format.expand(module.weight_scale.double(), plan.low_features)
    if plan.transform is None:
        return w.numpy()
    w = w / site["smooth"].double()
    return (w + module.low_rank.double() @ site["basis"].double().T).numpy()


def test_layers_compute_nunchakus_formula(model, imported):
    """With 4-bit activations, signed ones and those behind GELU, and with 16-bit ones: the formula in float64."""
    g = torch.Generator().manual_seed(5)
    for name, module in quantized_linears(imported).items():
        if name in model.modulation:
            continue
        parts = model.linears[name]
        x = torch.randn(9, module.in_features, generator=g)
        widths = [p.codes.shape[1] for p, _ in parts]
        pieces = np.split(x.double().numpy(), np.cumsum(widths)[:-1], axis=1)
        assert module.site.activation == "sym_g64"
        for bits, activation in ((16, None), (4, "sym_g64")):
            module.site.activation = activation
            with torch.no_grad():
                ours = module(x).double().numpy()
            formula = sum(
                p.forward(piece, imported.lite, bits)[:, rows] for (p, rows), piece in zip(parts, pieces, strict=True)
            )
            formula += module.bias.double().numpy() - model.bias(name)  # the bias without the shift's part is rounded
            off = np.linalg.norm(ours - formula, axis=1) / np.linalg.norm(formula, axis=1)
            # In float32 a value on the border of two codes, or of two numbers in bfloat16, may go either way.
            assert np.median(off) < 2e-5 and off.max() < (0.05 if bits == 4 else 1e-3), (name, bits, off)


def relative(found, reference):
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def test_other_weights_fit_an_imported_site(imported):
    """What ComfyUI does to a weight that a LoRA has changed: fold and unfold are inverse, zero columns or not."""
    g = torch.Generator().manual_seed(7)
    for name, module in quantized_linears(imported).items():
        if module.plan.transform is None:
            continue
        site = module.site.tensors()
        w = torch.randn(5, module.in_features, generator=g)
        rest, low_rank = module.plan.transform.fold(w, site)
        torch.testing.assert_close(module.plan.transform.unfold(rest, low_rank, site), w, rtol=1e-3, atol=1e-3)
        unused = ~site["basis"].any(0)
        assert not low_rank[:, unused].any(), name


def test_the_whole_model(model, imported):
    """With 16-bit activations the imported model is the dense one that the file stands for."""
    dirotq.set_activation_bits(imported, 16)
    with torch.no_grad():
        found = imported(**inputs(torch.float32))[0].double().numpy()
        expected = model.filled()(**inputs(torch.float64))[0].numpy()
    assert relative(found, expected) < 0.01
    for bits, most in ((8, 0.05), (4, 0.7)):
        dirotq.set_activation_bits(imported, bits)
        with torch.no_grad():
            assert relative(imported(**inputs(torch.float32))[0].double().numpy(), expected) < most
    assert imported.hf_quantizer.quantization_config.method == "nunchaku"


def test_one_single_block_at_the_real_width(tmp_path):
    """Width 3072, random bytes; the rows of each linear that are looked at are exact."""
    d, r = 3072, 32
    config = {k: v for k, v in flux(num_layers=0, num_single_layers=0).config.items() if not k.startswith("_")}
    config |= {"num_attention_heads": 24, "num_single_layers": 1, "_class_name": "FluxTransformer2DModel"}
    with torch.device("meta"):
        skeleton = FluxTransformer2DModel.from_config(config)
    g = torch.Generator().manual_seed(8)
    gone = ("attn.to_", "proj_mlp", "single_transformer_blocks.0.proj_out", "norm.linear")
    tensors = {
        n.replace(".attn.norm_", ".norm_"): torch.ones(t.shape, dtype=torch.bfloat16)
        for n, t in skeleton.state_dict().items()
        if not any(x in n for x in gone)
    }
    widths = {"qkv_proj": (3 * d, d), "out_proj": (d, d), "mlp_fc1": (4 * d, d), "mlp_fc2": (d, 4 * d)}
    for name, (n, k) in widths.items():
        prefix = f"single_transformer_blocks.0.{name}"
        tensors |= {
            f"{prefix}.qweight": torch.randint(-128, 128, (n, k // 2), generator=g, dtype=torch.int8),
            f"{prefix}.wscales": torch.rand(k // 64, n, generator=g).bfloat16(),
            f"{prefix}.bias": torch.zeros(n).bfloat16(),
            f"{prefix}.smooth": torch.ones(k).bfloat16() * 2,
            f"{prefix}.lora_down": torch.randn(k, r, generator=g).bfloat16(),
            f"{prefix}.lora_up": torch.randn(n, r, generator=g).bfloat16(),
        }
    prefix = "single_transformer_blocks.0.norm.linear"
    scale = torch.rand(d // 64, 3 * d, generator=g).bfloat16()
    tensors |= {
        f"{prefix}.qweight": torch.randint(-(2**31), 2**31, (3 * d // 4, d // 2), generator=g, dtype=torch.int32),
        f"{prefix}.wscales": scale, f"{prefix}.wzeros": -7 * scale, f"{prefix}.bias": torch.zeros(3 * d).bfloat16(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "one.safetensors", {"config": json.dumps(config)})
    found = import_nunchaku(tmp_path / "one.safetensors", progress=False).tensors
    proj_out = "single_transformer_blocks.0.proj_out"
    assert found[f"{proj_out}.weight"].shape == (d, 5 * d // 2)
    rows = np.array([0, 1, 777, 3071])
    at, columns = np.meshgrid(rows, np.arange(4 * d), indexing="ij")
    stored = tensors["single_transformer_blocks.0.mlp_fc2.qweight"].numpy().reshape(-1).view(np.uint8)
    byte, high = files.code_address(at, columns, 4 * d)
    codes = found[f"{proj_out}.weight"][rows, d // 2 :].numpy()
    np.testing.assert_array_equal(
        np.stack([codes & 15, codes >> 4], -1).reshape(len(rows), -1), stored[byte] >> 4 * high & 15
    )
    assert found[f"{proj_out}.low_rank"].shape == (d, 2 * r)
    basis = found[f"{proj_out}.input_site.basis"]
    assert not basis[:d, r:].any() and not basis[d:, :r].any()
    at, ranks = np.meshgrid(np.arange(4 * d), np.arange(r), indexing="ij")
    place = (at // 16 * (r // 16) + ranks // 16) * 256 + files.block_address(ranks % 16, at % 16)
    down = tensors["single_transformer_blocks.0.mlp_fc2.lora_down"].reshape(-1)
    assert torch.equal(basis[d:, r:], down[torch.from_numpy(place)])


def test_straight_to_the_single_file(written, tmp_path):
    """For ComfyUI, in one step or in two: the same bytes."""
    folder = convert(written["native"], tmp_path / "folder")
    one, two = convert(written["native"], tmp_path / "one.safetensors"), convert(folder, tmp_path / "two.safetensors")
    assert one.read_bytes() == two.read_bytes()
    assert read_native(one).quantization.method == "nunchaku"


def test_other_zero_points_stay_in_16_bit(tmp_path, caplog):
    model = files.Model(flux(), zero=9)
    imported = import_nunchaku(model.save_native(tmp_path / "zero.safetensors"), progress=False)
    assert "kept in 16 bit" in caplog.text
    assert imported.config["quantization_config"]["quantize_modulation"] is False
    for name, (linear, _) in model.modulation.items():
        np.testing.assert_allclose(imported.tensors[f"{name}.weight"].double().numpy(), linear.weight, atol=2e-3)


# --- what is refused ---


def change(tensors, name, value):
    return {**tensors, name: value}


QKV = "transformer_blocks.0.qkv_proj"
MLP = "single_transformer_blocks.0.mlp_fc1"


@pytest.mark.parametrize(
    ("edit", "config", "message"),
    [
        (lambda t: change(t, f"{QKV}.wscales", t[f"{QKV}.wscales"].to(torch.float8_e4m3fn)), {}, "is NVFP4"),
        (lambda t: t, {"_class_name": "SanaTransformer2DModel"}, "is a SanaTransformer2DModel; of Nunchaku's models"),
        (lambda t: t, {"_class_name": "NunchakuFluxTransformer2dModel"}, None),
        (lambda t: t, {"num_layers": 2}, r"tensor 'transformer_blocks\.1\..*' is missing"),
        (lambda t: {k: v for k, v in t.items() if k != f"{QKV}.lora_up"}, {}, f"tensor '{QKV}.lora_up' is missing"),
        (lambda t: change(t, "extra.weight", torch.zeros(3)), {}, "tensor 'extra.weight' has no place"),
        (lambda t: change(t, f"{QKV}.extra", torch.zeros(3)), {}, f"tensor '{QKV}.extra' has no place"),
        (lambda t: change(t, f"{QKV}.qweight", t[f"{QKV}.qweight"][:128].clone()), {}, r"shape '\[|have shape"),
        (lambda t: change(t, f"{MLP}.smooth", t[f"{MLP}.smooth"] * 2), {}, "smooth it differently"),
    ],
)
def test_one_sentence(model, tmp_path, edit, config, message):
    file = tmp_path / "theirs.safetensors"
    save_file(edit(model.native()), file, {"config": json.dumps(model.config | config)})
    assert is_nunchaku(file)
    if message is None:
        import_nunchaku(file, progress=False)
        return
    with pytest.raises(CheckpointError, match=message) as failed:
        import_nunchaku(file, progress=False)
    assert "\n" not in str(failed.value) and str(file) in str(failed.value)
    assert main(["convert", str(file), "--out", str(tmp_path / "out")]) == 1 and not (tmp_path / "out").exists()


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_damaged_files(model, tmp_path_factory, data):
    """Whatever is wrong with a tensor, the file is refused in one sentence or gives a checkpoint that holds."""
    tensors = model.native()
    name = data.draw(st.sampled_from(sorted(tensors)))
    value = tensors[name]
    kind = data.draw(st.sampled_from(["gone", "dtype", "flat", "short", "extra dimension", "nan"]))
    if kind == "gone":
        del tensors[name]
    elif kind == "nan" and value.is_floating_point():
        tensors[name] = torch.full_like(value, float("nan"))
    else:
        change = {
            "dtype": lambda: value.to(torch.int64),
            "flat": value.flatten,
            "short": lambda: value[: len(value) // 2],
        }
        tensors[name] = change.get(kind, lambda: value[None])().clone()
    file = tmp_path_factory.mktemp("damaged") / "theirs.safetensors"
    save_file(tensors, file, {"config": json.dumps(model.config)})
    try:
        found = import_nunchaku(file, progress=False)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(file) in str(error)
        return
    assert name.endswith("smooth_orig") or kind in ("dtype", "flat", "nan")
    assert all(torch.isfinite(t).all() for t in found.tensors.values() if t.is_floating_point())


def test_who_reads_ours_says_what_to_do(written):
    with pytest.raises(CheckpointError, match=r"SVDQuant checkpoint of Nunchaku's; `dirotq convert` makes one of it"):
        read_native(written["native"])


def test_no_configuration(model, tmp_path):
    file = tmp_path / "bare.safetensors"
    save_file(model.native(), file)
    with pytest.raises(CheckpointError, match=r"has no configuration in its header; give the merged single file"):
        import_nunchaku(file)


def test_ours_are_not_taken_for_theirs(written, tmp_path):
    ours = convert(written["lite"], tmp_path / "ours.safetensors")
    assert not is_nunchaku(ours) and not is_nunchaku(convert(ours, tmp_path / "folder"))
    assert not is_nunchaku(tmp_path / "nothing")
    assert load_file(ours)
