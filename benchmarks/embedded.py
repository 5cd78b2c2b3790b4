"""Measuring quantized copies of an embedded model: what `quality.py` and `methods.py` share."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from rows import Once, Rows, write

import dirotq
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.calibrate import Calibration
from dirotq.dirotq_core.demo.checker import check
from dirotq.dirotq_core.demo.embedded import MODELS, load_pipeline, prompts
from dirotq.dirotq_core.layout import plan_sites
from dirotq.dirotq_core.metrics import psnr, ssim
from dirotq.dirotq_core.quantize import install_all, solve_all

#: Forward passes that are timed, after as many that are not.
TIMED = 20


class Bench:
    """One embedded model on one device: its images, its calibration statistics, and rows about quantized copies.

    All copies see the same calibration activations, prompts and seeds; images are compared with the dense model's.

    Args:
        n_prompts: held-out captions to draw. n_calibration: captions to calibrate on, one in eight of them held out.
        batch: images drawn at once.
    """

    def __init__(self, name: str, device: str, n_prompts: int, n_calibration: int, batch: int):
        self.name, self.device, self.batch, self.call = name, device, batch, MODELS[name].call
        self.pipeline = load_pipeline(name, torch_dtype=torch.bfloat16).to(device)
        self.dense = self.pipeline.transformer
        self.scenes = prompts(n_prompts, seed=2)
        self.inputs: tuple[tuple, dict] | None = None
        self.reference = self.draw(self.dense)
        self.parameters = sum(p.numel() for p in self.dense.parameters())
        plans = plan_sites(self.dense, dirotq.DiRotQConfig().resolved(calibrated=True))
        self.calibration = Calibration(self.dense, plans)
        captions = [s.caption() for s in prompts(n_calibration, seed=1, held_out=False)]
        self.calibration.run(self.pipeline, captions, self.call, 0, progress=True)

    def draw(self, transformer: torch.nn.Module) -> list[np.ndarray]:
        """uint8 images of all prompts; image i has seed i."""
        self.pipeline.transformer = transformer
        images: list[np.ndarray] = []
        for start in range(0, len(self.scenes), self.batch):
            captions = [s.caption() for s in self.scenes[start : start + self.batch]]
            seeds = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(captions))]
            images += [*self.pipeline(captions, generator=seeds, output_type="np", **self.call).images]
        self.pipeline.transformer = self.dense
        return [(i * 255).round().astype(np.uint8) for i in images]

    def accuracy(self, images: Iterable[np.ndarray]) -> float:
        """Share of images that show their scene in every attribute."""
        return float(np.mean([check(i, s).ok for i, s in zip(images, self.scenes, strict=True)]))

    def dense_row(self) -> dict[str, Any]:
        accuracy = self.accuracy(self.reference)
        print(f"{self.name}: bf16 scene accuracy {accuracy:.1%}", flush=True)
        return {
            "model": self.name, "method": "bf16", "accuracy": accuracy, "bytes": self.parameters * 2, "bits": 16.0,
            "step_ms": self.step_ms(self.dense),
        }  # fmt: skip

    def quantized_row(self, label: str, options: dict[str, Any]) -> dict[str, Any]:
        """Quantize a copy with a `DiRotQConfig` of `options` and measure it."""
        start = time.perf_counter()
        config = dirotq.DiRotQConfig(**options).resolved(calibrated=True)
        plans = plan_sites(self.dense, config)
        report, solved = solve_all(self.dense, plans, config, self.calibration, progress=False)
        quantized = copy.deepcopy(self.dense)
        install_all(quantized, plans, config, solved)
        inputs = {n for p in plans if p.quantize_input for n in p.linears}
        sqnr = float(np.median([r.output_db for r in report.linears if r.name in inputs]))
        return self.row(label, quantized, options, sqnr, time.perf_counter() - start)

    def row(
        self, label: str, quantized: torch.nn.Module, options: dict[str, Any], sqnr: float | None, seconds: float
    ) -> dict[str, Any]:
        """What there is to say about a quantized transformer. seconds: what making it took."""
        images = self.draw(quantized)
        pairs = list(zip(images, self.reference, strict=True))
        size = sum(p.numel() * p.element_size() for p in quantized.parameters())
        linears = [m for m in quantized_linears(quantized).values() if m.plan.quantize_input]
        inside = sum(_bytes(m) for m in linears)
        return {
            "model": self.name, "method": label, "config": options, "sqnr": sqnr,
            "psnr": float(np.mean([min(psnr(a, b), 100.0) for a, b in pairs])),
            "ssim": float(np.mean([ssim(a, b) for a, b in pairs])),
            "accuracy": self.accuracy(images), "bytes": size, "bits": 8 * size / self.parameters,
            "linear_bits": 8 * inside / sum(m.in_features * m.out_features for m in linears),
            "step_ms": self.step_ms(quantized), "seconds": seconds,
        }  # fmt: skip

    @torch.no_grad()
    def step_ms(self, transformer: torch.nn.Module) -> float:
        """Median time of one denoising step of one image, in milliseconds."""
        if self.inputs is None:
            self.inputs = self._record()
        args, kwargs = self.inputs
        times = []
        for _ in range(2 * TIMED):
            self._wait()
            start = time.perf_counter()
            transformer(*args, **kwargs)
            self._wait()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times[TIMED:])

    def _record(self) -> tuple[tuple, dict]:
        """What the pipeline calls the transformer with in the first step of one image."""
        seen: list[tuple[tuple, dict]] = []
        handle = self.dense.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        try:
            generator = torch.Generator("cpu").manual_seed(0)
            call = {**self.call, "num_inference_steps": 1}
            self.pipeline(self.scenes[0].caption(), generator=generator, output_type="latent", **call)
        finally:
            handle.remove()
        return seen[0]

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def _bytes(linear: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for n, p in linear.named_parameters() if n != "bias")


def environment(device: str, **sizes: int) -> dict[str, Any]:
    """What a table was measured with."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu"
    return {"device": name, **{m.__name__: m.__version__ for m in (torch, diffusers, np)}, **sizes}


