"""Gluon kernel for Hopper: an 8-bit product whose tiles end with the low-rank branch, the scales and the bias.

One warp loads tiles with the tensor memory accelerator; two warpgroups multiply, each half of the rows of a tile, so
that one multiplies while the other finishes its half. A 128-byte slice of z and of L goes through the same ring of
buffers as the operands: the low-rank branch is one more step of the product, on the same accumulator.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Gluon's names differ between Triton 3.6 and 3.9.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "thread_barrier", None) or gl.barrier
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

BM = gl.constexpr(128)
BK = gl.constexpr(128)
RANKS = gl.constexpr(64)  # bf16 columns of z and L in a buffer of BK bytes
BAND = gl.constexpr(8)


if hasattr(gl.shared_memory_descriptor, "_reinterpret"):

    @gluon.jit
    def _as_bf16(buffer, rows: gl.constexpr, layout: gl.constexpr):
        return buffer._reinterpret(gl.bfloat16, [rows, RANKS], layout)

else:

    @gluon.jit
    def _as_bf16(buffer, rows: gl.constexpr, layout: gl.constexpr):
        return buffer.reinterpret(gl.bfloat16, [rows, RANKS], layout)


if hasattr(gl.shared_memory_descriptor, "_reinterpret"):

    @gluon.jit
    def _as_outputs(buffers, count: gl.constexpr, desc):
        return buffers._reinterpret(desc.dtype, [count, BM // 2, 128], desc.layout)

else:

    @gluon.jit
    def _as_outputs(buffers, count: gl.constexpr, desc):
        return buffers.reinterpret(desc.dtype, [count, BM // 2, 128], desc.layout)


@gluon.jit
def _residual_buf(a_bufs, w_bufs, slot, desc, BN: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr):
    """Where a warpgroup finds 128 columns of its rows of the residual, in the buffers of a step."""
    if BN == 256:
        return _as_outputs(w_bufs, 2 * STAGES, desc).index(2 * slot + HALF)
    elif HALF == 0:
        return _as_outputs(w_bufs, STAGES, desc).index(slot)
    else:
        return _as_outputs(a_bufs, STAGES, desc).index(slot)


# A kernel launched with `launch_pdl` starts when all programs of the one before it have called
# `let_next_kernel_start` or ended; `wait_for_previous_kernel` waits until their results are in memory. Both do nothing
# in a kernel launched otherwise.
@gluon.jit
def wait_for_previous_kernel():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, False, 1)


@gluon.jit
def let_next_kernel_start():
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, False, 1)


# y / (1 + exp(−2 u)), u = √(2 / π) (y + 0.044715 y³): `triton_common.gelu` with the chip's own approximations, whose
# errors are a millionth.
_GELU = gl.constexpr("""
{
.reg .f32 s, t;
mul.rn.f32 s, $1, $1;
fma.rn.f32 s, s, 0fBDD2D3E8, 0fC0135761;
mul.rn.f32 s, s, $1;
ex2.approx.ftz.f32 t, s;
add.rn.f32 t, t, 0f3F800000;
rcp.approx.ftz.f32 t, t;
mul.rn.f32 $0, $1, t;
}
""")


@gluon.jit
def gelu(y):
    """GELU of fp32 y in its tanh form."""
    return gl.inline_asm_elementwise(_GELU, "=f,f", [y], gl.float32, True, 1)


@gluon.jit
def _tile(tile, M, N, BN: gl.constexpr):
    """First row and column of an output tile, in bands of eight row tiles: a band's operands stay in L2."""
    row_tiles = (M + BM - 1) // BM
    col_tiles = (N + BN - 1) // BN
    per_band = BAND * col_tiles
    first = tile // per_band * BAND
    height = gl.minimum(row_tiles - first, BAND)
    row_tile = first + tile % per_band % height
    col_tile = tile % per_band // height
    return row_tile * BM, col_tile * BN


