"""``dirotq quantize``: its options, and what they become."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .arguments import pick_device, positive, positive_number
from .folders import write_folder
from .prompts import BUILT_IN_PROMPTS, read_prompts


def add_parser(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "quantize",
        help="quantize a pipeline's transformer",
        description="Calibrate a diffusers pipeline (a folder or a Hub id) by drawing prompts, and write it with its "
        "transformer in 4 bit. The model is read block by block and never whole in memory. Stopped or killed, the same "
        "command goes on where it was. `from_pretrained` loads the result after `import dirotq`.",
    )
    parser.add_argument("model", metavar="MODEL", help="pipeline folder or Hub id, e.g. black-forest-labs/FLUX.1-dev")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with its estimates, and stop")
    parser.add_argument("--transformer-only", action="store_true", help="write the transformer alone, not the pipeline")
    _add_method(parser.add_argument_group("method"))
    _add_calibration(parser.add_argument_group("calibration"))
    _add_machine(parser.add_argument_group("machine"))
    parser.set_defaults(run=run)


def _add_method(group: Any) -> None:
    group.add_argument(
        "--method",
        default="dirotq",
        help="dirotq, paper, hadamard, svdquant, rtn, nvfp4, nf4, orbitquant[_w3, _w2] or lrq[_w3] "
        "(default: %(default)s)",
    )
    group.add_argument("--rank", type=int, help="width of the 16-bit subspace (default: the method's, 64)")
    group.add_argument(
        "--high-fraction", type=float, help="that width as a share of the input width (the paper's: 0.125)"
    )
    group.add_argument("--basis", choices=("pca", "joint"), help="how the subspace is found")
    group.add_argument("--rounding", choices=("gptq", "nearest"), help="how weights are rounded")
    group.add_argument(
        "--activation-bits",
        type=int,
        choices=(1, 2, 3, 4, 6, 8, 16),
        help="default of the checkpoint; can be changed at run time",
    )
    group.add_argument("--keep", action="append", metavar="PATTERN", help="modules to leave in 16 bit; can be repeated")
    group.add_argument(
        "--weight-only",
        action="append",
        metavar="PATTERN",
        help="modules to run with 16-bit activations; can be repeated",
    )
    group.add_argument("--no-modulation", action="store_true", help="leave modulation layers in 16 bit")
    group.add_argument("--seed", type=int, default=0)


def _add_calibration(group: Any) -> None:
    group.add_argument("--prompts", type=Path, metavar="FILE", help="calibration prompts, one a line (UTF-8)")
    group.add_argument(
        "--data-free", action="store_true", help="no calibration: seconds instead of minutes, lower quality"
    )
    group.add_argument(
        "--samples", type=positive, metavar="N", help="images to draw (default: one per prompt, at most 32)"
    )
    group.add_argument("--steps", type=positive, default=20, help="steps per image (default: %(default)s)")
    group.add_argument(
        "--timesteps",
        type=positive,
        metavar="N",
        help="steps of each image that are calibrated on, spread over the schedule (default: 4)",
    )
    group.add_argument(
        "--tokens-per-sample", type=positive, metavar="N", help="tokens of each input in the statistics (default: all)"
    )
    order = group.add_mutually_exclusive_group()
    order.add_argument(
        "--sequential",
        action="store_true",
        help="each block is calibrated on what the quantized blocks before it make (default)",
    )
    order.add_argument(
        "--parallel", action="store_true", help="each block is calibrated on what the dense blocks before it make"
    )
    group.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    group.add_argument("--height", type=positive, help="image height in pixels (default: the pipeline's)")
    group.add_argument("--width", type=positive, help="image width in pixels (default: the pipeline's)")


def _add_machine(group: Any) -> None:
    group.add_argument("--device", default=None, help="cpu, cuda, … (default: cuda if there is one)")
    group.add_argument(
        "--draw-batch",
        type=positive,
        metavar="N",
        help="images drawn at once; every step of a batch reads the model once (default: 32)",
    )
    group.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    group.add_argument("--max-gpu-memory", type=positive_number, metavar="GB", help="use no more of the GPU")
    group.add_argument(
        "--max-host-memory",
        type=positive_number,
        metavar="GB",
        help="calibration inputs that would take more wait in files (default: half of what is free)",
    )
    group.add_argument(
        "--in-memory",
        action="store_true",
        help="load the whole pipeline and calibrate on every step of every prompt, as dirotq.quantize does",
    )


def run(args: argparse.Namespace) -> None:
    """Do what `args` say."""
    from .config import DiRotQConfig

    config = DiRotQConfig(
        method=args.method, rank=args.rank, high_fraction=args.high_fraction, basis=args.basis,
        rounding=args.rounding, activation_bits=args.activation_bits, modules_to_not_convert=args.keep,
        weight_only_modules=args.weight_only,
        quantize_modulation=not args.no_modulation, seed=args.seed,
    )  # fmt: skip
    device = pick_device(args.device)
    for name in CALIBRATION_ONLY:
        if args.data_free and getattr(args, name):
            raise ValueError(f"--data-free and --{name.replace('_', '-')} exclude each other")
    prompts = [] if args.data_free else read_prompts(args.prompts or BUILT_IN_PROMPTS)
    config.resolved(calibrated=bool(prompts))  # complain before anything is loaded
    call = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "height": args.height,
        "width": args.width,
    }
    call = {k: v for k, v in call.items() if v is not None}
    (_in_memory if args.in_memory else _streaming)(args, config, prompts, call, device)


def what_is_left(args: argparse.Namespace) -> str:
    """Of an interrupted run, for people."""
    from .engine.journal import work_folder

    work = work_folder(args.out)
    if args.in_memory or not work.exists():
        return "nothing was written"
    return f"what is finished is kept in {work}, run the same command again to go on"


def _streaming(args: argparse.Namespace, config: Any, prompts: list[str], call: dict, device: str) -> None:
    import torch

    from .engine import EngineOptions, plan_checkpoint, quantize_checkpoint
    from .engine.journal import work_folder
    from .inspect import format_table, inspect_checkpoint

    given = {
        "samples": args.samples,
        "timesteps": args.timesteps,
        "tokens_per_sample": args.tokens_per_sample,
        "draw_batch": args.draw_batch,
    }
    options = EngineOptions(
        sequential=not args.parallel, transformer_only=args.transformer_only, dtype=getattr(torch, args.dtype),
        device=device, max_gpu_memory=args.max_gpu_memory, max_host_memory=args.max_host_memory,
        **{k: v for k, v in given.items() if v is not None},
    )  # fmt: skip
    if args.dry_run:
        plan = plan_checkpoint(args.model, config, prompts, call=call, options=options)
        print(plan.text())
        for problem in plan.obstacles(args.out, work_folder(args.out), options):
            print(f"{'refused':<12} {problem}")
        return
    quantize_checkpoint(args.model, args.out, config, prompts, call=call, options=options)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one writes
        print(format_table(inspect_checkpoint(args.out), limit=0))


#: Options that mean something to calibration alone; other ones of it have a default or belong to drawing.
CALIBRATION_ONLY = ("prompts", "samples", "timesteps", "tokens_per_sample", "sequential", "parallel", "draw_batch")

#: Options that mean something to the streaming engine alone.
STREAMING_ONLY = (
    "dry_run", "samples", "timesteps", "tokens_per_sample", "sequential", "parallel", "draw_batch", "max_gpu_memory",
    "max_host_memory",
)  # fmt: skip


def _in_memory(args: argparse.Namespace, config: Any, prompts: list[str], call: dict, device: str) -> None:
    for name in STREAMING_ONLY:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} and --in-memory exclude each other")
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists already; give a new folder, nothing is overwritten")

    import torch
    from diffusers import DiffusionPipeline

    from .base_model import hub_id, look_up, of_folder
    from .card import write_card
    from .inspect import format_table, inspect_checkpoint
    from .quantize import quantize

    pipeline = DiffusionPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    if not hasattr(pipeline, "transformer"):
        raise ValueError(
            f"{type(pipeline).__name__} has no transformer; dirotq quantizes FLUX.1 and PixArt-Σ pipelines"
        )
    pipeline.to(device)
    report = quantize(pipeline, config, prompts, call=call)
    target = pipeline.transformer if args.transformer_only else pipeline

    def write(folder: Path) -> None:
        target.save_pretrained(folder)
        report.save(folder)
        source = Path(args.model)
        write_card(folder, of_folder(source) if source.is_dir() else look_up(hub_id(args.model)), name=args.out.name)

    write_folder(args.out, write)
    print(format_table(inspect_checkpoint(args.out), limit=0))
