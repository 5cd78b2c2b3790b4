"""The paper's rows of PixArt-Σ or FLUX.1-dev, for who has the weights: quantize both ways, draw, measure.

    python benchmarks/published.py pixart --prompts meta_data.json --real mjhq30k_imgs --out pixart

Runs three commands of `dirotq`, which --dry-run only prints: `quantize` twice (method "paper", and "dirotq" at the
paper's width) and `evaluate`, as SVDQuant's and DiRotQ's code has the settings. Killed, it goes on where it was.
Arguments behind ``--`` are for `dirotq evaluate`, such as ``--offload`` or ``--judge``.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

#: Model → its repository, arguments of both `quantize` and of `evaluate`.
MODELS = {
    "pixart": (
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        ["--weight-only", "ff.net.2", "--dtype", "float16"],
        ["--dtype", "float16", "--steps", "20", "--guidance", "4.5"],
    ),
    "flux": ("black-forest-labs/FLUX.1-dev", ["--steps", "25"], ["--steps", "50", "--guidance", "3.5"]),
}
ROWS = {"paper": ["--method", "paper"], "dirotq": ["--high-fraction", "0.125"]}


def commands(args: argparse.Namespace) -> list[list[str]]:
    """Arguments of `dirotq`, one list for each command."""
    repository, quantize, evaluate = MODELS[args.model]
    source = args.source or repository
    calibration = ["--samples", str(args.calibration)]
    if args.calibration_prompts is not None:
        calibration += ["--prompts", str(args.calibration_prompts)]
    folders = {row: args.out / row for row in ROWS}
    found = [
        ["quantize", source, *ROWS[row], *quantize, *calibration, "--out", str(folder)]
        for row, folder in folders.items()
    ]
    against = ["--reference", f"16 bit={source}", "--prompts", str(args.prompts), "--samples", str(args.samples)]
    measured = ["--metrics", "all", "--real", str(args.real), "--real-by-id"]
    rows = [f"{row}={folder}" for row, folder in folders.items()]
    return [*found, ["evaluate", *rows, *against, *evaluate, *measured, "--out", str(args.out / "report"), *args.more]]


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    more = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--prompts", type=Path, required=True, help="MJHQ-30K's meta_data.json")
    parser.add_argument("--real", type=Path, required=True, help="MJHQ-30K's unpacked pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to go on in")
    parser.add_argument("--source", help="folder or Hub id of the pipeline in 16 bit (default: the published one)")
    parser.add_argument("--samples", type=int, default=5000, help="prompts drawn (default: %(default)s)")
    parser.add_argument("--calibration", type=int, default=128, help="prompts calibrated on (default: %(default)s)")
    parser.add_argument("--calibration-prompts", type=Path, help="(default: the built-in ones)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args(argv[: len(argv) - len(more) - 1] if "--" in argv else argv)
    args.more = more
    for command in commands(args):
        print("dirotq", shlex.join(command), flush=True)
        finished = command[0] == "quantize" and Path(command[-1]).exists()  # it appears when all of it is written
        if not args.dry_run and not finished:
            status = subprocess.run([sys.executable, "-m", "dirotq.dirotq_core.cli", *command], check=False).returncode
            if status:
                sys.exit(status)


if __name__ == "__main__":
    main()
