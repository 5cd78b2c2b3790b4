"""Time of a site's basis: subspace iteration against eigh, and what each leaves outside of the subspace.

    python benchmarks/subspace.py 3072 12288

Second moments with the spectrum i^-steep in a random basis. Prints one JSON line per width, spectrum and rank; eigh
runs once per width, in float32 and in float64.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from dirotq.dirotq_core.subspace import top_eigenvectors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(f: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    torch.ones(1, device=DEVICE).item()
    start = time.perf_counter()
    result = f()
    result[0, 0].item()  # waits
    return time.perf_counter() - start, result


def moment(k: int, steep: float) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(2 * k, k, device=DEVICE, generator=generator)
    x *= torch.arange(1, k + 1, device=DEVICE) ** (-steep / 2)
    x = x @ torch.linalg.qr(torch.randn(k, k, device=DEVICE, generator=generator))[0]
    return x.T @ x / len(x)


def outside(c: torch.Tensor, u: torch.Tensor) -> float:
    """Share of the trace of C outside of the span of U."""
    u = u.to(c)
    return 1 - float((u * (c @ u)).sum(dtype=torch.float64) / c.diagonal().sum(dtype=torch.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("widths", type=int, nargs="+", help="K")
    for k in parser.parse_args().widths:
        for steep in (0.5, 1.2):
            c = moment(k, steep)
            where = {"device": DEVICE, "k": k, "steep": steep}
            for rank in (64, k // 8):
                top_eigenvectors(c, rank)
                seconds, u = timed(lambda c=c, rank=rank: top_eigenvectors(c, rank))
                row = {"rank": rank, "by": "iteration", "seconds": seconds, "outside": outside(c, u)}
                print(json.dumps(where | row), flush=True)
            if steep > 1:
                continue
            for dtype in (torch.float32, torch.float64):
                seconds, vectors = timed(lambda c=c, dtype=dtype: torch.linalg.eigh(c.to(dtype))[1])
                for rank in (64, k // 8):
                    row = {
                        "rank": rank,
                        "by": f"eigh {dtype}",
                        "seconds": seconds,
                        "outside": outside(c, vectors[:, -rank:]),
                    }
                    print(json.dumps(where | row), flush=True)


if __name__ == "__main__":
    main()
