"""Quality of every method on the embedded models: SQNR, PSNR, SSIM, scene accuracy, bits.

    python benchmarks/quality.py --prompts 128 --calibration 128 --out benchmarks/results/quality
    python benchmarks/quality.py --join a.json b.json --out benchmarks/results/quality

All methods see the same calibration activations, prompts and seeds. SQNR is the median over the W4A4 linears of the
output's signal-to-noise ratio on tokens of held-out prompts; images are compared with the unquantized model's.
Writes OUT.json and OUT.png and prints the table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from embedded import bars, quantized_jobs, results
from rows import failures

from dirotq.dirotq_core.demo.embedded import MODELS

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


def format_row(r: dict) -> str:
    if "error" in r:
        return f"{r['model']:<18} {r['method']:<34} {r['error']}"
    if r["method"] == "bf16":
        return f"{r['model']:<18} {'bf16':<34} {'':>6} {'':>6} {'':>6} {r['accuracy']:>7.1%} {r['bits']:>6.2f}"
    return (
        f"{r['model']:<18} {r['method']:<34} {r['sqnr']:>6.1f} {r['psnr']:>6.2f} {r['ssim']:>6.3f} "
        f"{r['accuracy']:>7.1%} {r['bits']:>6.2f} {r['linear_bits']:>6.2f}"
    )


def colour(label: str) -> str:
    return "#2a7fb8" if "dirotq" in label else "#b8862a" if "paper" in label else "#999"


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
    rows, _ = results(args, lambda name, args: quantized_jobs(configurations(), args.only), format_row)
    header = f"{'model':<18} {'method':<34} {'SQNR':>6} {'PSNR':>6} {'SSIM':>6} {'scenes':>7} {'bits':>6} {'linear':>6}"
    print("\n" + "\n".join([header, *map(format_row, rows)]))
    bars(rows, args.out.with_suffix(".png"), colour)
    sys.exit(failures(rows))


if __name__ == "__main__":
    main()
