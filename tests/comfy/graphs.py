"""Prompts in the API format that several tests build on."""

from __future__ import annotations

from typing import Any

from . import models

Prompt = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def sampled(
    model: dict[str, Any], *, text: str = "a red circle", steps: int = 2, seed: int = 1, size: int = 64
) -> Prompt:
    """FLUX.1: `model` node → latent in node "latent", saved by node "save"."""
    return {
        "model": model,
        "clip": node("DiRotQTestTextEncoder"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text=text),
        "guided": node("FluxGuidance", conditioning=["text", 0], guidance=3.5),
        "empty": node("EmptySD3LatentImage", width=size, height=size, batch_size=1),
        "latent": node(
            "KSampler",
            model=["model", 0],
            positive=["guided", 0],
            negative=["text", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["latent", 0], filename_prefix="latents/test"),
    }


def dense_flux() -> dict[str, Any]:
    return node("UNETLoader", unet_name=models.FLUX, weight_dtype="default")


def four_bit(name: str, **settings: str) -> dict[str, Any]:
    """Load DiRotQ Model with its default settings, or others."""
    defaults = {
        "repo_id": "",
        "revision": "main",
        "activation_bits": "default",
        "backend": "auto",
        "lora": "side branch",
    }
    return node("DiRotQLoadModel", model_name=name, **(defaults | settings))


def saved_latent(client: Any, outputs: dict[str, Any]) -> Any:
    """The tensor [B, C, H, W] that a prompt's node "save" wrote."""
    from safetensors.torch import load_file

    return load_file(client.file(outputs["save"]["latents"][0]))["latent_tensor"]
