"""Train the embedded models with RobuQ (arXiv 2509.23582): W1.58A4, then average A3 and A2 by AMPN.

    python benchmarks/robuq.py --out /tmp/robuq

From the embedded weights: their linears become ternary with a 16-bit branch of rank 16 and learn, straight through,
what the 16-bit model predicts on its training data (`--data`: from the data itself, as that model did). The W1.58A4
model tells how much each site's activation bits matter; bits are allocated under an average budget, and training goes
on with them. Writes OUT/<model>-a4, -a3 and -a2: pipelines with a quantized transformer that `from_pretrained` loads,
which `benchmarks/methods.py --robuq OUT` draws with; OUT/<model>.json holds the losses on the way. Where a loss is not
finite, far above what it was, or that of the averaged weights is, training of that model stops and the exit code is 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dirotq
from dirotq.dirotq_core.allocate import allocate_bits, sensitivities
from dirotq.dirotq_core.demo import train
from dirotq.dirotq_core.demo.embedded import MODELS, load_pipeline, prompts
from dirotq.dirotq_core.demo.fit import Diverged
from dirotq.dirotq_core.demo.scenes import sample_scenes
from dirotq.dirotq_core.layout import plan_sites
from dirotq.dirotq_core.methods import METHODS
from dirotq.dirotq_core.quantize import install_all
from dirotq.dirotq_core.ternary_training import TernarySite, insert, solved

TRAINERS = {"pixart-sigma-tiny": train.train_pixart, "flux-tiny": train.train_flux}
AVERAGES = {"a3": 3.0, "a2": 2.0}


class Recorded:
    """Inputs of some calls of the transformer, to run it on again."""

    def __init__(self, pipeline: Any, call: dict, captions: list[str]):
        self.model, self.calls = pipeline.transformer, []
        handle = self.model.register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            for i, caption in enumerate(captions):
                generator = torch.Generator("cpu").manual_seed(1_000_000 + i)
                pipeline(caption, generator=generator, output_type="latent", **call)
        finally:
            handle.remove()

    def _keep(self, _module: Any, args: tuple, kwargs: dict) -> None:
        self.calls.append((args, kwargs))

    def run(self) -> torch.Tensor:
        """The model's outputs on every fourth call, one after the other."""
        outputs = []
        for args, kwargs in self.calls[::4]:
            out = self.model(*args, **kwargs)
            outputs.append((out[0] if isinstance(out, tuple) else out.sample).flatten())
        return torch.cat(outputs)


def save(pipe: Any, plans: list, config: dirotq.DiRotQConfig, folder: Path) -> None:
    """The pipeline with its transformer quantized as trained; `pipe` is not changed."""
    transformer = copy.deepcopy(pipe.transformer)
    sites = solved(transformer, plans, config)
    install_all(transformer.to(torch.bfloat16), plans, config, sites)
    parts = {
        name: copy.deepcopy(part).to(torch.bfloat16) if isinstance(part, torch.nn.Module) else part
        for name, part in pipe.components.items()
        if name != "transformer"
    }
    type(pipe)(transformer=transformer, **parts).save_pretrained(folder)


def train_model(name: str, images: torch.Tensor, captions: list[str], args: argparse.Namespace) -> None:
    """Trains and saves the three pipelines; what is known so far stands in OUT/<model>.json, also if it ends early."""
    report: dict[str, Any] = {}
    try:
        _train_model(name, images, captions, args, report)
    except Diverged as error:
        report["error"] = {"message": str(error), "curve": error.curve}
        raise
    finally:
        (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def _train_model(name: str, images: torch.Tensor, captions: list[str], args: argparse.Namespace, report: dict) -> None:
    torch.manual_seed(train.SEED)
    pipe = load_pipeline(name, torch.float32).to(args.device)
    pipe.text_encoder.requires_grad_(False)
    if hasattr(pipe, "text_encoder_2"):
        pipe.text_encoder_2.requires_grad_(False)
    latents = train.train_autoencoder(pipe.vae, images, 0, train.VAE_BATCH)
    config = dirotq.DiRotQConfig(method="robuq", activation_bits=4).resolved(calibrated=True)
    plans = plan_sites(pipe.transformer, config)
    teacher = None if args.data else copy.deepcopy(pipe.transformer).requires_grad_(False)
    sites = insert(pipe.transformer, plans, config)
    pipe.transformer.train().requires_grad_(True)

    def fit(steps: int) -> dict[str, Any]:
        start = time.perf_counter()
        if args.compile:
            torch._dynamo.reset()  # what was compiled for other bits
            pipe.transformer.compile()
        done = TRAINERS[name](pipe, latents, captions, steps, args.batch, args.lr, lambda: None, teacher)
        pipe.transformer._compiled_call_impl = None  # what follows changes bits all the time
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.0f} s, loss of the averaged weights {done.average:.5f}", flush=True)
        return {"steps": steps, "seconds": seconds, "average": done.average, "curve": done.curve}

    report["a4"] = fit(args.steps)
    save(pipe, plans, config, args.out / f"{name}-a4")

    held = [s.caption() for s in prompts(args.sensitivity_prompts, seed=3, held_out=False)]
    quantized = [p for p in plans if p.owner in sites]
    formats = METHODS["robuq"].activations
    modules: list[TernarySite] = [sites[p.owner] for p in quantized]
    costs = sensitivities(modules, formats, Recorded(pipe, MODELS[name].call, held).run)
    report["sensitivities"] = {p.owner: c for p, c in zip(quantized, costs, strict=True)}
    start = copy.deepcopy(pipe.transformer.state_dict())
    for label, average in AVERAGES.items():
        bits = allocate_bits(costs, [len(p.linears) for p in quantized], average)
        digits = "".join(map(str, bits))
        print(f"{name}: average {average:g} bits, by site {digits}", flush=True)
        pipe.transformer.load_state_dict(start)
        for site, own in zip(modules, bits, strict=True):
            site.activation = formats[own]
        report[label] = {"bits": digits, **fit(args.steps // 2)}
        mixed = replace(config, site_activation_bits=digits)
        save(pipe, plan_sites_as(plans, bits), mixed, args.out / f"{name}-{label}")


def plan_sites_as(plans: list, bits: list[int]) -> list:
    """The plans with activation bits of their own, as a loaded checkpoint's configuration gives them."""
    left = iter(bits)
    return [replace(p, activation_bits=next(left)) if p.quantize_input else p for p in plans]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the pipelines")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=6000, help="of W1.58A4; half as many for each average")
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--data", action="store_true", help="learn from the data instead of the 16-bit model")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model while it is trained")
    parser.add_argument("--sensitivity-prompts", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    scenes = sample_scenes(args.images, train.SEED, held_out=False)
    images, captions = train.render(scenes).to(args.device), [s.caption() for s in scenes]
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # see `demo.train`
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.models:
        try:
            train_model(name, images, captions, args)
        except Diverged as error:
            failed.append(f"{name} is not trained to its end: {error}")
            print(failed[-1], flush=True)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
