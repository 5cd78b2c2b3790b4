"""A modulation linear (W4A16, groups of 64) against bf16 `F.linear` on a GPU: python benchmarks/modulation.py

Times as in benchmarks/linear.py: medians over replays of a CUDA graph, weights from memory. Writes
benchmarks/results/modulation.json.
"""

import argparse
import json

import step_models
import torch
import torch.nn.functional as F
from linear import COLD_BYTES, RESULTS, median_ms

from dirotq import kernels

SHAPES = [(3072, 9216), (3072, 18432)]  # FLUX.1: single blocks, double blocks
TOKENS = [1, 2, 4, 8, 16]


def tensors(m: int, k: int, n: int) -> tuple:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5
    packed = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    scale = ((0.5 + torch.rand(n, k // 64, device="cuda")) / (36 * k**0.5)).bfloat16()
    return x, dense, packed, scale, torch.randn(n, device="cuda", dtype=torch.bfloat16)


def measure(m: int, k: int, n: int) -> dict[str, float]:
    def bf16(x, dense, packed, scale, bias):
        return F.linear(x, dense, bias)

    def w4a16(x, dense, packed, scale, bias):
        return kernels.linear_a16(x, None, packed, scale, None, bias, kernels.CODEBOOK16)

    sets = [tensors(m, k, n) for _ in range(max(2, int(COLD_BYTES / (n * k // 2)) + 1))]
    return {"bf16": median_ms(bf16, sets), "w4a16": median_ms(w4a16, sets)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for k, n in SHAPES:
        for m in TOKENS:
            ms = measure(m, k, n)
            rows.append({"M": m, "K": k, "N": n, "ms": ms})
            print(f"{k} -> {n}  M {m:<3} bf16 {1e3 * ms['bf16']:.1f} us  W4A16 {1e3 * ms['w4a16']:.1f} us", flush=True)
    setting = {**step_models.setting(), "unit": "ms, median"}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "modulation.json").write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
