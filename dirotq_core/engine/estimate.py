"""What a run will take, from the shapes alone: disk, GPU and host memory, multiplications."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from ..checkpoint import checkpoint_tensors
from ..config import DiRotQConfig
from ..files import read_json
from ..layout import SitePlan
from ..rounding import DOUBLE_WIDTH
from .blocks import Block
from .options import EngineOptions
from .source import Source

logger = logging.getLogger(__name__)

#: Kernels, the allocator's slack, the context.
GPU_OVERHEAD = 1.0e9
#: Packages, and a GPU's driver with its libraries (bytes without and with a GPU).
HOST_OVERHEAD = (1e9, 3e9)
#: K × K matrices that exist at once while a site is solved, beside its moment: that of v, three of the factorization,
#: and the factorization's own workspace.
SOLVER_MATRICES = 5
#: Image tokens assumed where neither size nor the pipeline's parts say how many: 1024² pixels.
IMAGE_TOKENS = 4096
TEXT_TOKENS = 512
#: Room left on the disk.
DISK_MARGIN = 1.02
#: Share of a plain product's speed that a whole run comes to, and seconds beside: per calibrated site, per linear
#: without calibration, per GB read and per GB written. Fits an H200: FLUX.1-dev's shape 323 s, without calibration 27,
#: PixArt-Σ's 78 (docs/quantize.md).
EFFICIENCY = 0.5
SECONDS_PER_SITE, SECONDS_PER_LINEAR, SECONDS_PER_GB_READ, SECONDS_PER_GB_WRITTEN = 0.1, 0.02, 0.2, 1.8


@dataclass(frozen=True)
class Estimate:
    """Bytes, and multiply-add operations. Activations follow from an assumed number of tokens per image.

    `pipeline` is whether one is around the transformer; `speed` that of the device, multiply-adds per second, None if
    it was not measured.
    """

    model: str
    blocks: int
    linears: int
    sites: int
    images: int
    inputs: int
    tokens_per_input: int
    dense_bytes: int
    output_bytes: int
    copied_bytes: int
    parts_bytes: int
    input_bytes: int
    spill_bytes: int
    gpu_bytes: int
    host_bytes: int
    operations: float
    pipeline: bool = True
    speed: float | None = None

    @property
    def seconds(self) -> float | None:
        """How long it takes, roughly."""
        if self.speed is None:
            return None
        each = self.sites * SECONDS_PER_SITE if self.images else self.linears * SECONDS_PER_LINEAR
        files = SECONDS_PER_GB_READ * self.dense_bytes / 1e9 + SECONDS_PER_GB_WRITTEN * self.output_bytes / 1e9
        return self.operations / (self.speed * EFFICIENCY) + each + files

    @property
    def disk_bytes(self) -> int:
        """Needed beside the output at the peak: finished parts, inputs, the result before its rename."""
        return self.parts_bytes + self.input_bytes + self.spill_bytes + self.output_bytes + self.copied_bytes

    def obstacles(self, target: Path, work: Path, options: EngineOptions) -> list[str]:
        """Why the run that was planned would be refused."""
        exists = f"{target} exists already" if target.exists() else None
        alone = "there is no pipeline around the transformer, which calibration runs"
        found = [
            exists, alone if self.images and not self.pipeline else None, self.too_large_for_gpu(options),
            self.too_large_for_disk(target, work),
        ]  # fmt: skip
        return [problem for problem in found if problem]

    def too_large_for_gpu(self, options: EngineOptions) -> str | None:
        """What is wrong if the estimate is above `max_gpu_memory` of the GPU to compute on."""
        limit = options.max_gpu_memory
        if limit is None or not options.device.startswith("cuda") or self.gpu_bytes <= limit * 1e9:
            return None
        return (
            f"about {self.gpu_bytes / 1e9:.1f} GB of GPU memory are needed, {limit:g} are allowed "
            "(max_gpu_memory); a smaller rank or chunk_tokens needs less"
        )

    def too_large_for_disk(self, target: Path, work: Path) -> str | None:
        """What is wrong if the disk has no room for the run; what it has written already counts as room."""
        folder = next(p for p in target.absolute().parents if p.is_dir())
        there = sum(f.stat().st_size for f in work.rglob("*") if f.is_file()) if work.is_dir() else 0
        room, wanted = shutil.disk_usage(folder).free + there, self.disk_bytes * DISK_MARGIN
        return f"{folder} has {_size(room)} of room, the run needs {_size(wanted)}" if room < wanted else None

    def check_gpu(self, options: EngineOptions) -> None:
        """Apply `max_gpu_memory`. ValueError if the estimate is above it."""
        if options.max_gpu_memory is None:
            return
        if not options.device.startswith("cuda"):
            logger.warning("max_gpu_memory has no effect on device %s", options.device)
            return
        problem = self.too_large_for_gpu(options)
        if problem:
            raise ValueError(problem)
        index = torch.device(options.device).index
        index = torch.cuda.current_device() if index is None else index
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.max_gpu_memory * 1e9 / total), index)

    def text(self) -> str:
        """The plan, for people."""
        rows = [
            ("model", f"{self.model}, {_size(self.dense_bytes)}"),
            ("to quantize", f"{self.linears} linears at {self.sites} sites in {self.blocks} blocks"),
            ("result", f"{_size(self.output_bytes)} transformer, {_size(self.copied_bytes)} copied"),
            ("disk", f"{_size(self.disk_bytes)} while it runs"),
            ("GPU memory", f"about {self.gpu_bytes / 1e9:.1f} GB (if computed on a GPU)"),
            ("host memory", f"about {self.host_bytes / 1e9:.1f} GB beyond the page cache"),
            ("operations", f"{self.operations:.3g} multiply-adds, drawing included"),
        ]
        if self.seconds is not None and self.speed is not None:
            rows.append(("time", f"about {_duration(self.seconds)} at {2 * self.speed / 1e12:.3g} TFLOP/s; rough"))
        if self.images:
            inputs = f"{self.images} images, {self.inputs} inputs of about {self.tokens_per_input} tokens, "
            inputs += _size(self.input_bytes) + (", waiting in files" if self.spill_bytes else "")
            rows.insert(2, ("calibration", inputs))
        else:
            rows.insert(2, ("calibration", "none (data-free)"))
        return "\n".join(f"{name:<12} {value}" for name, value in rows)


def estimate(
    source: Source, model: Any, blocks: Sequence[Block], outer: Sequence[str], config: DiRotQConfig, images: int,
    call: dict[str, Any], options: EngineOptions,
) -> Estimate:  # fmt: skip
    """What quantizing takes; `model` is the skeleton, `images` 0 without calibration."""
    state = model.state_dict()
    size = options.dtype.itemsize
    sites = [s for b in blocks for s in b.sites]
    spec = checkpoint_tensors(model, sites)
    output = sum(prod(shape) * (dtype or options.dtype).itemsize for shape, dtype in spec.values())
    block_bytes = [sum(state[n].numel() * size for n in b.tensors) for b in blocks]
    image_tokens, text_tokens = _tokens(source, model, call)
    tokens, width = image_tokens + text_tokens, max(s.in_features for s in sites)
    guided = 2 if type(model).__name__.startswith("PixArt") else 1
    steps = int(call.get("num_inference_steps") or 20)
    inputs = images * guided * min(options.timesteps, steps)
    hidden = min(s.in_features for s in sites)
    input_bytes = inputs * tokens * hidden * size
    limit = host_limit(options)
    chunk = max(tokens, min(options.chunk_tokens, tokens * max(1, inputs)))
    drawn_at_once = min(images, options.draw_batch)
    dense = sum(t.numel() for t in state.values())
    weights = sum(b.weights for b in blocks)
    operations = 0.0
    if images:
        passes = 2 if options.sequential else 1
        drawn = images * guided * steps
        seen = tokens if options.tokens_per_sample is None else min(tokens, options.tokens_per_sample)
        attention = 2 * tokens * hidden * len(blocks)
        operations += (weights + attention) * tokens * (drawn + passes * inputs)
        operations += inputs * seen * sum(float(s.in_features) ** 2 for s in sites if s.method)
        operations += sum(2.0 * s.in_features**3 for s in sites if s.method)
    operations += sum(float(s.in_features) ** 2 * sum(s.out_features) for s in sites if s.method and images)
    return Estimate(
        model=type(model).__name__, blocks=len(blocks), linears=sum(len(s.linears) for s in sites), sites=len(sites),
        images=images, inputs=inputs, tokens_per_input=tokens, dense_bytes=dense * size, output_bytes=output,
        copied_bytes=_copied(source, options), parts_bytes=output, input_bytes=input_bytes,
        spill_bytes=input_bytes if input_bytes > limit else 0,
        gpu_bytes=max(
            _gpu(state, blocks, outer, chunk * (4 * width + 8 * hidden) * size if images else 0, size),
            int(GPU_OVERHEAD + _largest_part(source, size)) if images else 0,
            int(GPU_OVERHEAD + 2 * max(block_bytes) + 3 * drawn_at_once * guided * tokens * hidden * size),
        ),
        host_bytes=int(
            HOST_OVERHEAD[options.device.startswith("cuda")] + 2 * max(block_bytes) + min(2 * input_bytes, limit)
            + _encoders(source, options, images)
        ),
        operations=operations, pipeline=source.root is not None,
    )  # fmt: skip


def measured_speed(options: EngineOptions) -> float:
    """Multiply-adds per second of a large product of matrices on the device."""
    n, rounds = (8192, 10) if options.device.startswith("cuda") else (1024, 3)
    a = torch.randn(n, n, dtype=options.dtype, device=options.device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(rounds):
            b = a @ a
        b[0, 0].item()  # waits
        seconds.append(time.perf_counter() - start)
    return rounds * float(n) ** 3 / min(seconds)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _gpu(state: Any, blocks: Sequence[Block], outer: Sequence[str], activations: int, size: int) -> int:
    """At the peak: while a block runs on its inputs, or while one of its sites is solved. No activations: data-free."""
    peak = 0
    for b in blocks:
        weights = sum(state[n].numel() * size for n in b.tensors)
        solving = max((_solver(s, activations > 0) for s in b.sites), default=0)
        peak = max(peak, 2 * weights + (_moments(b) if activations else 0) + max(solving, activations))
    return int(GPU_OVERHEAD + peak + (sum(state[n].numel() * size for n in outer) if activations else 0))


def _largest_part(source: Source, size: int) -> int:
    """Bytes of the pipeline's largest text encoder, which is on the GPU before the transformer."""
    if source.root is None:
        return 0
    return max((sum(prod(shape) * size for shape in part.values()) for part in source.other_parts()), default=0)


