"""Gluon kernel for Hopper: attention with heads of 128 columns (FLUX.1's), without a running maximum.

A softmax subtracts a row's largest score only to stay within what fp32 can hold, and looks for it in every tile. Here
a weight is 2 to the score as it is, as long as the sum of a row's weights lies between 2⁻⁸⁰ and 2⁹⁰: then neither it
nor a term that matters has left fp32's range (of values below 2³⁷). Tiles with a row of which that does not hold are
marked, and `triton_attention.doubtful_attention_kernel` computes them again with a running maximum. In FLUX.1 the norms
of queries and keys bound scores by √128 times the largest weight of each.

One warp loads tiles with the tensor memory accelerator; two warpgroups have 64 queries each. Scores of the next keys
and the product of these weights with the values are issued together, and the next weights computed meanwhile
(FlashAttention-3, arXiv 2407.08608, algorithm 2), though ptxas moves most of them behind the wait for that product; the
other warpgroup computes then.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_attention import BQ, BS, _exp2, _place
from .gluon_hopper import _next, copy_in, ring, wait_for_previous_kernel

D = gl.constexpr(128)
BYTES = gl.constexpr(BS * D * 2)  # of a tile of keys or values
# Sums of weights for which there is no doubt: 2⁻⁸⁰ and 2⁹⁰.
LOW = gl.constexpr(2.0**-80)
HIGH = gl.constexpr(2.0**90)


@gluon.jit
def _copy_next(desc, row, col, bufs, full, empty, slot, phase, STAGES: gl.constexpr):
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), BYTES)
    copy_in(desc, [row, col], full.index(slot), bufs.index(slot))
    return _next(slot, phase, STAGES)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_bufs, bufs, q_full, q_empty, full, empty, S, keys, heads, tiles, STAGES: gl.constexpr
):  # fmt: skip
    """Keys are one tile ahead of values in the ring."""
    slot = 0
    phase = 0
    q_phase = 0
    wait_for_previous_kernel()
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        query, _, first, head = _place(tile, S, keys, heads)
        col = head * D
        mbarrier.wait(q_empty, q_phase ^ 1)
        mbarrier.expect(q_full, BYTES)
        for half in gl.static_range(2):
            copy_in(q_desc, [query + half * BQ, col], q_full, q_bufs.index(half))
        q_phase ^= 1
        slot, phase = _copy_next(k_desc, first, col, bufs, full, empty, slot, phase, STAGES)
        for key in range(first, first + keys, BS):
            if key + BS < first + keys:
                slot, phase = _copy_next(k_desc, key + BS, col, bufs, full, empty, slot, phase, STAGES)
            slot, phase = _copy_next(v_desc, key, col, bufs, full, empty, slot, phase, STAGES)


@gluon.jit
def _sum(x, COLUMNS: gl.constexpr):
    """Sums [64, COLUMNS] of columns of x that one thread has."""
    if x.shape[1] > COLUMNS:
        left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        return _sum(left + right, COLUMNS)
    else:
        return x


@gluon.jit
def _weigh(s, left: gl.constexpr, keys, key, dtype: gl.constexpr, MASK: gl.constexpr):
    """The weights of scores s for keys from `key` on, as a left operand, and their sums [64, 8]."""
    if MASK:
        column = key + gl.arange(0, BS, gl.SliceLayout(0, s.type.layout))
        s = gl.where(gl.expand_dims(column < keys, 0), s, float("-inf"))
    p = _exp2(s)
    return gl.convert_layout(p.to(dtype), left, assert_trivial=True), _sum(p, 8)


@gluon.jit
def _step(
    q, p, o, total, bufs, full, empty, slot, phase, keys, key, layout: gl.constexpr, left: gl.constexpr,
    STAGES: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """o + p times the values of the tile of keys before `key`, and the weights p of that from `key` on."""
    mbarrier.wait(full.index(slot), phase)
    k_slot = slot
    s = gl.zeros([BQ, BS], gl.float32, layout)
    s = warpgroup_mma(q, bufs.index(k_slot).permute((1, 0)), s, use_acc=False, is_async=True)
    slot, phase = _next(slot, phase, STAGES)
    mbarrier.wait(full.index(slot), phase)
    o = warpgroup_mma(p, bufs.index(slot), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(empty.index(k_slot), count=1)
    following, sums = _weigh(s, left, keys, key, bufs.dtype, MASK)
    # Until here the product reads the registers of p: what follows it must not be in them.
    o, p, following = warpgroup_mma_wait(0, deps=(o, p, following))
    mbarrier.arrive(empty.index(slot), count=1)
    slot, phase = _next(slot, phase, STAGES)
    return following, o, total + sums, slot, phase


@gluon.jit
def _attend(
    out_ptr, doubt_ptr, q_bufs, bufs, q_full, q_empty, full, empty, S, keys, heads, tiles,
    MASK: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    slot = 0
    phase = 0
    q_phase = 0
    wait_for_previous_kernel()
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        query, end, _, head = _place(tile, S, keys, heads)
        q = q_bufs.index(HALF)
        mbarrier.wait(q_full, q_phase)
        q_phase ^= 1
        mbarrier.wait(full.index(slot), phase)
        s = gl.zeros([BQ, BS], gl.float32, layout)
        s = warpgroup_mma(q, bufs.index(slot).permute((1, 0)), s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = _next(slot, phase, STAGES)
        p, total = _weigh(s, left, keys, 0, bufs.dtype, MASK)
        o = gl.zeros([BQ, D], gl.float32, layout)
        whole = keys // BS * BS  # of the keys beyond, a tile is not full
        for key in range(BS, whole, BS):
            p, o, total, slot, phase = _step(
                q, p, o, total, bufs, full, empty, slot, phase, keys, key, layout, left, STAGES, False
            )
        if MASK:
            if keys > BS:
                p, o, total, slot, phase = _step(
                    q, p, o, total, bufs, full, empty, slot, phase, keys, whole, layout, left, STAGES, True
                )
        mbarrier.wait(full.index(slot), phase)
        o = warpgroup_mma(p, bufs.index(slot), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = _next(slot, phase, STAGES)
        mbarrier.arrive(q_empty, count=1)
        total = gl.convert_layout(gl.sum(total, 1), by_row, assert_trivial=True)
        rows = query + HALF * BQ + gl.arange(0, BQ, by_row)
        sure = (rows >= end) | ((total > LOW) & (total < HIGH))
        gl.store(doubt_ptr + 2 * tile + HALF, gl.max(gl.where(sure, 0, 1), 0))
        cols = head * D + gl.arange(0, D, gl.SliceLayout(0, layout))
        at = gl.expand_dims(rows.to(gl.int64) * (heads * D), 1) + gl.expand_dims(cols, 0)
        o = o * gl.expand_dims(1 / total, 1)
        gl.store(out_ptr + at, o.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(rows < end, 1))


@gluon.jit
def wide_attention_kernel(
    q_desc, k_desc, v_desc, out_ptr, doubt_ptr, S, keys, heads, tiles,
    MASK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out [B S, heads 128] = softmax(ln 2 · q kᵀ) v for q [B S, heads 128], k and v [B keys, heads 128], but for tiles
    of which doubt [tiles, 2] is not zero.

    MASK: `keys` is no multiple of 128. One program per multiprocessor; `tiles` of 128 queries
    of an image and a head.
    """
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [2, BQ, D], q_desc.layout)
    bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BS, D], k_desc.layout)  # keys and values by turns
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    full, empty = ring(STAGES)
    gl.warp_specialize(
        [
            (_attend, (
                out_ptr, doubt_ptr, q_bufs, bufs, q_full, q_empty, full, empty, S, keys, heads, tiles,
                MASK, STAGES, 0,
            )),
            (_attend, (
                out_ptr, doubt_ptr, q_bufs, bufs, q_full, q_empty, full, empty, S, keys, heads, tiles,
                MASK, STAGES, 1,
            )),
            (_load, (
                q_desc, k_desc, v_desc, q_bufs, bufs, q_full, q_empty, full, empty, S, keys, heads, tiles, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
