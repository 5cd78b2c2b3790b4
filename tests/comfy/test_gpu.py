"""Our weights on a GPU under ComfyUI's ways to hold and stream a model, beside the same graphs on the CPU.

The CPU tests compare ComfyUI with diffusers; here the GPU is compared with the CPU, and its memory modes with one
another.
"""

import os
import shlex

import pytest
import torch

from . import graphs, models
from .graphs import node
from .server import PACK, ROOT, Server
from .training import scene_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

# What a server is told besides, e.g. --front-end-root; never --cpu.
MORE = [a for a in shlex.split(os.environ.get("COMFYUI_ARGS", "")) if a != "--cpu"]
HUGE = "1000"  # GB that no card has: as much as possible stays outside it
MODES = {
    "default": [],  # dynamic VRAM, where the platform has it
    "dynamic, nothing fits": ["--vram-headroom", HUGE],
    "estimates": ["--disable-dynamic-vram"],
    "estimates, nothing fits": ["--disable-dynamic-vram", "--reserve-vram", HUGE],
    "novram": ["--novram"],
    "highvram": ["--highvram"],
}
BITS = ("4", "8", "16")


def graphs_to_run():
    """Name → prompt."""
    lora = {"base": graphs.four_bit(models.FLUX_4BIT, activation_bits="16")}
    ours = node("DiRotQLoRA", model=["base", 0], lora_name=models.LORA, strength=1.0)
    core = node("LoraLoaderModelOnly", model=["base", 0], lora_name=models.LORA, strength_model=1.0)
    found = {bits: graphs.sampled(graphs.four_bit(models.FLUX_4BIT, activation_bits=bits)) for bits in BITS}
    found |= {"our LoRA": graphs.sampled(ours) | lora, "core's LoRA": graphs.sampled(core) | lora}
    on_the_fly = node("DiRotQApply", model=["dense", 0], activation_bits="8")
    found["applied"] = graphs.sampled(on_the_fly) | {"dense": graphs.dense_flux()}
    return found | {"dense": graphs.sampled(graphs.dense_flux()), "again": found["4"]}


def latents(checkout, base, arguments):
    """Latents by graph, what the server said, and the bytes its torch held at the end, after it unloaded everything."""
    packs = {PACK: ROOT, "stand_ins": ROOT / "tests/comfy/stand_ins"}
    with Server(checkout, base, packs, arguments=arguments) as server:
        client, found = server.client, {}
        for name, prompt in graphs_to_run().items():
            prompt["latent"]["inputs"]["seed"] = 1 + (name == "again")  # another seed first, so that nothing is cached
            if name == "again":
                client.run(prompt, timeout=300)
                prompt["latent"]["inputs"]["seed"] = 1
            found[name] = graphs.saved_latent(client, client.run(prompt, timeout=300)).double()
        client.post("/free", {"unload_models": True, "free_memory": True})
        client.run({"empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
                    "save": node("SaveLatent", samples=["empty", 0], filename_prefix="x")})  # fmt: skip
        device = client.get("/system_stats")["devices"][0]
        return found, server.log(), device


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("gpu")
    models.make_all(base / "models")
    return base


@pytest.fixture(scope="module")
def runs(checkout, base):
    return {name: latents(checkout, base, [*MORE, *arguments]) for name, arguments in MODES.items()}


@pytest.fixture(scope="module")
def cpu(checkout, base):
    return latents(checkout, base, [*MORE, "--cpu"])[0]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("mode", MODES)
def test_every_memory_mode_gives_the_same_bits(runs, mode):
    found, log, _ = runs[mode]
    assert not [line for line in log.splitlines() if "Traceback" in line and PACK in line]
    for name, latent in found.items():
        if name != "core's LoRA":
            assert torch.equal(latent, runs["highvram"][0][name]), name
    assert torch.equal(found["again"], found["4"])


DYNAMIC = "DynamicVRAM support detected and enabled"


@pytest.mark.parametrize("mode", ["default", "dynamic, nothing fits"])
def test_dynamic_vram_is_on(runs, mode):
    if "No working comfy-aimdo install detected" in runs[mode][1]:
        pytest.skip("comfy-aimdo does not start here, so ComfyUI falls back to estimates")
    assert DYNAMIC in runs[mode][1]


def test_the_modes_are_what_they_are_called(runs):
    """ComfyUI says whether dynamic VRAM is on, and how much of a model it loads where nothing fits."""
    for mode in ("estimates", "estimates, nothing fits", "novram", "highvram"):
        assert DYNAMIC not in runs[mode][1], mode
    assert "loaded partially" in runs["estimates, nothing fits"][1]


def test_gpu_equals_cpu(runs, cpu):
    """Within the rounding of the dense model in bfloat16; the CPU computes in float32.

    Codes are decided by comparisons, so rounding moves some of them: with 4 and 8 bits it is what quantization itself
    changes that bounds the difference.
    """
    found = runs["default"][0]
    rounding = relative(found["dense"], cpu["dense"])
    assert 0 < rounding < 0.05
    assert relative(found["16"], cpu["16"]) < 2 * rounding
    for name in ("8", "4", "applied"):
        error = relative(cpu[name], cpu["dense"])
        assert relative(found[name], cpu[name]) < max(2 * rounding, error), name


@pytest.mark.parametrize("name", [*BITS, "dense"])
def test_scenes(runs, name):
    assert scene_of(runs["default"][0][name]) == "a red circle"


@pytest.mark.parametrize("mode", MODES)
def test_loras(runs, cpu, mode):
    found = runs[mode][0]
    expected = cpu["our LoRA"] - cpu["16"]
    effect = expected.norm() / cpu["16"].norm()
    assert effect > 0.05
    rounding = relative(found["16"], cpu["16"])
    for name in ("our LoRA", "core's LoRA"):
        assert relative(found[name] - found["16"], expected) < min(0.2, 3 * rounding / effect), name


@pytest.mark.parametrize("mode", MODES)
def test_unloading_leaves_nothing(runs, mode):
    device = runs[mode][2]
    assert device["type"] == "cuda"
    # cuBLAS keeps a workspace of 32 MiB; the models have 5 to 23 MB, and nine of them were loaded.
    assert device["torch_vram_total"] - device["torch_vram_free"] < 36 * 2**20
