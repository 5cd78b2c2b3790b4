"""From a dense MODEL to a quantized one."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ..dirotq_core.config import DiRotQConfig
from ..dirotq_core.inspect import skeleton
from ..dirotq_core.layout import SitePlan, plan_sites
from ..dirotq_core.prompts import BUILT_IN_PROMPTS, read_prompts
from ..dirotq_core.report import QuantizationReport
from ..dirotq_core.single_file import NativeCheckpoint, fusions, infer_config, write_native
from ..dirotq_core.solve import SolvedSite, solve_site
from .calibrate import Sampling, calibrated_sites
from .folders import checkpoint_root
from .hooks import refuse_weight_hooks
from .model import make_model, make_settings
from .operations import DiRotQLinear
from .progress import Progress
from .size import count_when_loaded
from .source import SourceWeights

#: Most bytes of a file's name before its extension; file systems take 255 with what it is called while it is written.
NAME_BYTES = 200


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
    # Biases of quantized linears stay; what diffusers has no name for is unused at inference.
    tensors = {
        name: _stored(weights[name])
        for name in weights
        if name.removesuffix(".weight") not in solved and (name in known or name.rpartition(".")[0] in known)
    }
    for name, site in solved.items():
        tensors |= {f"{name}.{field}": t for field, t in site.linears[0].items()}
        tensors |= {f"{name}.input_site.{field}": t for field, t in site.site.items()}
    return NativeCheckpoint(
        tensors, {p.owner: p for p in plans}, config, description | {"quantization_config": config.to_dict()}
    )


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.cpu()
    # A copy, because the dense model goes on living with memory of its own.
    return tensor.to(torch.bfloat16 if tensor.dtype == torch.float32 else tensor.dtype, copy=True)


def dense_weights(model: Any) -> SourceWeights:
    """The weights of a MODEL that can be quantized; ValueError says why it cannot be."""
    if any(isinstance(m, DiRotQLinear) for m in model.model.modules()):
        raise ValueError("this MODEL is quantized already, by a DiRotQ node: it needs no further one, use it as it is")
    if model.injections:
        raise ValueError(
            f"this MODEL computes more than its weights say (injections: {', '.join(sorted(model.injections))}), which "
            "quantizing would lose; add a bypass LoRA behind this node, or in front of it with 'Load LoRA'"
        )
    return SourceWeights(model)


def examine(
    model: Any, config: DiRotQConfig, width: int, height: int
) -> tuple[SourceWeights, dict[str, Any], list[SitePlan]]:
    """Weights, config.json and sites of a dense MODEL; ValueError if it cannot be quantized, or not at that size."""
    weights = dense_weights(model)
    description, plans = native_plans(weights.shapes, config)
    if description["_class_name"].startswith("PixArt") and width + height <= 512:
        raise ValueError(
            f"ComfyUI's PixArt divides by zero at {width} x {height} pixels; its sides must be more than 256 pixels on "
            "average"
        )
    return weights, description, plans


def quantize_calibrated(
    sampling: Sampling, config: DiRotQConfig, path: Path, node_id: str | None = None
) -> tuple[Any, str]:
    """Quantize the model of `sampling` on the images it draws and save it; the quantized MODEL, and a report.

    Nothing is written before all is computed; an error or ComfyUI's interrupt leaves no file, also while it is written.
    """
    model = sampling.model
    weights, description, plans = examine(model, config, sampling.width, sampling.height)
    solved = calibrated_sites(sampling, weights, plans, config, node_id)
    checkpoint = assemble(weights, solved, plans, config, description)
    rows = [row for site in solved.values() for row in site.reports]
    measured = {r.name: r.output_db for r in rows if r.output_db is not None and math.isfinite(r.output_db)}
    interrupt = comfy.model_management.throw_exception_if_processing_interrupted
    write_native(path, checkpoint.tensors, checkpoint.config, measured, before_each=interrupt)
    report = QuantizationReport(config.method, config.activation_bits or 4, rows)
    return put_on(model, checkpoint), report_text(report, path)


def quantize_instantly(model: Any, bits: int, node_id: str | None = None) -> Any:
    """`model` with data-free 4-bit weights (Hadamard rotation, rounding to nearest) and `bits`-bit activations."""
    config = DiRotQConfig(activation_bits=bits).resolved(calibrated=False)
    weights = dense_weights(model)
    description, plans = native_plans(weights.shapes, config)
    device = comfy.model_management.get_torch_device()
    solved = {}
    with Progress(len(plans), node_id) as progress:
        for plan in plans:
            solved[plan.owner] = solve_site(plan, config, [weights[f"{plan.owner}.weight"].to(device)], None)
            progress.step(f"quantizing {plan.owner}")
    return put_on(model, assemble(weights, solved, plans, config, description))


def put_on(model: Any, checkpoint: NativeCheckpoint) -> Any:
    """`model` with the weights of `checkpoint`: its options, wrappers and hooks stay, its weight patches are inside.

    `model` must have no injections: they belong to its modules.
    """
    made = make_model(checkpoint, make_settings(checkpoint, "default", "auto", "side branch"))
    clone = model.clone(model_override=made.get_clone_model_override())
    clone.patches, clone.size, clone.cached_patcher_init = {}, 0, made.cached_patcher_init
    # ComfyUI may otherwise go back to the dense model, which the parent keeps in memory, and take its injections out of
    # modules that they were never put into.
    clone.parent, clone.injections, clone.is_injected = None, {}, False
    clone.set_attachments("dirotq", checkpoint.config)
    count_when_loaded(clone)
    refuse_weight_hooks(clone)
    return clone


def target_path(filename: str) -> Path:
    """Where a checkpoint called `filename` goes.

    Raises:
        ValueError: the name leads out of the folder, or no file can have it.
        OSError: nothing can be written there.
    """
    root = checkpoint_root().resolve()
    name = filename.strip().removesuffix(".safetensors")
    if "\0" in name:
        raise ValueError(f"filename must not contain a NUL character, got {filename!r}")
    longest = max(len(os.fsencode(part)) for part in (*Path(name).parts, ""))
    if longest > NAME_BYTES:
        raise ValueError(f"each part of filename can have {NAME_BYTES} bytes, got one of {longest}")
    path = (root / f"{name}.safetensors").resolve()
    if not name or path.stem.startswith(".") or root not in path.parents:
        raise ValueError(f"filename must be a name below {root}, got {filename!r}")
    above = _nearest(path)
    if not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {above} is not a folder; choose another filename")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write in {above}; choose another filename")
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another filename")
    return path


def _nearest(path: Path) -> Path:
    """The nearest of the folders above `path` that is there; it need not be a folder."""
    return next(p for p in path.parents if os.path.lexists(p))


def check_room(path: Path, weights: SourceWeights, plans: list[SitePlan]) -> None:
    """Raise OSError unless the disk of `path` has room for the checkpoint of `plans`."""
    packed = {f"{name}.weight" for plan in plans for name in plan.linears}
    size = sum(2 * math.prod(shape) for name, shape in weights.shapes.items() if name not in packed)
    for plan in plans:
        specs = [plan.site_spec(), *(plan.linear_spec(rows) for rows in plan.out_features)]
        size += sum(math.prod(shape) * dtype.itemsize for spec in specs for shape, dtype in spec.values())
    above = _nearest(path)
    free = shutil.disk_usage(above).free
    if free < size:
        raise OSError(
            f"the checkpoint takes {size / 1e9:.2f} GB, but the disk of {above} has only {free / 1e9:.2f} GB left"
        )


def calibrated_config(method: str, rank: int, bits: int, seed: int) -> DiRotQConfig:
    own = rank if method == "dirotq" else None  # the others bring theirs
    return DiRotQConfig(method=method, rank=own, activation_bits=bits, seed=seed).resolved(calibrated=True)


def check_inputs(clip: Any, positive: Any, negative: Any, cfg: float) -> None:
    """Raise ValueError before any work if an input is missing."""
    if positive is None and clip is None:
        raise ValueError("connect clip (it encodes the prompts) or positive")
    if cfg != 1.0 and negative is None:
        raise ValueError(f"cfg is {cfg:g}; connect negative, or set cfg to 1")


def conditionings(clip: Any, positive: Any, prompts: str, samples: int, node_id: str | None = None) -> list[Any]:
    """One positive conditioning per image; encoded once, kept in host memory."""
    if positive is not None:
        return [positive]
    lines = [line.strip() for line in prompts.splitlines() if line.strip()] or read_prompts(BUILT_IN_PROMPTS)
    lines = lines[:samples]
    out = []
    with Progress(len(lines), node_id) as progress:
        for line in lines:
            out.append(clip.encode_from_tokens_scheduled(clip.tokenize(line)))
            progress.step("encoding prompts")
    return out


def report_text(report: QuantizationReport, path: Path) -> str:
    lines = [f"saved {path} ({path.stat().st_size / 1e9:.2f} GB), {len(report.linears)} linears in 4 bit"]
    if report.median_output_db is not None:
        lines.append(f"median SQNR of their outputs on held-out tokens: {report.median_output_db:.1f} dB")
    return "\n".join([*lines, *report.notes()])
