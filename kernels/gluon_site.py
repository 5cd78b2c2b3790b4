"""Gluon kernels for Hopper: the two passes of `rotate_quantize` over a common site.

A program keeps tiles of x on their way from memory (the tensor memory accelerator writes them to a ring of buffers), so
that the next ones arrive while it computes. In the second pass it also holds the operators of its 128 columns, D H
[128, 128] and −G = −Uᵀ D H [64, 128]: v = x (D H) − z G. A thread of the matrix instruction holds pairs of columns of
the result. The operators' columns are renumbered (`_target`) so that those are 16 neighbours, stored at once.

x may lie in two parts: `x_desc` then describes its first `split` columns, a multiple of 128, and `x1_desc` the others.
`x1_desc` is None where x lies in one part, and the kernel then the same as without it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import reference
from .gluon_hopper import copy_in, let_next_kernel_start, wait_for_previous_kernel

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6, 3.9

BM = gl.constexpr(64)
COLUMNS = gl.constexpr(128)
HALF = gl.constexpr(64)
RANKS = gl.constexpr(64)
TILE_BYTES = gl.constexpr(64 * 64 * 2)
SMALLEST_SCALE = gl.constexpr(reference.SMALLEST_SCALE)
SMALLEST_SHARE = gl.constexpr(reference.SMALLEST_SHARE)
# Of v [BM, 128]: as the matrix instruction leaves it, and in order, 16 neighbours to a thread.
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
IN_ORDER = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [0, 4], [0, 8], [0, 32], [8, 0]],
    [[0, 16], [0, 64], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128],
))  # fmt: skip

# Four values v to four bytes m q + o: q = floor(v a + b), kept in 0..15. Arguments per element: v, a, b + 2^15, m, and
# o + 128 in every byte. Bytes 1 and 2 of a float 2^15 + t are the integer part of t (8 bits of fraction follow), or
# a negative number if t is. No byte carries into the next, since 0 <= m q + o + 128 <= 255.
_INT4 = gl.constexpr("""
{
.reg .b32 a, b, c, d, p, q, t;
mov.b32 t, 0x000f000f;
fma.rn.f32 a, $1, $5, $9;
fma.rn.f32 b, $2, $6, $10;
fma.rn.f32 c, $3, $7, $11;
fma.rn.f32 d, $4, $8, $12;
prmt.b32 p, a, c, 0x6521;
prmt.b32 q, b, d, 0x6521;
min.relu.s16x2 p, p, t;
min.relu.s16x2 q, q, t;
mad.lo.u32 p, q, 256, p;
mad.lo.u32 p, p, $13, $17;
xor.b32 $0, p, 0x80808080;
}
""")

# Four values to four bytes: round(v a), kept in -127..127.
_INT8 = gl.constexpr("""
{
.reg .b32 a, b, c, d, p, q, s, t;
mov.b32 s, 0x007f007f;
mov.b32 t, 0xff81ff81;
fma.rn.f32 a, $1, $5, 0f4B400000;
fma.rn.f32 b, $2, $6, 0f4B400000;
fma.rn.f32 c, $3, $7, 0f4B400000;
fma.rn.f32 d, $4, $8, 0f4B400000;
prmt.b32 p, a, b, 0x5410;
prmt.b32 q, c, d, 0x5410;
min.s16x2 p, p, s;
min.s16x2 q, q, s;
max.s16x2 p, p, t;
max.s16x2 q, q, t;
prmt.b32 $0, p, q, 0x6420;
}
""")

# Four values to four bytes of the codebook. The index of a magnitude is how many of the thresholds 8.5, 17.5, 27, 38,
# 50, 64, 84 lie below |u| = |v a|: the integer part of the least of four lines, each through two neighbouring ones.
_CODEBOOK = gl.constexpr(
    """
{
.reg .b32 a, b, c, d, f, g, p, q, s, t;
mov.b32 t, 0x00070007;
mul.rn.f32 a, $1, $5;
mul.rn.f32 b, $2, $6;
mul.rn.f32 c, $3, $7;
mul.rn.f32 d, $4, $8;
"""
    + "".join(
        f"""
abs.f32 {x}, {x};
fma.rn.f32 f, {x}, 0f3DE38E39, 0fBEE38E39;
fma.rn.f32 g, {x}, 0f3DBA2E8C, 0f3D3A2E8C;
min.f32 f, f, g;
fma.rn.f32 g, {x}, 0f3D924925, 0f3F6DB6DB;
min.f32 f, f, g;
fma.rn.f32 g, {x}, 0f3D23D70A, 0f4048F5C3;
min.f32 f, f, g;
add.rn.f32 {x}, f, 0f4B400000;
"""
        for x in "abcd"
    )
    + """
prmt.b32 p, a, c, 0x5410;
prmt.b32 q, b, d, 0x5410;
min.relu.s16x2 p, p, t;
min.relu.s16x2 q, q, t;
mad.lo.u32 p, q, 256, p;
shr.u32 q, p, 4;
or.b32 p, p, q;
prmt.b32 p, p, p, 0x4420;
prmt.b32 p, 0x20160d04, 0x6048382c, p;
prmt.b32 a, $1, $2, 0x00fb;
prmt.b32 b, $3, $4, 0x00fb;
prmt.b32 s, a, b, 0x5410;
xor.b32 p, p, s;
and.b32 s, s, 0x01010101;
add.u32 $0, p, s;
}
"""
)


@gluon.jit
def _target(n):
    """The column of v that the matrix instruction computes as column n."""
    return (n & 1) | ((n >> 2) & 14) | ((n & 2) << 3) | ((n & 64) >> 1) | ((n & 4) << 4)


@gluon.jit
def _parity(x):
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    return x & 1


@gluon.jit
def _in_order(v):
    """v [BM, 128], its columns as `_target` says."""
    v = v.reshape([BM, 2, 2, 2, 2, 2, 2, 2]).permute(0, 5, 1, 6, 2, 3, 4, 7)
    return gl.convert_layout(v.reshape([BM, COLUMNS]), IN_ORDER, assert_trivial=True)


@gluon.jit
def _rotation(signs_ptr, first, START: gl.constexpr, BLOCK: gl.constexpr):
    """Rows START to START + 64 of D H [128, 128] as bf16 of ±1 and 0, columns by `_target`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8, 8], [32, 1, 1], [2, 2, 1], [2, 1, 0])
    k = START + gl.arange(0, HALF, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    signs = gl.load(signs_ptr + first + k)
    k = gl.expand_dims(gl.expand_dims(k, 1), 2)
    negative = gl.expand_dims(gl.expand_dims((signs < 0).to(gl.int32), 1), 2)
    high = _target(gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, layout))) * 8)
    low = _target(gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout))))
    high = gl.expand_dims(gl.expand_dims(high, 0), 2)
    low = gl.expand_dims(gl.expand_dims(low, 0), 1)
    minus = (_parity(k & high & (BLOCK - 1)) ^ negative) ^ _parity(k & low & (BLOCK - 1))
    bits = (minus << 15) | 0x3F80
    if BLOCK < COLUMNS:
        bits = gl.where(((k ^ (high | low)) & (COLUMNS - BLOCK)) == 0, bits, 0)
    return bits.to(gl.int16).reshape([HALF, COLUMNS]).to(gl.bfloat16, bitcast=True)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], gl.float32, True, 1)


