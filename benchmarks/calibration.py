"""How a model is calibrated against what comes out: sequential or parallel, how many images, how many steps of each.

Runs the streaming engine on the embedded models and compares the checkpoints on prompts that no model has seen, drawn
with the same seeds by the dense model:

    python benchmarks/calibration.py

- layers: median over W4A4 linears of the output's SQNR, on held-out tokens of the *dense* model, the same for all rows.
- model: SQNR of the transformer's output over all held-out calls, given the dense model's inputs.
- psnr: of images after all steps.

Lines are means over the repeats, dots single runs (filled: sequential).

Writes benchmarks/results/calibration.json and docs/images/calibration-*.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch

import dirotq
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.calibrate import Calibration
from dirotq.dirotq_core.demo.embedded import MODELS, load_pipeline, prompts
from dirotq.dirotq_core.layout import linear_at, plan_sites
from dirotq.dirotq_core.metrics import psnr

RESULTS = Path(__file__).parent / "results" / "calibration.json"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
SAMPLES = (2, 4, 8, 16, 32, 64)
TIMESTEPS = (1, 2, 4, 8, 20)
#: What the rows about timesteps have in common, and the rows about samples.
FIXED_SAMPLES, FIXED_TIMESTEPS = 16, 4
#: What is repeated with other prompts and noise: images move by a decibel between repeats.
REPEATED_SAMPLES = (8, 16, 32)


class HeldOut:
    """Images, calls of the transformer and tokens of its linears, all of the dense model on held-out prompts."""

    def __init__(self, name: str, count: int):
        self.model = MODELS[name]
        self.scenes = prompts(count, seed=2)
        self.pipeline = load_pipeline(name, torch_dtype=torch.bfloat16)
        self.dense = self.pipeline.transformer
        plans = plan_sites(self.dense, dirotq.DiRotQConfig().resolved(calibrated=True))
        calibration = Calibration(self.dense, plans)
        calibration.holding_out, calibration.rows_per_call = True, 32
        self.calls: list[tuple[dict, torch.Tensor]] = []
        hook = self.dense.register_forward_hook(self._record, with_kwargs=True)
        with calibration.recording():
            self.images = self.draw(self.dense)
        hook.remove()
        self.plans, self.tokens = plans, calibration.held_out

    def _record(self, module, args, kwargs, output) -> None:
        assert not args or len(args) == 1
        named = {**({"hidden_states": args[0]} if args else {}), **kwargs}
        self.calls.append(({k: v for k, v in named.items() if k != "return_dict"}, output[0].float()))

    @torch.no_grad()
    def draw(self, transformer) -> np.ndarray:
        self.pipeline.transformer = transformer
        noise = [torch.Generator("cpu").manual_seed(i) for i in range(len(self.scenes))]
        captions = [s.caption() for s in self.scenes]
        images = self.pipeline(captions, generator=noise, output_type="np", **self.model.call).images
        return (images * 255).round().astype(np.uint8)

    @torch.no_grad()
    def compare(self, quantized) -> dict[str, float]:
        linears, db = quantized_linears(quantized), []
        for plan in self.plans:
            x = self.tokens[plan.owner]
            for name in plan.linears if plan.quantize_input else ():
                y = linear_at(self.dense, name)(x).double()
                db.append(_db(y, linears[name](x).double() - y))
        noise = [quantized(**kwargs, return_dict=False)[0].float() - y for kwargs, y in self.calls]
        images = self.draw(quantized)
        return {
            "layers": float(np.median(db)),
            "model": _db(torch.stack([y for _, y in self.calls]), torch.stack(noise)),
            "psnr": float(np.mean([min(psnr(a, b), 100.0) for a, b in zip(images, self.images, strict=True)])),
        }


def _db(signal: torch.Tensor, noise: torch.Tensor) -> float:
    return float(10 * torch.log10(signal.double().square().sum() / noise.double().square().sum()))


def rows(seed: int) -> list[dict]:
    """Every run of a seed; the first one has all."""
    if seed:
        return [
            {"sequential": s, "samples": n, "timesteps": FIXED_TIMESTEPS}
            for n in REPEATED_SAMPLES
            for s in (True, False)
        ]
    return [{"sequential": s, "samples": n, "timesteps": FIXED_TIMESTEPS} for n in SAMPLES for s in (True, False)] + [
        {"sequential": True, "samples": FIXED_SAMPLES, "timesteps": t} for t in TIMESTEPS if t != FIXED_TIMESTEPS
    ]


def evaluate(name: str, held_out: HeldOut, row: dict, seed: int) -> dict:
    captions = [s.caption() for s in prompts(row["samples"], seed=1 + 100 * seed, held_out=False)]
    folder = Path(tempfile.mkdtemp())
    try:
        start = time.perf_counter()
        options = dirotq.EngineOptions(**row, transformer_only=True)
        report = dirotq.quantize_checkpoint(
            MODELS[name].folder, folder / "out", dirotq.DiRotQConfig(seed=seed), captions, call=MODELS[name].call,
            options=options, progress=False,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        cls = getattr(diffusers, MODELS[name].transformer)
        quantized = cls.from_pretrained(folder / "out", torch_dtype=torch.bfloat16)
    finally:
        shutil.rmtree(folder)
    tokens = min(r.tokens for r in report.linears if not r.weight_only)
    return {"name": name, "seed": seed, **row, **held_out.compare(quantized), "tokens": tokens, "seconds": seconds}


def plot(results: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for axis, fixed, fixed_value, file in (
        ("samples", "timesteps", FIXED_TIMESTEPS, "calibration-samples.png"),
        ("timesteps", "samples", FIXED_SAMPLES, "calibration-timesteps.png"),
    ):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        for name, color in zip(MODELS, ("tab:blue", "tab:orange"), strict=True):
            for sequential, style in ((True, "-"), (False, "--")):
                some = [r for r in results if r["name"] == name and r["sequential"] == sequential]
                some = [r for r in some if r[fixed] == fixed_value and (axis == "samples" or r["seed"] == 0)]
                values = sorted({r[axis] for r in some})
                if len(values) < 2:
                    continue
                for ax, metric in zip(axes, ("layers", "model", "psnr"), strict=True):
                    mean = [np.mean([r[metric] for r in some if r[axis] == v]) for v in values]
                    label = f"{name}, {'sequential' if sequential else 'parallel'}"
                    ax.plot(values, mean, style, color=color, label=label)
                    face = color if sequential else "none"
                    ax.scatter(
                        [r[axis] for r in some], [r[metric] for r in some], 14, edgecolors=color, facecolors=face
                    )
        titles = ("linears' outputs, SQNR dB", "transformer's output, SQNR dB", "images, PSNR dB")
        for ax, title in zip(axes, titles, strict=True):
            ax.set(xscale="log", xlabel="images drawn" if axis == "samples" else "steps kept of each", title=title)
            ticks = SAMPLES if axis == "samples" else TIMESTEPS
            ax.set_xticks(ticks, [str(t) for t in ticks])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        axes[0].legend(fontsize=7)
        figure.savefig(IMAGES / file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", type=int, default=16, help="held-out prompts to draw (default %(default)s)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="other prompts and noise for each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file (default %(default)s)")
    parser.add_argument("--plot-only", action="store_true", help="draw the plots of the results that are there")
    args = parser.parse_args()
    if args.plot_only:
        plot(json.loads(args.out.read_text())["rows"])
        return
    results: list[dict] = []
    for name in args.models:
        held_out = HeldOut(name, args.held_out)
        for seed in args.seeds:
            for row in rows(seed):
                results.append(evaluate(name, held_out, row, seed))
                print(json.dumps(results[-1]), flush=True)
    body = {"torch": torch.__version__, "device": "cpu", "held_out": args.held_out, "rows": results}
    args.out.write_text(json.dumps(body, indent=1) + "\n")
    plot(results)


if __name__ == "__main__":
    main()
