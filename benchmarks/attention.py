"""Attention with PixArt's heads (16 of 72 columns) and FLUX.1's (24 of 128), ours and PyTorch's:
python benchmarks/attention.py

Queries, keys and values are columns of one matrix, as the projections leave them; keys and values of text have a bias
that masks some; of heads of 128 columns, queries hold the factor that `qk_norm_rope` leaves in them. Times as in
benchmarks/linear.py: medians over replays of a CUDA graph, ours and PyTorch's by turns.
Writes benchmarks/results/attention.json.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import step_models
import torch
from linear import RESULTS, median_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dirotq.kernels import POWERS_OF_TWO, attend, powers_scale

HEADS = {72: 16, 80: 16, 128: 24}
SHAPES = [
    (2, 4096, 4096, 72), (1, 4096, 4096, 72), (2, 1024, 1024, 72), (2, 4096, 4096, 80), (2, 4096, 300, 72),
    (1, 1536, 1536, 128), (1, 4592, 4592, 128), (1, 4608, 4608, 128), (4, 4608, 4608, 128), (1, 16896, 16896, 128),
]  # fmt: skip
COPIES = 10  # in a replay
ROUNDS = 5


def scale_of(query: Tensor) -> float | None:
    return POWERS_OF_TWO if query.shape[3] == 128 else None


def dirotq(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    return attend(query, key, value, bias, scale_of(query))


def pytorch(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        heads = [x.transpose(1, 2) for x in (query, key, value)]
        with sdpa_kernel(backend):
            mask = None if bias is None else bias[:, None, None].expand(-1, query.shape[2], query.shape[1], -1)
            return scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale_of(query)).transpose(1, 2)

    return run


RUNS: dict[str, Callable[..., Tensor]] = {
    "dirotq": dirotq,
    "cudnn": pytorch(SDPBackend.CUDNN_ATTENTION),
    "flash": pytorch(SDPBackend.FLASH_ATTENTION),  # takes no bias
    "efficient": pytorch(SDPBackend.EFFICIENT_ATTENTION),
}


def tensors(batch: int, queries: int, keys: int, d: int) -> tuple[Tensor | None, ...]:
    wide = torch.randn(batch, queries, 3, HEADS[d], d, device="cuda", dtype=torch.bfloat16)
    if d == 128:
        wide[:, :, 0] *= powers_scale(d)
    if keys == queries:
        return *wide.unbind(2), None
    text = torch.randn(batch, keys, 2, HEADS[d], d, device="cuda", dtype=torch.bfloat16)
    bias = torch.zeros(batch, keys, device="cuda", dtype=torch.bfloat16)
    bias[:, keys // 2 :] = -10000
    return wide[:, :, 0], *text.unbind(2), bias


def in_float64(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Of the first head."""
    q, k, v = (x[:, :, 0].double() for x in (query, key, value))
    scores = q @ k.transpose(1, 2) * (scale_of(query) or q.shape[-1] ** -0.5)
    if bias is not None:
        scores += bias[:, None].double()
    return (scores.softmax(-1) @ v)[:, :, None]


def measure(*shape: int) -> dict[str, Any]:
    sets = [tensors(*shape) for _ in range(COPIES if shape[0] * shape[1] < 10_000 else 2)]
    query, key, value, bias = sets[0]
    exact = in_float64(query, key, value, bias)
    runs = {name: run for name, run in RUNS.items() if bias is None or name != "flash"}
    error = {name: float((run(*sets[0])[:, :, :1] - exact).abs().max()) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(median_ms(run, sets))
    return {"ms": {name: statistics.median(values) for name, values in times.items()}, "error": error}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for batch, queries, keys, d in SHAPES:
        found = measure(batch, queries, keys, d)
        rows.append({"batch": batch, "queries": queries, "keys": keys, "columns": d, **found})
        ms = found["ms"]
        times = "  ".join(f"{name} {1e3 * ms[name]:.1f} us (x{ms[name] / ms['dirotq']:.2f})" for name in ms)
        print(f"{batch} x {queries} x {keys} x {d}: {times}  errors {found['error']}", flush=True)
    setting = {
        **step_models.setting(), "heads by columns": HEADS,
        "unit": "ms, median; error: largest, against float64",
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "attention.json").write_text(json.dumps({**setting, "shapes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
