"""The harness itself: ComfyUI's own loaders and samplers run on the small models, and failures are reported."""

import pytest
import torch

from . import graphs, models
from .graphs import node
from .server import GraphError


def test_dense_flux_draws(client):
    prompt = graphs.sampled(graphs.dense_flux())
    latent = graphs.saved_latent(client, client.run(prompt))
    assert latent.shape == (1, 16, 8, 8) and torch.isfinite(latent).all() and latent.std() > 0.1


def test_dense_pixart_draws_a_picture(client):
    prompt = graphs.sampled(node("UNETLoader", unet_name=models.PIXART, weight_dtype="default"), steps=1, size=512)
    prompt["empty"] = node("EmptyLatentImage", width=512, height=512, batch_size=1)
    prompt["latent"]["inputs"] |= {"positive": ["text", 0], "cfg": 4.5}
    prompt["vae"] = node("VAELoader", vae_name=models.VAE_4)
    prompt["picture"] = node("VAEDecode", samples=["latent", 0], vae=["vae", 0])
    prompt["out"] = node("SaveImage", images=["picture", 0], filename_prefix="pixart")
    outputs = client.run(prompt)
    assert client.file(outputs["out"]["images"][0]).stat().st_size > 1000


def test_a_refused_prompt_and_a_failing_node(client, server):
    prompt = graphs.sampled(node("UNETLoader", unet_name="absent.safetensors", weight_dtype="default"))
    with pytest.raises(GraphError, match=r"absent\.safetensors"):
        client.queue(prompt)
    with pytest.raises(GraphError) as failed:
        client.run({"1": node("DiRotQModelInfo", checkpoint="", limit=1)})
    assert failed.value.node == "DiRotQModelInfo" and server.alive


def test_interrupt(client):
    number = client.queue(graphs.sampled(graphs.dense_flux(), steps=5000, seed=77))
    client.wait_until_running(number)
    client.interrupt()
    with pytest.raises(GraphError, match="interrupted"):
        client.wait(number)
