"""Tests against a real ComfyUI checkout, named by COMFYUI_PATH; skipped where there is none."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel

import dirotq
from dirotq.dirotq_core.single_file import read_native

from ..hub_server import Hub
from . import models
from .beside_diffusers import calibrated_flux
from .core import dequantized, load
from .server import PACK, ROOT, Server

CHECKOUT = os.environ.get("COMFYUI_PATH")


def _reason() -> str | None:
    """Why these tests cannot run, or None."""
    if not CHECKOUT:
        return "COMFYUI_PATH names no ComfyUI checkout (0.33 or newer)"
    if not (Path(CHECKOUT) / "main.py").is_file():
        return f"COMFYUI_PATH is {CHECKOUT}, which has no main.py"
    if importlib.util.find_spec("comfy_kitchen") is None:
        return "ComfyUI's requirements are not installed: pip install -r $COMFYUI_PATH/requirements.txt"
    return None


def pytest_collection_modifyitems(items):
    reason = _reason()
    if reason is not None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def checkout():
    return Path(CHECKOUT).resolve()


@pytest.fixture(scope="session")
def hub():
    """What the server takes for the Hugging Face Hub; it runs while a test enters it."""
    hub = Hub()
    with hub:  # a port of its own
        pass
    return hub


@pytest.fixture(scope="session")
def server(checkout, hub, tmp_path_factory):
    """ComfyUI with our pack, the stand-ins and the small models."""
    base = tmp_path_factory.mktemp("comfyui")
    models.make_all(base / "models")
    packs = {PACK: ROOT, "stand_ins": Path(__file__).parent / "stand_ins"}
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(base / "hf")}
    with Server(checkout, base, packs, env) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    return server.client


@pytest.fixture(scope="session")
def object_info(client):
    return client.object_info()


@pytest.fixture(scope="session")
def core(checkout):
    return load(checkout)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders in the diffusers layout: calibrated FLUX.1 with a 16-bit subspace, data-free PixArt."""
    flux, pixart = tmp_path_factory.mktemp("flux"), tmp_path_factory.mktemp("pixart")
    calibrated_flux(dirotq.DiRotQConfig(rank=64)).save_pretrained(flux)
    dense = tmp_path_factory.mktemp("dense")
    models.pixart().save_pretrained(dense)
    quantized = PixArtTransformer2DModel.from_pretrained(
        dense, quantization_config=dirotq.DiRotQConfig(), torch_dtype=torch.bfloat16
    )
    quantized.save_pretrained(pixart)
    return {"flux": flux, "pixart": pixart}


@pytest.fixture(scope="session")
def checkpoint(folders):
    return read_native(folders["flux"])


@pytest.fixture
def make(core, checkpoint):
    """A fresh MODEL of the FLUX.1 checkpoint."""

    def make(bits="16", lora="side branch", backend="auto"):
        return core.model.make_model(checkpoint, core.model.make_settings(checkpoint, bits, backend, lora))

    yield make
    core.comfy.model_management.unload_all_models()


@pytest.fixture
def dense(core, make):
    """The dense MODEL in float32 with the weights that the 4-bit ones stand for."""
    return dequantized(core, make())