@gluon.jit
def _codes(v, inverse, MODE: gl.constexpr):
    """int8 codes of v [BM, 128] in order; inverse [BM] is the reciprocal of the scale."""
    if MODE == "int4":
        groups = v.reshape([BM, COLUMNS // 64, 64])
        unit = gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, gl.SliceLayout(2, groups.type.layout))), 1)
        low = gl.maximum(gl.min(groups, 2) * unit, -128.0)
        high = gl.minimum(gl.max(groups, 2) * unit, 127.0)
        step = gl.minimum(gl.maximum(gl.floor((high - low) * (1 / 15) + 0.5), 1.0), 17.0)
        offset = gl.floor((low + high) * 0.5 - 7.5 * step + 0.5)
        offset = gl.minimum(gl.maximum(offset, -128.0), 127 - 15 * step)
        shrink = _reciprocal(step)
        a = gl.expand_dims(unit * shrink, 2)
        b = gl.expand_dims(32768.5 - offset * shrink, 2)
        m = gl.expand_dims(step.to(gl.int32), 2)
        o = gl.expand_dims((offset.to(gl.int32) + 128) * 0x01010101, 2)
        args = [groups, a, b, m, o]
        codes = gl.inline_asm_elementwise(_INT4, "=r" + ",r" * 20, args, gl.int8, True, 4)
        return gl.convert_layout(codes.reshape([BM, COLUMNS]), IN_ORDER, assert_trivial=True)
    else:
        asm: gl.constexpr = _INT8 if MODE == "int8" else _CODEBOOK
        return gl.inline_asm_elementwise(asm, "=r" + ",r" * 8, [v, gl.expand_dims(inverse, 1)], gl.int8, True, 4)


