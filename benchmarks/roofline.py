"""Expected milliseconds of a step on GPUs that it has not run on, from a step that was measured: not measurements.

    python benchmarks/roofline.py [--step benchmarks/results/step.json]

Each kind of work in the measured profile takes the share of a peak that it reached on the measured GPU: 8-bit products
of the 8-bit peak, 16-bit products and attention of the 16-bit peak, everything else of the memory bandwidth. Attention
is PyTorch's, as in compiled bf16: the kernels for it here are for Hopper. What a chip's caches, clocks, power limit and
instruction set change is not in it, nor whether 24 GB hold the bf16 model.
"""

import argparse
import json
from pathlib import Path

# Dense tensor-core peaks in 1e12 operations per second (bf16 with fp32 accumulation; int8) and memory in 1e12 bytes per
# second, as NVIDIA publishes them: H200 data sheet (halved where it counts sparsity); the papers "NVIDIA Ampere GA102
# GPU Architecture" (RTX 3090), "NVIDIA Ada GPU Architecture" (4090), "NVIDIA RTX Blackwell GPU Architecture" (5090).
PEAKS = {
    "NVIDIA H200": {"bf16": 989.5, "int8": 1979.0, "memory": 4.8},
    "RTX 3090": {"bf16": 71.0, "int8": 284.0, "memory": 0.936},
    "RTX 4090": {"bf16": 165.2, "int8": 660.6, "memory": 1.008},
    "RTX 5090": {"bf16": 209.5, "int8": 838.0, "memory": 1.792},
}


def bound_by(variant: str, kind: str) -> str:
    """The peak that limits a kind of work in a variant."""
    if kind == "matmul":
        return "bf16" if variant.startswith("bf16") else "int8"
    return "bf16" if kind == "attention" else "memory"


def expected(variant: str, buckets: dict[str, float], measured: str, chip: str) -> float:
    """Milliseconds on `chip` of what took `buckets` (kind: ms) on the GPU `measured`."""
    here, there = PEAKS[measured], PEAKS[chip]
    return sum(ms * here[bound_by(variant, kind)] / there[bound_by(variant, kind)] for kind, ms in buckets.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=Path, default=Path(__file__).parent / "results" / "step.json")
    parser.add_argument("--variants", nargs="+", default=["bf16", "bf16-compiled", "ours-r64-compiled"])
    arguments = parser.parse_args()
    for step in json.loads(arguments.step.read_text())["steps"]:
        rows = {
            n: r["buckets_ms"] for n, r in step["variants"].items() if n in arguments.variants and "buckets_ms" in r
        }
        if not rows:
            continue
        pytorchs = rows.get("bf16-compiled", {}).get("attention")
        print(f"\n{step['model']} {step['pixels']}² batch {step['batch']}: expected ms, not measured\n")
        print("| | " + " | ".join(rows) + " |\n|---|" + "---|" * len(rows))
        for chip in PEAKS:
            measured = chip == step["gpu"]
            other = {} if measured or pytorchs is None else {"attention": pytorchs}  # ours is for Hopper
            cells = [f"{expected(name, row | other, step['gpu'], chip):.0f}" for name, row in rows.items()]
            note = " (kernels as measured)" if measured else ""
            print(f"| {chip}{note} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
