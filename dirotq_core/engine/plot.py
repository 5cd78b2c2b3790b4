"""The picture of a report: output error by depth, one line per kind of linear."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..report import QuantizationReport


def plot_by_depth(report: QuantizationReport, file: Path) -> None:
    """SQNR over blocks in the order in which they run; of outputs where measured, else of weights."""
    stacks: dict[str, int] = {}
    lines: dict[str, list[tuple[int, float]]] = {}
    measured = any(r.output_db is not None for r in report.linears)
    for r in report.linears:
        stack, index, member = r.name.split(".", 2)
        depth = stacks.setdefault(f"{stack}.{index}", len(stacks))
        value = r.output_db if measured else r.weight_db
        if value is not None:
            lines.setdefault(f"{stack.removesuffix('_blocks')}: {member}", []).append((depth, value))
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]  # FLUX.1 has 20 kinds of linears
    for i, (label, points) in enumerate(lines.items()):
        marker = "osv^"[i // len(colors) % 4]
        axes.plot(
            *zip(*points, strict=True), marker=marker, markersize=3, label=label, linewidth=1,
            color=colors[i % len(colors)],
        )  # fmt: skip
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"SQNR of {'outputs on held-out tokens' if measured else 'weights'}, dB")
    axes.set_title(f"{report.method}, {report.activation_bits}-bit activations")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=120, metadata={"Software": None})
