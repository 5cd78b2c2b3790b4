"""Quantize Model (DiRotQ) and Apply DiRotQ (instant)."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..dirotq_core.methods import METHODS


class Quantize(io.ComfyNode):
    """Calibrates a dense MODEL and saves it in 4 bit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiRotQQuantizeModel",
            display_name="Quantize Model (DiRotQ)",
            category="DiRotQ",
            description="Draws calibration images with a 16-bit FLUX.1 or PixArt model, quantizes it to 4 bit, saves "
            "it below models/diffusion_models and hands it on.",
            inputs=[
                io.Model.Input("model", tooltip="A bf16 or fp16 model; LoRAs applied to it are quantized with it."),
                io.String.Input(
                    "filename", default="dirotq/model", tooltip="Below models/diffusion_models; a new name."
                ),
                io.Combo.Input("method", list(METHODS), tooltip="dirotq is the best here."),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=0,
                    max=1024,
                    step=64,
                    tooltip="Width of dirotq's 16-bit part.",
                ),
                io.Combo.Input("activation_bits", ["4", "8", "16"], tooltip="Default; can be changed on load."),
                io.Int.Input("samples", default=32, min=1, max=1024, tooltip="Images drawn; more is better, slower."),
                io.Int.Input("steps", default=20, min=1, max=200, tooltip="Sampling steps per image."),
                io.Int.Input("width", default=1024, min=64, max=4096, step=16, tooltip="Of the images, in pixels."),
                io.Int.Input("height", default=1024, min=64, max=4096, step=16, tooltip="Of the images, in pixels."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="FLUX.1: 1, PixArt: 4.5."),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, tooltip="Of the calibration noise."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One a line, read with clip. Empty: built-in ones.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts. Not needed with positive."),
                io.Conditioning.Input("positive", optional=True, tooltip="Used for every image instead of prompts."),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed where cfg is not 1."),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(
        cls, model: Any, filename: str, method: str, rank: int, activation_bits: str, samples: int, steps: int,
        width: int, height: int, cfg: float, seed: int, prompts: str, clip: Any = None, positive: Any = None,
        negative: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        from . import quantizing
        from .calibrate import Sampling

        path = quantizing.target_path(filename)
        config = quantizing.calibrated_config(method, rank, int(activation_bits), seed)
        conditionings = quantizing.conditionings(clip, positive, prompts, samples)
        sampling = Sampling(model, conditionings, negative, samples, steps, cfg, width, height, seed)
        return io.NodeOutput(*quantizing.quantize_calibrated(sampling, config, path))


class Apply(io.ComfyNode):
    """Quantizes a loaded MODEL without calibration, in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiRotQApply",
            display_name="Apply DiRotQ (instant)",
            category="DiRotQ",
            description="Quantizes a 16-bit model in seconds, without data; Quantize Model (DiRotQ) is better.",
            inputs=[
                io.Model.Input("model", tooltip="A bf16 or fp16 FLUX.1 or PixArt model."),
                io.Combo.Input("activation_bits", ["8", "4", "16"], tooltip="8 is advised without calibration."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, activation_bits: str) -> io.NodeOutput:
        from . import quantizing

        return io.NodeOutput(quantizing.quantize_instantly(model, int(activation_bits)))
