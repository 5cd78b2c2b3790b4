"""The figures of how-it-works.md, from the embedded models: python docs/figures.py writes docs/images/how-*.png.

Everything but the diagram is measured: inputs of linears while an embedded model draws, and FLUX.1-dev's shapes.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from dirotq import DiRotQConfig
from dirotq.dirotq_core.architectures import recipe_for
from dirotq.dirotq_core.calibrate import Calibration
from dirotq.dirotq_core.codebooks import WEIGHT_FORMATS
from dirotq.dirotq_core.demo.embedded import get, load_pipeline, prompts
from dirotq.dirotq_core.layout import linear_at, plan_sites
from dirotq.dirotq_core.transforms import TRANSFORMS, SiteStatistics
from dirotq.kernels import rotate_quantize

IMAGES = Path(__file__).parent / "images"
MODEL, PROMPTS, STEPS = "flux-tiny", 12, 8
SITE = "single_transformer_blocks.1.attn.to_q"
RANK = 32
BLUE, RED, GREEN, GREY = "#3465a4", "#cc3333", "#4e9a06", "#888888"


def figure(width: float, height: float) -> Figure:
    out = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(out)
    return out


def save(fig: Figure, name: str) -> None:
    fig.savefig(IMAGES / f"how-{name}.png")
    print(IMAGES / f"how-{name}.png")


def calibrated() -> tuple[torch.nn.Module, list, Calibration]:
    """A model with the second moment of every site's input, and held-out inputs."""
    pipeline = load_pipeline(MODEL, torch.float32)
    plans = plan_sites(pipeline.transformer, DiRotQConfig(rank=RANK).resolved(calibrated=True))
    calibration = Calibration(pipeline.transformer, plans)
    captions = [s.caption() for s in prompts(PROMPTS, seed=3, held_out=False)]
    calibration.run(pipeline, captions, {**get(MODEL).call, "num_inference_steps": STEPS}, 0, progress=True)
    return pipeline.transformer, plans, calibration


def draw_linear() -> None:
    """What a quantized linear does, as boxes."""
    fig = figure(9.6, 3.3)
    axes = fig.subplots()
    axes.set_xlim(0, 96)
    axes.set_ylim(0, 33)
    axes.axis("off")

    def box(x: float, y: float, w: float, text: str, color: str) -> None:
        axes.add_patch(
            FancyBboxPatch((x, y), w, 6.4, "round,pad=0.3,rounding_size=1", fc=color, ec="#555555", alpha=0.9)
        )
        axes.text(x + w / 2, y + 3.2, text, ha="center", va="center", fontsize=9)

    def arrow(*points: tuple[float, float]) -> None:
        for start, end in itertools.pairwise(points[:-1]):
            axes.plot(*zip(start, end, strict=True), color="#555555", lw=1.2)
        axes.add_patch(FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=11, color="#555555"))

    wide, narrow = "#d7e3f4", "#f7dcdc"
    box(0.5, 13, 9, "x\n[M, K]", "#eeeeee")
    box(17, 23, 14, "z = x U\n16 bit, r columns", narrow)
    box(17, 3, 14, "x − z Uᵀ", wide)
    box(37, 3, 13, "· D H\nsigns, Hadamard", wide)
    box(55.5, 3, 14, "round to\n4-bit codes", wide)
    box(75, 3, 11, "· Ŵᵀ\n8-bit GEMM", wide)
    box(75, 23, 11, "· Lᵀ\n16 bit", narrow)
    box(90, 13, 4.5, "+ b", "#eeeeee")
    arrow((10, 17), (13, 17), (13, 26.2), (16.6, 26.2))
    arrow((10, 16), (13, 16), (13, 6.2), (16.6, 6.2))
    arrow((24, 22.6), (24, 9.9))
    for a, b in ((31.4, 36.6), (50.4, 55.1), (69.9, 74.6)):
        arrow((a, 6.2), (b, 6.2))
    arrow((31.4, 26.2), (74.6, 26.2))
    arrow((86.4, 26.2), (92.2, 26.2), (92.2, 19.9))
    arrow((86.4, 6.2), (92.2, 6.2), (92.2, 12.6))
    axes.text(53, 27.4, "the few directions that hold most of the energy", fontsize=8.5, ha="center", color=RED)
    axes.text(43, 0.6, "once per input, shared by to_q, to_k, to_v", fontsize=8.5, ha="center", color=BLUE)
    save(fig, "linear")


