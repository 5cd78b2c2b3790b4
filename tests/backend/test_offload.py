"""Every way of keeping weights elsewhere gives the bits of the resident model.

On the CPU, with the CPU as the device to compute on. That shows little where weights only move from the CPU to the CPU;
on disk, though, or on meta, a tensor that was not brought in is missing or garbage. tests/backend/test_offload_gpu.py
has the same with a GPU.
"""

import accelerate
import peft
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.hooks import apply_group_offloading

import dirotq
from dirotq.dirotq_core.build import quantized_linears

from ..marks import thorough
from .versions import all_on_disk, groups_on_cpu, knows_files

CPU = torch.device("cpu")
LEVELS = {"leaf_level": {}, "block_level": {"num_blocks_per_group": 1}}


def loaded(case, bits=8, **kwargs):
    model = case.load(**kwargs)
    dirotq.set_activation_bits(model, bits)
    return model


def runs_twice(model, helpers, expected):
    return all(torch.equal(helpers.run(model), expected) for _ in range(2))


# --- diffusers' group offloading ----------------------------------------------------------------------------------


@groups_on_cpu
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("level", LEVELS)
def test_groups_on_disk(case, helpers, tmp_path, level, bits):
    """FLUX.1's single blocks call proj_mlp before to_q, which owns the tensors that both need."""
    expected = helpers.run(loaded(case, bits))
    model = loaded(case, bits)
    model.enable_group_offload(CPU, CPU, level, offload_to_disk_path=str(tmp_path), **LEVELS[level])
    assert list(tmp_path.glob("*.safetensors"))
    assert runs_twice(model, helpers, expected)


@groups_on_cpu
@pytest.mark.parametrize("level", LEVELS)
def test_groups_with_a_lora_loaded_later(flux_case, helpers, level):
    """In memory: on disk diffusers does not write the changed groups again, and a dense model breaks as well."""
    g, lora = torch.Generator().manual_seed(0), {}
    for name, n in [("single_transformer_blocks.0.proj_mlp", 768), ("transformer_blocks.0.attn.to_k", 192)]:
        for ab, shape in {"A": (4, 192), "B": (n, 4)}.items():
            lora[f"transformer.{name}.lora_{ab}.weight"] = 0.1 * torch.randn(shape, generator=g)
    outputs = []
    for offload in (False, True):
        model = loaded(flux_case)
        if offload:
            model.enable_group_offload(CPU, CPU, level, **LEVELS[level])
        FluxPipeline(None, None, None, None, None, None, model).load_lora_weights(dict(lora))
        outputs.append(helpers.run(model))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], helpers.run(loaded(flux_case)))


@groups_on_cpu
@pytest.mark.parametrize("level", LEVELS)
def test_an_absorbed_lora_moves_along(flux_case, helpers, tmp_path, level):
    model = loaded(flux_case)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    model.fuse_lora()
    model.unload_lora()
    expected = helpers.run(model)
    model.enable_group_offload(CPU, CPU, level, offload_to_disk_path=str(tmp_path), **LEVELS[level])
    assert runs_twice(model, helpers, expected)


@groups_on_cpu
def test_fusing_under_group_offload_is_refused(flux_case, tmp_path):
    """The groups hold the tensors that they found; new ones would stay behind, or the old ones come back."""
    model = loaded(flux_case)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]))
    model.enable_group_offload(CPU, CPU, "leaf_level")
    for change in (model.fuse_lora, model.unfuse_lora):
        with pytest.raises(ValueError, match="before enabling group offload"):
            change()


class Siblings(torch.nn.Module):
    """FLUX.1's linears of one site, the one that owns its tensors last."""

    def __init__(self, block):
        super().__init__()
        self.parts = torch.nn.ModuleList([block.proj_mlp, block.attn.to_v, block.attn.to_k, block.attn.to_q])

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], -1)


def gradient(module, x):
    x = x.clone().requires_grad_()
    module(x).float().square().mean().backward()
    return x.grad


@groups_on_cpu
@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (None, 4), ("orbitquant", 3), ("lrq", 4), ("robuq", 2), ("nvfp4", 4),
        *(thorough(*kind) for kind in ((None, 8), (None, 16), ("orbitquant", 4), ("nf4", 16), ("rtn", 4))),
    ],
)  # fmt: skip
def test_gradients_of_linears_in_groups(flux_case, tmp_path, method, bits):
    """Backward runs when the weights are gone again; on disk what stands in their place is not initialized."""
    config = dirotq.DiRotQConfig(method=method, activation_bits=bits) if method else dirotq.DiRotQConfig()
    model = flux_case.on_the_fly(config)
    dirotq.set_activation_bits(model, bits)
    module = Siblings(model.single_transformer_blocks[0])
    x = torch.randn(1, 9, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = gradient(module, x)
    apply_group_offloading(module, CPU, CPU, "leaf_level", offload_to_disk_path=str(tmp_path))
    assert all(torch.equal(gradient(module, x), expected) for _ in range(2))


def lora_gradients(model, helpers):
    model(**helpers.inputs(model))[0].float().square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@groups_on_cpu
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("level", LEVELS)
def test_a_lora_trains_in_groups(pixart_case, helpers, tmp_path, level, bits):
    """PixArt's; diffusers loses the weights of FLUX.1's normalizations, of dense models as well."""
    found = []
    for offload in (False, True):
        model = loaded(pixart_case, bits)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["to_q", "to_k"]), model)
        if offload:
            model.enable_group_offload(CPU, CPU, level, offload_to_disk_path=str(tmp_path), **LEVELS[level])
        found.append(lora_gradients(model, helpers))
    assert len(found[0]) == 16 and all(torch.equal(g, found[1][n]) for n, g in found[0].items())


