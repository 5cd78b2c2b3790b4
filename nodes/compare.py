"""Compare: two images or two latents → PSNR, SSIM, and the two beside their difference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..dirotq_core.metrics import psnr, ssim

#: Latents are drawn this many times larger, as every supported model's VAE would.
LATENT_SCALE = 8
SSIM_WINDOW = 7


class Compare(io.ComfyNode):
    """PSNR and SSIM of B against A, and the picture A | B | gain × |A − B|."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiRotQCompare",
            display_name="Compare (DiRotQ)",
            category="DiRotQ",
            description="Measures how far two pictures or latents of the same prompt and seed are apart.",
            search_aliases=["psnr", "ssim", "difference", "image quality"],
            is_output_node=True,
            inputs=[
                io.Float.Input(
                    "gain", default=8.0, min=1.0, max=255.0, step=0.5, tooltip="How much the difference is amplified."
                ),
                io.Image.Input("image_a", optional=True, tooltip="The reference, e.g. drawn by the bf16 model."),
                io.Image.Input("image_b", optional=True, tooltip="Compared with A, e.g. drawn by the 4-bit model."),
                io.Latent.Input("latent_a", optional=True, tooltip="The reference, instead of an image."),
                io.Latent.Input("latent_b", optional=True, tooltip="Compared with latent A."),
            ],
            outputs=[
                io.Image.Output("picture", display_name="picture", tooltip="A, B, and their amplified difference."),
                io.Float.Output(
                    "psnr", display_name="PSNR", tooltip="Peak signal-to-noise ratio in dB; higher is closer."
                ),
                io.Float.Output("ssim", display_name="SSIM", tooltip="Structural similarity; 1 means equal."),
                io.String.Output("text", display_name="text", tooltip="Both numbers in words."),
            ],
        )

    @classmethod
    def execute(
        cls,
        gain: float,
        image_a: torch.Tensor | None = None,
        image_b: torch.Tensor | None = None,
        latent_a: dict[str, Any] | None = None,
        latent_b: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        images, latents = _pair("image", image_a, image_b), _pair("latent", latent_a, latent_b)
        if (images is None) == (latents is None):
            raise ValueError("Compare needs either image_a and image_b or latent_a and latent_b")
        if images is not None:
            a, b = images
            _check("images", a, b)
            reference, other = (np.clip(x.cpu().float().numpy() * 255, 0, 255).round() for x in (a, b))
            what = f"{len(a)} image{'s' if len(a) > 1 else ''} of {a.shape[2]} × {a.shape[1]}"
            scale = 1
        else:
            assert latents is not None
            a, b = (x["samples"] for x in latents)
            _check("latents", a, b)
            reference, other = _latent_levels(a, b)
            what = f"{len(a)} latent{'s' if len(a) > 1 else ''} of {a.shape[3]} × {a.shape[2]}, {a.shape[1]} channels"
            scale = LATENT_SCALE
        decibels, similarity = _measure(reference, other)
        text = f"PSNR {decibels:.2f} dB, SSIM {_similarity_in_words(similarity)} ({what})"
        picture = _picture(reference, other, gain, scale)
        return io.NodeOutput(picture, decibels, similarity, text, ui=_Shown(picture, text, cls))


class _Shown(ui.PreviewImage):
    """The picture on the node, with the numbers below."""

    def __init__(self, picture: torch.Tensor, text: str, cls: type[io.ComfyNode]):
        super().__init__(picture, cls=cls)
        self.text = text

    def as_dict(self) -> dict:
        return {**super().as_dict(), "text": (self.text,)}


def _pair(kind: str, a: Any, b: Any) -> tuple[Any, Any] | None:
    if (a is None) != (b is None):
        present, absent = ("a", "b") if b is None else ("b", "a")
        raise ValueError(f"Compare has {kind}_{present} but no {kind}_{absent}")
    return None if a is None else (a, b)


def _check(kind: str, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.ndim != 4 or b.ndim != 4:
        raise ValueError(f"Compare works on still {kind} (4 dimensions), got shapes {tuple(a.shape)}, {tuple(b.shape)}")
    if a.shape != b.shape:
        raise ValueError(f"Compare needs two {kind} of one size, got {tuple(a.shape)} and {tuple(b.shape)}")


def _latent_levels(a: torch.Tensor, b: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, C, H, W] as [B, H, W, C] on a scale where A spans 0 to 255, the peak that PSNR refers to."""
    reference, other = (x.cpu().double().numpy().transpose(0, 2, 3, 1) for x in (a, b))
    low, span = reference.min(), np.ptp(reference)
    if span == 0:
        raise ValueError("latent_a is constant (an empty latent?), so there is no signal to compare with")
    return (reference - low) * (255 / span), (other - low) * (255 / span)


def _measure(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """PSNR over all images of the batch [B, H, W, C] together, mean SSIM; NaN for images too small for its window."""
    rows = (-1, *reference.shape[2:])
    decibels = psnr(other.reshape(rows), reference.reshape(rows))
    if min(reference.shape[1:3]) < SSIM_WINDOW:
        return decibels, math.nan
    return decibels, float(np.mean([ssim(o, r) for o, r in zip(other, reference, strict=True)]))


def _similarity_in_words(similarity: float) -> str:
    return "undefined at this size" if math.isnan(similarity) else f"{similarity:.4f}"


def _picture(reference: np.ndarray, other: np.ndarray, gain: float, scale: int) -> torch.Tensor:
    """IMAGE [B, H, 3 W, 3] in 0 … 1: A, B, amplified difference; the first three channels."""
    reference, other = (_three_channels(x) for x in (reference, other))
    row = np.concatenate([reference, other, gain * np.abs(reference - other)], axis=2)
    row = row.repeat(scale, axis=1).repeat(scale, axis=2)
    return torch.from_numpy(np.clip(row / 255, 0, 1).astype(np.float32))


def _three_channels(x: np.ndarray) -> np.ndarray:
    return x[..., :3] if x.shape[-1] >= 3 else x[..., :1].repeat(3, axis=-1)