@gluon.jit
def _inverse(scale, norm):
    return gl.where(scale > 0, norm / gl.where(scale > 0, scale, 1.0), 0.0)


@gluon.jit
def _store_codes(codes_ptr, total, inverse, rows, first, M, K, MODE: gl.constexpr):
    """The codes of a product's tile v [BM, 128], to `rows` from column `first` on."""
    codes = _codes(_in_order(total), inverse, MODE)
    cols = first + gl.arange(0, COLUMNS, gl.SliceLayout(0, IN_ORDER))
    at = gl.expand_dims(rows.to(gl.int64) * K, 1) + gl.expand_dims(cols, 0)
    gl.store(codes_ptr + at, codes, mask=gl.expand_dims(rows < M, 1))


@gluon.jit
def _minus_g(u_0, u_1, top, low):
    """−G = −Uᵀ D H of 128 columns, for the halves of U and of D H."""
    g = warpgroup_mma(u_0.permute((1, 0)), top, gl.zeros([RANKS, COLUMNS], gl.float32, PRODUCT))
    return -warpgroup_mma(u_1.permute((1, 0)), low, g)


@gluon.jit
def _copy_x(x_desc, x1_desc, split, x_bufs, full, slot, tile, first, HALVES: gl.constexpr, BYTES: gl.constexpr):
    """A tile of x, 64 HALVES columns, on its way. BYTES: of all that comes to the slot's barrier."""
    ready = full.index(slot)
    mbarrier.expect(ready, BYTES)
    if x1_desc is None:
        _copy_columns(x_desc, x_bufs, ready, slot, tile * BM, first, HALVES)
    elif first < split:  # the same for all threads and tiles of a program
        _copy_columns(x_desc, x_bufs, ready, slot, tile * BM, first, HALVES)
    else:
        _copy_columns(x1_desc, x_bufs, ready, slot, tile * BM, first - split, HALVES)


@gluon.jit
def _copy_columns(part_desc, x_bufs, ready, slot, row, col, HALVES: gl.constexpr):
    for i in gl.static_range(HALVES):
        copy_in(part_desc, [row, col + i * HALF], ready, x_bufs.index(HALVES * slot + i))


