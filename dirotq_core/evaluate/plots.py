"""The report's plots, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .judge.protocol import QUESTIONS
from .metrics import METRICS
from .summary import JUDGE, marked

INK, BLUE, GREY, GREEN, RED = "#444", "#2a7fb8", "#9a9a9a", "#3a9a5c", "#c0504d"


def plots(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(caption, SVG) of what there is to show."""
    rows = result["rows"]
    found = []
    measured = [m for m in METRICS if any(m in row["metrics"] for row in rows)]
    if measured:
        found.append(("Means over prompts with 95 % bootstrap intervals.", _means(result, measured)))
    sized = [r for r in rows if r["bits"] is not None and "psnr" in r["metrics"] and not r["control"]]
    if len(sized) > 1:
        found.append(("PSNR against the size of the denoiser.", _sizes(sized)))
    judged = [q for q in QUESTIONS if any(q in row["judge"] for row in rows)]
    if judged:
        caption = marked(result, JUDGE, "The judge: preferred in both orders, or not.")
        found.append((caption, _judged(rows, judged)))
    return found


def _means(result: Mapping[str, Any], metrics: list[str]) -> str:
    shown = {m: [r for r in result["rows"] if m in r["metrics"]][::-1] for m in metrics}
    height = 0.9 + 0.32 * max(map(len, shown.values()))
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.2 * columns, height * lines), layout="constrained")
    for axes, metric in zip(figure.subplots(lines, columns, squeeze=False).flat, metrics, strict=False):
        for i, row in enumerate(shown[metric]):
            value = row["metrics"][metric]
            colour = GREY if row["control"] or row["reference"] else BLUE
            axes.plot([value["low"], value["high"]], [i, i], color=colour, linewidth=2)
            axes.plot([value["mean"]], [i], "o", color=colour, markersize=5)
        info = METRICS[metric]
        axes.set_yticks(range(len(shown[metric])), [_short(r["name"]) for r in shown[metric]])
        axes.set_ylim(-0.6, len(shown[metric]) - 0.4)
        unit = f", {info.unit}" if info.unit else ""
        axes.set_xlabel(marked(result, metric, f"{info.label}{unit} ({info.better} is better)"))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", alpha=0.3)
    for axes in figure.axes[len(metrics) :]:
        axes.set_visible(False)
    return _svg(figure)


def _sizes(rows: list[dict[str, Any]]) -> str:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        value, size = row["metrics"]["psnr"], row["bytes"] / 1e6
        axes.errorbar(
            [size], [value["mean"]], [[value["mean"] - value["low"]], [value["high"] - value["mean"]]], fmt="o",
            color=BLUE, capsize=3,
        )  # fmt: skip
        axes.annotate(_short(row["name"]), (size, value["mean"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.margins(0.25, 0.15)
    axes.set_xlabel("denoiser, MB")
    axes.set_ylabel("PSNR, dB")
    axes.grid(alpha=0.3)
    return _svg(figure)


def _judged(rows: list[dict[str, Any]], questions: list[str]) -> str:
    shown = [r for r in rows if r["judge"]][::-1]
    figure = Figure(figsize=(5.2 * len(questions), 1.3 + 0.34 * len(shown)), layout="constrained")
    for axes, question in zip(figure.subplots(1, len(questions), squeeze=False)[0], questions, strict=True):
        left = [0.0] * len(shown)
        for key, label, colour in (("won", "model", GREEN), ("tied", "tie", "#ccc"), ("lost", "reference", RED)):
            widths = [100 * (r["judge"][question][key] or 0) for r in shown]  # None where nothing was read
            axes.barh(range(len(shown)), widths, left=left, color=colour, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(shown)), [_short(r["name"]) for r in shown])
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of prompts")
        axes.set_title(question, fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return _svg(figure)


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def _svg(figure: Figure) -> str:
    """As text that can stand inside a page; the same bytes every time."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dirotq", "font.family": "sans-serif", "font.size": 9}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]
