"""Time the passes of `rotate_quantize` over its launch choices on Hopper, those of `kernels/hopper_site.py`.

python benchmarks/site_tiles.py [--tokens 4608] [--columns 3072 12288] [--mode int4]
"""

import argparse
from collections.abc import Callable
from itertools import product

import torch
from torch.profiler import ProfilerActivity, profile

from dirotq.kernels import hopper_site, replay, rotate_quantize

CHOICES = {
    "project_plan": tuple(  # with the programs that share the rows
        ({"ROWS": rows, "WIDTH": width, "STAGES": stages}, programs)
        for rows, width, stages in ((64, 1, 6), (64, 2, 3), (64, 2, 4), (128, 1, 4), (128, 2, 2))
        for programs in (108, 132, 216, 264)
    ),
    "RESIDENT": (1, 2, 3),
    "WIDE_ELEMENTS": (0, 2**60),  # 256 columns at a time in the second pass, or 128 (RESIDENT is of these)
}


def plan(choice: tuple[dict[str, int], int]) -> Callable[..., tuple[dict[str, int], int]]:
    """`hopper_site.project_plan` that always takes this tile, and shares its rows among that many programs."""
    tile, programs = choice
    return lambda m, blocks, _: (tile, min(blocks, max(1, programs // -(-m // tile["ROWS"])), hopper_site.MOST_CHUNKS))


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
        for values in product(*CHOICES.values()):
            if values[-1] == 0 and not (wide and values[-2] == CHOICES["RESIDENT"][0]):
                continue
            for name, value in zip(CHOICES, values, strict=True):
                setattr(hopper_site, name, plan(value) if name == "project_plan" else value)
            rotate_quantize(xs[0], basis, signs, 128, arguments.mode)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for x in xs * 3:
                    rotate_quantize(x, basis, signs, 128, arguments.mode)
                torch.cuda.synchronize()
            kernels = [event for event in seen.key_averages() if event.key.endswith("_kernel")]
            parts = "  ".join(f"{event.key.removesuffix('_kernel')} {event.device_time:.1f}" for event in kernels)
            choice = ", ".join(f"{name} {value}" for name, value in zip(CHOICES, values, strict=True))
            print(f"K {k}  {choice}: {sum(event.device_time for event in kernels):.1f} us  {parts}")


if __name__ == "__main__":
    main()