# --- accelerate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 16])
def test_sequential_offload(case, helpers, bits):
    """What `enable_sequential_cpu_offload` does to the transformer."""
    expected = helpers.run(loaded(case, bits))
    model = loaded(case, bits)
    accelerate.cpu_offload(model, CPU)
    assert all(p.is_meta for p in model.parameters())
    assert runs_twice(model, helpers, expected)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not any(p.is_meta for p in model.parameters()) and runs_twice(model, helpers, expected)


def test_absorbed_loras_under_sequential_offload(flux_case, helpers):
    model = loaded(flux_case)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    with_adapter = helpers.run(model)
    accelerate.cpu_offload(model, CPU)
    with pytest.raises(ValueError, match="fuse it before enabling offload"):
        model.fuse_lora()
    assert torch.equal(helpers.run(model), with_adapter)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    model.fuse_lora()
    model.unload_lora()
    expected = helpers.run(model)
    accelerate.cpu_offload(model, CPU)
    assert runs_twice(model, helpers, expected)


def test_model_offload(pipeline, draw):
    expected = draw(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipeline), expected)
    pipeline.remove_all_hooks()
    assert torch.equal(draw(pipeline), expected)


# --- what else saves memory ---------------------------------------------------------------------------------------


def test_vae_tiling_and_slicing(pipeline, draw):
    """They concern the VAE alone: latents keep their bits."""
    expected = draw(pipeline, output_type="latent")
    pipeline.vae.enable_slicing()
    pipeline.vae.enable_tiling()
    try:
        assert torch.equal(draw(pipeline, output_type="latent"), expected)
        assert torch.isfinite(draw(pipeline)).all()
    finally:
        pipeline.vae.disable_slicing()
        pipeline.vae.disable_tiling()


def test_layerwise_casting_leaves_packed_tensors_alone(case, helpers):
    model = loaded(case)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    quantized = tuple(quantized_linears(model))
    cast = {n for n, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert cast and not any(n.startswith(quantized) for n in cast)
    assert torch.isfinite(helpers.run(model)).all()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith(quantized))


# --- what needs every tensor --------------------------------------------------------------------------------------


def offloaded(case, how, folder):
    """A model that is offloaded in one of the ways that leave no tensor to read."""
    if how == "device map":
        with all_on_disk():
            return loaded(case, device_map={"": "disk"}, offload_folder=str(folder))
    model = loaded(case)
    if how == "sequential":
        accelerate.cpu_offload(model, CPU)
    else:
        model.enable_group_offload(CPU, CPU, how, offload_to_disk_path=str(folder), **LEVELS[how])
    return model


AWAY = [pytest.param(level, marks=groups_on_cpu) for level in LEVELS]
AWAY += ["sequential", pytest.param("device map", marks=knows_files)]


@pytest.mark.parametrize("how", AWAY)
@pytest.mark.parametrize("ran", [False, True], ids=["", "after a forward"])
def test_saving_what_is_offloaded_is_refused(case, helpers, tmp_path, how, ran):
    """Over a good checkpoint, which stays."""
    good = tmp_path / "good"
    case.load().save_pretrained(good)
    before = {p.name: p.read_bytes() for p in good.iterdir()}
    model = offloaded(case, how, tmp_path / "away")
    if ran:
        model(**helpers.inputs(model, torch.bfloat16))
    with pytest.raises(ValueError, match=r"cannot be saved: .*; load it without offloading"):
        model.save_pretrained(good)
    assert {p.name: p.read_bytes() for p in good.iterdir()} == before


@pytest.mark.parametrize("how", AWAY)
@pytest.mark.parametrize("ran", [False, True], ids=["", "after a forward"])
def test_dequantizing_what_is_offloaded_is_refused(case, helpers, tmp_path, how, ran):
    expected = helpers.run(loaded(case))
    model = offloaded(case, how, tmp_path)
    if ran:
        model(**helpers.inputs(model, torch.bfloat16))
    with pytest.raises(ValueError, match=r"cannot be dequantized: .*; load it without offloading"):
        model.dequantize()
    with torch.no_grad():
        assert torch.equal(model(**helpers.inputs(model, torch.bfloat16))[0], expected)


@groups_on_cpu
@pytest.mark.parametrize("level", LEVELS)
def test_groups_in_memory_are_saved_and_not_dequantized(case, helpers, tmp_path, level):
    model = loaded(case)
    model.enable_group_offload(CPU, CPU, level, **LEVELS[level])
    with pytest.raises(ValueError, match="cannot be dequantized under group offload"):
        model.dequantize()
    model.save_pretrained(tmp_path)
    assert torch.equal(helpers.run(case.load(tmp_path)), helpers.run(loaded(case)))


@groups_on_cpu
def test_a_pipeline_of_what_is_offloaded_is_refused_before_it_is_written(flux_case, tmp_path):
    pipe = FluxPipeline(None, None, None, None, None, None, offloaded(flux_case, "leaf_level", tmp_path / "away"))
    with pytest.raises(ValueError, match="cannot be saved"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()
