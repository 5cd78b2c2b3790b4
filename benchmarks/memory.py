"""FLUX.1-dev end to end, text encoders and VAE included, under the memory of smaller cards.

    python benchmarks/memory.py [--cards 6 8 12 16 24] [--steps 4] [--folder KEEP] [--tiny]

Every part has its real shape and random weights; the transformer is quantized at rank 64 (the text encoders and the
VAE are not: T5-XXL has 9.5 GB in bf16). The pipeline is saved once and each measurement loads it in a process of its
own, as a user would, with `torch.cuda.set_per_process_memory_fraction` at the card's size less --reserve (the CUDA
context and a desktop, which that limit does not count). For each card the settings are tried from the fastest on; what
did not fit a larger card is not tried on a smaller. The latents of all that fit must be equal, bit for bit. Writes
results/memory.json after each measurement. --tiny runs all of it on the CPU with small shapes and no limit.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import dirotq

RESULTS = Path(__file__).parent / "results" / "memory.json"
GIB = 2**30
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    "dropout_rate": 0.0,
}  # fmt: skip
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "sample_size": 1024,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
# What --tiny has instead.
T5_TINY = {**T5_XXL, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
CLIP_TINY = {**CLIP_L, "hidden_size": 64, "intermediate_size": 128, "projection_dim": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
VAE_TINY = {**VAE, "block_out_channels": (16, 16, 16, 16), "latent_channels": 4, "norm_num_groups": 8,
            "sample_size": 64}  # fmt: skip
TILE = 512  # pixels: FLUX.1's VAE says 1024 of itself, and would decode a picture of that size in one piece


def small_tiles(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size = TILE
    pipe.vae.tile_latent_min_size = TILE // 8


def resident(pipe: Any, device: str) -> None:
    pipe.to(device)


def model_offload(pipe: Any, device: str) -> None:
    pipe.enable_model_cpu_offload(device=device)


def streamed_text(pipe: Any, device: str) -> None:
    small_tiles(pipe)
    _groups(pipe, device, ["transformer", "vae"])


def streamed(pipe: Any, device: str) -> None:
    small_tiles(pipe)
    _groups(pipe, device, ["vae"])


def sequential(pipe: Any, device: str) -> None:
    small_tiles(pipe)
    pipe.enable_sequential_cpu_offload(device=device)


def _groups(pipe: Any, device: str, resident: list[str]) -> None:
    pipe.enable_group_offload(
        torch.device(device), offload_type="leaf_level", use_stream=device != "cpu", exclude_modules=resident
    )


#: From the fastest to the one that needs least.
SETTINGS: dict[str, Callable[[Any, str], None]] = {
    "resident": resident,
    "model-offload": model_offload,
    "streamed-text": streamed_text,
    "streamed": streamed,
    "sequential": sequential,
}


# --- the pipeline -------------------------------------------------------------------------------------------------


def build(folder: Path, tiny: bool, device: str) -> None:
    """Save the pipeline in `folder`."""
    import step_models

    from dirotq.dirotq_core.demo.architectures import clip_tokenizer, t5_tokenizer

    transformer = step_models.dirotq(step_models.dense("flux", tiny, device), dirotq.DiRotQConfig(rank=64)).to("cpu")
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        text = CLIPTextModel(CLIPTextConfig(**(CLIP_TINY if tiny else CLIP_L))).to("cpu")
        text_2 = T5EncoderModel(T5Config(**(T5_TINY if tiny else T5_XXL))).to("cpu")
        vae = AutoencoderKL(**(VAE_TINY if tiny else VAE)).to("cpu")
    torch.set_default_dtype(default)
    gc.collect()
    # Small vocabularies, whose tokens the large models have, too; the lengths are FLUX.1's.
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    tokenizer.model_max_length, tokenizer_2.model_max_length = 77, 512
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    FluxPipeline(scheduler, vae, text, tokenizer, text_2, tokenizer_2, transformer).save_pretrained(folder)


def draw(pipe: Any, steps: int, pixels: int) -> tuple[float, list[float], str]:
    """Seconds in all, seconds of each step but the first, and a digest of the latents."""
    marks, digest = [], ""

    def mark(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        nonlocal digest
        _wait()
        marks.append(time.perf_counter())
        if step == steps - 1:
            digest = hashlib.sha256(kept["latents"].cpu().view(torch.uint8).numpy().tobytes()).hexdigest()
        return {}

    _wait()
    begin = time.perf_counter()
    image = pipe(
        "a large red square above a small yellow triangle on orange", height=pixels, width=pixels,
        num_inference_steps=steps, guidance_scale=3.5, generator=torch.Generator().manual_seed(0), output_type="pt",
        callback_on_step_end=mark,
    ).images  # fmt: skip
    _wait()
    if not torch.isfinite(image).all():
        raise RuntimeError("the picture holds NaN or infinity")
    return time.perf_counter() - begin, [b - a for a, b in itertools.pairwise(marks)], digest


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(setting: str, folder: Path, cap: int, steps: int, pixels: int, device: str) -> dict[str, Any]:
    """One setting under a limit of `cap` bytes (0: none), in this process."""
    if cap:
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    try:
        SETTINGS[setting](pipe, device)
        draw(pipe, 2, pixels)  # kernels are compiled, groups learn their order
        seconds, each, digest = draw(pipe, steps, pixels)
    except torch.OutOfMemoryError as error:
        return {"fits": False, "error": str(error).split(". GPU")[0]}
    row = {"fits": True, "seconds": seconds, "seconds_per_step": sorted(each)[len(each) // 2], "latents": digest}
    if device != "cpu":
        row |= {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
    return row


# --- the table ----------------------------------------------------------------------------------------------------


def child(args: argparse.Namespace, setting: str, folder: Path, cap: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", setting, "--folder", str(folder), "--cap", str(cap)]
    command += ["--steps", str(args.steps), "--pixels", str(args.pixels), *(["--tiny"] if args.tiny else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"fits": False, "error": f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| card | settings | peak | s per step | s in all |", "|---|---|---|---|---|"]
    for row in rows:
        if not row["fits"]:
            lines.append(f"| {row['card']} GB | {row['setting']} | {row['error']} | | |")
            continue
        peak = f"{row['peak_reserved'] / GIB:.1f} GiB" if "peak_reserved" in row else ""
        times = f"{row['seconds_per_step']:.2f} | {row['seconds']:.1f}"
        lines.append(f"| {row['card']} GB | {row['setting']} | {peak} | {times} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=float, nargs="+", default=[24, 16, 12, 8, 6], help="GiB (default: 24 … 6)")
    parser.add_argument("--reserve", type=float, default=0.6, help="GiB not for tensors (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="keep the pipeline there, and take it from there if it is")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU, to try the script")
    parser.add_argument("--run", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first is not timed")
    device = "cpu" if args.tiny else "cuda"
    if args.run:
        print(json.dumps(measure(args.run, args.folder, args.cap, args.steps, args.pixels, device)))
        return
    args.pixels = 128 if args.tiny else args.pixels
    temporary = None if args.folder else tempfile.TemporaryDirectory()
    folder = args.folder or Path(temporary.name) / "pipeline"  # type: ignore[union-attr]
    if not (folder / "model_index.json").exists():
        build(folder, args.tiny, device)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__, "pixels": args.pixels, "steps": args.steps, "reserve_gib": args.reserve,
        "rank": 64, "activation_bits": 4, "tiny": args.tiny, "rows": [],
    }  # fmt: skip
    # Sequential offload to the CPU is not one: accelerate refuses it for embeddings.
    names = [n for n in SETTINGS if device != "cpu" or n != "sequential"]
    for card in sorted(args.cards, reverse=True):
        while names:
            cap = 0 if device == "cpu" else int((card - args.reserve) * GIB)
            row = {"card": card, "setting": names[0], "cap": cap, **child(args, names[0], folder, cap)}
            result["rows"].append(row)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print(table([row]).splitlines()[-1], flush=True)
            if row["fits"] and not args.tiny:
                break
            names = names[1:]  # on the CPU all fit, and all are tried
    digests = {r["latents"] for r in result["rows"] if r["fits"]}
    print(table(result["rows"]))
    if len(digests) != 1:
        raise SystemExit(f"the settings gave {len(digests)} different results; all must be the resident model's")


if __name__ == "__main__":
    main()
