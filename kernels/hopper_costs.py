"""Which product runs on Hopper, and with what tiles: whichever should take least by a model of its time.

The constants are microseconds, fitted to measurements on an H200 (132 multiprocessors): FLUX.1's and PixArt's shapes
with 1 to 16384 tokens, the larger ones with the GPU at its limit of power, as in a model's step.
"""

from dataclasses import dataclass
from functools import cache

from .launch import cdiv

FEWEST_TOKENS = 65  # for which it can pay to unpack weights first
ROWS = COLUMNS = WIDTH = 128  # of the tiles counted here: rows of A or of W, and the part of K in a step


@dataclass(frozen=True)
class Packed:
    """Time of `hopper_packed.multiply` with tiles of `tokens` tokens.

    tokens: of a tile. launch: of the whole, once. step: of one tile by 128 columns of K. tile: of what ends one. share:
    what it adds that multiprocessors share tiles, and once more `part` for each part another left.
    """

    tokens: int
    launch: float
    step: float
    tile: float
    share: float
    part: float


PACKED = (
    Packed(256, launch=3.3, step=0.74, tile=2.6, share=7.0, part=1.0),
    Packed(128, launch=3.0, step=0.43, tile=2.0, share=4.7, part=0.8),
    Packed(64, launch=3.4, step=0.31, tile=1.3, share=3.7, part=0.7),
)
# `hopper.linear_a8`: a launch, a million weights unpacked, and a step and the end of a tile by its columns.
UNPACK_LAUNCH, UNPACK, UNPACKED_STEP, UNPACKED_TILE = 2.05, 0.35, {128: 0.345, 256: 0.70}, {128: 2.0, 256: 3.0}
# A step of a shared tile takes longer, by measurement, with more activations (bytes) than these.
FAR, FAR_STEP = 8e6, 1.25


def tiles_shared(tiles: int, processors: int) -> int:
    """How many of the tiles all multiprocessors share evenly, so that they end together; the rest has one each."""
    if tiles < processors:
        return tiles
    return tiles % processors + processors if tiles % processors else 0


def packed_time(cost: Packed, shared: bool, m: int, k: int, col_tiles: int, processors: int) -> float:
    tiles, steps = cdiv(m, cost.tokens) * col_tiles, cdiv(k, WIDTH)
    if not shared:
        return cost.launch + cdiv(tiles, processors) * (steps * cost.step + cost.tile)
    common = tiles_shared(tiles, processors)
    units = cdiv(k, 2 * WIDTH)
    share = cdiv(common * units, processors)  # units of work of a multiprocessor
    alone, pieces = (tiles - common) // processors, 2 if tiles >= processors else 1
    parts = cdiv(units, share)
    far = FAR_STEP if m * k > FAR else 1.0
    work = (alone * steps + 2 * share * far) * cost.step + (alone + pieces) * cost.tile
    return cost.launch + work + cost.share + parts * cost.part


def unpacked_columns(m: int, n: int) -> int:
    """Columns of a tile of `hopper.multiply`: fewer where there are too few wide tiles to fill the chip evenly."""
    return 128 if cdiv(m, ROWS) * n < 36 * 4096 else 256


def unpacked_time(m: int, k: int, n: int, weights: int, processors: int) -> float:
    columns = unpacked_columns(m, n)
    rounds = cdiv(cdiv(m, ROWS) * cdiv(n, columns), processors)
    work = rounds * (cdiv(k, WIDTH) * UNPACKED_STEP[columns] + UNPACKED_TILE[columns])
    return weights * UNPACK_LAUNCH + n * k * UNPACK / 1e6 + work


@cache
def choose(m: int, k: int, ns: tuple[int, ...], processors: int) -> tuple[int, bool] | None:
    """Tokens of a tile and whether multiprocessors share tiles, for a product from packed weights of `ns` rows side by
    side; None where it should take longer than unpacking them first."""
    col_tiles = sum(cdiv(n, COLUMNS) for n in ns)
    times: dict[tuple[int, bool] | None, float] = {}
    if m >= FEWEST_TOKENS:
        times[None] = unpacked_time(m, k, sum(ns), len(ns), processors)
    for cost in PACKED:
        shares = (False, True) if tiles_shared(cdiv(m, cost.tokens) * col_tiles, processors) else (False,)
        for shared in shares:
            times[cost.tokens, shared] = packed_time(cost, shared, m, k, col_tiles, processors)
    return min(times, key=lambda choice: times[choice])
