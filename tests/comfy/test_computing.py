"""What a quantized model computes in ComfyUI: as diffusers does, and as the dense weights that the codes stand for."""

from itertools import pairwise

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

import dirotq
from dirotq.dirotq_core.single_file import read_native

from .core import condition, relative, run
from .training import image_ids, packed


def unpacked(x, h, w):
    return x.view(len(x), h // 2, w // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, h, w)


# Codes are decided by comparisons, so one unit in the last place of float32 moves some of them, which moves the output
# by 0.4 % at 8 bit and 2 % at 4. What equality means there is: no further apart than the same model with inputs that
# differ by as little. With 16-bit activations only the
# 16-bit part z is rounded, to bfloat16.
LAST_PLACES = [1 + sign * 2**-power for power in (22, 21, 20) for sign in (1, -1)]


def assert_equal(ours, model_on, x, bits):
    """`ours` is what `model_on` makes of x, but for rounding."""
    theirs = model_on(x)
    least = 2**-8 if bits == 16 else 0  # a unit in bfloat16's last place, by which z may differ
    assert relative(ours, theirs) < max(least, 2 * max(relative(model_on(x * p), theirs) for p in LAST_PLACES))


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
    from comfy.samplers import calculate_sigmas

    sigmas = calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps)
    ids = image_ids()

    @torch.no_grad()
    def sampled(noise):
        x = packed(noise * sigmas[0])
        for now, then in pairwise(sigmas):
            velocity = model(
                hidden_states=x, encoder_hidden_states=given["context"], pooled_projections=given["y"],
                timestep=now[None], img_ids=ids, txt_ids=torch.zeros(12, 3), guidance=given["guidance"],
            ).sample  # fmt: skip
            x = x + (then - now) * velocity
        return patcher.get_model_object("latent_format").process_out(unpacked(x, 8, 8))

    assert_equal(latent, sampled, noise, bits)


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