@gluon.jit
def ring(STAGES: gl.constexpr):
    """Barriers of buffers that one warp fills and two warpgroups empty: which are full, which are empty again."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    return full, empty


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _before(slot, STAGES: gl.constexpr):
    return gl.where(slot == 0, STAGES - 1, slot - 1)


@gluon.jit
def _load(
    a_desc, w_desc, z_desc, l_desc, residual_desc, a_bufs, w_bufs, full, empty, M, N, K, rank, tiles,
    ADD: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    z_layout: gl.constexpr = z_desc.layout
    slot = 0
    phase = 0
    wait_for_previous_kernel()
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, col = _tile(tile, M, N, BN)
        for k in range(0, K, BK):
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), phase ^ 1)
            mbarrier.expect(ready, (BM + BN) * BK)
            copy_in(a_desc, [row, k], ready, a_bufs.index(2 * slot))
            copy_in(a_desc, [row + BM // 2, k], ready, a_bufs.index(2 * slot + 1))
            copy_in(w_desc, [col, k], ready, w_bufs.index(slot))
            slot, phase = _next(slot, phase, STAGES)
        for k in range(0, rank, RANKS):
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), phase ^ 1)
            mbarrier.expect(ready, (BM + BN) * BK)
            z_0 = _as_bf16(a_bufs.index(2 * slot), BM // 2, z_layout)
            z_1 = _as_bf16(a_bufs.index(2 * slot + 1), BM // 2, z_layout)
            low_rank = _as_bf16(w_bufs.index(slot), BN, z_layout)
            copy_in(z_desc, [row, k], ready, z_0)
            copy_in(z_desc, [row + BM // 2, k], ready, z_1)
            copy_in(l_desc, [col, k], ready, low_rank)
            slot, phase = _next(slot, phase, STAGES)
        if ADD:
            for part in gl.static_range(BN // 128):
                ready = full.index(slot)
                mbarrier.wait(empty.index(slot), phase ^ 1)
                mbarrier.expect(ready, BM * 128 * 2)
                at = col + part * 128
                upper = _residual_buf(a_bufs, w_bufs, slot, residual_desc, BN, STAGES, 0)
                lower = _residual_buf(a_bufs, w_bufs, slot, residual_desc, BN, STAGES, 1)
                copy_in(residual_desc, [row, at], ready, upper)
                copy_in(residual_desc, [row + BM // 2, at], ready, lower)
                slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _split(x, PARTS: gl.constexpr):
    """The PARTS column slices of x."""
    if PARTS == 1:
        return (x,)
    else:
        left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        return _split(left, PARTS // 2) + _split(right, PARTS // 2)


@gluon.jit
def _columns(ptr, col, N, count: gl.constexpr, layout: gl.constexpr):
    """`count` values of a vector from `col` on, each for a column of a tile in `layout`."""
    cols = col + gl.arange(0, count, gl.SliceLayout(0, layout))
    return gl.load(ptr + cols, mask=cols < N, other=0.0)


@gluon.jit
def _columns_of(part, ptr, col, N):
    layout: gl.constexpr = part.type.layout
    return _columns(ptr, col, N, part.shape[1], layout)


@gluon.jit
def _scales(scale_ptr, weight_scale_ptr, row, col, M, N, BN: gl.constexpr, layout: gl.constexpr):
    rows = row + gl.arange(0, BM // 2, gl.SliceLayout(1, layout))
    return gl.load(scale_ptr + rows, mask=rows < M, other=0.0), _columns(weight_scale_ptr, col, N, BN, layout)


@gluon.jit
def _multiply(
    out_desc, z_desc, scale_ptr, weight_scale_ptr, bias_ptr, residual_desc, gate_ptr, a_bufs, w_bufs, out_buf,
    full, empty, M, N, K, rank, image, gate_step, tiles,
    TOTAL: gl.constexpr, HAS_BIAS: gl.constexpr, GELU: gl.constexpr, ADD: gl.constexpr, GATED: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    # Triton offers the int8 instruction with at most 224 columns.
    columns: gl.constexpr = 128 if TOTAL == gl.int32 else BN
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32])
    layout_16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])
    z_layout: gl.constexpr = z_desc.layout
    width: gl.constexpr = BN // PARTS
    early: gl.constexpr = BN == 128  # a wider tile leaves no registers for it
    slot = 0
    phase = 0
    wait_for_previous_kernel()
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, col = _tile(tile, M, N, BN)
        row += HALF * (BM // 2)
        gate_at = gate_ptr + gl.minimum(row, M - 1) // image * gate_step
        if early:  # what the end of the tile needs, on its way meanwhile
            scale, weight_scale = _scales(scale_ptr, weight_scale_ptr, row, col, M, N, BN, layout)
            if HAS_BIAS:
                bias = _columns(bias_ptr, col, N, BN, layout_16)
            if GATED:
                gate = _columns(gate_at, col, N, BN, layout_16)
        total = gl.zeros([BM // 2, BN], TOTAL, layout)
        for k in range(0, K, BK):
            mbarrier.wait(full.index(slot), phase)
            a = a_bufs.index(2 * slot + HALF)
            w = w_bufs.index(slot).permute((1, 0))
            total = warpgroup_mma(a, w, total, is_async=True)
            total = warpgroup_mma_wait(1, deps=(total,))
            # The product before this one has ended, so its buffers are free.
            mbarrier.arrive(empty.index(_before(slot, STAGES)), count=1, pred=k > 0)
            slot, phase = _next(slot, phase, STAGES)
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index(_before(slot, STAGES)), count=1)

        if not early:
            scale, weight_scale = _scales(scale_ptr, weight_scale_ptr, row, col, M, N, BN, layout)
        y = total.to(gl.float32) * gl.expand_dims(scale, 1)
        y = y * gl.expand_dims(weight_scale, 0)
        y = gl.convert_layout(y, layout_16)
        for _ in range(0, rank, RANKS):
            mbarrier.wait(full.index(slot), phase)
            z = _as_bf16(a_bufs.index(2 * slot + HALF), BM // 2, z_layout)
            low_rank = _as_bf16(w_bufs.index(slot), BN, z_layout)
            y = warpgroup_mma(z, low_rank.permute((1, 0)), y, is_async=True)
            y = warpgroup_mma_wait(0, deps=(y,))
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = _next(slot, phase, STAGES)
        if HAS_BIAS:
            if not early:
                bias = _columns(bias_ptr, col, N, BN, layout_16)
            y += gl.expand_dims(bias.to(gl.float32), 0)
        if GELU:
            y = gelu(y)
        parts = _split(y.to(out_desc.dtype), PARTS)
        for i in gl.static_range(PARTS):
            part = parts[i]
            if ADD:  # a part at a time: the registers hold no more of residual and gate
                mbarrier.wait(full.index(slot), phase)
                if GATED:
                    if not early:
                        gate = _columns_of(part, gate_at, col + i * width, N)
                    part = part.to(gl.float32) * gl.expand_dims(gate.to(gl.float32), 0)
                residual = _residual_buf(a_bufs, w_bufs, slot, residual_desc, BN, STAGES, HALF)
                part = residual.load(part.type.layout).to(gl.float32) + part.to(gl.float32)
                fence_async_shared()  # or the memory accelerator may write here before all have read
                barrier()
                mbarrier.arrive(empty.index(slot), count=1)
                slot, phase = _next(slot, phase, STAGES)
            tma.store_wait(0)
            out_buf.store(part.to(out_desc.dtype))
            fence_async_shared()
            copy_out(out_desc, [row, col + i * width], out_buf)
    tma.store_wait(0)


@gluon.jit
def linear_a8_hopper_kernel(
    a_desc, w_desc, z_desc, l_desc, out_desc, scale_ptr, weight_scale_ptr, bias_ptr, residual_desc, gate_ptr,
    M, N, K, rank, image, gate_step,
    TOTAL: gl.constexpr, HAS_BIAS: gl.constexpr, GELU: gl.constexpr, ADD: gl.constexpr, GATED: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """out [M, N] = ((Σ_k a w) · s) · t + z Lᵀ + b, or GELU of it, for unpacked weights w [N, K].

    ADD: residual [M, N] + that rounded, GATED: times gate [M / image, N], a row for each `image`
    rows, `gate_step` apart; the rows of a warpgroup are of one image, and the output is 16-bit. One program per
    multiprocessor.
    """
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [2 * STAGES, BM // 2, BK], a_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, BK], w_desc.layout)
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [2, BM // 2, BN // PARTS], out_desc.layout)
    full, empty = ring(STAGES)
    tiles = ((M + BM - 1) // BM) * ((N + BN - 1) // BN)
    gl.warp_specialize(
        [
            (_multiply, (
                out_desc, z_desc, scale_ptr, weight_scale_ptr, bias_ptr, residual_desc, gate_ptr, a_bufs, w_bufs,
                out_bufs.index(0), full, empty, M, N, K, rank, image, gate_step, tiles,
                TOTAL, HAS_BIAS, GELU, ADD, GATED, BN, STAGES, PARTS, 0,
            )),
            (_multiply, (
                out_desc, z_desc, scale_ptr, weight_scale_ptr, bias_ptr, residual_desc, gate_ptr, a_bufs, w_bufs,
                out_bufs.index(1), full, empty, M, N, K, rank, image, gate_step, tiles,
                TOTAL, HAS_BIAS, GELU, ADD, GATED, BN, STAGES, PARTS, 1,
            )),
            (_load, (
                a_desc, w_desc, z_desc, l_desc, residual_desc, a_bufs, w_bufs, full, empty, M, N, K, rank, tiles,
                ADD, BN, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
