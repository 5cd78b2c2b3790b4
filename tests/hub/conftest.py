"""A local Hub with a base model and a user, and huggingface_hub's own client pointed at it."""

from pathlib import Path

import pytest
import torch

import dirotq
from dirotq.dirotq_core.demo.embedded import MODELS, load_pipeline

from ..hub_server import Hub, Repository

BASE = "lab/flux-tiny"
BASE_CARD = b"""---
license: other
license_name: flux-1-dev-non-commercial-license
license_link: LICENSE.md
pipeline_tag: text-to-image
extra_gated_prompt: By clicking "Agree", you agree to the licence.
tags:
- image-generation
---
# The base
"""
#: Token → (user, whether it may write).
TOKENS = {"hf_writer": ("ada", True), "hf_reader": ("ada", False), "hf_other": ("bob", True)}


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A quantized pipeline on disk."""
    folder = tmp_path_factory.mktemp("quantized") / "flux-tiny-dirotq"
    quantized_pipeline(MODELS["flux-tiny"].folder).save_pretrained(folder)
    return folder


def quantized_pipeline(source, **kwargs):
    """The embedded FLUX.1 from `source`, its transformer quantized without data."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_pretrained(
        source, subfolder="transformer", quantization_config=dirotq.DiRotQConfig(), torch_dtype=torch.bfloat16, **kwargs
    )
    return load_pipeline("flux-tiny", torch.bfloat16, transformer)


@pytest.fixture(scope="session")
def base_files():
    return Repository.of(MODELS["flux-tiny"].folder).files | {"README.md": BASE_CARD, "LICENSE.md": b"terms\n"}


@pytest.fixture
def hub(monkeypatch, tmp_path, base_files):
    """A running Hub with the base model, gated; nobody is logged in, nothing is in the cache."""
    hub = Hub(tokens=dict(TOKENS))
    hub.repositories[BASE] = Repository(dict(base_files), gated="auto", granted={"ada"})
    with hub:
        use(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


def use(monkeypatch, url, cache: Path):
    """What HF_ENDPOINT and HF_HUB_CACHE do when the client is imported."""
    from huggingface_hub import constants, file_download, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # before 1.0
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server has no Xet store
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def login(monkeypatch):
    """`login("hf_writer")` sets HF_TOKEN."""
    return lambda token: monkeypatch.setenv("HF_TOKEN", token)
