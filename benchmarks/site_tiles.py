"""Time the passes of `rotate_quantize` over its launch choices on Hopper, those of `kernels/hopper_site.py`.

python benchmarks/site_tiles.py [--tokens 4608] [--columns 3072 12288] [--mode int4]
"""

import argparse
from itertools import product
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dirotq.kernels import hopper_site, replay, rotate_quantize
from dirotq.kernels.launch import cdiv

TILES = tuple(
    {"ROWS": rows, "WIDTH": width, "STAGES": stages}
    for rows, width, stages in ((64, 1, 6), (64, 2, 3), (64, 2, 4), (128, 1, 4), (128, 2, 2))
)
ON_EACH = (0.8, 1.0, 1.64, 2.0)  # programs of the projection for each multiprocessor
CHOICES: dict[str, tuple[Any, ...]] = {
    "RESIDENT": (1, 2, 3),
    "WIDE_ELEMENTS": (0, 2**60),  # 256 columns at a time in the second pass, or 128 (RESIDENT is of these)
}


def plans(m: int, k: int) -> list[tuple[int, int]]:
    """Tiles of the projection, by their number, and numbers of programs that share their rows; each once."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    most = min(k // hopper_site.WIDTH, hopper_site.MOST_CHUNKS)
    counts = (
        (i, round(each * processors) // cdiv(m, tile["ROWS"])) for i, tile in enumerate(TILES) for each in ON_EACH
    )
    return sorted({(i, min(max(1, count), most)) for i, count in counts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4608)
    parser.add_argument("--columns", type=int, nargs="+", default=[3072, 12288])
    parser.add_argument("--mode", default="int4")
    arguments = parser.parse_args()
    replay.enable(False)  # the choices change between calls
    for k in arguments.columns:
        m = arguments.tokens
        xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(3, int(250e6 / (2 * m * k))))]
        basis = torch.linalg.qr(torch.randn(k, 64, device="cuda"))[0].bfloat16().contiguous()
        signs = (torch.randint(0, 2, (k,), device="cuda") * 2 - 1).to(torch.int8)
        wide = hopper_site.takes_wide(k, k, arguments.mode)
        for (tile, chunks), *values in product(plans(m, k), *CHOICES.values()):
            if values[-1] == 0 and not (wide and values[0] == CHOICES["RESIDENT"][0]):
                continue
            hopper_site.project_plan = lambda *_, plan=(TILES[tile], chunks): plan
            for name, value in zip(CHOICES, values, strict=True):
                setattr(hopper_site, name, value)
            rotate_quantize(xs[0], basis, signs, 128, arguments.mode)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for x in xs * 3:
                    rotate_quantize(x, basis, signs, 128, arguments.mode)
                torch.cuda.synchronize()
            kernels = [event for event in seen.key_averages() if event.key.endswith("_kernel")]
            parts = "  ".join(f"{event.key.removesuffix('_kernel')} {event.device_time:.1f}" for event in kernels)
            choice = ", ".join(f"{name} {value}" for name, value in zip(CHOICES, values, strict=True))
            plan = ", ".join(f"{name} {value}" for name, value in TILES[tile].items())
            total = sum(event.device_time for event in kernels)
            print(f"K {k}  {plan}, parts {chunks}, {choice}: {total:.1f} us  {parts}")


if __name__ == "__main__":
    main()
