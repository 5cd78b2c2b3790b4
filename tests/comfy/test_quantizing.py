"""Quantize Model: what it writes is what it returns, refusals come before any work, and an interrupt leaves nothing."""

import time

import pytest
import torch

from . import graphs, models
from .graphs import node
from .server import GraphError


def quantize(filename, **inputs):
    """Quantize the small FLUX.1 on two short drawings; its MODEL drives the sampler of the same prompt."""
    settings = {
        "method": "dirotq", "rank": 64, "activation_bits": "8", "samples": 2, "steps": 2, "width": 64, "height": 64,
        "cfg": 1.0, "seed": 0, "prompts": "a cat\na dog",
    }  # fmt: skip
    settings = settings | {"clip": ["clip", 0]} | inputs
    settings = {k: v for k, v in settings.items() if v is not None}
    return graphs.sampled(node("DiRotQQuantizeModel", model=["dense", 0], filename=filename, **settings)) | {
        "dense": graphs.dense_flux()
    }


@pytest.fixture
def folder(client):
    return client.base / "models" / "diffusion_models"


def names(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))


def options(client):
    return client.object_info()["DiRotQLoadModel"]["input"]["required"]["model_name"][1]["options"]


def test_the_file_is_the_model(client, folder):
    prompt = quantize("mine/first")
    prompt["report"] = node("PreviewAny", source=["model", 1])
    before = options(client)
    outputs = client.run(prompt)
    assert set(options(client)) - set(before) == {"mine/first.safetensors"}
    report = outputs["report"]["text"][0]
    assert report.startswith(f"saved {folder}/mine/first.safetensors (0.0") and "median SQNR" in report
    returned = graphs.saved_latent(client, outputs)
    loaded = graphs.saved_latent(client, client.run(graphs.sampled(graphs.four_bit("mine/first.safetensors"))))
    assert torch.equal(returned, loaded)
    info = client.run({"info": node("DiRotQModelInfo", checkpoint="mine/first.safetensors", limit=3)})["info"]["text"][
        0
    ]
    assert "lowest signal-to-noise ratio:" in info and info.count(" dB") == 3 and "W4A8: " in info
    dense = graphs.saved_latent(client, client.run(graphs.sampled(graphs.dense_flux())))
    assert not torch.equal(dense, loaded) and (dense - loaded).norm() < 0.3 * dense.norm()
    with pytest.raises(GraphError, match=r"first\.safetensors exists; choose another filename$"):
        client.run(quantize("mine/first", seed=1))


def test_a_lora_is_quantized_with_the_weights(client):
    """Applied by ComfyUI to the dense model, which afterwards is as it was."""

    def latent(prompt):
        return graphs.saved_latent(client, client.run(prompt))

    lora = {
        "dense": graphs.dense_flux(),
        "lora": node("LoraLoaderModelOnly", model=["dense", 0], lora_name=models.LORA, strength_model=1.0),
    }
    plain = latent(graphs.sampled(graphs.dense_flux()))
    changed = latent(graphs.sampled(lora["lora"]) | {"dense": lora["dense"]})
    applied = graphs.sampled(node("DiRotQApply", model=["lora", 0], activation_bits="16"))
    found = latent(applied | lora)
    assert (found - changed).norm() < 0.5 * (plain - changed).norm()
    assert torch.equal(latent(graphs.sampled(graphs.dense_flux(), seed=1)), plain)
    assert torch.equal(latent(graphs.sampled(lora["lora"]) | {"dense": lora["dense"]}), changed)


def test_interrupt_leaves_nothing(client, folder):
    before = names(folder)
    number = client.queue(quantize("interrupted/model", steps=200, samples=100))
    following = client.queue(graphs.sampled(graphs.dense_flux(), seed=9))
    client.wait_until_running(number)
    time.sleep(1)
    client.interrupt()
    with pytest.raises(GraphError, match="interrupted"):
        client.wait(number)
    client.wait(following)
    assert names(folder) == before


def test_interrupt_while_layers_are_solved(client, folder):
    """After both drawings of two steps each; the queue goes on."""
    before = names(folder)
    with pytest.raises(GraphError, match="interrupted"):
        client.progress(quantize("solving/model", seed=3), lambda name, value, of: name == "model" and 4 < value < of)
    latent = graphs.saved_latent(client, client.run(graphs.sampled(graphs.dense_flux(), seed=10)))
    assert torch.isfinite(latent).all() and names(folder) == before


def test_progress_ends_full(client, folder):
    seen = [(value, of) for name, value, of in client.progress(quantize("whole", samples=1)) if name == "model"]
    assert len(seen) > 2 and seen[-1][0] == seen[-1][1]
    (folder / "whole.safetensors").unlink()


@pytest.mark.parametrize(
    ("filename", "inputs", "message"),
    [
        ("../outside", {}, "filename must be a name below .*, got '../outside'"),
        ("/tmp/outside", {}, "filename must be a name below .*, got '/tmp/outside'"),
        ("  ", {}, "filename must be a name below .*, got '  '"),
        ("folder/", {}, "filename must be a name below .*, got 'folder/'"),
        ("new", {"clip": None}, r"connect clip \(it encodes the prompts\) or positive"),
        ("new", {"cfg": 4.5}, "cfg is 4.5; connect negative, or set cfg to 1"),
    ],
)
def test_refused_before_any_work(client, folder, filename, inputs, message):
    before = names(folder)
    with pytest.raises(GraphError, match=f"^{message}$") as failed:
        client.run(quantize(filename, **inputs))
    assert failed.value.node == "DiRotQQuantizeModel"
    assert names(folder) == before


def test_a_quantized_model_is_not_quantized_again(client):
    prompt = quantize("twice") | {"dense": graphs.four_bit(models.FLUX_4BIT)}
    with pytest.raises(GraphError, match="this MODEL is quantized already"):
        client.run(prompt)


@pytest.mark.parametrize("method", ["paper", "svdquant"])
def test_other_methods(client, folder, method):
    prompt = quantize(f"methods/{method}", method=method, activation_bits="4", samples=1, steps=1)
    returned = graphs.saved_latent(client, client.run(prompt))
    loaded = graphs.saved_latent(client, client.run(graphs.sampled(graphs.four_bit(f"methods/{method}.safetensors"))))
    assert torch.equal(returned, loaded) and torch.isfinite(loaded).all()


def test_nothing_need_follow(client, folder):
    """The file is what it is for; the report stands on the node."""
    prompt = {k: v for k, v in quantize("alone", samples=1, steps=1).items() if k in ("model", "dense", "clip")}
    assert client.run(prompt)["model"]["text"][0].startswith(f"saved {folder}/alone.safetensors ")
    assert (folder / "alone.safetensors").is_file()
