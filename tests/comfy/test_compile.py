"""Core's TorchCompileModel node on 4-bit models: one graph, the same picture, with LoRAs of both kinds."""

import shutil

import pytest
import torch

from . import graphs, models
from .graphs import node
from .server import ARGUMENTS, PACK, ROOT, Server
from .test_sampling import decibels, latent

# ComfyUI's attention for CPUs asks for the free memory, where the compiler has to leave the graph.
ONE_GRAPH = [*ARGUMENTS, "--use-pytorch-cross-attention"]


@pytest.fixture(scope="module")
def compiling(checkout, server, tmp_path_factory):
    base = tmp_path_factory.mktemp("compiling")
    shutil.copytree(server.base / "models", base / "models")
    packs = {PACK: ROOT, "stand_ins": server.base / "custom_nodes" / "stand_ins"}
    with Server(checkout, base, packs, {"TORCH_LOGS": "dynamo,graph_breaks"}, ONE_GRAPH) as running:
        yield running


def compiled(server, nodes, last):
    """Latents of the model of node `last`, as it is and compiled, and the number of graphs that made."""
    plain = latent(server.client, nodes[last], **{n: v for n, v in nodes.items() if n != last})
    before = len(server.log())
    model = node("TorchCompileModel", model=[last, 0], backend="inductor")
    fast = latent(server.client, model, **nodes)
    log = server.log()[before:]
    assert "Graph break" not in log
    return plain, fast, log.count("torchdynamo done tracing")


def loras(kind, base):
    """A LoRA by our node or by core's on node "base"."""
    inputs = {"model": ["base", 0], "lora_name": models.LORA}
    if kind == "ours":
        lora = node("DiRotQLoRA", **inputs, strength=1.0)
    else:
        lora = node("LoraLoaderModelOnly", **inputs, strength_model=1.0)
    return {"base": base, "lora": lora}


@pytest.mark.parametrize("bits", ["4", "8", "16"])
def test_one_graph_and_the_same_picture(compiling, bits):
    base = graphs.four_bit(models.FLUX_4BIT, activation_bits=bits)
    plain, fast, traced = compiled(compiling, {"base": base}, "base")
    assert traced == 1
    # 4-bit codes at a border fall to either side when a norm is summed in another order.
    assert decibels(fast, plain) > {"4": 30, "8": 40, "16": 40}[bits]
    again = node("TorchCompileModel", model=["base", 0], backend="inductor")
    assert torch.equal(latent(compiling.client, again, base=base), fast)


@pytest.mark.parametrize("kind", ["ours", "core"])
def test_with_a_lora(compiling, kind):
    base = graphs.four_bit(models.FLUX_4BIT, activation_bits="16")
    without = latent(compiling.client, base)
    plain, fast, traced = compiled(compiling, loras(kind, base), "lora")
    assert traced == 1
    assert decibels(plain, without) < 30 and decibels(fast, plain) > 40


def test_applied_on_the_fly(compiling):
    nodes = {"dense": graphs.dense_flux(), "base": node("DiRotQApply", model=["dense", 0], activation_bits="16")}
    plain, fast, traced = compiled(compiling, nodes, "base")
    assert traced == 1 and decibels(fast, plain) > 40
