"""Quantize Model and Apply: from a dense MODEL to a quantized one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..dirotq_core.config import DiRotQConfig
from ..dirotq_core.inspect import skeleton
from ..dirotq_core.layout import SitePlan, plan_sites
from ..dirotq_core.methods import METHODS
from ..dirotq_core.prompts import BUILT_IN_PROMPTS, read_prompts
from ..dirotq_core.report import QuantizationReport
from ..dirotq_core.single_file import NativeCheckpoint, fusions, infer_config, write_native
from ..dirotq_core.solve import SolvedSite, solve_site
from .calibrate import Sampling, calibrated_sites
from .load import FOLDER
from .model import make_model, make_settings, native_weights


def native_plans(shapes: Mapping[str, tuple[int, ...]], config: DiRotQConfig) -> tuple[dict[str, Any], list[SitePlan]]:
    """config.json of a native model, and the sites of its native linears.

    Args:
        shapes: of the dense model's tensors. config: resolved.

    Raises:
        ValueError: the model has no recipe, or `config` excludes part of a linear that is fused here.
    """
    description = infer_config(shapes)
    owners = {n: p for p in plan_sites(skeleton(description), config) for n in p.linears}
    plans = []
    for fusion in fusions(description):
        planned = {owners.get(part) for part in fusion.parts}
        if planned == {None}:
            continue
        if len(planned) > 1:
            raise ValueError(f"{fusion.native} is one linear here; exclude all of {', '.join(fusion.parts)} or none")
        plan = owners[fusion.parts[0]]
        plans.append(dataclasses.replace(plan, linears=(fusion.native,), out_features=(sum(plan.out_features),)))
    return description, plans


def assemble(
    weights: Mapping[str, torch.Tensor], solved: Mapping[str, SolvedSite], plans: list[SitePlan],
    config: DiRotQConfig, description: dict[str, Any],
) -> NativeCheckpoint:  # fmt: skip
    """The checkpoint of dense `weights` with the `solved` linears in place of theirs, in host memory."""
    known = {f.native for f in fusions(description)}
    tensors = {
        name: _stored(t)
        for name, t in weights.items()
        # Biases of quantized linears stay; what diffusers has no name for is unused at inference.
        if name.removesuffix(".weight") not in solved and (name in known or name.rpartition(".")[0] in known)
    }
    for name, site in solved.items():
        tensors |= {f"{name}.{field}": t for field, t in site.linears[0].items()}
        tensors |= {f"{name}.input_site.{field}": t for field, t in site.site.items()}
    return NativeCheckpoint(
        tensors, {p.owner: p for p in plans}, config, description | {"quantization_config": config.to_dict()}
    )


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    return tensor.to(torch.bfloat16) if tensor.dtype == torch.float32 else tensor


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
        path = _target(filename)
        config = _config(method, rank, int(activation_bits), seed)
        weights = native_weights(model)
        description, plans = native_plans({n: tuple(t.shape) for n, t in weights.items()}, config)
        conditionings = _conditionings(clip, positive, prompts, samples)
        sampling = Sampling(model, conditionings, negative, samples, steps, cfg, width, height, seed)
        solved = calibrated_sites(sampling, plans, config)
        checkpoint = assemble(weights, solved, plans, config, description)
        report = QuantizationReport(
            config.method, config.activation_bits or 4, [r for s in solved.values() for r in s.reports]
        )
        write_native(path, checkpoint.tensors, checkpoint.config)
        return io.NodeOutput(_on(model, checkpoint), _text(report, path))


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
        config = DiRotQConfig(activation_bits=int(activation_bits)).resolved(calibrated=False)
        weights = native_weights(model)
        description, plans = native_plans({n: tuple(t.shape) for n, t in weights.items()}, config)
        bar = comfy.utils.ProgressBar(len(plans))
        device = comfy.model_management.get_torch_device()
        solved = {}
        for plan in plans:
            comfy.model_management.throw_exception_if_processing_interrupted()
            solved[plan.owner] = solve_site(plan, config, [weights[f"{plan.owner}.weight"].to(device)], None)
            bar.update(1)
        return io.NodeOutput(_on(model, assemble(weights, solved, plans, config, description)))


def _on(model: Any, checkpoint: NativeCheckpoint) -> Any:
    """`model` with the weights of `checkpoint`: its options, wrappers and hooks stay, its weight patches are inside."""
    made = make_model(checkpoint, make_settings(checkpoint, "default", "auto", "side branch"))
    clone = model.clone(model_override=made.get_clone_model_override())
    clone.patches, clone.size, clone.cached_patcher_init = {}, 0, made.cached_patcher_init
    clone.set_attachments("dirotq", checkpoint.config)
    return clone


def _target(filename: str) -> Path:
    root = Path(folder_paths.get_folder_paths(FOLDER)[0]).resolve()
    name = filename.strip().removesuffix(".safetensors")
    path = (root / f"{name}.safetensors").resolve()
    if not name or root not in path.parents:
        raise ValueError(f"filename must be a name below {root}, got {filename!r}")
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another filename")
    return path


def _config(method: str, rank: int, bits: int, seed: int) -> DiRotQConfig:
    own = rank if method == "dirotq" else None  # the others bring theirs
    return DiRotQConfig(method=method, rank=own, activation_bits=bits, seed=seed).resolved(calibrated=True)


def _conditionings(clip: Any, positive: Any, prompts: str, samples: int) -> list[Any]:
    """One positive conditioning per image; encoded once, kept in host memory."""
    if positive is not None:
        return [positive]
    if clip is None:
        raise ValueError("connect clip (it encodes the prompts) or positive")
    lines = [line.strip() for line in prompts.splitlines() if line.strip()] or read_prompts(BUILT_IN_PROMPTS)
    bar = comfy.utils.ProgressBar(min(samples, len(lines)))
    out = []
    for line in lines[:samples]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        out.append(clip.encode_from_tokens_scheduled(clip.tokenize(line)))
        bar.update(1)
    return out


def _text(report: QuantizationReport, path: Path) -> str:
    lines = [f"saved {path} ({path.stat().st_size / 1e9:.2f} GB), {len(report.linears)} linears in 4 bit"]
    if report.median_output_db is not None:
        lines.append(f"median SQNR of their outputs on held-out tokens: {report.median_output_db:.1f} dB")
    return "\n".join([*lines, *report.notes()])
