"""The command line: ``dirotq demo``, ``quantize``, ``inspect``, ``convert``, ``evaluate``, ``card``, ``push``."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cli_evaluate, cli_hub, cli_quantize
from .arguments import pick_device, positive


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
        left = "nothing was written"
        if args.command in ("demo", "evaluate"):
            left = "what is finished stays in the folder"
        if args.command == "quantize":
            left = cli_quantize.what_is_left(args)
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
        "--prompts", type=positive, default=16, metavar="N", help="prompts to draw (default: %(default)s)"
    )
    demo.add_argument(
        "--calibration", type=int, default=32, metavar="N", help="calibration prompts (default: %(default)s)"
    )
    demo.add_argument("--device", default=None, help="cpu, cuda, … (default: cuda if there is one)")
    demo.set_defaults(run=_demo)

    cli_quantize.add_parser(commands)
    cli_evaluate.add_parser(commands)

    inspect = commands.add_parser(
        "inspect",
        help="list a checkpoint's layers",
        description="Per layer: shape, scheme, rank, bytes, average bits, and the measured SQNR if known.",
    )
    inspect.add_argument("path", metavar="PATH", help="a saved transformer or pipeline, or a single .safetensors file")
    inspect.add_argument("--limit", type=int, help="show at most this many layers")
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser(
        "convert",
        help="between a diffusers folder and ComfyUI's single file, and from Nunchaku's",
        description="A folder (transformer or pipeline) becomes one .safetensors file for ComfyUI; such a file "
        "becomes a transformer's folder. Every tensor keeps its bytes. An SVDQuant INT4 checkpoint of FLUX.1 as "
        "Nunchaku or nunchaku_lite store it becomes either, as --out is called.",
    )
    convert.add_argument(
        "source", metavar="SOURCE", help="a quantized transformer or pipeline, or a single file; here or on the Hub "
        "(OWNER/NAME or OWNER/NAME/FILE.safetensors)",
    )  # fmt: skip
    convert.add_argument("--revision", help="branch, tag or commit on the Hub")
    convert.add_argument("--out", type=Path, required=True, help="what to write; must not exist")
    convert.set_defaults(run=_convert)

    cli_hub.add_parsers(commands)
    return parser


def _demo(args: argparse.Namespace) -> None:
    from .demo.run import run_demo

    run_demo(args.out, args.prompts, args.calibration, pick_device(args.device))


def _inspect(args: argparse.Namespace) -> None:
    from .inspect import format_table, inspect_checkpoint

    print(format_table(inspect_checkpoint(args.path), args.limit))


def _convert(args: argparse.Namespace) -> None:
    from .hub_files import local_checkpoint
    from .single_file import convert

    if args.out.exists():  # before anything is downloaded
        raise FileExistsError(f"{args.out} exists; choose another name")
    print(convert(local_checkpoint(args.source, args.revision), args.out))


if __name__ == "__main__":
    sys.exit(main())
