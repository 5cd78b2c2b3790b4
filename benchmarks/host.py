"""What a call of an op costs the host, with recordings (`kernels/replay.py`) and without: python benchmarks/host.py

On a GPU: until the call returns, few enough calls in a row that no queue fills. Without one: Python's part as on a
Hopper GPU, launches left out. Medians over rounds, with and without by turns; shapes of PixArt-Σ. Writes
benchmarks/results/host.json.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import triton
from linear import RESULTS
from torch import Tensor

from dirotq import kernels
from dirotq.kernels import backend, launch, replay

TOKENS, K, N, HEADS = 512, 1152, 4608, 16
CALLS, ROUNDS = 40, 25


def pretend() -> None:
    """As if the CPU's tensors were those of a Hopper GPU on which every kernel is compiled."""
    from triton.runtime.jit import JITFunction

    from dirotq.kernels import triton_launcher

    class Maps(list):
        """As many as are asked for."""

        def __getitem__(self, i):
            while len(self) <= i:
                meta = dict.fromkeys(("swizzle", "elem_size", "block_size"), 0)
                self.append(triton_launcher._Maps(meta, lambda *arguments: 0, 0))
            return super().__getitem__(i)

        def __bool__(self):
            return True

    def direct(compiled, rest):
        return triton_launcher.Direct(lambda *line: None, [0, False, True, *[None] * 6], Maps(), rest, nested=False)

    replay._launches = lambda tensor: True
    replay._same_bits = lambda a, b: True  # nothing is computed
    backend._obstacle = lambda *arguments: None
    launch._is_hopper, launch._multiprocessors, launch.direct = lambda *_: True, lambda *_: 132, direct
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    Tensor.get_device = lambda self: 0
    JITFunction.__getitem__ = lambda kernel, grid: lambda *arguments, **constants: SimpleNamespace()


def calls(device: str) -> dict[str, Callable[[], object]]:
    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.rand(shape, device=device).to(dtype)

    x, basis = random(TOKENS, K), random(K, 64)
    signs = torch.ones(K, dtype=torch.int8, device=device)
    codes, scale, z = (
        torch.zeros(TOKENS, K, dtype=torch.int8, device=device),
        random(TOKENS).float(),
        random(TOKENS, 64),
    )
    weights = [torch.zeros(N, K // 2, dtype=torch.uint8, device=device) for _ in range(3)]
    scales, groups = [random(N).float() for _ in range(3)], random(N, K // 64)
    low_ranks, biases = [random(N, 64) for _ in range(3)], [random(N) for _ in range(3)]
    residual, tokens, table = random(2, TOKENS // 2, N), random(2, TOKENS // 2, K), list(kernels.CODEBOOK16)
    rows, gate, heads = random(2, 2, K), random(2, N), [random(2, TOKENS // 2, HEADS, 72) for _ in range(3)]
    one = codes, scale, z, weights[0], scales[0], low_ranks[0], biases[0], table
    three = codes, scale, z, weights, scales, low_ranks, biases, table
    row = random(1, K)
    return {
        "rotate_quantize": lambda: kernels.rotate_quantize(x, basis, signs, 128, "int4"),
        "linear_a8": lambda: kernels.linear_a8(*one, torch.bfloat16),
        "linear_a8_add": lambda: kernels.linear_a8_add(*one, [residual], gate),
        "linear_a8_siblings": lambda: kernels.linear_a8_siblings(*three, torch.bfloat16),
        "linear_a16": lambda: kernels.linear_a16(row, None, weights[0], groups, None, biases[0], table),
        "norm_modulate": lambda: kernels.norm_modulate([tokens], rows[:, 0], rows[:, 1], 1e-6),
        "attend": lambda: kernels.attend(*heads),
    }


def microseconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return 1e6 * (time.perf_counter() - start) / CALLS


@torch.no_grad()
def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        pretend()
    rows = {}
    for name, call in calls(device).items():
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for on in times:
                replay.enable(on)
                for _ in range(5):
                    call()
                times[on].append(microseconds(call, device))
        rows[name] = {"without": statistics.median(times[False]), "with": statistics.median(times[True])}
        ratio = rows[name]["without"] / rows[name]["with"]
        print(f"{name:20} {rows[name]['without']:7.1f} -> {rows[name]['with']:6.1f} us  x{ratio:.1f}", flush=True)
    setting = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "none: Python's part, launches left out",
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "tokens": TOKENS, "unit": "us, median",
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "host.json").write_text(json.dumps({**setting, "ops": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
