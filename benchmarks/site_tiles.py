"""Time the passes of `rotate_quantize` over tile sizes, for the choices in `kernels/triton_site.py`.

python benchmarks/site_tiles.py [--tokens 4608] [--columns 3072 12288] [--mode int4]
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from dirotq.kernels import triton_site

# rows, columns of the result, warps, stages; 49 to 120 KiB of shared memory
TILES = [(64, 128, 4, 2), (64, 128, 4, 1), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 1)]
RESIDENT = [1, 2, 4]  # programs at a time on a multiprocessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4608)
    parser.add_argument("--columns", type=int, nargs="+", default=[3072, 12288])
    parser.add_argument("--mode", default="int4")
    arguments = parser.parse_args()
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for k in arguments.columns:
        m = arguments.tokens
        xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(3, int(250e6 / (2 * m * k))))]
        basis = torch.linalg.qr(torch.randn(k, 64, device="cuda"))[0].bfloat16()
        signs = (torch.randint(0, 2, (k,), device="cuda") * 2 - 1).to(torch.int8)
        for bm, out, warps, stages in TILES:
            tile = {"BM": bm, "OUT": out, "num_warps": warps, "num_stages": stages}
            triton_site.site_blocks = lambda *_, tile=tile: tile
            for resident in RESIDENT:
                triton_site._chip = lambda *_, resident=resident: (multiprocessors * resident, True)
                triton_site.rotate_quantize(xs[0], basis, signs, 128, arguments.mode)
                torch.cuda.synchronize()
                with profile(activities=[ProfilerActivity.CUDA]) as seen:
                    for x in xs * 3:
                        triton_site.rotate_quantize(x, basis, signs, 128, arguments.mode)
                    torch.cuda.synchronize()
                kernels = [event for event in seen.key_averages() if event.key.endswith("_kernel")]
                parts = "  ".join(f"{event.key.removesuffix('_kernel')} {event.device_time:.1f}" for event in kernels)
                total = sum(event.device_time for event in kernels)
                print(
                    f"K {k}  {bm}x{out}, {warps} warps, {stages} stages, {resident} resident: {total:.1f} us  {parts}"
                )


if __name__ == "__main__":
    main()
