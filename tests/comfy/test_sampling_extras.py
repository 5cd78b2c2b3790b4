"""What hangs on a sampler's MODEL besides LoRAs: a ControlNet, previews, LoRA hooks, and merges of two models."""

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel
from safetensors.torch import save_file

from . import graphs, models
from .core import condition, dequantized, relative, run
from .graphs import node
from .loras import lora

STEPS = 3


def controlnet_state():
    """A random ControlNet of InstantX's kind for the small FLUX.1, in diffusers' names."""
    torch.manual_seed(0)
    net = FluxControlNetModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=128,
        num_attention_heads=models.FLUX_WIDTH // 128, joint_attention_dim=4096, pooled_projection_dim=768,
        guidance_embeds=True, axes_dims_rope=[16, 56, 56],
    )  # fmt: skip
    with torch.no_grad():  # its outputs begin as zeros
        for block in (*net.controlnet_blocks, *net.controlnet_single_blocks, net.controlnet_x_embedder):
            block.weight.normal_(std=0.7 * block.in_features**-0.5)
    return net.state_dict()


def hint():
    """An image [1, 64, 64, 3]: a bright square on black."""
    image = torch.zeros(1, 64, 64, 3)
    image[:, 16:48, 16:48] = 1.0
    return image


@pytest.fixture(scope="module")
def control(core):
    import comfy.controlnet

    net = comfy.controlnet.load_controlnet_state_dict(controlnet_state())
    vae = core.comfy.sd.VAE(sd=models.vae(16))
    return net.set_cond_hint(hint().movedim(-1, 1), 1.0, (0.0, 1.0), vae=vae)


def draw(core, patcher, control=None, callback=None, **more):
    given = condition()
    extras = {"pooled_output": given["y"], "guidance": 3.5, **more}
    if control is not None:
        extras |= {"control": control.copy(), "control_apply_to_uncond": False}
        extras["control"].set_cond_hint(control.cond_hint_original, 1.0, (0.0, 1.0), vae=control.vae)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(9))
    positive = [[given["context"], extras]]
    return core.comfy.sample.sample(
        patcher, noise, STEPS, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise), disable_pbar=True,
        callback=callback,
    )  # fmt: skip


@pytest.mark.parametrize(("bits", "tolerance"), [("16", 0.02), ("8", 0.1), ("4", 0.5)])
def test_a_controlnet_acts_as_on_the_dense_model(core, make, dense, control, bits, tolerance):
    model = make(bits=bits)
    plain = draw(core, model)
    expected = draw(core, dense, control) - draw(core, dense)
    assert expected.norm() > 0.2 * plain.norm()
    assert relative(draw(core, model, control) - plain, expected) < tolerance
    assert torch.equal(draw(core, model), plain)


def test_a_controlnet_in_a_graph(client):
    folder = client.base / "models" / "controlnet"
    folder.mkdir(exist_ok=True)
    save_file(controlnet_state(), folder / "tiny-controlnet.safetensors")
    prompt = graphs.sampled(graphs.four_bit(models.FLUX_4BIT), steps=STEPS)
    prompt |= {
        "net": node("ControlNetLoader", control_net_name="tiny-controlnet.safetensors"),
        "image": node("EmptyImage", width=64, height=64, batch_size=1, color=0xFF8000),
        "vae": node("VAELoader", vae_name=models.VAE_16),
        "controlled": node(
            "ControlNetApplyAdvanced", positive=["guided", 0], negative=["text", 0], control_net=["net", 0],
            image=["image", 0], vae=["vae", 0], strength=1.0, start_percent=0.0, end_percent=1.0,
        ),
    }  # fmt: skip
    plain = graphs.saved_latent(client, client.run(prompt))
    prompt["latent"]["inputs"] |= {"positive": ["controlled", 0], "negative": ["controlled", 1]}
    changed = graphs.saved_latent(client, client.run(prompt))
    assert torch.isfinite(changed).all() and (changed - plain).norm() > 0.2 * plain.norm()


def previews(core, patcher, monkeypatch):
    """The pictures that ComfyUI would show on the sampler, one for each step, [H, W, 3]."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod

    shown = []
    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(
        core.comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: shown.append((value, total, preview))
    )
    draw(core, patcher, callback=latent_preview.prepare_callback(patcher, STEPS))
    assert [(value, total) for value, total, _ in shown] == [(i + 1, STEPS) for i in range(STEPS)]
    return [np.asarray(picture, np.float64) for _, _, (_, picture, _) in shown]


@pytest.mark.parametrize(("bits", "levels"), [("16", 1.5), ("4", 25)])
def test_previews_are_those_of_the_dense_model(core, make, dense, monkeypatch, bits, levels):
    ours, theirs = (previews(core, patcher, monkeypatch) for patcher in (make(bits=bits), dense))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == (8, 8, 3) and b.std() > 5
        assert np.abs(a - b).mean() < levels


def test_lora_hooks_are_refused(core, make, dense):
    """They would be left in the weights; the same MODEL draws on without them."""
    import comfy.hooks

    model = make()
    plain = draw(core, model)
    hooks = comfy.hooks.create_hook_lora(lora(0), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"^LoRA hooks cannot change 4-bit weights \(double_blocks\.0\..*\); "):
        draw(core, model, hooks=hooks)
    assert torch.equal(draw(core, model), plain)
    assert not torch.equal(draw(core, dense, hooks=hooks), draw(core, dense))


def test_merging_two_quantized_models(core, make, checkpoint):
    """ComfyUI's ModelMergeSimple: W₁ + (1 − ratio)(W₂ − W₁), rounded anew."""
    import dataclasses

    tensors = dict(checkpoint.tensors)
    name = "single_blocks.1.linear2.weight_scale"
    tensors[name] = 6 * tensors[name]
    other = dataclasses.replace(checkpoint, tensors=tensors)
    models_ = make(), core.model.make_model(other, core.model.make_settings(other, "16", "auto", "side branch"))
    twins = [dequantized(core, patcher) for patcher in models_]

    def merged(one, two):
        clone = one.clone()
        for key, patch in two.get_key_patches("diffusion_model.").items():
            clone.add_patches({key: patch}, 0.5, 0.5)
        return clone

    plain, expected = run(core, twins[0]), run(core, merged(*twins))
    before = run(core, models_[0])
    assert relative(plain, expected) > 0.02
    assert relative(run(core, merged(*models_)), expected) < 0.5 * relative(plain, expected)
    assert torch.equal(run(core, models_[0]), before)
