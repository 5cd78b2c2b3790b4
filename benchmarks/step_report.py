"""Table and plots of `step.py`, and which kind of work a GPU kernel is."""

import re
from pathlib import Path
from typing import Any

# The first pattern that a kernel's name matches decides.
KINDS = {
    "unpack": r"^unpack_kernel",
    "rotate + quantize": r"^(partial_project|sum_project|project|site_\w+|measure|quantize|rotate)_?\w*kernel",
    "modulation": r"(one|few)_tokens?_kernel|gemv|kgemm_4bit_inference|nvjet_\w+?_\d+x8_",  # tiles of eight tokens
    "elementwise": r"^triton_(poi|red|per)_|layer_norm",
    "attention": r"flash|fmha|attention|sdpa|softmax",
    "matmul": r"linear_a8|siblings_packed|many_tokens|gemm|nvjet|cutlass|xmma|splitKreduce|cublas|_mm_|triton_(tem|mm)",
    "dequantize": r"kDequantize",
}
REST = "elementwise"  # copies, concatenations and everything else that PyTorch launches


def kind_of(kernel: str) -> str:
    """The key of `KINDS` that `kernel` belongs to."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), REST)


def buckets(kernels: dict[str, float]) -> dict[str, float]:
    """Milliseconds by kind, from microseconds by kernel."""
    found: dict[str, float] = {}
    for name, microseconds in kernels.items():
        found[kind_of(name)] = found.get(kind_of(name), 0.0) + microseconds / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def table(step: dict[str, Any]) -> str:
    """A row per variant."""
    rows = step["variants"]
    bases = [rows[name]["ms"] if name in rows else None for name in ("bf16", "bf16-compiled", "torchao-fp8-compiled")]
    lines = [
        f"{step['model']} {step['pixels']}² batch {step['batch']}",
        f"{'':28}{'ms':>8}{'low':>8}{'high':>8}{'host':>8}{'eager×':>8}{'comp.×':>8}{'fp8×':>7}"
        f"{'weights':>9}{'peak GB':>9}{'first s':>8}",
    ]
    for name, row in rows.items():
        ratios = "".join(f"{base / row['ms']:>8.2f}" if base else f"{'':>8}" for base in bases)
        lines.append(
            f"{name:28}{row['ms']:8.2f}{row['ms_low']:8.2f}{row['ms_high']:8.2f}{row['host_ms']:8.2f}{ratios}"
            f"{row['weight_bytes'] / 1e9:9.2f}{row['peak_bytes'] / 1e9:9.2f}{row['first_call_s']:8.1f}"
        )
    for name, row in rows.items():
        if row.get("buckets_ms"):
            parts = "  ".join(f"{kind} {ms:.1f}" for kind, ms in row["buckets_ms"].items())
            lines.append(f"  {name}: {sum(row['buckets_ms'].values()):.1f} ms of kernels: {parts}")
    return "\n".join(lines)


def _title(step: dict[str, Any]) -> str:
    model = {"flux": "FLUX.1-dev", "pixart": "PixArt-Σ"}[step["model"]]
    note = f" ({step['note']})" if "note" in step else ""
    guided = " with guidance" if step["model"] == "pixart" else ""
    return f"{model}, {step['pixels']}², batch {step['batch']}{guided}{note}"


def panels(count: int, width: float, height: float, **shared: bool):
    """A figure and its `count` panels of this size in inches, three in a row. shared: axes, as in `subplots`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **shared)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, axes.flat[:count]


def _axes(steps: list[dict[str, Any]]):
    figure, axes = panels(len(steps), 6.5, 5)
    settings = dict.fromkeys(f"{step['gpu']}, torch {step['torch']}" for step in steps)
    figure.suptitle(f"One denoising step, random weights: {'; '.join(settings)}")
    return figure, axes


def _cut(axis: Any, values: list[float]) -> float:
    """Where the axis of these bars ends: a bar more than twice as long as the next is cut, and its length written."""
    longest, second = sorted([0.0, 0.0, *values], reverse=True)[:2]
    end = 1.3 * second if longest > 2 * second > 0 else 1.2 * longest
    for at, value in enumerate(values):
        if value > end:
            axis.text(end, at, f"{value:.0f} ms → ", va="center", ha="right", fontsize=8)
    axis.set_xlim(0, end)
    return end


def plot_times(steps: list[dict[str, Any]], file: Path) -> None:
    """Milliseconds per variant, one panel per step."""
    if not steps:
        return
    figure, axes = _axes(steps)
    for axis, step in zip(axes, steps, strict=True):
        names = list(step["variants"])
        values = [step["variants"][name]["ms"] for name in names]
        colors = ["tab:blue" if name.startswith("ours") else "lightgrey" for name in names]
        axis.barh(names, values, color=colors)
        end = _cut(axis, values)
        for at, value in enumerate(values):
            if value < end:
                axis.text(value, at, f" {value:.0f} ms", va="center", fontsize=8)
        axis.invert_yaxis()
        axis.set(title=_title(step), xlabel="ms")
    figure.tight_layout(rect=(0, 0, 1, 0.98))  # below the title of all
    figure.savefig(file, dpi=120)


def plot_profile(steps: list[dict[str, Any]], file: Path) -> None:
    """Stacked milliseconds of GPU kernels by kind, one panel per step."""
    steps = [s for s in steps if any(row.get("buckets_ms") for row in s["variants"].values())]
    if not steps:
        return
    figure, axes = _axes(steps)
    for axis, step in zip(axes, steps, strict=True):
        rows = {name: row["buckets_ms"] for name, row in step["variants"].items() if row.get("buckets_ms")}
        left = dict.fromkeys(rows, 0.0)
        for number, kind in enumerate(KINDS):
            widths = [row.get(kind, 0.0) for row in rows.values()]
            if any(widths):
                axis.barh(list(rows), widths, left=list(left.values()), label=kind, color=f"C{number}")
            left = {name: left[name] + width for name, width in zip(rows, widths, strict=True)}
        _cut(axis, list(left.values()))
        axis.invert_yaxis()
        axis.set(title=_title(step), xlabel="ms of GPU kernels")
    labels = {name: bar for axis in axes for bar, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0, 1, 0.98))  # below the title of all
    figure.legend(labels.values(), labels.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(labels))
    figure.savefig(file, dpi=120, bbox_inches="tight")