@gluon.jit
def site_quantize_hopper_kernel(
    x_desc, x1_desc, split, z_desc, basis_desc, signs_ptr, scale_ptr, codes_ptr, M, K, norm,
    PROJECT: gl.constexpr, BLOCK: gl.constexpr, MODE: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """codes [M, K] int8 for scale [M] and z [M, r] bf16; G is held as PARTS bf16 parts."""
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([RANKS, COLUMNS], gl.bfloat16)
    x_layout: gl.constexpr = x_desc.layout
    bytes: gl.constexpr = 3 * TILE_BYTES if PROJECT else 2 * TILE_BYTES
    first = gl.program_id(0) * COLUMNS
    step = gl.num_programs(1)
    tiles = (M + BM - 1) // BM
    x_bufs = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, BM, HALF], x_layout)
    z_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, RANKS], x_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES + 1):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    barrier()
    tile = gl.program_id(1)
    if PROJECT:  # U comes through the last buffers of x
        ready = full.index(STAGES)
        mbarrier.expect(ready, 2 * TILE_BYTES)
        copy_in(basis_desc, [first, 0], ready, x_bufs.index(2 * STAGES - 2))
        copy_in(basis_desc, [first + HALF, 0], ready, x_bufs.index(2 * STAGES - 1))
    for slot in gl.static_range(STAGES - 1):
        if tile + slot * step < tiles:
            _copy_x(x_desc, x1_desc, split, x_bufs, full, slot, tile + slot * step, first, 2, bytes)

    top = gl.allocate_shared_memory(gl.bfloat16, [HALF, COLUMNS], flat, _rotation(signs_ptr, first, 0, BLOCK))
    low = gl.allocate_shared_memory(gl.bfloat16, [HALF, COLUMNS], flat, _rotation(signs_ptr, first, 64, BLOCK))
    g_high = top
    g_low = top
    fence_async_shared()
    barrier()
    if PROJECT:
        mbarrier.wait(full.index(STAGES), 0)
        g = _minus_g(x_bufs.index(2 * STAGES - 2), x_bufs.index(2 * STAGES - 1), top, low)
        g_high = gl.allocate_shared_memory(gl.bfloat16, [RANKS, COLUMNS], flat, g.to(gl.bfloat16))
        if PARTS == 2:
            rest = g - g.to(gl.bfloat16).to(gl.float32)
            g_low = gl.allocate_shared_memory(gl.bfloat16, [RANKS, COLUMNS], flat, rest.to(gl.bfloat16))
        fence_async_shared()
        barrier()
    if tile + (STAGES - 1) * step < tiles:
        _copy_x(x_desc, x1_desc, split, x_bufs, full, STAGES - 1, tile + (STAGES - 1) * step, first, 2, bytes)
    wait_for_previous_kernel()
    let_next_kernel_start()
    if PROJECT:
        for slot in gl.static_range(STAGES):
            if tile + slot * step < tiles:
                copy_in(z_desc, [(tile + slot * step) * BM, 0], full.index(slot), z_bufs.index(slot))

    slot = 0
    phase = 0
    rows = tile * BM + gl.arange(0, BM, gl.SliceLayout(1, IN_ORDER))
    scale = gl.load(scale_ptr + rows, mask=rows < M, other=0.0)
    while tile < tiles:  # the scales of a tile are on their way since the tile before it
        inverse = _inverse(scale, norm)
        mbarrier.wait(full.index(slot), phase)
        total = gl.zeros([BM, COLUMNS], gl.float32, PRODUCT)
        total = warpgroup_mma(x_bufs.index(2 * slot), top, total, use_acc=False, is_async=True)
        total = warpgroup_mma(x_bufs.index(2 * slot + 1), low, total, is_async=True)
        if PROJECT:
            total = warpgroup_mma(z_bufs.index(slot), g_high, total, is_async=True)
            if PARTS == 2:
                total = warpgroup_mma(z_bufs.index(slot), g_low, total, is_async=True)
        total = warpgroup_mma_wait(0, deps=(total,))
        barrier()
        ahead = tile + STAGES * step
        if ahead < tiles:
            _copy_x(x_desc, x1_desc, split, x_bufs, full, slot, ahead, first, 2, bytes)
            if PROJECT:
                copy_in(z_desc, [ahead * BM, 0], full.index(slot), z_bufs.index(slot))
        following = rows + step * BM
        scale = gl.load(scale_ptr + following, mask=following < M, other=0.0)
        _store_codes(codes_ptr, total, inverse, rows, first, M, K, MODE)
        rows = following
        tile += step
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1


@gluon.jit
def _copy_step(
    x_desc, x1_desc, split, basis_desc, x_bufs, u_bufs, full, slot, row, col, ROWS: gl.constexpr, WIDTH: gl.constexpr
):  # fmt: skip
    ready = full.index(slot)
    mbarrier.expect(ready, (ROWS + HALF) * HALF * 2 * WIDTH)
    if x1_desc is None:
        _copy_operands(x_desc, basis_desc, x_bufs, u_bufs, ready, slot, row, col, col, WIDTH)
    elif col < split:
        _copy_operands(x_desc, basis_desc, x_bufs, u_bufs, ready, slot, row, col, col, WIDTH)
    else:
        _copy_operands(x1_desc, basis_desc, x_bufs, u_bufs, ready, slot, row, col - split, col, WIDTH)


