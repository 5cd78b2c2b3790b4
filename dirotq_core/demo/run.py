"""``dirotq demo``: quantize the embedded models, reload them in a new process, compare the pictures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..inspect import inspect_checkpoint
from ..metrics import psnr, ssim
from .checker import check
from .embedded import MODELS, EmbeddedModel, load_pipeline, prompts
from .scenes import Scene
from .sheet import contact_sheet

CALIBRATION_SEED, DRAWING_SEED = 1, 2
#: Says that a folder is the demo's own, to be written again.
MARKER = ".dirotq-demo"


@dataclass(frozen=True)
class Row:
    """One model, 4 bit against bf16, over the drawn prompts. Megabytes are 10⁶ bytes of the transformer."""

    model: str
    psnr: float
    ssim: float
    accuracy: float
    reference_accuracy: float
    megabytes: float
    reference_megabytes: float
    bits: float
    quantized_bits: float


def run_demo(out: Path, n_prompts: int, n_calibration: int, device: str) -> list[Row]:
    """Quantize, reload, draw and compare both embedded models; write ``contact-sheet.png`` and ``table.txt`` to `out`.

    Raises ValueError on a prompt count below 1, or if `out` holds files of somebody else.
    """
    if n_prompts < 1 or n_calibration < 2:
        raise ValueError(f"at least 1 prompt and 2 calibration prompts are needed, got {n_prompts} and {n_calibration}")
    claim_folder(out)
    started = time.perf_counter()
    rows, panels = [], []
    for model in MODELS.values():
        checkpoint = out / model.name
        print(f"{model.name}: calibrating on {n_calibration} prompts")
        quantize_embedded(model, checkpoint, n_calibration, device)
        print(f"{model.name}: drawing {n_prompts} held-out prompts in bf16, and in 4 bit in a new process")
        reference = draw_in_new_process(model, model.folder, out / f"{model.name}-bf16", n_prompts, device)
        quantized = draw_in_new_process(model, checkpoint, out / f"{model.name}-w4a4", n_prompts, device)
        scenes = prompts(n_prompts, DRAWING_SEED)
        rows.append(compare(model, checkpoint, scenes, reference, quantized))
        panels.append((model.name, [s.caption() for s in scenes], reference, quantized))
    sheet = contact_sheet(panels)
    sheet.save(out / "contact-sheet.png")
    table = format_rows(rows, n_prompts)
    (out / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\n{out / 'contact-sheet.png'}  ({time.perf_counter() - started:.0f} s)")
    return rows


def claim_folder(out: Path) -> None:
    """Make `out`, or take it over if an earlier demo made it. Raises ValueError rather than touch anybody's files."""
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and was not made by the demo; give --out a new folder, nothing is overwritten")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def quantize_embedded(model: EmbeddedModel, folder: Path, n_calibration: int, device: str) -> None:
    """Calibrate an embedded model with the default configuration and save the pipeline to `folder`."""
    import torch

    from ..config import DiRotQConfig
    from ..quantize import quantize

    pipeline = load_pipeline(model.name, torch_dtype=torch.bfloat16).to(device)
    captions = [s.caption() for s in prompts(n_calibration, CALIBRATION_SEED, held_out=False)]
    report = quantize(pipeline, DiRotQConfig(), captions, call=model.call)
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder)
    report.save(folder)


def draw_in_new_process(
    model: EmbeddedModel, folder: Path, images: Path, n_prompts: int, device: str
) -> list[np.ndarray]:
    """Load the pipeline in `folder` with plain `from_pretrained` in another Python, draw, and read the pictures."""
    package = __package__.removesuffix(".demo")
    command = [sys.executable, "-m", f"{package}.demo.draw", model.name, str(folder), str(images)]
    options = {"prompts": n_prompts, "seed": DRAWING_SEED, "device": device}
    subprocess.run([*command, json.dumps(options)], check=True)
    return [np.asarray(Image.open(images / f"{i:03d}.png").convert("RGB")) for i in range(n_prompts)]


def compare(
    model: EmbeddedModel,
    checkpoint: Path,
    scenes: list[Scene],
    reference: list[np.ndarray],
    quantized: list[np.ndarray],
) -> Row:
    """Metrics of `quantized` against `reference`, and sizes read from the checkpoint."""
    result = inspect_checkpoint(checkpoint)
    pairs = list(zip(quantized, reference, strict=True))
    return Row(
        model=model.name,
        psnr=float(np.mean([min(psnr(q, r), 100.0) for q, r in pairs])),
        ssim=float(np.mean([ssim(q, r) for q, r in pairs])),
        accuracy=float(np.mean([check(q, s).ok for q, s in zip(quantized, scenes, strict=True)])),
        reference_accuracy=float(np.mean([check(r, s).ok for r, s in zip(reference, scenes, strict=True)])),
        megabytes=result.total_bytes / 1e6,
        reference_megabytes=result.parameters * 2 / 1e6,
        bits=result.average_bits,
        quantized_bits=result.quantized_bits,
    )


def format_rows(rows: list[Row], n_prompts: int) -> str:
    """The table as text."""
    lines = [
        f"W4A4 against bf16, {n_prompts} held-out prompts, same seeds",
        f"{'model':<18} {'PSNR dB':>8} {'SSIM':>6} {'scenes right':>18} {'MB':>13} {'bits':>6} {'in linears':>11}",
    ]
    lines += [
        f"{r.model:<18} {r.psnr:>8.2f} {r.ssim:>6.3f} {r.accuracy:>8.1%} of {r.reference_accuracy:>6.1%} "
        f"{r.megabytes:>5.2f} of {r.reference_megabytes:>4.2f} {r.bits:>6.2f} {r.quantized_bits:>11.2f}"
        for r in rows
    ]
    return "\n".join(lines)
