"""The command line: ``dirotq demo``, ``dirotq quantize``, ``dirotq inspect``."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .folders import write_folder
from .prompts import BUILT_IN_PROMPTS, read_prompts


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Expected failures are one line on stderr, status 1."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    try:
        args.run(args)
    except subprocess.CalledProcessError as error:  # it has said why on stderr
        print(f"dirotq {args.command}: a child process failed with status {error.returncode}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:  # out of memory is a RuntimeError
        if args.verbose:
            raise
        print(f"dirotq {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        left = "what is finished stays in the folder" if args.command == "demo" else "nothing was written"
        print(f"dirotq {args.command}: interrupted; {left}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dirotq",
        description="4-bit (W4A4) diffusion transformers: quantize FLUX.1 and PixArt-Σ models and look inside them.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show details, and tracebacks of errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="quantize two small built-in models and compare their pictures",
        description="Quantize the two built-in models, reload them in a new process, draw the same prompts in "
        "16 and in 4 bit, and write a contact sheet and a table. Needs no network and no GPU.",
    )
    demo.add_argument("--out", type=Path, default=Path("dirotq-demo"), help="folder to write (default: %(default)s)")
    demo.add_argument(
        "--prompts", type=_positive, default=16, metavar="N", help="prompts to draw (default: %(default)s)"
    )
    demo.add_argument(
        "--calibration", type=int, default=32, metavar="N", help="calibration prompts (default: %(default)s)"
    )
    demo.add_argument("--device", default=None, help="cpu, cuda, … (default: cuda if there is one)")
    demo.set_defaults(run=_demo)

    quantize = commands.add_parser(
        "quantize",
        help="quantize a pipeline's transformer",
        description="Load a diffusers pipeline (a folder or a Hub id), calibrate it by drawing prompts, and write "
        "the pipeline with its transformer in 4 bit. `from_pretrained` loads it after `import dirotq`.",
    )
    quantize.add_argument("model", metavar="MODEL", help="pipeline folder or Hub id, e.g. black-forest-labs/FLUX.1-dev")
    quantize.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    quantize.add_argument("--prompts", type=Path, metavar="FILE", help="calibration prompts, one a line (UTF-8)")
    quantize.add_argument(
        "--data-free", action="store_true", help="no calibration: seconds instead of minutes, lower quality"
    )
    quantize.add_argument(
        "--transformer-only", action="store_true", help="write the transformer alone, not the pipeline"
    )
    quantize.add_argument(
        "--method", default="dirotq", help="dirotq, paper, hadamard, svdquant or rtn (default: %(default)s)"
    )
    quantize.add_argument("--rank", type=int, help="width of the 16-bit subspace (default: the method's, 64)")
    quantize.add_argument(
        "--high-fraction", type=float, help="that width as a share of the input width (the paper's: 0.125)"
    )
    quantize.add_argument("--basis", choices=("pca", "joint"), help="how the subspace is found")
    quantize.add_argument("--rounding", choices=("gptq", "nearest"), help="how weights are rounded")
    quantize.add_argument(
        "--activation-bits",
        type=int,
        choices=(4, 8, 16),
        help="default of the checkpoint; can be changed at run time",
    )
    quantize.add_argument(
        "--keep", action="append", metavar="PATTERN", help="modules to leave in 16 bit; can be repeated"
    )
    quantize.add_argument("--no-modulation", action="store_true", help="leave modulation layers in 16 bit")
    quantize.add_argument("--steps", type=_positive, default=20, help="steps per prompt (default: %(default)s)")
    quantize.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    quantize.add_argument("--height", type=_positive, help="image height in pixels (default: the pipeline's)")
    quantize.add_argument("--width", type=_positive, help="image width in pixels (default: the pipeline's)")
    quantize.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    quantize.add_argument("--device", default=None, help="cpu, cuda, … (default: cuda if there is one)")
    quantize.add_argument("--seed", type=int, default=0)
    quantize.set_defaults(run=_quantize)

    inspect = commands.add_parser(
        "inspect",
        help="list a checkpoint's layers",
        description="Per layer: shape, scheme, rank, bytes, average bits, and the measured SQNR if known.",
    )
    inspect.add_argument("path", metavar="PATH", help="a saved transformer or pipeline")
    inspect.add_argument("--limit", type=int, help="show at most this many layers")
    inspect.set_defaults(run=_inspect)
    return parser


def _demo(args: argparse.Namespace) -> None:
    from .demo.run import run_demo

    run_demo(args.out, args.prompts, args.calibration, pick_device(args.device))


def _inspect(args: argparse.Namespace) -> None:
    from .inspect import format_table, inspect_checkpoint

    print(format_table(inspect_checkpoint(args.path), args.limit))


def _quantize(args: argparse.Namespace) -> None:
    from .config import DiRotQConfig

    config = DiRotQConfig(
        method=args.method, rank=args.rank, high_fraction=args.high_fraction, basis=args.basis,
        rounding=args.rounding, activation_bits=args.activation_bits, modules_to_not_convert=args.keep,
        quantize_modulation=not args.no_modulation, seed=args.seed,
    )  # fmt: skip
    device = pick_device(args.device)
    if args.data_free and args.prompts:
        raise ValueError("--data-free and --prompts exclude each other")
    prompts = [] if args.data_free else read_prompts(args.prompts or BUILT_IN_PROMPTS)
    config.resolved(calibrated=bool(prompts))  # complain before anything is loaded
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists already; give a new folder, nothing is overwritten")

    import torch
    from diffusers import DiffusionPipeline

    from .inspect import format_table, inspect_checkpoint
    from .quantize import quantize

    pipeline = DiffusionPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    if not hasattr(pipeline, "transformer"):
        raise ValueError(
            f"{type(pipeline).__name__} has no transformer; dirotq quantizes FLUX.1 and PixArt-Σ pipelines"
        )
    pipeline.to(device)
    call = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "height": args.height,
        "width": args.width,
    }
    report = quantize(pipeline, config, prompts, call={k: v for k, v in call.items() if v is not None})
    target = pipeline.transformer if args.transformer_only else pipeline
    write_folder(args.out, lambda folder: (target.save_pretrained(folder), report.save(folder)))
    print(format_table(inspect_checkpoint(args.out), limit=0))


def pick_device(name: str | None) -> str:
    """`name`, or cuda if there is one, else cpu. ValueError if torch does not know it or has none."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise ValueError(f"--device {name!r}: {str(error).splitlines()[0]}") from error
    return name


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