@gluon.jit
def _copy_operands(part_desc, basis_desc, x_bufs, u_bufs, ready, slot, row, col, u_row, WIDTH: gl.constexpr):
    """Columns of x from `col` of its part on, and the rows of U that they meet."""
    for i in gl.static_range(WIDTH):
        copy_in(part_desc, [row, col + i * HALF], ready, x_bufs.index(slot * WIDTH + i))
        copy_in(basis_desc, [u_row + i * HALF, 0], ready, u_bufs.index(slot * WIDTH + i))


@gluon.jit
def site_project_hopper_kernel(
    x_desc, x1_desc, split, basis_desc, partial_ptr, squares_ptr, z_ptr, scale_ptr, M, K, r, factor,
    PROJECT: gl.constexpr, ALONE: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """partial [chunks, M, 64] and squares [chunks, M], fp32: x U and ‖x‖² over every chunks-th 64 WIDTH columns.

    The programs of a row so read neighbouring columns at a time, as memory likes it. ALONE: there is one chunk, and z
    [M, r] and scale [M] are written instead. A program has ROWS rows and as many warps as there are 16 of these.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    row = gl.program_id(1) * ROWS
    chunk = gl.program_id(0)
    span = gl.num_programs(0) * (WIDTH * HALF)
    first = chunk * (WIDTH * HALF)
    steps = (K - first + span - 1) // span
    x_bufs = gl.allocate_shared_memory(gl.bfloat16, [WIDTH * STAGES, ROWS, HALF], x_desc.layout)
    u_bufs = gl.allocate_shared_memory(gl.bfloat16, [WIDTH * STAGES, HALF, RANKS], basis_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    barrier()
    wait_for_previous_kernel()
    let_next_kernel_start()  # not before: the second pass reads x before its own wait
    for slot in gl.static_range(STAGES):
        if slot < steps:
            col = first + slot * span
            _copy_step(x_desc, x1_desc, split, basis_desc, x_bufs, u_bufs, full, slot, row, col, ROWS, WIDTH)
    total = gl.zeros([ROWS, RANKS], gl.float32, mma)
    squares = gl.zeros([ROWS, HALF], gl.float32, operand)
    slot = 0
    phase = 0
    for i in range(0, steps):
        mbarrier.wait(full.index(slot), phase)
        for part in gl.static_range(WIDTH):
            at = slot * WIDTH + part
            total = warpgroup_mma(x_bufs.index(at), u_bufs.index(at), total, is_async=True)
        for part in gl.static_range(WIDTH):
            x = x_bufs.index(slot * WIDTH + part).load(operand).to(gl.float32)
            squares = gl.inline_asm_elementwise(
                "fma.rn.f32 $0, $1, $1, $2;", "=r,r,r", [x, squares], gl.float32, True, 1
            )
        total = warpgroup_mma_wait(0, deps=(total,))
        fence_async_shared()  # or the memory accelerator may write here before all have read
        barrier()
        if i + STAGES < steps:
            ahead = first + (i + STAGES) * span
            _copy_step(x_desc, x1_desc, split, basis_desc, x_bufs, u_bufs, full, slot, row, ahead, ROWS, WIDTH)
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    ranks = gl.arange(0, RANKS, gl.SliceLayout(0, mma))
    energy = gl.convert_layout(gl.sum(squares, 1), gl.SliceLayout(1, mma))
    inside = gl.expand_dims(rows < M, 1)
    if ALONE:
        residual = energy
        if PROJECT:
            residual = gl.maximum(energy - gl.sum(total * total, 1), energy * SMALLEST_SHARE)
            where = gl.expand_dims(rows * r, 1) + gl.expand_dims(ranks, 0)
            gl.store(z_ptr + where, total.to(gl.bfloat16), mask=inside & gl.expand_dims(ranks < r, 0))
        scale = gl.sqrt(residual / K) * factor
        gl.store(scale_ptr + rows, gl.where(scale >= SMALLEST_SCALE, scale, 0.0), mask=rows < M)
    else:
        at = chunk.to(gl.int64) * M + rows
        gl.store(squares_ptr + at, energy, mask=rows < M)
        where = gl.expand_dims(at * RANKS, 1) + gl.expand_dims(ranks, 0)
        gl.store(partial_ptr + where, total, mask=inside)
