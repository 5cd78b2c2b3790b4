"""Who computes what in `gluon_packed`, and how parts of one tile from several programs come together.

There is a program for each multiprocessor. Tiles that do not make a full round of all of them are cut along K, so that
all end together: who has the beginning of a tile gathers the rest from the programs that left it. Integers are summed,
so the result does not depend on who does what.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6, 3.9

BN = gl.constexpr(128)  # weight rows of a tile
BK = gl.constexpr(128)
BAND = gl.constexpr(8)

# A flag's value once a part of a tile is left for another program; zero again when that was taken. It takes no kernel
# that clears flags, as no memory holds it by itself: both halves exceed any sum that lies there (K < 97,000).
LEFT = gl.constexpr(0x5DC1_9B3E_72F0_A64D)
# One thread of a warpgroup reads or writes flags; a barrier stands between that and what the others read or wrote.
_AWAIT = gl.constexpr("""
{
.reg .b32 t;
.reg .b64 value;
.reg .pred other, again;
mov.u32 t, %tid.x;
and.b32 t, t, 127;
setp.ne.u32 other, t, 0;
@other bra DONE;
AGAIN:
ld.acquire.gpu.global.b64 value, [$1];
setp.ne.b64 again, value, $2;
@again bra AGAIN;
DONE:
mov.u32 $0, 0;
}
""")
_RAISE = gl.constexpr("""
{
.reg .b32 t;
.reg .pred first;
mov.u32 t, %tid.x;
and.b32 t, t, 127;
setp.eq.u32 first, t, 0;
@first st.release.gpu.global.b64 [$1], $2;
mov.u32 $0, 0;
}
""")


@gluon.jit
def tile_of(tile, M, col_tiles, BM: gl.constexpr):
    """First token and number of the column tile of a tile, in bands of row tiles: a band's operands stay in L2."""
    row_tiles = (M + BM - 1) // BM
    per_band = BAND * col_tiles
    first = tile // per_band * BAND
    height = gl.minimum(row_tiles - first, BAND)
    row_tile = first + tile % per_band % height
    return row_tile * BM, tile % per_band // height


@gluon.jit
def sibling_of(col_tile, Ns):
    """Which weight a column tile belongs to, its first column there, and its first column in the output."""
    which = 0
    first = 0  # column tile of that weight
    start = 0  # its column in the output
    tiles = 0
    columns = 0
    for i in gl.static_range(len(Ns)):
        if col_tile >= tiles:
            which = i
            first = tiles
            start = columns
        tiles += (Ns[i] + BN - 1) // BN
        columns += Ns[i]
    col = (col_tile - first) * BN
    return which, col, start + col


@gluon.jit
def share_of(shared, units):
    """This program's part of the units of the first `shared` tiles, which all programs share evenly.

    Its number, the units of a program, its first unit and the one past its last. A program waits for such of higher
    number: those were launched before it.
    """
    programs = gl.num_programs(0)
    mine = programs - 1 - gl.program_id(0)
    share = (shared * units + programs - 1) // programs
    return mine, share, mine * share, gl.minimum((mine + 1) * share, shared * units)


@gluon.jit
def count_pieces(first, last, tiles, shared, units, SHARED: gl.constexpr):
    """How many tiles this program has a part in, and that and how many more it computes alone."""
    programs = gl.num_programs(0)
    alone = (gl.maximum(tiles - shared - gl.program_id(0), 0) + programs - 1) // programs
    parts = 0
    if SHARED:
        parts = gl.where(first < last, (last - 1) // units - first // units + 1, 0)
    return parts, parts + alone


@gluon.jit
def piece_of(i, parts, first, last, shared, units, SHARED: gl.constexpr):
    """Tile of this program's i-th piece of work, and its units there."""
    tile = shared + gl.program_id(0) + (i - parts) * gl.num_programs(0)
    start = 0
    stop = units
    if SHARED:
        if i < parts:
            tile = first // units + i
            start = gl.maximum(first - tile * units, 0)
            stop = gl.minimum(last - tile * units, units)
    return tile, start, stop


@gluon.jit
def _in_runs(x, BM: gl.constexpr):
    """A tile [BN / 2, BM] with eights of rows and of columns apart: a warp holds 8 by 8 of them at a time."""
    return x.reshape([BN // 16, 8, BM // 8, 8])


@gluon.jit
def _shelf(space_ptr, number, BM: gl.constexpr, HALF: gl.constexpr, layout: gl.constexpr):
    """Where a program leaves its part of a tile, `_in_runs`, for another, and the address of the flag of that."""
    place = number * 2 + HALF
    high = gl.arange(0, BN // 16, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))) * (8 * BM)
    row = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout)))) * 8
    run = gl.arange(0, BM // 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout)))) * 64
    col = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    at = high[:, None, None, None] + run[None, None, :, None] + row[None, :, None, None] + col[None, None, None, :]
    flags = (space_ptr + gl.num_programs(0) * (BN * BM)).to(gl.int64)
    return space_ptr + place * (BN // 2 * BM) + at, flags + place * 8


@gluon.jit
def gather(total, space_ptr, mine, others, BM: gl.constexpr, HALF: gl.constexpr):
    """total and the parts that the next `others` programs leave."""
    runs = _in_runs(total, BM)
    layout: gl.constexpr = runs.type.layout
    whole: gl.constexpr = total.type.layout
    for number in range(mine + 1, mine + 1 + others):
        places, flag = _shelf(space_ptr, number, BM, HALF, layout)
        gl.inline_asm_elementwise(_AWAIT, "=r,l,l", [flag, LEFT], gl.int32, False, 1)
        barrier()
        runs += gl.load(places, cache_modifier=".cg")
        gl.inline_asm_elementwise(_RAISE, "=r,l,l", [flag, gl.to_tensor(0).to(gl.int64)], gl.int32, False, 1)
    return gl.convert_layout(runs.reshape([BN // 2, BM]), whole, assert_trivial=True)


@gluon.jit
def leave(total, space_ptr, mine, BM: gl.constexpr, HALF: gl.constexpr):
    runs = _in_runs(total, BM)
    layout: gl.constexpr = runs.type.layout
    places, flag = _shelf(space_ptr, mine, BM, HALF, layout)
    gl.store(places, runs)
    barrier()
    gl.inline_asm_elementwise(_RAISE, "=r,l,l", [flag, LEFT], gl.int32, False, 1)
