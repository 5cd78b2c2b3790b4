"""LoRA files as trainers name them, on quantized FLUX.1 and PixArt: fused linears, kohya, LoKr, Control LoRAs."""

import pytest
import torch

from dirotq.dirotq_core.single_file import read_native

from . import loras
from .core import condition, dequantized, relative, run
from .loras import FLUX_LAYERS, PIXART_DIFFUSERS, PIXART_LAYERS, PIXART_WIDTH, WIDTH

SPLIT = {"transformer_blocks.0.attn.to_q": (1, 1), "single_transformer_blocks.1.attn.to_k": (1, 1)}
SPLIT |= {"transformer_blocks.0.attn.add_v_proj": (1, 1), "single_transformer_blocks.0.proj_mlp": (1, 4)}
SLICES = {"single_blocks.0.linear1_qkv": (1, 3), "single_blocks.1.linear2": (5, 1)}

FLUX = {
    "fused": loras.peft(FLUX_LAYERS, WIDTH, "diffusion_model."),
    "linear1_qkv": loras.peft(SLICES, WIDTH, "diffusion_model.", 1.5),
    "kohya": loras.kohya(FLUX_LAYERS, WIDTH),
    "kohya, split": loras.kohya(SPLIT, WIDTH, "lora_transformer_", 2.0),
    "lokr": loras.lokr(SPLIT, WIDTH, scale=4.0),
    "lokr, fused": loras.lokr(FLUX_LAYERS, WIDTH, "lora_unet_", 2, 2.5),
    "loha": loras.loha(FLUX_LAYERS, WIDTH),
}
PIXART = {
    "diffusers": loras.peft(PIXART_DIFFUSERS, PIXART_WIDTH, "transformer."),
    "peft": loras.peft(PIXART_DIFFUSERS, PIXART_WIDTH, "base_model.model."),
    "kohya": loras.kohya(PIXART_LAYERS, PIXART_WIDTH),
    "lokr": loras.lokr(PIXART_LAYERS, PIXART_WIDTH, "lora_unet_", scale=2.0),
}
#: What is no product of two thin matrices, so that core's loader can but round it into the weights.
FULL_RANK = {"lokr"}
LOADERS = ("ours", "side branch", "requantize")


def core_loaded(core, patcher, state, strength):
    return core.comfy.sd.load_lora_for_models(patcher, None, state, strength, 0)[0]


def tolerance(loader, form):
    rounds = loader == "requantize" or (loader == "side branch" and form in FULL_RANK)
    return 0.2 if rounds else 0.01


def effects(core, model, dense, state, loader, forward=run, plain=None):
    """What a LoRA of strength 0.8 adds to the output of the quantized and of the dense model."""
    plain = plain or (lambda patcher: forward(core, patcher))
    before = plain(model)
    if loader == "ours":
        changed = core.branches.apply_lora(model, state, 0.8)
    else:
        changed = core_loaded(core, model, state, 0.8)
    found = forward(core, changed) - before
    expected = forward(core, core_loaded(core, dense, state, 0.8)) - plain(dense)
    assert expected.norm() > 0.2 * before.norm()  # much more than the rounding of z to bfloat16
    return found, expected


def assert_unchanged(model, before):
    after = model.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())


def copied(model):
    return {n: t.clone() for n, t in model.model.state_dict().items()}


@pytest.mark.parametrize("form", FLUX)
@pytest.mark.parametrize("loader", LOADERS)
def test_flux(core, make, dense, loader, form):
    model = make(lora="side branch" if loader == "ours" else loader)
    before, plain = copied(model), run(core, model)
    found, expected = effects(core, model, dense, FLUX[form], loader)
    assert relative(found, expected) < tolerance(loader, form)
    assert torch.equal(run(core, model), plain)
    assert_unchanged(model, before)


@pytest.fixture(scope="module")
def pixart(core, folders):
    """Setting of core's LoRAs → the quantized PixArt, and its dense twin under None."""
    checkpoint = read_native(folders["pixart"])
    found = {
        lora: core.model.make_model(checkpoint, core.model.make_settings(checkpoint, "16", "auto", lora))
        for lora in ("side branch", "requantize")
    }
    yield found | {None: dequantized(core, found["side branch"])}
    core.comfy.model_management.unload_all_models()


def pixart_run(core, patcher):
    core.comfy.model_management.load_models_gpu([patcher])
    g = torch.Generator().manual_seed(5)
    # 320 pixels: ComfyUI's PixArt divides by zero at 256.
    x, text = torch.randn(1, 4, 40, 40, generator=g), torch.randn(1, 9, 4096, generator=g)
    with torch.no_grad():
        return patcher.model.diffusion_model(x, torch.tensor([500.0]), text).clone()


@pytest.mark.parametrize("form", PIXART)
@pytest.mark.parametrize("loader", LOADERS)
def test_pixart(core, pixart, loader, form):
    model = pixart["side branch" if loader == "ours" else loader]
    before, plain = copied(model), pixart_run(core, model)
    found, expected = effects(core, model, pixart[None], PIXART[form], loader, pixart_run)
    assert relative(found, expected) < tolerance(loader, form)
    assert torch.equal(pixart_run(core, model), plain)
    assert_unchanged(model, before)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_control_lora_widens_the_input(core, make, dense, loader):
    """Black Forest Labs' LoRAs for edges and depth: the input has twice the channels, biases and norms change, too."""

    def wide(core, patcher):
        core.comfy.model_management.load_models_gpu([patcher])
        x = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            return patcher.model.diffusion_model(x, torch.tensor([0.7]), **condition()).clone()

    model = make(lora="side branch" if loader == "ours" else loader)
    before = copied(model)
    state = loras.control(WIDTH, 128)
    found, expected = effects(core, model, dense, state, loader, wide, lambda patcher: run(core, patcher))
    assert relative(found, expected) < tolerance(loader, "control")
    run(core, model)
    assert_unchanged(model, before)


def test_a_lokr_of_another_width_is_refused(core, make):
    wrong = loras.lokr({"transformer_blocks.0.attn.to_q": (1, 1)}, 2 * WIDTH)
    with pytest.raises(
        ValueError, match=r"LoKr for .*img_attn\.qkv.* has factors .* 256 × 256; it was made for another"
    ):
        core.branches.apply_lora(make(), wrong, 1.0)
