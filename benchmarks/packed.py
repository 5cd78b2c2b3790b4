"""Products from packed weights against unpacking them first, on a Hopper GPU, with F.linear beside them.

    python benchmarks/packed.py [--tokens 512 4608] [--shapes 3072x9216]

`before` is `linear_a8` and the whole linear with weights always unpacked first (in Triton's general kernel below 65
tokens), `now` with what `kernels/hopper_costs.py` chooses. Times as in `linear.py`, the least of two medians taken in
turn: large products are limited by power, and what ran before one matters. Results go to
benchmarks/results/packed.json.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import step_models
import torch
from linear import COLD_BYTES, FLUX, PIXART, RESULTS, Linear, median_ms
from torch import Tensor

from dirotq import kernels
from dirotq.kernels import hopper_costs, hopper_packed, replay

SHAPES = {**dict.fromkeys(FLUX, (16, 77, 512, 1024, 1536, 4096, 4608, 16384)),
          **dict.fromkeys(PIXART, (16, 600, 4096, 8192))}  # fmt: skip
SIBLINGS = {(3072, (3072, 3072, 3072, 12288)): (512, 4096, 4608), (3072, (3072, 3072, 3072)): (512, 4096, 4608),
            (1152, (1152, 1152, 1152)): (512, 4096, 4608)}  # fmt: skip


@contextmanager
def unpacked(always: bool) -> Iterator[None]:
    choose = hopper_packed.choose
    if always:
        hopper_packed.choose = lambda *_: None
    try:
        yield
    finally:
        hopper_packed.choose = choose


def least(runs: dict[str, tuple[Callable[..., Any], list[tuple], bool]]) -> dict[str, float]:
    """Microseconds of each run: a function, sets of arguments, and whether weights are always unpacked first."""
    us: dict[str, float] = {}
    for _ in range(2):
        for name, (run, sets, always) in runs.items():
            with unpacked(always):
                us[name] = min(us.get(name, float("inf")), 1000 * median_ms(run, sets))
    return {name: round(time, 1) for name, time in us.items()}


def choice(m: int, k: int, ns: tuple[int, ...]) -> tuple[int, bool] | None:
    return hopper_costs.choose(m, k, ns, torch.cuda.get_device_properties(0).multi_processor_count)


def measure(m: int, k: int, n: int) -> dict[str, Any]:
    count = int(COLD_BYTES / (2 * m * k + n * k // 2 + 2 * m * n)) + 1
    copies = [Linear(m, k, n) for _ in range(max(2, min(10, count)))]
    sets = [(copy,) for copy in copies]
    quantized = [(copy, *copy.rotate_quantize("int4")) for copy in copies]
    us = least({
        "bf16": (Linear.bf16, sets, False),
        "rotate_quantize": (lambda c: c.rotate_quantize("int4"), sets, False),
        "linear before": (lambda c: c.ours("int4"), sets, True),
        "linear now": (lambda c: c.ours("int4"), sets, False),
        "linear_a8 before": (Linear.multiply, quantized, True),
        "linear_a8 now": (Linear.multiply, quantized, False),
    })  # fmt: skip
    return {"M": m, "K": k, "N": n, "tile": choice(m, k, (n,)), "us": us}


def measure_siblings(m: int, k: int, ns: tuple[int, ...]) -> dict[str, Any]:
    sets = []
    for _ in range(4):
        linears = [Linear(m, k, n) for n in ns]
        names = ("weight", "weight_scale", "low_rank", "bias")
        sets.append((*linears[0].rotate_quantize("int4"), *([getattr(x, name) for x in linears] for name in names)))

    def run(*arguments: Any) -> Tensor:
        return kernels.linear_a8_siblings(*arguments, kernels.CODEBOOK16, torch.bfloat16)

    us = least({"linear_a8 before": (run, sets, True), "linear_a8 now": (run, sets, False)})
    return {"M": m, "K": k, "N": list(ns), "tile": choice(m, k, ns), "us": us}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--shapes", nargs="+", default=[f"{k}x{n}" for k, n in SHAPES], metavar="KxN")
    arguments = parser.parse_args()
    replay.enable(False)  # what is chosen changes between calls
    rows = []
    for k, n in (tuple(map(int, shape.split("x"))) for shape in arguments.shapes):
        for m in arguments.tokens or SHAPES[k, n]:
            rows.append(measure(m, k, n))
            us = rows[-1]["us"]
            ratios = "  ".join(f"{name} {time} (x{us['bf16'] / time:.2f})" for name, time in us.items())
            print(f"{k:>6} -> {n:<6} M {m:<6} {ratios}  {rows[-1]['tile']}", flush=True)
    siblings = [measure_siblings(m, k, ns) for (k, ns), tokens in SIBLINGS.items() for m in tokens]
    for row in siblings:
        print(row)
    RESULTS.mkdir(exist_ok=True)
    results = {**step_models.setting(), "unit": "µs, median", "rows": rows, "siblings": siblings}
    (RESULTS / "packed.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
