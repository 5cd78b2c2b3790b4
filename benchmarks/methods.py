"""Every method at its bit settings on the embedded models: SQNR, PSNR, SSIM, scenes, bits, bytes, time of a step.

    python benchmarks/robuq.py --out /tmp/robuq
    python benchmarks/methods.py --robuq /tmp/robuq --out benchmarks/results/methods

All see the same calibration activations, prompts and seeds. SQNR: median over the quantized linears of the output's
signal-to-noise ratio on tokens of held-out prompts; none for RobuQ, whose linears were trained to be others. Images are
compared with the unquantized model's. Bits count scales, low-rank branches and what rotations store; "linear" those of
the linears with quantized inputs alone, "all" the whole transformer. Writes OUT.json, OUT.md and OUT.png.

A row that fails says why in the table, the others are measured all the same, and the exit code is 1. Rows are kept in
OUT.part.json as they are made: the same command goes on after a kill, and tries failed rows again.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from embedded import Bench, Job, bars, quantized_jobs, results
from rows import failures

from dirotq.dirotq_core.demo.embedded import MODELS

W4A4 = "W4A4"
#: Label → configuration. Widths of the 16-bit branch make rows of equal average bits.
ROWS: dict[str, dict[str, Any]] = {
    "dirotq r=64 W4A4": {"rank": 64, "activation_bits": 4},
    "dirotq r=32 W4A4": {"rank": 32, "activation_bits": 4},
    "dirotq r=4 W4A4": {"rank": 4, "activation_bits": 4},
    "dirotq r=0 W4A4": {"rank": 0, "activation_bits": 4},
    "dirotq K/8 W4A4": {"high_fraction": 0.125, "activation_bits": 4},
    "dirotq r=64 W4A8": {"rank": 64, "activation_bits": 8},
    "paper K/8 W4A4": {"method": "paper", "activation_bits": 4},
    "paper K/8 W4A8": {"method": "paper", "activation_bits": 8},
    "svdquant r=32 W4A4": {"method": "svdquant", "activation_bits": 4},
    "svdquant r=32 W4A8": {"method": "svdquant", "activation_bits": 8},
    "orbitquant W4A4": {"method": "orbitquant", "activation_bits": 4},
    "orbitquant W4A6": {"method": "orbitquant", "activation_bits": 6},
    "orbitquant W3A3": {"method": "orbitquant_w3", "activation_bits": 3},
    "orbitquant W2A4": {"method": "orbitquant_w2", "activation_bits": 4},
    "orbitquant W2A4, GPTQ": {"method": "orbitquant_w2", "activation_bits": 4, "rounding": "gptq"},
    **{f"lrq W4A{b}": {"method": "lrq", "activation_bits": b} for b in (4, 6, 8)},
    **{f"lrq W3A{b}": {"method": "lrq_w3", "activation_bits": b} for b in (4, 6, 8)},
    "hadamard W4A4": {"method": "hadamard", "activation_bits": 4},
    "hadamard W4A8": {"method": "hadamard", "activation_bits": 8},
    "nvfp4 W4A4": {"method": "nvfp4", "activation_bits": 4},
    "nvfp4 W4A16": {"method": "nvfp4", "activation_bits": 16},
    "nf4 W4A16": {"method": "nf4", "activation_bits": 16},
    "rtn W4A4": {"method": "rtn", "activation_bits": 4},
    "rtn W4A8": {"method": "rtn", "activation_bits": 8},
    "robuq W1.58A4, untrained": {"method": "robuq", "activation_bits": 4},
}
#: Label → ending of a folder of `robuq.py`.
TRAINED = {"robuq W1.58A4": "a4", "robuq W1.58 average A3": "a3", "robuq W1.58 average A2": "a2"}
COLUMNS = ("SQNR", "PSNR", "SSIM", "scenes", "linear bits", "all bits", "bytes", "step ms")


def jobs(name: str, args: argparse.Namespace) -> dict[str, Job]:
    """Every row of a model."""
    out = quantized_jobs(ROWS, args.only)
    for label, ending in TRAINED.items() if args.robuq else ():
        folder = args.robuq / f"{name}-{ending}" / "transformer"
        if folder.is_dir():
            out[label] = None, partial(trained_row, label=label, folder=folder)
        else:
            print(f"{name}: {label} is left out, there is no {folder}", flush=True)
    return out


def trained_row(bench: Bench, label: str, folder: Path) -> dict[str, Any]:
    """Measures a transformer that `robuq.py` trained."""
    trained = type(bench.dense).from_pretrained(folder, torch_dtype=torch.bfloat16).to(bench.device)
    config = trained.hf_quantizer.quantization_config
    options = {k: v for k, v in config.to_diff_dict().items() if k in ("method", "rank", "site_activation_bits")}
    return bench.row(label, trained, options, None, 0.0)


def values(r: dict) -> list[str]:
    """What stands in `COLUMNS`; of a row that failed, why."""
    if "error" in r:
        said = " ".join(r["error"].split()).replace("|", "\\|")
        return [f"**failed**: {said}", *[""] * (len(COLUMNS) - 1)]
    return [
        "" if r.get("sqnr") is None else f"{r['sqnr']:.1f}",
        f"{r['psnr']:.2f}" if "psnr" in r else "",
        f"{r['ssim']:.3f}" if "ssim" in r else "",
        f"{r['accuracy']:.1%}",
        f"{r['linear_bits']:.2f}" if "linear_bits" in r else "16.00",
        f"{r['bits']:.2f}",
        f"{r['bytes']:,}",
        f"{r['step_ms']:.2f}",
    ]


def format_row(r: dict) -> str:
    return f"{r['model']:<18} {r['method']:<26} " + " ".join(f"{v:>10}" for v in values(r))


def markdown(rows: list[dict], about: dict[str, Any]) -> str:
    """The tables, one a model."""
    lines = ["# Every method on the embedded models", "", ", ".join(f"{k} {v}" for k, v in about.items()) + "."]
    for name in dict.fromkeys(r["model"] for r in rows):
        lines += ["", f"## {name}", "", f"| method | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [f"| {r['method']} | {' | '.join(values(r))} |" for r in rows if r["model"] == name]
    return "\n".join(lines) + "\n"


def colour(label: str) -> str:
    """Blue for `dirotq`, dark where both sides have 4 bits, light otherwise."""
    if "dirotq" in label:
        return "#2a7fb8"
    return "#777" if label.endswith(W4A4) else "#ccc"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--only", help="only methods whose label contains this")
    parser.add_argument("--robuq", type=Path, help="folder that robuq.py wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/methods"))
    parser.add_argument("--batch", type=int, default=64, help="images drawn at once")
    parser.add_argument("--join", type=Path, nargs="+", help="only join results of earlier runs, one model each")
    args = parser.parse_args()
    rows, about = results(args, jobs, format_row)
    table = markdown(rows, about)
    print("\n" + table)
    args.out.with_suffix(".md").write_text(table)
    bars(rows, args.out.with_suffix(".png"), colour)
    sys.exit(failures(rows))


if __name__ == "__main__":
    main()
