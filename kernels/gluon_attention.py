"""Gluon kernel for Hopper: attention with heads of 72 or 80 columns (PixArt's have 72).

Libraries compute such heads as if they had 96 or 128 columns. Here one is 64 columns and the 16 after them, of which
those that belong to the next head count as zero in the scores and are left out of the result. One warp loads tiles
with the tensor memory accelerator; two warpgroups have 64 queries each, and one multiplies while the other is at its
softmax. Scores and sums are fp32; the softmax runs along with them (FlashAttention-2, arXiv 2307.08691, algorithm 1).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_hopper import _next, copy_in, ring, wait_for_previous_kernel

BQ = gl.constexpr(64)  # queries of a warpgroup
BS = gl.constexpr(128)  # keys of a tile
WIDE = gl.constexpr(64)
REST = gl.constexpr(16)
LOG2_E = gl.constexpr(1.4426950408889634)
BYTES = gl.constexpr((64 + 16) * 2)  # of a row of a tile


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _place(tile, S, keys, heads):
    """Of a tile of 128 queries: the row of its first, the end of its image's, the row of the first key, the head."""
    per_head = (S + 2 * BQ - 1) // (2 * BQ)
    image = tile // per_head // heads
    return image * S + tile % per_head * (2 * BQ), (image + 1) * S, image * keys, tile // per_head % heads


@gluon.jit
def _copy_next(desc, rest_desc, row, col, bufs, rest_bufs, full, empty, slot, phase, STAGES: gl.constexpr):
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), BS * BYTES)
    copy_in(desc, [row, col], full.index(slot), bufs.index(slot))
    copy_in(rest_desc, [row, col + WIDE], full.index(slot), rest_bufs.index(slot))
    return _next(slot, phase, STAGES)


@gluon.jit
def _load(
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, v_rest_desc, q_bufs, q_rest_bufs, bufs, rest_bufs,
    q_full, q_empty, full, empty, S, keys, heads, tiles, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    slot = 0
    phase = 0
    q_slot = 0
    q_phase = 0
    wait_for_previous_kernel()
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        query, _, first, head = _place(tile, S, keys, heads)
        col = head * D
        ready = q_full.index(q_slot)
        mbarrier.wait(q_empty.index(q_slot), q_phase ^ 1)
        mbarrier.expect(ready, 2 * BQ * BYTES)
        for half in gl.static_range(2):
            copy_in(q_desc, [query + half * BQ, col], ready, q_bufs.index(2 * q_slot + half))
            copy_in(q_rest_desc, [query + half * BQ, col + WIDE], ready, q_rest_bufs.index(2 * q_slot + half))
        q_slot, q_phase = _next(q_slot, q_phase, 2)
        for key in range(0, keys, BS):
            slot, phase = _copy_next(
                k_desc, k_rest_desc, first + key, col, bufs, rest_bufs, full, empty, slot, phase, STAGES
            )
            slot, phase = _copy_next(
                v_desc, v_rest_desc, first + key, col, bufs, rest_bufs, full, empty, slot, phase, STAGES
            )


@gluon.jit
def _rows_as(x, like):
    """x, a value for each row, where `like` has its rows."""
    layout: gl.constexpr = like.type.layout
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, layout), assert_trivial=True), 1)