def _moments(block: Block) -> int:
    return sum(s.moment_bytes for s in block.sites)


def _solver(site: SitePlan, calibrated: bool) -> int:
    k, n = site.in_features, sum(site.out_features)
    matrices = SOLVER_MATRICES * k * k * (8 if k <= DOUBLE_WIDTH else 4) if site.method and calibrated else 0
    return matrices + 6 * n * k * 4


def _copied(source: Source, options: EngineOptions) -> int:
    if source.root is None or options.transformer_only:
        return 0
    return sum(f.stat().st_size for f in source.files() if source.folder not in f.parents)


def _encoders(source: Source, options: EngineOptions, images: int) -> int:
    """Bytes of the pipeline's other parts, which are in host memory while it draws."""
    return _copied(source, EngineOptions()) if images else 0


def _tokens(source: Source, model: Any, call: dict[str, Any]) -> tuple[int, int]:
    """Image and text tokens per row, as far as configurations and arguments say."""
    factor, text = 8, int(call.get("max_sequence_length") or TEXT_TOKENS)
    if type(model).__name__.startswith("PixArt"):
        text = 0  # seen by cross-attention alone
    vae = source.root / "vae" / "config.json" if source.root else None
    if vae is not None and vae.is_file():
        factor = 2 ** (len(read_json(vae).get("block_out_channels", [0] * 4)) - 1)
    height, width = (int(call.get(name) or 0) for name in ("height", "width"))
    if not height or not width:
        side = model.config.get("sample_size")
        return (side // 2) ** 2 if side else IMAGE_TOKENS, text
    return (height // factor // 2) * (width // factor // 2), text


def host_limit(options: EngineOptions) -> float:
    """Bytes of host memory that inputs may take."""
    if options.max_host_memory is not None:
        return options.max_host_memory * 1e9
    return psutil.virtual_memory().available / 2


class NoRoomError(OSError):
    """The disk has no room for a run that is about to start or to go on."""


def check_space(target: Path, needs: Estimate, work: Path) -> None:
    """Raise NoRoomError if the disk has no room for the run."""
    problem = needs.too_large_for_disk(target, work)
    if problem:
        raise NoRoomError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {problem}")
