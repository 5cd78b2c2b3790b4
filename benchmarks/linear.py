"""One linear on a GPU, bf16 in to bf16 out, side by side: F.linear, torch's rowwise fp8, and this package, by part.

    python benchmarks/linear.py [--tokens 1 512 4608] [--shapes 3072x9216] [--modes int4 codebook]

With PEER_TOKENS also torchao's fp8 and int8, compiled for the size (with the compiler's settings; `step.py` has
torchao's), bitsandbytes' NF4 and the published DiRotQ. One that is not installed or fails is named and left out.

Every time is the median over replays of a CUDA graph that runs each of several sets of random tensors once; together
the sets are larger than the last-level cache, so operands come from memory. Host time is not in it.

`ms` is of a few calls, bf16 first, one variant right after the other: bf16 has the clock that the GPU starts with, what
is timed later less of it the more tokens there are. `sustained_ms`, of the first mode from 512 tokens on, is taken
after SECONDS of nothing else, by turns, as work one step after the other finds it: large products are limited by power
then. Results go to benchmarks/results/linear.json and linear.png.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import linear_peers
import step_models
import torch
import torch.nn.functional as F
from step_report import panels
from torch import Tensor

from dirotq import kernels

FLUX = [(3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072), (3072, 21504), (15360, 3072)]
PIXART = [(1152, 1152), (1152, 3456), (1152, 4608), (4608, 1152)]
TOKENS = [1, 16, 77, 512, 1024, 4608, 16384]
RANK = 64
COLD_BYTES = 250e6
SECONDS, TIMED_SECONDS, ROUNDS = 0.2, 0.05, 3
SUSTAINED_TOKENS = 512  # fewer do not reach the limit of power
PEER_TOKENS = (512, 4608)
# Signal-to-noise ratio against bf16, random weights and inputs: what is below is another linear.
LEAST_DB = {"torchao fp8": 20.0, "torchao int8": 30.0, "NF4": 12.0, "paper": 12.0}
RESULTS = Path(__file__).parent / "results"


def graph_of(run: Callable[..., Any], sets: list[tuple]) -> torch.cuda.CUDAGraph:
    """`run` for each of `sets`, replayed once."""
    run(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in sets:
            run(*arguments)
    graph.replay()
    return graph


def replays_ms(graph: torch.cuda.CUDAGraph, count: int = 1) -> float:
    """Milliseconds of one of `count` replays in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def median_ms(run: Callable[..., Any], sets: list[tuple], repeats: int = 9) -> float:
    """Milliseconds of one call of `run`, over all `sets` in turn."""
    graph = graph_of(run, sets)
    return statistics.median(replays_ms(graph) for _ in range(repeats)) / len(sets)