def draw_energy(model: torch.nn.Module, plans: list, calibration: Calibration) -> None:
    """Share of E‖x‖² inside the top r eigenvectors, for every site of the model."""
    fig = figure(7.2, 3.6)
    axes = fig.subplots()
    for plan in plans:
        if plan.transform is None:
            continue
        values = torch.linalg.eigvalsh(calibration.moments[plan.owner].mean().double()).flip(0)
        share = 100 * values.cumsum(0) / values.sum()
        chosen = plan.owner == SITE
        axes.plot(
            torch.arange(1, len(share) + 1), share, color=RED if chosen else BLUE, lw=2 if chosen else 0.8,
            alpha=1 if chosen else 0.45, zorder=3 if chosen else 2, label=SITE if chosen else None,
        )  # fmt: skip
    axes.axvline(RANK, color=GREY, ls="--", lw=1)
    axes.text(RANK * 1.06, 22, f"r = {RANK}", color=GREY, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
    axes.set_xlim(1, 1024)
    axes.set_ylim(0, 101)
    axes.set_xlabel("directions kept")
    axes.set_ylabel("% of the energy of x")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    save(fig, "energy")


def draw_stages(model: torch.nn.Module, plans: list, calibration: Calibration) -> None:
    """Root mean square of each column of one site's input: as it is, without the subspace, and rotated."""
    plan = next(p for p in plans if p.owner == SITE)
    moment = calibration.moments[SITE].mean()
    weights = [linear_at(model, n).weight.detach() for n in plan.linears]
    hadamard = TRANSFORMS["subspace_hadamard"]
    t = hadamard.prepare(SiteStatistics(plan.in_features, weights, plan.seed, RANK, "joint", moment))
    x = calibration.held_out[SITE].float()
    u = t["basis"].float()
    rest = x - (x @ u) @ torch.linalg.pinv(u)
    rotated = hadamard.apply(x, t)[0]
    fig = figure(9.6, 2.9)
    stages = ((x, "x", GREY), (rest, "x − z Uᵀ", RED), (rotated, "v = (x − z Uᵀ) D H", BLUE))
    top = float(x.square().mean(0).sqrt().max())
    for axes, (values, name, color) in zip(fig.subplots(1, 3, sharey=True), stages, strict=True):
        rms = values.square().mean(0).sqrt()
        axes.bar(torch.arange(len(rms)), rms, width=1.0, color=color)
        crest = float((values.abs().amax(1) / values.square().mean(1).sqrt()).median())
        axes.set_title(f"{name}\nlargest / rms of a token: {crest:.1f}", fontsize=9)
        axes.set_xlabel("column")
        axes.set_ylim(0, top * 1.05)
    fig.axes[0].set_ylabel("rms of the column")
    save(fig, "stages")


def draw_codebook() -> None:
    """The sixteen values of a weight code on the density that they are made for."""
    fig = figure(8.4, 2.9)
    left, right = fig.subplots(1, 2, width_ratios=[1.7, 1])
    grid = torch.linspace(-3.5, 3.5, 1401, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2) / (2 * torch.pi) ** 0.5
    left.fill_between(grid, density, color=BLUE, alpha=0.2, lw=0)
    fmt = WEIGHT_FORMATS["codebook"]
    values = sorted(fmt.table)
    left.vlines([v / fmt.rms for v in values], 0, 0.44, color=BLUE, lw=1.4)
    for v in values:
        if v > 0:
            left.text(v / fmt.rms, 0.45, str(v), fontsize=7, ha="center", color=BLUE)
    left.set_ylim(0, 0.5)
    left.set_xlabel("weight, in standard deviations; each line is a code, its number the int8 value", fontsize=8)
    left.set_yticks([])
    wide = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    weight = torch.exp(-(wide**2) / 2) / (2 * torch.pi) ** 0.5 * float(wide[1] - wide[0])
    e2m1 = {v * s for v in (0, 1, 2, 3, 4, 6, 8, 12) for s in (1, -1)}
    formats = {"this codebook": (fmt.table, fmt.rms), "e2m1": (e2m1, None), "INT4, −8 … 7": (range(-8, 8), None)}
    for i, (table, unit) in enumerate(formats.values()):
        entries = torch.tensor(sorted(table), dtype=torch.float64)
        units = [unit] if unit else [k / 20 for k in range(20, 140)]
        error = min(float(((wide[:, None] - entries / k).abs().amin(1) ** 2 * weight).sum()) for k in units)
        right.barh(i, error * 1000, color=BLUE if i == 0 else GREY)
        right.text(error * 1000 - 0.3, i, f"{error * 1000:.2f}", va="center", ha="right", color="white", fontsize=8)
    right.set_yticks(range(len(formats)), formats, fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("mean squared error on a unit Gaussian, × 10⁻³", fontsize=8)
    save(fig, "codebook")


def draw_lattice(model: torch.nn.Module, plans: list, calibration: Calibration) -> None:
    """One token's v and the int8 lattice values its 4-bit codes stand for, two groups of 64 columns."""
    x = calibration.held_out[SITE][:1].float()
    block = TRANSFORMS["subspace_hadamard"].block(x.shape[1])
    signs = TRANSFORMS["subspace_hadamard"].prepare(SiteStatistics(x.shape[1], [], 1, 0, "pca", None))["signs"]
    codes, scale, _ = rotate_quantize(x, None, signs, block, "int4")
    v = TRANSFORMS["subspace_hadamard"].apply(x, {"signs": signs})[0][0] / scale
    fig = figure(8.4, 2.9)
    axes = fig.subplots()
    columns = torch.arange(128)
    for g, color in ((0, BLUE), (1, RED)):
        part = slice(64 * g, 64 * g + 64)
        levels = codes[0, part].float().unique()
        axes.hlines(levels, 64 * g - 0.5, 64 * g + 63.5, color=color, lw=0.6, alpha=0.5)
        axes.plot(columns[part], v[part], ".", color="black", ms=4, zorder=3)
        step = int(levels.diff().min()) if len(levels) > 1 else 0
        axes.text(64 * g + 1, 1.06 * float(v[:128].max()), f"step m = {step}", color=color, fontsize=9)
    axes.set_xlabel("column of v (dots); lines: values that codes of its group reach, whole numbers of the unit u")
    axes.set_ylabel("v / u")
    axes.set_ylim(None, 1.22 * float(v[:128].max()))
    save(fig, "lattice")


def draw_size() -> None:
    """Where the bytes of FLUX.1-dev's transformer are, from its shapes."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    with init_empty_weights():
        model = FluxTransformer2DModel(guidance_embeds=True)
    total = sum(p.numel() for p in model.parameters())
    linears = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    groups = list(recipe_for(model).groups({n: linear_at(model, n) for n in linears}))
    w4a4 = sum(linears[n] for names, modulation in groups if not modulation for n in names)
    modulation = sum(linears[n] for names, is_modulation in groups if is_modulation for n in names)
    plans = plan_sites(model, DiRotQConfig(rank=64).resolved(calibrated=True))
    branch = w4a4_scales = 0
    for plan in plans:
        branch += sum(torch.Size(s).numel() * d.itemsize for s, d in plan.site_spec().values())
        branch += 2 * plan.rank * sum(plan.out_features)
        w4a4_scales += 0 if plan.format.grouped else 4 * sum(plan.out_features)
    rest = total - w4a4 - modulation
    parts = {
        "linears of the blocks": (2 * w4a4, w4a4 / 2 + w4a4_scales),
        "modulation": (2 * modulation, modulation / 2 + modulation / 64 * 2),
        "16-bit branch, r = 64": (0, branch),
        "embedders, norms, biases": (2 * rest, 2 * rest),
    }
    fig = figure(8.4, 2.2)
    axes = fig.subplots()
    left = [0.0, 0.0]
    for (name, sizes), color in zip(parts.items(), (BLUE, GREEN, RED, GREY), strict=True):
        axes.barh([0, 1], [s / 1e9 for s in sizes], left=left, color=color, label=name)
        left = [a + s / 1e9 for a, s in zip(left, sizes, strict=True)]
    for i, end in enumerate(left):
        axes.text(end + 0.2, i, f"{end:.2f} GB", va="center", fontsize=9)
    axes.set_yticks([0, 1], ["bf16", "dirotq"])
    axes.invert_yaxis()
    axes.set_xlim(0, 28)
    axes.set_xlabel("FLUX.1-dev's transformer, GB")
    axes.legend(fontsize=8, ncol=2, loc="lower right")
    save(fig, "size")


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    draw_linear()
    draw_codebook()
    draw_size()
    torch.manual_seed(0)
    model, plans, calibration = calibrated()
    draw_energy(model, plans, calibration)
    draw_stages(model, plans, calibration)
    draw_lattice(model, plans, calibration)


if __name__ == "__main__":
    main()
