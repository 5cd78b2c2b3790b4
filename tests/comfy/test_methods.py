"""Checkpoints of every method through the nodes: they load, say what they are, and draw as they do in diffusers."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

import dirotq
from dirotq.dirotq_core.methods import METHODS
from dirotq.dirotq_core.single_file import convert, read_native

from ..core import nunchaku_files
from . import graphs, models
from .beside_diffusers import assert_equal, assert_same_linears, calibrated_flux, drawing
from .graphs import node
from .stand_ins import TextEncoder

#: Name of the checkpoint → its configuration; the activation bits are those of its default, or the ones given.
CONFIGS = {name: {"method": name} for name in METHODS if name != "nunchaku"}
CONFIGS |= {
    "orbitquant at 3": {"method": "orbitquant_w3", "activation_bits": 3},
    "robuq by site": {"method": "robuq", "site_activation_bits": "432143214321"},
}
PROMPT, SEED, STEPS = "a blue square", 5, 2


@pytest.fixture(scope="module")
def folder(client):
    folder = client.base / "models" / "diffusion_models" / "methods"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def schedule(core, checkpoint):
    """Any FLUX.1 MODEL."""
    return core.model.make_model(checkpoint, core.model.make_settings(checkpoint, "16", "auto", "side branch"))


def conditioning():
    encoder = TextEncoder()
    context, pooled = encoder.encode_from_tokens(encoder.tokenize(PROMPT), return_pooled=True)
    return {"context": context, "y": pooled, "guidance": torch.tensor([3.5])}


def check(client, core, schedule, name, path):
    """The latents that `name` of the loader's list draws, beside the diffusers model in the folder `path`.

    With its own activation bits and with 16. The linears alone compute the same bits; the rest of the two models rounds
    in another order, and at 1 to 3 bits a single code that moves is seen.
    """
    model = FluxTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32)
    draw = drawing(core, schedule, model, conditioning(), STEPS)
    own = model.hf_quantizer.quantization_config.activation_bits
    for bits in ("default", "16"):
        loader = graphs.four_bit(name, activation_bits=bits)
        latent = graphs.saved_latent(client, client.run(graphs.sampled(loader, text=PROMPT, seed=SEED, steps=STEPS)))
        assert torch.isfinite(latent).all() and latent.std() > 0.1
        noise = core.comfy.sample.prepare_noise(torch.zeros_like(latent), SEED)
        assert_equal(latent, draw, noise, own if bits == "default" else 16, slack=5)
        assert_same_linears(core, model, read_native(path), bits)
        dirotq.set_activation_bits(model, 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_draws_what_diffusers_draws(client, core, schedule, folder, name):
    path = folder / name.replace(" ", "-")
    config = dirotq.DiRotQConfig(**CONFIGS[name])
    model = calibrated_flux(config)
    model.save_pretrained(path)
    bits = model.hf_quantizer.quantization_config.activation_bits
    check(client, core, schedule, f"methods/{path.name}", path)
    loaded = {"model": graphs.four_bit(f"methods/{path.name}")}
    info = {"info": node("DiRotQModelInfo", checkpoint="", limit=2, model=["model", 0])}
    text = client.run(loaded | info)["info"]["text"][0]
    assert f"W{METHODS[config.method].weights.label}A{4 if config.site_activation_bits else bits}: " in text


@pytest.mark.parametrize("method", ["orbitquant_w3", "robuq", "nvfp4", "nf4"])
def test_linears_of_pixart(core, tmp_path, method):
    """Widths of 1152 and 4608, whose Hadamard blocks and packed columns are others than FLUX.1's."""
    models.pixart().save_pretrained(tmp_path / "dense")
    config = dirotq.DiRotQConfig(method=method)
    model = PixArtTransformer2DModel.from_pretrained(
        tmp_path / "dense", quantization_config=config, torch_dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "packed")
    model = PixArtTransformer2DModel.from_pretrained(tmp_path / "packed", torch_dtype=torch.float32)
    assert_same_linears(core, model, read_native(tmp_path / "packed"), "default")


def test_an_imported_svdquant_file(client, core, schedule, folder):
    """Nunchaku's own layout → a single file of ours → ComfyUI."""
    torch.manual_seed(0)
    dense = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=2,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    source = nunchaku_files.Model(dense.to(torch.bfloat16)).save_native(folder.parent.parent / "svdq.safetensors")
    convert(source, folder / "svdq.safetensors")
    convert(source, folder / "svdq")
    check(client, core, schedule, "methods/svdq.safetensors", folder / "svdq")
