"""Gluon kernel for Hopper: an 8-bit product that expands 4-bit weights on their way into the tensor cores.

The tile is computed transposed, Ĉ = Ŵ Aᵀ: the left operand of the matrix instruction may come from registers, and there
the weights go straight from their codes, through shared memory but not back to it. One warp loads tiles with the tensor
memory accelerator; two warpgroups multiply, each half of the weight rows of a tile, so that one multiplies while the
other expands. A slice of z and of L goes through the same ring of buffers: the low-rank branch is one more step.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_hopper import _before, _next, copy_in, copy_out, gelu, ring, wait_for_previous_kernel
from .gluon_work import BK, BN, barrier, count_pieces, gather, leave, piece_of, share_of, sibling_of, tile_of

RANKS = gl.constexpr(32)  # bf16 columns of z and L in a buffer of BK / 2 bytes
UNROLL = gl.constexpr(4)
# Of a thread that multiplies and one that loads; which of two splits keeps both from spilling depends on the compiler.
_OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)
PRODUCT_REGISTERS = gl.constexpr(224 if _OLD else 216)
LOAD_REGISTERS = gl.constexpr(56 if _OLD else 72)
# What a thread holds of the 16-bit words of a left operand [64, BK], four codes each: rows g and g + 8 and of each 32
# columns two runs of four, 16 columns apart.
WORDS = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 4], [8, 0], [0, 8], [0, 16]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 32]
))  # fmt: skip

# Four codes in the low half of a word to four table bytes. A byte permute looks up bits 0-2 of each digit of its
# selector; where bit 3 is set it returns the sign of what it found, repeated. So one lookup by bits 0-2 finds the
# value of a code of 8 to 15, and one by all four bits what to take off below 8, zero for the others
# (`triton_common.expansion`).
_EXPAND = gl.constexpr("""
{
.reg .b32 c, high, less;
and.b32 c, $1, 0x7777;
prmt.b32 high, $4, $5, c;
prmt.b32 less, $2, $3, $1;
mad.lo.s32 $0, less, -2, high;
}
""")

if hasattr(gl.shared_memory_descriptor, "_reinterpret"):

    @gluon.jit
    def _as_bf16(buffer, rows: gl.constexpr, layout: gl.constexpr):
        return buffer._reinterpret(gl.bfloat16, [rows, RANKS], layout)

else:

    @gluon.jit
    def _as_bf16(buffer, rows: gl.constexpr, layout: gl.constexpr):
        return buffer.reinterpret(gl.bfloat16, [rows, RANKS], layout)


@gluon.jit
def _pick(values, which):
    value = values[0]
    for i in gl.static_range(1, len(values)):
        if which == i:
            value = values[i]
    return value


@gluon.jit
def _copy_of(descs, which, at, ready, buffer):
    for i in gl.static_range(len(descs)):
        if which == i:
            copy_in(descs[i], at, ready, buffer)


@gluon.jit
def _load(
    a_desc, w_descs, z_desc, l_descs, a_bufs, w_bufs, full, empty, M, Ns, K, rank, col_tiles, tiles, shared,
    BM: gl.constexpr, STAGES: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    z_layout: gl.constexpr = z_desc.layout
    l_layout: gl.constexpr = l_descs[0].layout
    units = (K + 2 * BK - 1) // (2 * BK)
    _, _, first, last = share_of(shared, units)
    parts, pieces = count_pieces(first, last, tiles, shared, units, SHARED)
    slot = 0
    phase = 0
    ahead = 0
    if pieces > 0:  # weights are no result of the kernel before this one
        tile, start, stop = piece_of(0, parts, first, last, shared, units, SHARED)
        _, col_tile = tile_of(tile, M, col_tiles, BM)
        which, col, _ = sibling_of(col_tile, Ns)
        for k in range(start * (2 * BK), gl.minimum(gl.minimum(K, stop * (2 * BK)), (start * 2 + STAGES) * BK), BK):
            mbarrier.expect(full.index(ahead), BM * BK + BN * BK // 2)
            _copy_of(w_descs, which, [col, k // 4], full.index(ahead), w_bufs.index(ahead))
            ahead += 1
    wait_for_previous_kernel()
    for i in range(0, pieces):
        tile, start, stop = piece_of(i, parts, first, last, shared, units, SHARED)
        row, col_tile = tile_of(tile, M, col_tiles, BM)
        which, col, _ = sibling_of(col_tile, Ns)
        for k in range(start * (2 * BK), gl.minimum(K, stop * (2 * BK)), BK):
            ready = full.index(slot)
            if ahead > 0:
                ahead -= 1
            else:
                mbarrier.wait(empty.index(slot), phase ^ 1)
                mbarrier.expect(ready, BM * BK + BN * BK // 2)
                _copy_of(w_descs, which, [col, k // 4], ready, w_bufs.index(slot))
            copy_in(a_desc, [row, k], ready, a_bufs.index(slot))
            slot, phase = _next(slot, phase, STAGES)
        for k in range(0, gl.where(start == 0, rank, 0), RANKS):
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), phase ^ 1)
            mbarrier.expect(ready, (BM + BN) * RANKS * 2)
            _copy_of(l_descs, which, [col, k], ready, _as_bf16(w_bufs.index(slot), BN, l_layout))
            copy_in(z_desc, [row, k], ready, _as_bf16(a_bufs.index(slot), BM, z_layout))
            slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _expand(codes, t0, t1, t2, t3):
    """Words of four table bytes [64, BK / 4] of shared 16-bit words of four codes."""
    return gl.inline_asm_elementwise(
        _EXPAND, "=r,r,r,r,r,r", [codes.load(WORDS).to(gl.int32), t0, t1, t2, t3], gl.int32, True, 1
    )


@gluon.jit
def _left(words, layout: gl.constexpr):
    """The left operand int8 [64, BK] in `layout` whose registers are `words`: nothing moves.

    Four registers pass for four tensors of four bytes; below, the index of the register, which is that of two halves
    of rows and of columns, and the index of the byte within it change places.
    """
    q0, q1, q2, q3 = gl.inline_asm_elementwise(
        "// $0", "=r,=r,=r,=r,0,1,2,3", [words], (gl.int8, gl.int8, gl.int8, gl.int8), True, 4
    )
    q = gl.join(gl.join(q0, q2), gl.join(q1, q3))
    q = q.reshape([4, 2, 8, 4, 2, 4, 2, 2]).permute((0, 6, 2, 3, 7, 5, 1, 4)).reshape([64, BK])
    return gl.convert_layout(q, layout, assert_trivial=True)


@gluon.jit
def _split(x, PARTS: gl.constexpr):
    """The PARTS column slices of x."""
    if PARTS == 1:
        return (x,)
    else:
        left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        return _split(left, PARTS // 2) + _split(right, PARTS // 2)


@gluon.jit
def _words(
    w_bufs, full, slot, phase, t0, t1, t2, t3, more, STAGES: gl.constexpr, HALF: gl.constexpr
):  # fmt: skip
    """The words of a full slot, once the next is full too if there is `more`: behind that wait ptxas moves none of it,
    so that the product they are for is issued in one go."""
    rows: gl.constexpr = BN // 2
    words = _expand(w_bufs.index(slot).slice(HALF * rows, rows), t0, t1, t2, t3)
    slot, phase = _next(slot, phase, STAGES)
    mbarrier.wait(full.index(slot), phase, pred=more)
    return words


@gluon.jit
def _product_of(words, total, a_bufs, slot, left: gl.constexpr):
    return warpgroup_mma(_left(words, left), a_bufs.index(slot).permute((1, 0)), total, is_async=True)


@gluon.jit
def _steps(
    total, steps, a_bufs, w_bufs, full, empty, slot, phase, t0, t1, t2, t3,
    left: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """total and the products of `steps` steps. While one runs, the words of the next are made, in two sets of
    registers by turns."""
    mbarrier.wait(full.index(slot), phase)
    first = _words(w_bufs, full, slot, phase, t0, t1, t2, t3, steps > 1, STAGES, HALF)
    for i in range(UNROLL, steps, UNROLL):
        words = first
        total = _product_of(words, total, a_bufs, slot, left)
        for _ in gl.static_range(1, UNROLL):
            slot, phase = _next(slot, phase, STAGES)
            after = _words(w_bufs, full, slot, phase, t0, t1, t2, t3, True, STAGES, HALF)
            total = _product_of(after, total, a_bufs, slot, left)
            total, words = warpgroup_mma_wait(1, deps=(total, words))
            mbarrier.arrive(empty.index(_before(slot, STAGES)), count=1)
            words = after
        slot, phase = _next(slot, phase, STAGES)
        first = _words(w_bufs, full, slot, phase, t0, t1, t2, t3, steps > i + 1, STAGES, HALF)
        total, words, first = warpgroup_mma_wait(0, deps=(total, words, first))
        mbarrier.arrive(empty.index(_before(slot, STAGES)), count=1)
    # The last of them, at most UNROLL.
    left_over = (steps - 1) % UNROLL
    for i in range(0, left_over):
        total = _product_of(first, total, a_bufs, slot, left)
        slot, phase = _next(slot, phase, STAGES)
        after = _words(w_bufs, full, slot, phase, t0, t1, t2, t3, left_over > i + 1, STAGES, HALF)
        total, first, after = warpgroup_mma_wait(0, deps=(total, first, after))
        mbarrier.arrive(empty.index(_before(slot, STAGES)), count=1)
        first = after
    total = _product_of(first, total, a_bufs, slot, left)
    total, first = warpgroup_mma_wait(0, deps=(total, first))
    mbarrier.arrive(empty.index(slot), count=1)
    slot, phase = _next(slot, phase, STAGES)
    return total, slot, phase


@gluon.jit
def _multiply(
    out_desc, z_desc, l_descs, residual_desc, scale_ptr, weight_scales, biases, gate_ptr, space_ptr,
    a_bufs, w_bufs, out_buf, scale_buf, residual_ready, full, empty,
    M, Ns, K, rank, image, gate_step, col_tiles, tiles, shared, t0, t1, t2, t3,
    HAS_BIAS: gl.constexpr, GELU: gl.constexpr, ADD: gl.constexpr, GATED: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, SHARED: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    columns: gl.constexpr = 128 if BM > 128 else BM  # Triton offers the int8 instruction with at most 224 columns
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32])
    layout_16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 4)
    rows: gl.constexpr = BN // 2
    units = (K + 2 * BK - 1) // (2 * BK)
    mine, share, first, last = share_of(shared, units)
    parts, pieces = count_pieces(first, last, tiles, shared, units, SHARED)
    slot = 0
    phase = 0
    residual_phase = 0
    wait_for_previous_kernel()
    for i in range(0, pieces):
        tile, start, stop = piece_of(i, parts, first, last, shared, units, SHARED)
        row, col_tile = tile_of(tile, M, col_tiles, BM)
        which, col, out_col = sibling_of(col_tile, Ns)
        N = _pick(Ns, which)
        if ADD:  # on its way meanwhile, to where the output leaves from
            if start == 0:
                tma.store_wait(0)
                mbarrier.expect(residual_ready, BM * rows * 2)
                copy_in(residual_desc, [row, out_col + HALF * rows], residual_ready, out_buf)
        col += HALF * rows
        # For the end of the tile, on their way meanwhile.
        tokens = row + gl.arange(0, BM, flat)
        scale = gl.load(scale_ptr + tokens, mask=tokens < M, other=0.0)
        outputs = col + gl.arange(0, rows, gl.SliceLayout(1, layout))
        weight_scale = gl.load(_pick(weight_scales, which) + outputs, mask=outputs < N, other=0.0)
        outputs_16 = col + gl.arange(0, rows, gl.SliceLayout(1, layout_16))
        if HAS_BIAS:
            bias = gl.load(_pick(biases, which) + outputs_16, mask=outputs_16 < N, other=0.0)
        else:
            bias = weight_scale
        gate = bias
        if GATED:
            gate_at = gate_ptr + gl.minimum(row, M - 1) // image * gate_step
            gate = gl.load(gate_at + outputs_16, mask=outputs_16 < N, other=0.0)
        total = gl.zeros([rows, BM], gl.int32, layout)
        steps = gl.minimum(2 * stop, (K + BK - 1) // BK) - 2 * start
        total, slot, phase = _steps(
            total, steps, a_bufs, w_bufs, full, empty, slot, phase, t0, t1, t2, t3, left, STAGES, HALF
        )
        whole = True
        if SHARED:
            whole = start == 0
            if whole:
                if stop < units:
                    others = (tile * units + units - 1) // share - mine
                    total = gather(total, space_ptr, mine, others, BM, HALF)
            else:
                leave(total, space_ptr, mine, BM, HALF)
        if whole:
            scale_buf.store(scale)
            y = total.to(gl.float32) * gl.expand_dims(scale_buf.load(gl.SliceLayout(0, layout)), 0)
            y = y * gl.expand_dims(weight_scale, 1)
            y = gl.convert_layout(y, layout_16)
            slot, phase = _finish(
                y, bias, gate, out_desc, z_desc, l_descs, a_bufs, w_bufs, out_buf, residual_ready, residual_phase,
                full, empty, slot, phase, row, out_col, rank, which,
                HAS_BIAS, GELU, ADD, GATED, BM, STAGES, PARTS, HALF,
            )  # fmt: skip
            residual_phase ^= 1
    tma.store_wait(0)


@gluon.jit
def _finish(
    y, bias, gate, out_desc, z_desc, l_descs, a_bufs, w_bufs, out_buf, residual_ready, residual_phase, full, empty,
    slot, phase, row, out_col, rank, which,
    HAS_BIAS: gl.constexpr, GELU: gl.constexpr, ADD: gl.constexpr, GATED: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """y plus the low-rank branch and the bias, or GELU of that, or the residual plus the gate times that, on its way to
    the output."""
    rows: gl.constexpr = BN // 2
    width: gl.constexpr = BM // PARTS
    z_layout: gl.constexpr = z_desc.layout
    l_layout: gl.constexpr = l_descs[0].layout
    for _ in range(0, rank, RANKS):
        mbarrier.wait(full.index(slot), phase)
        z = _as_bf16(a_bufs.index(slot), BM, z_layout)
        low_rank = _as_bf16(w_bufs.index(slot), BN, l_layout).slice(HALF * rows, rows)
        y = warpgroup_mma(low_rank, z.permute((1, 0)), y, is_async=True)
        y = warpgroup_mma_wait(0, deps=(y,))
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = _next(slot, phase, STAGES)
    if HAS_BIAS:
        y += gl.expand_dims(bias.to(gl.float32), 1)
    if GELU != 0:
        if ((GELU >> which) & 1) != 0:
            y = gelu(y)
    if ADD:
        y = y.to(out_desc.dtype).to(gl.float32)
    if GATED:
        y = y * gl.expand_dims(gate.to(gl.float32), 1)
    if ADD:
        mbarrier.wait(residual_ready, residual_phase)
        y = out_buf.permute((1, 0)).load(y.type.layout).to(gl.float32) + y
        barrier()  # all have read before one writes
    parts = _split(y.to(out_desc.dtype), PARTS)
    for part in gl.static_range(PARTS):
        tma.store_wait(0)
        out_buf.permute((1, 0)).store(parts[part])
        fence_async_shared()
        copy_out(out_desc, [row + part * width, out_col + HALF * rows], out_buf)
    return slot, phase


@gluon.jit
def _product(
    a_desc, w_descs, z_desc, l_descs, out_desc, residual_desc, scale_ptr, weight_scales, biases, gate_ptr, space_ptr,
    M, Ns, K, rank, image, gate_step, shared, t0, t1, t2, t3,
    HAS_BIAS: gl.constexpr, GELU: gl.constexpr, ADD: gl.constexpr, GATED: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    w_desc = w_descs[0]
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BM, BK], a_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, BK // 4], w_desc.layout)
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [2, BM // PARTS, BN // 2], out_desc.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scale_0 = gl.allocate_shared_memory(gl.float32, [BM], plain)
    scale_1 = gl.allocate_shared_memory(gl.float32, [BM], plain)
    full, empty = ring(STAGES)
    residual_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for half in gl.static_range(2):
        mbarrier.init(residual_ready.index(half), count=1)
    col_tiles = 0
    for i in gl.static_range(len(Ns)):
        col_tiles += (Ns[i] + BN - 1) // BN
    tiles = ((M + BM - 1) // BM) * col_tiles
    gl.warp_specialize(
        [
            (_multiply, (
                out_desc, z_desc, l_descs, residual_desc, scale_ptr, weight_scales, biases, gate_ptr, space_ptr,
                a_bufs, w_bufs, out_bufs.index(0), scale_0, residual_ready.index(0), full, empty,
                M, Ns, K, rank, image, gate_step, col_tiles, tiles, shared, t0, t1, t2, t3,
                HAS_BIAS, GELU, ADD, GATED, BM, STAGES, PARTS, SHARED, 0,
            )),
            (_multiply, (
                out_desc, z_desc, l_descs, residual_desc, scale_ptr, weight_scales, biases, gate_ptr, space_ptr,
                a_bufs, w_bufs, out_bufs.index(1), scale_1, residual_ready.index(1), full, empty,
                M, Ns, K, rank, image, gate_step, col_tiles, tiles, shared, t0, t1, t2, t3,
                HAS_BIAS, GELU, ADD, GATED, BM, STAGES, PARTS, SHARED, 1,
            )),
            (_load, (
                a_desc, w_descs, z_desc, l_descs, a_bufs, w_bufs, full, empty, M, Ns, K, rank, col_tiles, tiles,
                shared, BM, STAGES, SHARED,
            )),
        ],
        [4, 1],
        [PRODUCT_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "N", "K", "rank", "image", "gate_step", "shared", "t0", "t1", "t2", "t3"])
def linear_a8_packed_kernel(
    a_desc, z_desc, out_desc, scale_ptr, space_ptr, w_desc, l_desc, weight_scale_ptr, bias_ptr, residual_desc, gate_ptr,
    M, N, K, rank, image, gate_step, shared, t0, t1, t2, t3,
    HAS_BIAS: gl.constexpr, GELU: gl.constexpr, ADD: gl.constexpr, GATED: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """out [M, N] = ((Σ_k a ŵ) · s) · t + z Lᵀ + b for packed weights [N, K / 4] in 16-bit words, or GELU of it.

    ADD, GATED: as in `gluon_hopper`; all rows of a tile are of one image then, and PARTS is 1. GELU: 0 or 1; of
    siblings, a bit for each. SHARED: all programs share the work on the first `shared` tiles.
    `space_ptr` is then of memory for BN · BM 32-bit words of each program and four more, none of which is read before
    it was written but for the flags, by `LEFT`.
    """
    _product(
        a_desc, (w_desc,), z_desc, (l_desc,), out_desc, residual_desc, scale_ptr, (weight_scale_ptr,), (bias_ptr,),
        gate_ptr, space_ptr, M, (N,), K, rank, image, gate_step, shared, t0, t1, t2, t3,
        HAS_BIAS, GELU, ADD, GATED, BM, STAGES, PARTS, SHARED,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "N0", "N1", "N2", "N3", "K", "rank", "shared", "t0", "t1", "t2", "t3"])
def siblings_packed_kernel(
    a_desc, z_desc, out_desc, scale_ptr, space_ptr, w0_desc, w1_desc, w2_desc, w3_desc,
    l0_desc, l1_desc, l2_desc, l3_desc,
    weight_scale0_ptr, weight_scale1_ptr, weight_scale2_ptr, weight_scale3_ptr,
    bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr, M, N0, N1, N2, N3, K, rank, shared, t0, t1, t2, t3,
    HAS_BIAS: gl.constexpr, GELU: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    SHARED: gl.constexpr,
):  # fmt: skip
    """The same of up to four weights side by side; a missing one has N = 0."""
    _product(
        a_desc, (w0_desc, w1_desc, w2_desc, w3_desc), z_desc, (l0_desc, l1_desc, l2_desc, l3_desc), out_desc, out_desc,
        scale_ptr, (weight_scale0_ptr, weight_scale1_ptr, weight_scale2_ptr, weight_scale3_ptr),
        (bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr), scale_ptr, space_ptr, M, (N0, N1, N2, N3), K, rank, M, 0, shared,
        t0, t1, t2, t3, HAS_BIAS, GELU, False, False, BM, STAGES, PARTS, SHARED,
    )  # fmt: skip
