"""Gluon kernel for Hopper: the second pass of `rotate_quantize` over a large x, 256 columns at a time.

What `gluon_site.site_quantize_hopper_kernel` computes for "int4", with the same bits. One warp loads tiles with the
tensor memory accelerator; two warpgroups have 128 columns each, one multiplying while the other rounds, and share the
tiles of z. There is a program on a multiprocessor instead of two with 128 columns each. For 8-bit codes the operators,
G in two parts, leave memory for two stages, which are too few; rounding to the codebook takes more registers than there
are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_hopper import _next, copy_in, let_next_kernel_start, ring, wait_for_previous_kernel
from .gluon_site import (
    BM,
    COLUMNS,
    HALF,
    IN_ORDER,
    PRODUCT,
    RANKS,
    TILE_BYTES,
    _copy_x,
    _inverse,
    _minus_g,
    _rotation,
    _store_codes,
    barrier,
)

WIDE = gl.constexpr(256)
HALVES = gl.constexpr(4)  # of 128 columns, in 256


@gluon.jit
def _load(x_desc, x1_desc, split, z_desc, basis_desc, x_bufs, z_bufs, full, empty, M, first, STAGES: gl.constexpr):
    bytes: gl.constexpr = (HALVES + 1) * TILE_BYTES  # of x and z
    tiles = (M + BM - 1) // BM
    tile = gl.program_id(1)
    step = gl.num_programs(1)
    mbarrier.expect(full.index(0), HALVES * TILE_BYTES)
    for i in gl.static_range(HALVES):
        copy_in(basis_desc, [first + i * HALF, 0], full.index(0), x_bufs.index(i))
    for i in gl.static_range(1, STAGES):  # x was complete before the kernel before this one let others start
        if tile + (i - 1) * step < tiles:
            _copy_x(x_desc, x1_desc, split, x_bufs, full, i, tile + (i - 1) * step, first, HALVES, bytes)
    wait_for_previous_kernel()
    let_next_kernel_start()
    for i in gl.static_range(1, STAGES):
        if tile + (i - 1) * step < tiles:
            copy_in(z_desc, [(tile + (i - 1) * step) * BM, 0], full.index(i), z_bufs.index(i))
    slot = 0
    phase = 1
    for ahead in range(tile + (STAGES - 1) * step, tiles, step):
        mbarrier.wait(empty.index(slot), phase ^ 1)
        _copy_x(x_desc, x1_desc, split, x_bufs, full, slot, ahead, first, HALVES, bytes)
        copy_in(z_desc, [ahead * BM, 0], full.index(slot), z_bufs.index(slot))
        slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _quantize(
    signs_ptr, scale_ptr, codes_ptr, x_bufs, z_bufs, operators, full, empty, M, K, norm, first,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Columns first + 128 PART and the 127 after it, in one warpgroup."""
    first += PART * COLUMNS
    top, low, g_buf = operators.index(3 * PART), operators.index(3 * PART + 1), operators.index(3 * PART + 2)
    top.store(_rotation(signs_ptr, first, 0, BLOCK))
    low.store(_rotation(signs_ptr, first, 64, BLOCK))
    fence_async_shared()
    barrier()
    mbarrier.wait(full.index(0), 0)  # the first tile of the ring is U
    g_buf.store(_minus_g(x_bufs.index(2 * PART), x_bufs.index(2 * PART + 1), top, low).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    mbarrier.arrive(empty.index(0), count=1)
    wait_for_previous_kernel()

    step = gl.num_programs(1)
    slot = 1
    phase = 0
    rows = gl.program_id(1) * BM + gl.arange(0, BM, gl.SliceLayout(1, IN_ORDER))
    scale = gl.load(scale_ptr + rows, mask=rows < M, other=0.0)
    for _ in range(gl.program_id(1), (M + BM - 1) // BM, step):
        inverse = _inverse(scale, norm)
        following = rows + step * BM
        scale = gl.load(scale_ptr + following, mask=following < M, other=0.0)  # on their way meanwhile
        mbarrier.wait(full.index(slot), phase)
        at = HALVES * slot + 2 * PART
        total = gl.zeros([BM, COLUMNS], gl.float32, PRODUCT)
        total = warpgroup_mma(x_bufs.index(at), top, total, use_acc=False, is_async=True)
        total = warpgroup_mma(x_bufs.index(at + 1), low, total, is_async=True)
        total = warpgroup_mma(z_bufs.index(slot), g_buf, total, is_async=True)
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index(slot), count=1)
        _store_codes(codes_ptr, total, inverse, rows, first, M, K, "int4")
        rows = following
        slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def site_quantize_wide_kernel(
    x_desc, x1_desc, split, z_desc, basis_desc, signs_ptr, scale_ptr, codes_ptr, M, K, norm,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """int4 codes [M, K] int8, K and `split` multiples of 256, for scale [M] and z [M, r] bf16. G is one bf16 part."""
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, COLUMNS], gl.bfloat16)
    first = gl.program_id(0) * WIDE
    x_bufs = gl.allocate_shared_memory(gl.bfloat16, [HALVES * STAGES, BM, HALF], x_desc.layout)
    z_bufs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, RANKS], x_desc.layout)
    operators = gl.allocate_shared_memory(gl.bfloat16, [6, HALF, COLUMNS], flat)  # D H in two parts, and -G
    full, empty = ring(STAGES)
    gl.warp_specialize(
        [
            (_quantize, (
                signs_ptr, scale_ptr, codes_ptr, x_bufs, z_bufs, operators, full, empty, M, K, norm, first,
                BLOCK, STAGES, 0,
            )),
            (_quantize, (
                signs_ptr, scale_ptr, codes_ptr, x_bufs, z_bufs, operators, full, empty, M, K, norm, first,
                BLOCK, STAGES, 1,
            )),
            (_load, (
                x_desc, x1_desc, split, z_desc, basis_desc, x_bufs, z_bufs, full, empty, M, first, STAGES,
            )),
        ],
        [4, 1],
        [224, 48],
    )  # fmt: skip
