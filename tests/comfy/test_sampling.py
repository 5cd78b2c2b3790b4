"""4-bit models through ComfyUI's sampler, beside the 16-bit model they were made from."""

import pytest
import torch
from safetensors.torch import save_file

from . import graphs, loras, models
from .graphs import node
from .training import scene_of, scenes


def latent(client, model, **more):
    return graphs.saved_latent(client, client.run(graphs.sampled(model) | more)).double()


def decibels(found, reference):
    return 20 * torch.log10(reference.std() / (found - reference).square().mean().sqrt()).item()


@pytest.fixture(scope="module")
def dense(client):
    return latent(client, graphs.dense_flux())


def test_applied_on_the_fly(client, dense):
    more = {"dense": graphs.dense_flux()}
    eight = latent(client, node("DiRotQApply", model=["dense", 0], activation_bits="8"), **more)
    four = latent(client, node("DiRotQApply", model=["dense", 0], activation_bits="4"), **more)
    assert 10 < decibels(four, dense) < decibels(eight, dense) < 60
    # The dense model that both were made from is as it was.
    assert torch.equal(latent(client, graphs.dense_flux()), dense)


def test_a_checkpoint_is_what_applying_gives(client, dense):
    """Both are data-free with 8-bit activations; the checkpoint was made by the diffusers backend."""
    applied = node("DiRotQApply", model=["dense", 0], activation_bits="8")
    on_the_fly = latent(client, applied, dense=graphs.dense_flux())
    loaded = latent(client, graphs.four_bit(models.FLUX_4BIT))
    assert decibels(loaded, dense) == pytest.approx(decibels(on_the_fly, dense), abs=3)


def test_activation_bits_are_a_choice_of_each_load(client, dense):
    """Two loaders with different settings in one graph give what each gives alone."""
    alone = {bits: latent(client, graphs.four_bit(models.FLUX_4BIT, activation_bits=bits)) for bits in ("4", "16")}
    both = graphs.sampled(graphs.four_bit(models.FLUX_4BIT, activation_bits="4"))
    other = graphs.sampled(graphs.four_bit(models.FLUX_4BIT, activation_bits="16"))
    both |= {"model2": other["model"], "latent2": other["latent"], "save2": other["save"]}
    both["latent2"]["inputs"]["model"] = ["model2", 0]
    both["save2"]["inputs"] = {"samples": ["latent2", 0], "filename_prefix": "latents/other"}
    outputs = client.run(both)
    assert torch.equal(graphs.saved_latent(client, outputs).double(), alone["4"])
    assert torch.equal(graphs.saved_latent(client, {"save": outputs["save2"]}).double(), alone["16"])
    assert decibels(alone["4"], dense) < decibels(alone["16"], dense)


def test_a_lora_of_strength_zero_is_none(client):
    plain = latent(client, graphs.four_bit(models.FLUX_4BIT))
    more = {"base": graphs.four_bit(models.FLUX_4BIT)}
    changed, same = (
        latent(client, node("DiRotQLoRA", model=["base", 0], lora_name=models.LORA, strength=s), **more)
        for s in (1.0, 0.0)
    )
    assert torch.equal(same, plain) and decibels(changed, plain) < 40


FILES = {
    "kohya": loras.kohya(loras.FLUX_LAYERS, models.FLUX_WIDTH),
    "fused": loras.peft(loras.FLUX_LAYERS, models.FLUX_WIDTH, "diffusion_model."),
    "lokr": loras.lokr(loras.FLUX_LAYERS, models.FLUX_WIDTH, "lora_unet_", 2, 2.5),
}


@pytest.mark.parametrize("form", FILES)
def test_a_file_does_the_same_in_both_lora_nodes(client, form):
    """ComfyUI's LoraLoaderModelOnly and DiRotQ LoRA, with 16-bit activations; and it is gone without them."""
    name = f"both-{form}.safetensors"
    save_file(FILES[form], client.base / "models" / "loras" / name)
    more = {"base": graphs.four_bit(models.FLUX_4BIT, activation_bits="16")}
    plain = latent(client, more["base"])
    ours = latent(client, node("DiRotQLoRA", model=["base", 0], lora_name=name, strength=0.8), **more)
    theirs = latent(client, node("LoraLoaderModelOnly", model=["base", 0], lora_name=name, strength_model=0.8), **more)
    assert (ours - plain).norm() > 0.2 * plain.norm()
    assert (ours - theirs).norm() < 0.02 * (ours - plain).norm()
    assert torch.equal(latent(client, more["base"]), plain)


@pytest.mark.parametrize("prompt", list(scenes())[::3])
@pytest.mark.parametrize("bits", ["4", "8", "16"])
def test_draws_the_scenes_it_was_trained_on(client, prompt, bits):
    run = graphs.sampled(graphs.four_bit(models.FLUX_4BIT, activation_bits=bits), text=prompt, steps=4)
    assert scene_of(graphs.saved_latent(client, client.run(run))) == prompt
