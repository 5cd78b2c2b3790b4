"""Time and memory of the streaming engine on a transformer of a real model's shape, with random weights.

    python benchmarks/engine.py --shape flux-dev --out /tmp/engine --max-gpu-memory 11

Saves random weights as sharded safetensors, puts the embedded model's text encoders, scheduler and autoencoder around
them (the context embedder has their width; all else is the real shape), and quantizes. Inputs come from the real
pipeline code. Prints seconds by stage, the GPU's peak, and the peak of the process's own host memory (anonymous pages:
what is mapped from files is the page cache's), and writes them as JSON. ``torchrun --nproc-per-node N`` uses N GPUs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import threading
import time
from pathlib import Path

import torch

import dirotq
from dirotq.dirotq_core.demo.embedded import MODELS
from dirotq.dirotq_core.inspect import skeleton
from dirotq.dirotq_core.prompts import BUILT_IN_PROMPTS, read_prompts
from dirotq.dirotq_core.safetensors_file import write_safetensors
from dirotq.dirotq_core.shards import SHARD_BYTES

#: Shape → embedded model that lends the other parts, the transformer's configuration, and the call.
SHAPES = {
    "flux-dev": ("flux-tiny", {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24,
                               "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]},
                 {"height": 512, "width": 512, "max_sequence_length": 512}),
    "flux-small": ("flux-tiny", {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 2,
                                 "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]},
                   {"height": 128, "width": 128, "max_sequence_length": 64}),
    "pixart-sigma": ("pixart-sigma-tiny", {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72,
                                           "cross_attention_dim": 1152, "sample_size": 128},
                     {"height": 512, "width": 512, "max_sequence_length": 300, "guidance_scale": 4.5,
                      "use_resolution_binning": False, "clean_caption": False}),
}  # fmt: skip


def make_pipeline(folder: Path, shape: str, blocks: list[int] | None, device: str) -> None:
    """The embedded pipeline with a random transformer of another shape, in shards."""
    name, changes, _ = SHAPES[shape]
    if blocks is not None:
        changes = {**changes, **dict(zip(("num_layers", "num_single_layers"), blocks, strict=False))}
    shutil.copytree(MODELS[name].folder, folder, ignore=shutil.ignore_patterns("transformer"))
    target = folder / "transformer"
    target.mkdir()
    config = {**json.loads((MODELS[name].folder / "transformer" / "config.json").read_text()), **changes}
    (target / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device).manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for key, t in skeleton(config).state_dict().items():
        if sum(s.numel() * 2 for s in shards[-1].values()) + t.numel() * 2 > SHARD_BYTES:
            _save(target, len(shards), shards[-1])
            shards[-1] = {k: torch.empty(0) for k in shards[-1]}
            shards.append({})
        value = torch.randn(t.shape, generator=generator, device=device) * (0.5 / max(t.shape[-1], 1) ** 0.5)
        if key.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")):
            value = 1 + 0.1 * value
        shards[-1][key] = value.to("cpu", torch.bfloat16)
    _save(target, len(shards), shards[-1])
    names = {k: f"diffusion_pytorch_model-{i + 1:05d}.safetensors" for i, s in enumerate(shards) for k in s}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _save(folder: Path, number: int, shard: dict[str, torch.Tensor]) -> None:
    write_safetensors(folder / f"diffusion_pytorch_model-{number:05d}.safetensors", shard)


class Stages(logging.Handler):
    """Seconds by stage, from what the engine logs."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple):
            for arg in record.args:
                self.seconds = getattr(arg, "seconds", self.seconds)


class HostPeak(threading.Thread):
    """The most memory of its own that this process had, in bytes: anonymous and shared pages; Linux only."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        while Path("/proc/self/status").exists():
            lines = dict(li.split(":", 1) for li in Path("/proc/self/status").read_text().splitlines() if ":" in li)
            own = sum(int(lines.get(name, "0").split()[0]) for name in ("RssAnon", "RssShmem"))
            self.bytes = max(self.bytes, own * 1024)
            time.sleep(0.05)


def pinned_bytes() -> int:
    """The most page-locked memory that PyTorch held for copies to the GPU, which need not count as the process's."""
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="flux-dev")
    parser.add_argument("--out", type=Path, required=True, help="folder for model, result and engine.json")
    parser.add_argument("--json", type=Path, help="where to write the result instead")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--draw-batch", type=int, default=32)
    parser.add_argument("--blocks", type=int, nargs="+", help="fewer blocks: of each stack, in order")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--data-free", action="store_true")
    parser.add_argument("--max-gpu-memory", type=float)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    stages = Stages()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[stages, logging.StreamHandler()])
    first = os.environ.get("RANK", "0") == "0"
    model = args.out / args.shape
    if first and not (model / "transformer" / "config.json").exists():
        start = time.perf_counter()
        make_pipeline(model, args.shape, args.blocks, args.device)
        print(f"made the model in {time.perf_counter() - start:.0f} s", flush=True)
    while not (model / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists():
        time.sleep(1)
    peak = HostPeak()
    peak.start()
    options = dirotq.EngineOptions(
        samples=args.samples, timesteps=args.timesteps, draw_batch=args.draw_batch, device=args.device,
        max_gpu_memory=args.max_gpu_memory,
    )  # fmt: skip
    prompts = None if args.data_free else read_prompts(BUILT_IN_PROMPTS)
    call = {**SHAPES[args.shape][2], "num_inference_steps": args.steps}
    result = args.out / "result"
    shutil.rmtree(result, ignore_errors=True)
    start = time.perf_counter()
    config = dirotq.DiRotQConfig(rank=args.rank)
    report = dirotq.quantize_checkpoint(model, result, config, prompts, call=call, options=options)
    seconds = time.perf_counter() - start
    body = {
        "shape": args.shape, "samples": args.samples, "timesteps": args.timesteps, "steps": args.steps,
        "data_free": args.data_free, "seconds": seconds, "stages": stages.seconds,
        "host_gb": peak.bytes / 1e9, "pinned_gb": pinned_bytes() / 1e9, "max_gpu_memory": args.max_gpu_memory,
        "gpu_allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if args.device.startswith("cuda") else None,
        "gpu_reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if args.device.startswith("cuda") else None,
        "blocks": args.blocks, "rank": args.rank, "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu",
        "tokens": report.linears[0].tokens, "median_output_db": report.median_output_db,
        "notes": report.notes(),
    }  # fmt: skip
    if first:
        print(json.dumps(body, indent=1))
        (args.json or args.out / "engine.json").write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
