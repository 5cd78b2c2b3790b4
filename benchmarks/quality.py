"""Quality of every method on the embedded models: SQNR, PSNR, SSIM, scene accuracy, bits.

    python benchmarks/quality.py --prompts 128 --calibration 128 --out benchmarks/results/quality
    python benchmarks/quality.py --join a.json b.json --out benchmarks/results/quality

All methods see the same calibration activations, prompts and seeds. SQNR is the median over the W4A4 linears of the
output's signal-to-noise ratio on tokens of held-out prompts; images are compared with the unquantized model's.
Writes OUT.json and OUT.png and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from pathlib import Path

import diffusers
import numpy as np
import torch

import dirotq
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.calibrate import Calibration
from dirotq.dirotq_core.demo.checker import check
from dirotq.dirotq_core.demo.embedded import MODELS, load_pipeline, prompts
from dirotq.dirotq_core.layout import plan_sites
from dirotq.dirotq_core.metrics import psnr, ssim
from dirotq.dirotq_core.quantize import install_all, solve_all

WIDTH = {"high_fraction": 0.125}
#: Label → configuration. "K/8" rows have equal 16-bit width.
ROWS: dict[str, dict] = {
    "paper, K/8": {"method": "paper"},
    "dirotq pca K/8, int4": {"basis": "pca", **WIDTH},
    "dirotq pca K/8, codebook": {"basis": "pca", "activation_format": "codebook", **WIDTH},
    "dirotq joint K/8, int4": {"basis": "joint", **WIDTH},
    "dirotq joint K/8, codebook": {"basis": "joint", "activation_format": "codebook", **WIDTH},
    "dirotq joint K/8, int4, nearest": {"basis": "joint", "rounding": "nearest", **WIDTH},
    "paper, K/8, nearest": {"method": "paper", "rounding": "nearest"},
    "dirotq pca r=32, int4": {"basis": "pca", "rank": 32},
    "dirotq joint r=32, int4": {"basis": "joint", "rank": 32},
    "dirotq joint r=64, int4": {"basis": "joint", "rank": 64},
    "svdquant-like r=32": {"method": "svdquant"},
    "svdquant-like K/8": {"method": "svdquant", **WIDTH},
    "hadamard, codebook": {"method": "hadamard"},
    "hadamard, int4": {"method": "hadamard", "activation_format": "int4"},
    "rtn g64": {"method": "rtn"},
}
#: The same again with 8-bit activations.
EIGHT = ("paper, K/8", "dirotq pca K/8, int4", "dirotq joint K/8, int4", "dirotq joint r=64, int4",
         "svdquant-like r=32", "hadamard, codebook", "rtn g64")  # fmt: skip


def configurations() -> dict[str, dict]:
    rows = {f"{label}": {**kw, "activation_bits": 4} for label, kw in ROWS.items()}
    for label in EIGHT:
        name = label.replace(", int4", "").replace(", codebook", "")
        rows[f"{name}, A8"] = {
            **{k: v for k, v in ROWS[label].items() if k != "activation_format"},
            "activation_bits": 8,
        }
    return rows


def draw(pipeline, scenes, call, batch: int) -> list[np.ndarray]:
    images = []
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))]
        images += [*pipeline([s.caption() for s in part], generator=generators, output_type="np", **call).images]
    return [(i * 255).round().astype(np.uint8) for i in images]


def evaluate(name: str, args: argparse.Namespace) -> list[dict]:
    model = MODELS[name]
    pipeline = load_pipeline(name, torch_dtype=torch.bfloat16).to(args.device)
    dense = pipeline.transformer
    scenes = prompts(args.prompts, seed=2)
    reference = draw(pipeline, scenes, model.call, args.batch)
    accuracy = float(np.mean([check(i, s).ok for i, s in zip(reference, scenes, strict=True)]))
    parameters = sum(p.numel() for p in dense.parameters())
    rows = [{"model": name, "method": "bf16", "accuracy": accuracy, "bytes": parameters * 2, "bits": 16.0}]
    print(f"{name}: bf16 scene accuracy {accuracy:.1%}", flush=True)

    plans = plan_sites(dense, dirotq.DiRotQConfig().resolved(calibrated=True))
    calibration = Calibration(dense, plans)
    captions = [s.caption() for s in prompts(args.calibration, seed=1, held_out=False)]
    calibration.run(pipeline, captions, model.call, 0, progress=True)
    for label, options in configurations().items():
        if args.only and args.only not in label:
            continue
        start = time.perf_counter()
        config = dirotq.DiRotQConfig(**options).resolved(calibrated=True)
        model_plans = plan_sites(dense, config)
        report, solved = solve_all(dense, model_plans, config, calibration, progress=False)
        quantized = copy.deepcopy(dense)
        install_all(quantized, model_plans, config, solved)
        w4a4 = {p for plan in model_plans if plan.quantize_input for p in plan.linears}
        sqnr = float(np.median([r.output_db for r in report.linears if r.name in w4a4]))
        pipeline.transformer = quantized
        images = draw(pipeline, scenes, model.call, args.batch)
        pipeline.transformer = dense
        size = sum(p.numel() * p.element_size() for p in quantized.parameters())
        inside = sum(_bytes(m) for m in quantized_linears(quantized).values() if m.plan.quantize_input)
        weights = sum(
            m.in_features * m.out_features for m in quantized_linears(quantized).values() if m.plan.quantize_input
        )
        rows.append({
            "model": name, "method": label, "config": options, "sqnr": sqnr,
            "psnr": float(np.mean([min(psnr(a, b), 100.0) for a, b in zip(images, reference, strict=True)])),
            "ssim": float(np.mean([ssim(a, b) for a, b in zip(images, reference, strict=True)])),
            "accuracy": float(np.mean([check(i, s).ok for i, s in zip(images, scenes, strict=True)])),
            "bytes": size, "bits": 8 * size / parameters, "w4a4_bits": 8 * inside / weights,
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
        print(format_row(rows[-1]), flush=True)
    return rows


def _bytes(linear) -> int:
    return sum(p.numel() * p.element_size() for n, p in linear.named_parameters() if n != "bias")


def format_row(r: dict) -> str:
    if r["method"] == "bf16":
        return f"{r['model']:<18} {'bf16':<34} {'':>6} {'':>6} {'':>6} {r['accuracy']:>7.1%} {r['bits']:>6.2f}"
    return (
        f"{r['model']:<18} {r['method']:<34} {r['sqnr']:>6.1f} {r['psnr']:>6.2f} {r['ssim']:>6.3f} "
        f"{r['accuracy']:>7.1%} {r['bits']:>6.2f} {r['w4a4_bits']:>6.2f}"
    )


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["model"] for r in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(7.5 * len(names), 7), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        mine = [r for r in rows if r["model"] == name and "psnr" in r][::-1]
        colours = [
            "#2a7fb8" if "dirotq" in r["method"] else "#b8862a" if "paper" in r["method"] else "#999" for r in mine
        ]
        ax.barh([r["method"] for r in mine], [r["psnr"] for r in mine], color=colours)
        for i, r in enumerate(mine):
            ax.text(r["psnr"] + 0.2, i, f"{r['psnr']:.1f}  (SQNR {r['sqnr']:.1f})", va="center", fontsize=8)
        ax.set_xlim(0, max(r["psnr"] for r in mine) * 1.25)
        ax.set_title(name)
        ax.set_xlabel("image PSNR against bf16, dB")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--only", help="only methods whose label contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    parser.add_argument("--batch", type=int, default=16, help="images drawn at once")
    parser.add_argument("--join", type=Path, nargs="+", help="only join results of earlier runs, one model each")
    args = parser.parse_args()
    if args.join:
        parts = [json.loads(path.read_text()) for path in args.join]
        rows, environment = [row for part in parts for row in part["rows"]], parts[0]["environment"]
    else:
        rows = [row for name in args.models for row in evaluate(name, args)]
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu"
        versions = {m.__name__: m.__version__ for m in (torch, diffusers, np)}
        sizes = {"prompts": args.prompts, "calibration": args.calibration}
        environment = {"device": device, **versions, **sizes}
    header = f"{'model':<18} {'method':<34} {'SQNR':>6} {'PSNR':>6} {'SSIM':>6} {'scenes':>7} {'bits':>6} {'linear':>6}"
    print("\n" + "\n".join([header, *map(format_row, rows)]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