@gluon.jit
def _attend(
    bias_ptr, out_ptr, q_bufs, q_rest_bufs, bufs, rest_bufs, q_full, q_empty, full, empty,
    S, keys, heads, tiles, factor,
    D: gl.constexpr, BIAS: gl.constexpr, MASK: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    s_left: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    o_left: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rest_left: gl.constexpr = gl.DotOperandLayout(0, rest_layout, 2)
    slot = 0
    phase = 0
    q_slot = 0
    q_phase = 0
    wait_for_previous_kernel()
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        query, end, first, head = _place(tile, S, keys, heads)
        mbarrier.wait(q_full.index(q_slot), q_phase)
        q = q_bufs.index(2 * q_slot + HALF)
        q_rest = q_rest_bufs.index(2 * q_slot + HALF).load(s_left)
        if D < WIDE + REST:
            own = gl.arange(0, REST, gl.SliceLayout(0, s_left)) < D - WIDE
            q_rest = gl.where(gl.expand_dims(own, 0), q_rest, 0.0)
        most = gl.full([BQ], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        total = gl.zeros([BQ], gl.float32, gl.SliceLayout(1, s_layout))
        o = gl.zeros([BQ, WIDE], gl.float32, o_layout)
        o_rest = gl.zeros([BQ, REST], gl.float32, rest_layout)
        for key in range(0, keys, BS):
            column = key + gl.arange(0, BS, gl.SliceLayout(0, s_layout))
            if BIAS:  # on its way meanwhile; of all keys, -inf may be the first
                bias = gl.load(bias_ptr + first + column, mask=column < keys, other=0.0).to(gl.float32)
                bias = gl.maximum(bias, -1e30) * LOG2_E
            mbarrier.wait(full.index(slot), phase)
            s = gl.zeros([BQ, BS], gl.float32, s_layout)
            k, k_rest = bufs.index(slot).permute((1, 0)), rest_bufs.index(slot).permute((1, 0))
            s = warpgroup_mma(q, k, s, use_acc=False, is_async=True)
            s = warpgroup_mma(q_rest, k_rest, s, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = _next(slot, phase, STAGES)
            if BIAS:
                s = gl.fma(s, factor, gl.expand_dims(bias, 0))
            if MASK:
                s = gl.where(gl.expand_dims(column < keys, 0), s, float("-inf"))
            before = most
            most = gl.maximum(most, gl.max(s, 1))
            if BIAS:
                p = _exp2(s - gl.expand_dims(most, 1))
                shrink = _exp2(before - most)
            else:  # `most` is of the products alone
                p = _exp2(gl.fma(s, factor, gl.expand_dims(most * -factor, 1)))
                shrink = _exp2((before - most) * factor)
            total = total * shrink + gl.sum(p, 1)
            o = o * _rows_as(shrink, o)
            o_rest = o_rest * _rows_as(shrink, o_rest)
            p = p.to(q_bufs.dtype)
            mbarrier.wait(full.index(slot), phase)
            o = warpgroup_mma(gl.convert_layout(p, o_left, assert_trivial=True), bufs.index(slot), o, is_async=True)
            o_rest = warpgroup_mma(
                gl.convert_layout(p, rest_left, assert_trivial=True), rest_bufs.index(slot), o_rest, is_async=True
            )
            o, o_rest = warpgroup_mma_wait(0, deps=(o, o_rest))
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = _next(slot, phase, STAGES)
        fence_async_shared()  # between reads of the queries and what the memory accelerator writes there
        mbarrier.arrive(q_empty.index(q_slot), count=1)
        q_slot, q_phase = _next(q_slot, q_phase, 2)
        inverse = 1 / total
        row = query + HALF * BQ
        _store(out_ptr, o * _rows_as(inverse, o), row, end, heads * D, head * D, WIDE)
        _store(out_ptr, o_rest * _rows_as(inverse, o_rest), row, end, heads * D, head * D + WIDE, D - WIDE)


@gluon.jit
def _store(out_ptr, o, row, end, width, col, COLUMNS: gl.constexpr):
    """The first COLUMNS of o to the rows from `row` to `end` of out [., width], from its column `col` on."""
    layout: gl.constexpr = o.type.layout
    rows = row + gl.arange(0, BQ, gl.SliceLayout(1, layout))
    cols = gl.arange(0, o.shape[1], gl.SliceLayout(0, layout))
    at = gl.expand_dims(rows.to(gl.int64) * width + col, 1) + gl.expand_dims(cols, 0)
    inside = gl.expand_dims(rows < end, 1) & gl.expand_dims(cols < COLUMNS, 0)
    gl.store(out_ptr + at, o.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def narrow_attention_kernel(
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, v_rest_desc, bias_ptr, out_ptr, S, keys, heads, tiles, factor,
    D: gl.constexpr, BIAS: gl.constexpr, MASK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out [B S, heads D] = softmax(factor ln 2 · q kᵀ + bias) v for q [B S, heads D], k and v [B keys, heads D].

    BIAS: bias [B, keys] is there. MASK: `keys` is no multiple of 128. One program per multiprocessor; `tiles` of 128
    queries of an image and a head.
    """
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [4, BQ, WIDE], q_desc.layout)  # of this tile and the next
    q_rest_bufs = gl.allocate_shared_memory(q_desc.dtype, [4, BQ, REST], q_rest_desc.layout)
    bufs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BS, WIDE], k_desc.layout)  # keys and values by turns
    rest_bufs = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BS, REST], k_rest_desc.layout)
    q_full, q_empty = ring(2)
    full, empty = ring(STAGES)
    gl.warp_specialize(
        [
            (_attend, (
                bias_ptr, out_ptr, q_bufs, q_rest_bufs, bufs, rest_bufs, q_full, q_empty, full, empty,
                S, keys, heads, tiles, factor, D, BIAS, MASK, STAGES, 0,
            )),
            (_attend, (
                bias_ptr, out_ptr, q_bufs, q_rest_bufs, bufs, rest_bufs, q_full, q_empty, full, empty,
                S, keys, heads, tiles, factor, D, BIAS, MASK, STAGES, 1,
            )),
            (_load, (
                q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, v_rest_desc, q_bufs, q_rest_bufs, bufs, rest_bufs,
                q_full, q_empty, full, empty, S, keys, heads, tiles, D, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
