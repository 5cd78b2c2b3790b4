"""``dirotq evaluate``: its options, and what they become."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .arguments import pick_device, positive

#: Choices of --metrics beside the metrics' names.
ALL = "all"


def add_parser(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "evaluate",
        help="compare models by the pictures they draw",
        description="Draw the same prompts with the same seeds from a reference and from any number of models, compare "
        "the pictures, and write tables and a page. Interrupted or killed, the same command goes on where it was; "
        "`accelerate launch --module` spreads it over GPUs.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help="pipeline folder or Hub id, quantized transformer, single .safetensors file, or folder of images",
    )
    parser.add_argument("--reference", required=True, metavar="[NAME=]MODEL", help="the pipeline in 16 bit")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to go on in")
    _add_prompts(parser.add_argument_group("prompts and drawing"))
    _add_metrics(parser.add_argument_group("metrics"))
    _add_judge(parser.add_argument_group("a vision-language model as judge"))
    _add_machine(parser.add_argument_group("machine"))
    parser.set_defaults(run=run)


def _add_prompts(group: Any) -> None:
    group.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help=".txt, .csv, .json or .yaml, also MJHQ-30K's meta_data.json, sDCI.yaml and COCO's captions; none that a "
        "model was calibrated on",
    )
    group.add_argument("--samples", type=positive, metavar="N", help="so many of them, at random (default: all)")
    group.add_argument("--steps", type=positive, help="steps per image (default: the pipeline's)")
    group.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    group.add_argument("--height", type=positive, help="image height in pixels (default: the pipeline's)")
    group.add_argument("--width", type=positive, help="image width in pixels (default: the pipeline's)")
    group.add_argument(
        "--call", action="append", default=[], metavar="NAME=VALUE", help="further argument of the pipelines"
    )
    group.add_argument(
        "--activation-bits",
        type=int,
        nargs="+",
        default=[],
        metavar="BITS",
        help="draw DiRotQ checkpoints with each of these (default: the checkpoint's own)",
    )
    group.add_argument("--control", action="store_true", help="draw the reference with other seeds, too")


def _add_metrics(group: Any) -> None:
    group.add_argument(
        "--metrics",
        nargs="+",
        default=["psnr", "ssim"],
        metavar="METRIC",
        help=f"psnr, ssim, lpips, fid, clip, imagereward, or {ALL} (default: psnr ssim)",
    )
    group.add_argument("--real", type=Path, metavar="FOLDER", help="real images, for FID against them")
    group.add_argument(
        "--real-by-id", action="store_true", help="of the real images only those that are named by the prompts' ids"
    )
    group.add_argument(
        "--stand-in",
        action="store_true",
        help="the networks of metrics and judge are stand-ins, as of random weights: mark their numbers as meaningless",
    )
    group.add_argument("--resamples", type=positive, default=10_000, help="of the bootstrap (default: %(default)s)")
    group.add_argument(
        "--shown", type=int, default=8, metavar="N", help="prompts on the page, beside the worst (default: %(default)s)"
    )


def _add_judge(group: Any) -> None:
    group.add_argument(
        "--judge",
        nargs="?",
        const="",
        metavar="MODEL",
        help="folder or Hub id, or with --judge-url its name there (default: Qwen/Qwen2.5-VL-7B-Instruct)",
    )
    group.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint, up to /v1")
    group.add_argument("--judge-revision", metavar="COMMIT", help="of the judge on the Hub")
    group.add_argument("--judge-tokens", type=positive, default=512, metavar="N", help="of a reply (%(default)s)")
    group.add_argument(
        "--judge-parallel", type=positive, metavar="N", help="questions at a time (8 with --judge-url, else 1)"
    )


def _add_machine(group: Any) -> None:
    group.add_argument("--device", default=None, help="cpu, cuda, … (default: cuda if there is one)")
    group.add_argument("--batch", type=positive, default=1, help="images drawn at once (default: %(default)s)")
    group.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    group.add_argument("--offload", action="store_true", help="keep only the part that computes on the GPU")


def run(args: argparse.Namespace) -> None:
    """Do what `args` say."""
    import torch

    from .evaluate import EvaluationOptions, evaluate, read_prompt_set
    from .evaluate.metrics import METRICS
    from .evaluate.summary import table_text

    named = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "height": args.height,
             "width": args.width}  # fmt: skip
    call = {name: value for name, value in named.items() if value is not None} | dict(map(_argument, args.call))
    options = EvaluationOptions(
        metrics=tuple(METRICS) if ALL in args.metrics else tuple(dict.fromkeys(args.metrics)), real=args.real,
        real_by_id=args.real_by_id,
        call=call, batch=args.batch, dtype=getattr(torch, args.dtype), device=pick_device(args.device),
        offload=args.offload, activation_bits=tuple(dict.fromkeys(args.activation_bits)), control=args.control,
        resamples=args.resamples, shown=args.shown, stand_in=args.stand_in,
    )  # fmt: skip
    prompts = read_prompt_set(args.prompts, args.samples)
    judge, parallel = _judge(args)
    result = evaluate(args.models, args.reference, prompts, args.out, options, judge, parallel)
    if result is not None:
        print(f"{table_text(result)}\n\n{args.out / 'index.html'}")


def _argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE, with a value in JSON's notation or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--call {text!r} must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _judge(args: argparse.Namespace) -> tuple[Any, int]:
    """(what makes the judge on a device, or None; questions at a time). ValueError if it cannot be."""
    if args.judge_url is not None:
        from .evaluate.judge.endpoint import Endpoint

        if not args.judge:
            raise ValueError("--judge-url needs --judge, the name that the model has there")
        if args.judge_revision:
            raise ValueError("--judge-revision is of a model on the Hub; an endpoint has its own")
        endpoint = Endpoint(args.judge_url, args.judge, args.judge_tokens)
        return lambda device: endpoint, args.judge_parallel or 8
    if args.judge is None:
        for name in ("judge_revision", "judge_parallel"):
            if getattr(args, name):
                raise ValueError(f"--{name.replace('_', '-')} needs --judge")
        return None, 1
    from .evaluate.judge.local import DEFAULT_MODEL, LocalJudge, load_processor

    if args.judge_parallel not in (None, 1):
        raise ValueError("--judge-parallel is for --judge-url; a judge that runs here answers one question at a time")
    model = args.judge or DEFAULT_MODEL
    load_processor(model, args.judge_revision)  # what is missing shows before anything is drawn
    return lambda device: LocalJudge(model, device, args.judge_revision, args.judge_tokens), 1
