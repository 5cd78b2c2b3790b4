"""The plot of Model Info: every layer's signal-to-noise ratio and bits."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

import numpy as np
import torch

from .info_rows import Summary

WIDTH, HEIGHT, DPI = 9.6, 5.4, 100  # inches

_log = logging.getLogger(__name__)


def plot(summary: Summary) -> torch.Tensor:
    """IMAGE [1, 540, 960, 3] in 0 … 1. Without matplotlib, a picture that says so, which is also logged."""
    if find_spec("matplotlib") is None:
        message = f"The plot needs matplotlib:\n{sys.executable} -m pip install matplotlib"
        _log.warning("DiRotQ Model Info: %s", message.replace("\n", " "))
        return _written(message)
    return _drawn(summary)


def _drawn(summary: Summary) -> torch.Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would keep figures, and choose a backend for the whole process.
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    known = any(r.measured for r in summary.rows)
    axes = figure.subplots(2 if known else 1, 1, sharex=True, squeeze=False)[:, 0]
    for scheme in sorted({r.scheme for r in summary.rows}):
        rows = [(i, r) for i, r in enumerate(summary.rows) if r.scheme == scheme]
        axes[-1].plot([i for i, _ in rows], [r.bits for _, r in rows], ".", label=scheme)
        if known:
            axes[0].plot([i for i, _ in rows], [r.output_db if r.measured else np.nan for _, r in rows], ".")
    if known:
        axes[0].set_ylabel("SQNR, dB")
    axes[0].set_title(summary.title, fontsize=10)
    axes[-1].set_ylabel("bits per weight")
    axes[-1].set_xlabel("quantized linear, in the model's order")
    if summary.rows:
        axes[-1].legend()
    for ax in axes:
        ax.grid(alpha=0.3)
    canvas.draw()
    return _image(np.asarray(canvas.buffer_rgba())[..., :3])


def _written(message: str) -> torch.Tensor:
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", (int(WIDTH * DPI), int(HEIGHT * DPI)), "white")
    ImageDraw.Draw(sheet).text((30, 240), message, fill="black", font=ImageFont.load_default(16))
    return _image(np.asarray(sheet))


def _image(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]