def bars(rows: list[dict], path: Path, colour: Any) -> None:
    """A plot of PSNR by method, one panel a model; colour(label) of a bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["model"] for r in rows))
    tallest = max(sum(r["model"] == name for r in rows) for name in names)
    figure, axes = plt.subplots(1, len(names), figsize=(7.5 * len(names), 0.3 * tallest + 1), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        mine = [r for r in rows if r["model"] == name and "psnr" in r][::-1]
        ax.barh([r["method"] for r in mine], [r["psnr"] for r in mine], color=[colour(r["method"]) for r in mine])
        for i, r in enumerate(mine):
            note = "" if r["sqnr"] is None else f"  (SQNR {r['sqnr']:.1f})"
            ax.text(r["psnr"] + 0.2, i, f"{r['psnr']:.1f}{note}", va="center", fontsize=8)
        ax.set_xlim(0, max((r["psnr"] for r in mine), default=1) * 1.25)
        ax.margins(y=0.01)
        ax.set_title(name)
        ax.set_xlabel("image PSNR against bf16, dB")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


#: A row's configuration, None where it is not known before, and what measures it.
Job = tuple[dict[str, Any] | None, Callable[[Bench], dict[str, Any]]]


def quantized_jobs(configurations: dict[str, dict], only: str | None) -> dict[str, Job]:
    """Rows of `DiRotQConfig` options by label, those whose label contains `only`."""
    return {
        label: (options, lambda bench, label=label, options=options: bench.quantized_row(label, options))
        for label, options in configurations.items()
        if not only or only in label
    }


def results(
    args: argparse.Namespace,
    jobs: Callable[[str, argparse.Namespace], dict[str, Job]],
    show: Callable[[dict], str],
) -> tuple[list[dict], dict[str, Any]]:
    """Rows of each model's jobs, or of the files to join, and what they were measured on; written as JSON.

    A model whose rows an earlier run made is not loaded again.
    """
    if args.join:
        parts = [json.loads(path.read_text()) for path in args.join]
        about, rows = parts[0]["environment"], [row for part in parts for row in part["rows"]]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write(args.out.with_suffix(".json"), about, rows)
        return rows, about
    about = environment(args.device, prompts=args.prompts, calibration=args.calibration)
    table = Rows(args.out, about)
    for name in args.models:
        bench = Once(lambda name=name: Bench(name, args.device, args.prompts, args.calibration, args.batch))
        table.add(name, "bf16", None, lambda bench=bench: bench().dense_row())
        for label, (config, measure) in jobs(name, args).items():
            row = table.add(name, label, config, lambda bench=bench, measure=measure: measure(bench()))
            print(show(row), flush=True)
    return table.finish(), about
