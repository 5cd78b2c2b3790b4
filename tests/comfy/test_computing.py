"""What a quantized model computes in ComfyUI: as diffusers does, and as the dense weights that the codes stand for."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

import dirotq
from dirotq.dirotq_core.single_file import read_native

from .beside_diffusers import assert_equal, drawing
from .core import condition, relative, run


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_latents_equal_those_of_diffusers(core, make, folders, bits):
    """Same checkpoint, noise and schedule: ComfyUI's sampler against the diffusers model in a loop of its own."""
    patcher, steps, given = make(bits=str(bits)), 4, condition()
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(9))
    positive = [[given["context"], {"pooled_output": given["y"], "guidance": 3.5}]]
    latent = core.comfy.sample.sample(
        patcher, noise, steps, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise), disable_pbar=True
    )
    model = FluxTransformer2DModel.from_pretrained(folders["flux"], torch_dtype=torch.float32)
    dirotq.set_activation_bits(model, bits)
    assert_equal(latent, drawing(core, patcher, model, given, steps), noise, bits)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_pixart_equals_diffusers(core, folders, bits):
    checkpoint = read_native(folders["pixart"])
    patcher = core.model.make_model(checkpoint, core.model.make_settings(checkpoint, str(bits), "auto", "side branch"))
    core.comfy.model_management.load_models_gpu([patcher])
    g = torch.Generator().manual_seed(5)
    # 512 pixels: below, ComfyUI's PixArt divides by zero.
    x, text = torch.randn(1, 4, 64, 64, generator=g), torch.randn(1, 9, 4096, generator=g)
    time = torch.tensor([500.0])
    model = PixArtTransformer2DModel.from_pretrained(folders["pixart"], torch_dtype=torch.float32)
    dirotq.set_activation_bits(model, bits)

    @torch.no_grad()
    def theirs(x):
        none = {"resolution": None, "aspect_ratio": None}
        return model(x, encoder_hidden_states=text, timestep=time, added_cond_kwargs=none).sample[:, :4]

    with torch.no_grad():
        ours = patcher.model.diffusion_model(x, time, text)
    assert_equal(ours, theirs, x, bits)


def test_16_bit_activations_equal_the_dense_weights(core, make, dense):
    assert relative(run(core, make()), run(core, dense)) < 2e-3  # the low-rank branch's z is bfloat16


def test_a_quantized_file_equals_its_source(core, make, checkpoint, tmp_path):
    from dirotq.dirotq_core.single_file import write_native

    write_native(tmp_path / "one.safetensors", checkpoint.tensors, checkpoint.config)
    again = read_native(tmp_path / "one.safetensors")
    settings_ = core.model.make_settings(again, "4", "auto", "side branch")
    assert torch.equal(run(core, core.model.make_model(again, settings_)), run(core, make(bits="4")))


def test_two_loads_keep_their_settings(core, make):
    four, eight = make(bits="4"), make(bits="8")
    a, b = run(core, four), run(core, eight)
    assert not torch.equal(a, b)
    assert torch.equal(run(core, four), a) and torch.equal(run(core, eight), b)
    plain = make(bits="4", backend="pytorch")
    assert relative(run(core, plain), a) < 1e-5
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: "):
        make(backend="triton")
