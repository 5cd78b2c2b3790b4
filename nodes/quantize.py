"""Quantize Model (DiRotQ) and Apply DiRotQ (instant)."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..dirotq_core.methods import METHODS
from .choices import BITS


def obstacle(method: str | None, activation_bits: str | None) -> str | None:
    """Why the two values cannot go together, as one sentence, or None. A value is None where the graph computes it."""
    if method is not None and method not in METHODS:
        return f"method must be one of {', '.join(METHODS)}, got {method!r}"
    if activation_bits is not None and activation_bits not in BITS:
        return f"activation_bits must be one of {', '.join(BITS)}, got {activation_bits!r}"
    if method is None or activation_bits is None:
        return None
    known = [bits for bits in BITS if bits == "16" or int(bits) in METHODS[method].activations]
    if activation_bits in known:
        return None
    return f"method {method!r} has no {activation_bits}-bit activations; choose {' or '.join(known)}"


class Quantize(io.ComfyNode):
    """Calibrates a dense MODEL and saves it in 4 bit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiRotQQuantizeModel",
            display_name="Quantize Model (DiRotQ)",
            category="DiRotQ",
            description=(
                "Quantizes a 16-bit FLUX.1 or PixArt-Σ model to 4 bit, calibrated on prompts, saves the "
                "checkpoint and outputs the quantized model."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The 16-bit model to quantize."),
                io.String.Input(
                    "filename",
                    default="dirotq/model",
                    tooltip="Where to save the checkpoint, under models/diffusion_models; the extension is added.",
                ),
                io.Combo.Input(
                    "method",
                    list(METHODS),
                    tooltip=(
                        "dirotq: 16-bit subspace and Hadamard rotation (default); paper: as published, with a "
                        "dense rotation; orbitquant and lrq: other published methods; nvfp4 (4 or 16 bits) and nf4 "
                        "(16 bits): floating-point formats; hadamard, svdquant and rtn are simpler methods to compare "
                        "with; robuq is poor without training."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=0,
                    max=1024,
                    step=64,
                    tooltip=(
                        "Width of the subspace that stays 16 bit, for method dirotq. More is closer to the original, "
                        "and larger."
                    ),
                ),
                io.Combo.Input(
                    "activation_bits",
                    list(BITS),
                    tooltip=(
                        "Bits of the activations that the checkpoint asks for; it can be changed when loading. nf4 has "
                        "16 only, nvfp4 and robuq have 4 and 16."
                    ),
                ),
                io.Int.Input(
                    "samples", default=32, min=1, max=1024, tooltip="How many prompts are drawn for calibration."
                ),
                io.Int.Input("steps", default=20, min=1, max=200, tooltip="Sampling steps of each drawn prompt."),
                io.Int.Input(
                    "width", default=1024, min=64, max=4096, step=16, tooltip="Width of the drawn pictures in pixels."
                ),
                io.Int.Input(
                    "height", default=1024, min=64, max=4096, step=16, tooltip="Height of the drawn pictures in pixels."
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance while drawing: 1 for FLUX.1, about 4.5 for PixArt-Σ.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, tooltip="Seed of the drawn noise."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="Prompts for calibration, one a line. Empty: the built-in ones.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Text encoder for the prompts. Not needed if conditionings are connected.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip=(
                        "A conditioning to calibrate on, instead of prompts: this one is drawn samples times, each "
                        "with its own noise. The error in the report is measured on the same one."
                    ),
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative conditioning while drawing, where cfg is above 1."
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The quantized model."),
                io.String.Output(display_name="report", tooltip="What was measured: error of the layers, and remarks."),
            ],
            is_output_node=True,  # it writes a file, so nothing need follow
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, method: str | None = None, activation_bits: str | None = None) -> bool | str:
        """ComfyUI asks before it queues a graph, so nothing has been loaded or drawn yet."""
        return obstacle(method, activation_bits) or True

    @classmethod
    def execute(
        cls, model: Any, filename: str, method: str, rank: int, activation_bits: str, samples: int, steps: int,
        width: int, height: int, cfg: float, seed: int, prompts: str, clip: Any = None, positive: Any = None,
        negative: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        from . import quantizing
        from .calibrate import Sampling

        problem = obstacle(method, activation_bits)
        if problem:
            raise ValueError(problem)
        quantizing.check_inputs(clip, positive, negative, cfg)
        path = quantizing.target_path(filename)
        config = quantizing.calibrated_config(method, rank, int(activation_bits), seed)
        weights, _, plans = quantizing.examine(model, config, width, height)
        quantizing.check_room(path, weights, plans)
        conditionings = quantizing.conditionings(clip, positive, prompts, samples, cls.hidden.unique_id)
        sampling = Sampling(model, conditionings, negative, samples, steps, cfg, width, height, seed)
        made, report = quantizing.quantize_calibrated(sampling, config, path, cls.hidden.unique_id)
        return io.NodeOutput(made, report, ui=ui.PreviewText(report))


class Apply(io.ComfyNode):
    """Quantizes a loaded MODEL without calibration, in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiRotQApply",
            display_name="Apply DiRotQ (instant)",
            category="DiRotQ",
            description="Quantizes a loaded model's layers to 4 bit on the fly, without data.",
            inputs=[
                io.Model.Input("model", tooltip="A 16-bit model."),
                io.Combo.Input(
                    "activation_bits",
                    ["8", "4", "16"],
                    tooltip="Bits of the activations. Without calibration 8 is recommended.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with 4-bit layers.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, activation_bits: str) -> io.NodeOutput:
        from . import quantizing

        return io.NodeOutput(quantizing.quantize_instantly(model, int(activation_bits), cls.hidden.unique_id))