def sustained_ms(runs: dict[str, tuple[Callable[..., Any], list[tuple]]]) -> dict[str, float]:
    """Milliseconds of one call of each run, after SECONDS of that run alone; all by turns."""
    graphs = {name: graph_of(run, sets) for name, (run, sets) in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            once = replays_ms(graph) / 1000
            replays_ms(graph, round(SECONDS / once) + 1)
            times[name].append(replays_ms(graph, round(TIMED_SECONDS / once) + 1) / len(runs[name][1]))
    return {name: statistics.median(values) for name, values in times.items()}


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


class Linear:
    """Random tensors of one K → N linear and its input."""

    def __init__(self, m: int, k: int, n: int):
        self.x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        self.dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5
        self.fp8, self.fp8_scale = fp8_rows(self.dense)
        self.basis = torch.linalg.qr(torch.randn(k, RANK, device="cuda"))[0].bfloat16().contiguous()
        self.signs = (torch.randint(0, 2, (k,), device="cuda") * 2 - 1).to(torch.int8)
        self.weight = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        self.weight_scale = (0.5 + torch.rand(n, device="cuda")) / (36 * k**0.5)
        self.low_rank = (torch.randn(n, RANK, device="cuda") / k**0.5).bfloat16()
        self.bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        self.table = kernels.CODEBOOK16
        self.peers: dict[str, linear_peers.Run] = {}

    def bf16(self) -> Tensor:
        return F.linear(self.x, self.dense, self.bias)

    def torch_fp8(self) -> Tensor:
        return self.fp8_product(*_compiled_fp8_rows(self.x))

    def fp8_product(self, codes: Tensor, scale: Tensor) -> Tensor:
        return torch._scaled_mm(
            codes, self.fp8.T, scale, self.fp8_scale.T, bias=self.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def ours(self, mode: str) -> Tensor:
        return kernels.linear(self.x, self.basis, self.signs, 128, mode, *self._weights())

    def rotate_quantize(self, mode: str) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.rotate_quantize(self.x, self.basis, self.signs, 128, mode)

    def multiply(self, codes: Tensor, scale: Tensor, z: Tensor) -> Tensor:
        return kernels.linear_a8(codes, scale, z, *self._weights(), torch.bfloat16)

    def peer(self, name: str) -> Tensor:
        return self.peers[name](self.x)

    def _weights(self) -> tuple:
        return self.weight, self.weight_scale, self.low_rank, self.bias, self.table


_compiled_fp8_rows = torch.compile(fp8_rows, dynamic=True)


def attempt_peer(name: str, copies: list[Linear]) -> bool:
    """Give each of `copies` the peer `name`; False, and why, if one cannot be made or run here."""
    try:
        for copy in copies:
            copy.peers[name] = linear_peers.PEERS[name](copy.dense, copy.bias)
        signal = step_models.sqnr(copies[0].peer(name), copies[0].bf16())
        graph_of(lambda copy: copy.peer(name), [(copies[0],)])
    except (ImportError, AssertionError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    if signal < LEAST_DB[name]:
        raise AssertionError(f"{name} is not the linear it stands for: {signal:.1f} dB")
    return True


def of_first_mode(names: Iterable[str], modes: list[str]) -> list[str]:
    """Those of `names` that are not of another of our modes than the first."""
    others = {f"{what} {mode}" for what in ("ours", "rotate_quantize") for mode in modes[1:]}
    return [name for name in names if name not in others]


def measure(m: int, k: int, n: int, modes: list[str]) -> dict[str, dict[str, float]]:
    footprint = 2 * m * k + n * k // 2 + 2 * m * n
    copies = [Linear(m, k, n) for _ in range(max(2, min(16, int(COLD_BYTES / footprint) + 1)))]
    sets = [(copy,) for copy in copies]
    runs: dict[str, tuple[Callable[..., Any], list[tuple]]] = {"bf16": (Linear.bf16, sets)}
    try:
        Linear.torch_fp8(copies[0])
        runs["torch fp8"] = Linear.torch_fp8, sets
    except (RuntimeError, ValueError) as error:  # a GPU or shape that torch's fp8 product does not know
        print(f"torch fp8 is left out: {str(error).splitlines()[0]}")
    for name in linear_peers.PEERS if m in PEER_TOKENS else ():
        if attempt_peer(name, copies):
            runs[name] = (lambda c, name=name: c.peer(name)), sets
    for mode in modes:
        runs[f"ours {mode}"] = (lambda c, mode=mode: c.ours(mode)), sets
        runs[f"rotate_quantize {mode}"] = (lambda c, mode=mode: c.rotate_quantize(mode)), sets
    runs["linear_a8"] = Linear.multiply, [(copy, *copy.rotate_quantize(modes[0])) for copy in copies]
    row = {"ms": {name: median_ms(*run) for name, run in runs.items()}}
    if m >= SUSTAINED_TOKENS:
        row["sustained_ms"] = sustained_ms({name: runs[name] for name in of_first_mode(runs, modes)})
    return row


def plot(rows: list[dict[str, Any]], mode: str, title: str) -> None:
    shapes = sorted({(row["K"], row["N"]) for row in rows})
    figure, axes = panels(len(shapes), 4.5, 3.2, sharex=True, sharey=True)
    for axis, (k, n) in zip(axes, shapes, strict=True):
        here = sorted((row for row in rows if (row["K"], row["N"]) == (k, n)), key=lambda row: row["M"])
        for name, color in ((f"ours {mode}", "tab:blue"), ("torchao fp8", "tab:orange"), ("torch fp8", "grey")):
            for key, style in (("ms", ":"), ("sustained_ms", "-")):
                timed = [(row["M"], row[key]) for row in here if name in row.get(key, {})]
                label = f"{name}, {'a few calls' if key == 'ms' else 'sustained'}"
                speed = [ms["bf16"] / ms[name] for _, ms in timed]
                axis.plot([m for m, _ in timed], speed, style, marker=".", color=color, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", title=f"{k} → {n}")
        axis.tick_params(labelbottom=True)
    figure.supxlabel("tokens")
    figure.supylabel("speed against bf16 F.linear")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(RESULTS / "linear.png", dpi=120)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--shapes", nargs="+", default=[f"{k}x{n}" for k, n in FLUX + PIXART], metavar="KxN")
    parser.add_argument("--modes", nargs="+", default=["int4", "codebook", "int8"])
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 4 * len(PEER_TOKENS) * len(arguments.shapes)
    setting = {**step_models.setting("torchao", "bitsandbytes"), "rank": RANK, "unit": "ms, median"}
    print(json.dumps(setting))
    rows = []
    for shape in arguments.shapes:
        k, n = map(int, shape.split("x"))
        for m in arguments.tokens:
            rows.append({"M": m, "K": k, "N": n, **measure(m, k, n, arguments.modes)})
            for key in ("ms", "sustained_ms"):
                ms = rows[-1].get(key, {})
                ratios = "  ".join(f"{name} {time:.4f} (x{ms['bf16'] / time:.2f})" for name, time in ms.items())
                print(f"{k:>6} -> {n:<6} M {m:<6} {key:<12} {ratios}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "linear.json").write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")
    plot(rows, arguments.modes[0], f"One linear, everything included: {setting['gpu']}, torch {setting['torch']}")


if __name__ == "__main__":
    main()
