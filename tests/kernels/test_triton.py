"""Triton kernels against the reference: every shape on a GPU, a few in Triton's interpreter on the CPU.

The interpreter is chosen when Triton is imported, for the whole process: `test_interpreter.py` starts one with
TRITON_INTERPRET=1, where this file also offers its `cpu` cases.
"""

import os

import pytest
import torch

from dirotq import kernels
from dirotq.kernels import reference

from . import cases

if os.environ.get("TRITON_INTERPRET") == "1":
    SMALL = [(1, 128, 33), (7, 192, 65), (77, 256, 33), (17, 64, 130)]
else:
    SMALL = []

ALL_KN = (*cases.PIXART, *cases.FLUX, (192, 33), (1152, 1153), (64, 1))


def on(cpu, gpu):
    """Parameter sets with their device."""
    gpu_sets = [pytest.param(*values, "cuda", marks=pytest.mark.gpu) for values in gpu]
    return [pytest.param(*values, "cpu") for values in (cpu if SMALL else [])] + gpu_sets


def shapes():
    return on(SMALL, [(m, k, n) for k, n in ALL_KN for m in cases.TOKENS])


def sites():
    full = [(m, k) for k in (64, 192, 1152, 3072, 4608, 12288, 15360) for m in cases.TOKENS]
    full += [(8192, 1152), (8192, 4608), (16400, 1152), (16400, 4608)]  # rows enough that none are divided into parts
    return on([(m, k) for m, k, _ in SMALL], full)


def block_of(k):
    return 128 if k % 128 == 0 else 64


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")


def by_reference(op, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIROTQ_BACKEND", "reference")
        return op(*arguments)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "device"), sites())
def test_rotate_quantize(m, k, device, dtype, mode):
    case = cases.site(m, k, min(64, k // 8), block=block_of(k), dtype=dtype, device=device)
    assert case.x.stride(0) != k
    cases.assert_same_quantization(case, mode, *kernels.rotate_quantize(*case.arguments, mode))


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    ("m", "k", "rank", "block", "signs", "dtype", "device"),
    on(
        [
            (7, 192, 1, 16, True, torch.float32),
            (5, 64, 0, 1, True, torch.bfloat16),
            (5, 128, 33, 128, False, torch.float16),
            (66, 128, 0, 2, False, torch.bfloat16),
        ],
        [
            (7, 192, 1, 16, True, torch.float32),
            (77, 1152, 144, 128, True, torch.float32),
            (5, 64, 0, 1, True, torch.bfloat16),
            (512, 1152, 0, 64, True, torch.bfloat16),
            (512, 3072, 33, 128, False, torch.bfloat16),
            (512, 3072, 0, 32, False, torch.float16),
            (4608, 3072, 384, 128, True, torch.bfloat16),
            (512, 15360, 1920, 128, True, torch.bfloat16),
            (7000, 1152, 0, 128, True, torch.bfloat16),
            (8192, 1152, 64, 64, True, torch.bfloat16),
            *((512, 1152, 64, block, True, torch.bfloat16) for block in (1, 2, 32)),
        ],
    ),
)
def test_rotate_quantize_variants(m, k, rank, block, signs, dtype, device, mode):
    case = cases.site(m, k, rank, block=block, signs=signs, dtype=dtype, device=device)
    cases.assert_same_quantization(case, mode, *kernels.rotate_quantize(*case.arguments, mode))


@pytest.mark.parametrize(("rows", "device"), on([(3,)], [(3,), (512,)]))
def test_rotate_quantize_expanded(rows, device):
    case = cases.site(1, 128, 16, device=device)
    case.x = case.x.expand(rows, 128)
    assert case.x.stride(0) == 0
    made = kernels.rotate_quantize(*case.arguments, "int4")
    assert all(torch.equal(t, t[:1].expand_as(t)) for t in made)
    case.x = case.x[:1]
    cases.assert_same_quantization(case, "int4", *(t[:1] for t in made))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("m", "k", "rank", "device"),
    on(
        [(7, 192, 3), (65, 128, 0)],
        [(7, 192, 3), (1, 64, 0), *((m, k, 64) for k in (1152, 3072, 15360) for m in cases.TOKENS)],
    ),
)
def test_rotate(m, k, rank, dtype, device):
    case = cases.site(m, k, rank, block=block_of(k), dtype=dtype, device=device)
    v, z = kernels.rotate(*case.arguments)
    # z may round the other way, more often the more columns it sums; v is judged for the z that was returned.
    size = case.x.float().norm(dim=1, keepdim=True)
    expected_z = reference.project(case.x, case.basis).float()
    assert ((z.float() - expected_z).abs() <= 2**-7 * expected_z.abs() + 1e-5 * size).all()
    expected = reference.residual(case.x, z, case.basis, case.signs, case.block)
    cases.assert_close(v, expected.to(dtype))


@pytest.mark.parametrize(("m", "k", "n", "device"), shapes())
def test_lattice_product_is_exact(m, k, n, device):
    codes, scale = cases.lattice(m, k, device)
    w = cases.weights(n, k, device=device)
    for table in (kernels.CODEBOOK16, kernels.INT4):
        arguments = (codes, scale, None, w.weight, w.row_scale, None, None, table, torch.float32)
        y = kernels.linear_a8(*arguments)
        assert torch.equal(y, by_reference(kernels.linear_a8, *arguments))
        assert torch.equal(y, kernels.linear_a8(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "n", "device"), shapes())
def test_linear_a8(m, k, n, device, dtype):
    codes, scale = cases.lattice(m, k, device)
    for rank in (33, 64):
        w = cases.weights(n, k, rank, dtype=dtype, device=device)
        z = torch.randn(m, rank, generator=torch.Generator().manual_seed(4)).bfloat16().to(device)
        rest = (w.weight, w.row_scale / 100, w.low_rank, w.bias, kernels.CODEBOOK16)
        y = kernels.linear_a8(codes, scale, z, *rest, dtype)
        cases.assert_close(y, by_reference(kernels.linear_a8, codes, scale, z, *rest, dtype))
        single = kernels.linear_a8(codes, scale, z, *rest, torch.float32)
        cases.assert_close(single, by_reference(kernels.linear_a8, codes, scale, z, *rest, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "k", "n", "device"), shapes())
def test_gelu(m, k, n, device, dtype):
    """Over outputs from far below zero, where GELU ends at −0, to far above."""
    codes, scale = cases.lattice(m, k, device)
    w = cases.weights(n, k, 8, dtype=dtype, device=device)
    z = torch.randn(m, 8, generator=torch.Generator().manual_seed(4)).bfloat16().to(device)
    rest = (w.weight, w.row_scale / 20, w.low_rank, w.bias, kernels.CODEBOOK16, dtype, True)
    y = kernels.linear_a8(codes, scale, z, *rest)
    cases.assert_close(y, by_reference(kernels.linear_a8, codes, scale, z, *rest))


@pytest.mark.parametrize("gelu", [(), (False, False, False, True), (True, False, True, False), (True,) * 4])
@pytest.mark.parametrize("rank", [0, 33, 64])
@pytest.mark.parametrize(
    ("m", "k", "ns", "device"),
    on(
        [(5, 128, (33, 64, 1))],
        [(m, 3072, (3072, 3072, 3072, 12288)) for m in cases.TOKENS]
        + [(77, 192, (33, 7, 64)), (700, 192, (40, 7, 64))],
    ),
)
def test_siblings_are_their_linears_side_by_side(m, k, ns, device, rank, gelu):
    codes, scale = cases.lattice(m, k, device)
    own = [cases.weights(n, k, rank, device=device, seed=i) for i, n in enumerate(ns)]
    z = torch.randn(m, rank, generator=torch.Generator().manual_seed(4)).bfloat16().to(device) if rank else None
    low_ranks = [w.low_rank for w in own] if rank else []
    columns = [w.weight for w in own], [w.row_scale / 100 for w in own], low_ranks, [w.bias for w in own]
    gelu = gelu[: len(ns)]
    y = kernels.linear_a8_siblings(codes, scale, z, *columns, kernels.CODEBOOK16, torch.bfloat16, gelu)
    for part, w, curved in zip(y.split(ns, 1), own, gelu or [False] * len(ns), strict=True):
        rest = (w.weight, w.row_scale / 100, w.low_rank, w.bias, kernels.CODEBOOK16, torch.bfloat16, curved)
        cases.assert_close(part, by_reference(kernels.linear_a8, codes, scale, z, *rest))


@pytest.mark.parametrize(("n", "k", "device"), on([(1, 64), (33, 192)], [(1, 64), (1153, 1152), (9216, 3072)]))
def test_unpack(n, k, device):
    from dirotq.kernels.triton_unpack import unpack

    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    for table in (kernels.CODEBOOK16, kernels.INT4, tuple(range(-127, 113, 15))):
        assert torch.equal(unpack(packed.to(device), table).cpu(), kernels.decode(packed, table))
    e4m3 = unpack(packed.to(device), kernels.CODEBOOK16, torch.float8_e4m3fn)
    assert torch.equal(e4m3.cpu().float(), kernels.decode(packed, kernels.CODEBOOK16).float())


def hopper_case(m, k, n, rank):
    from dirotq.kernels import triton_linear

    codes, scale = cases.lattice(m, k, "cuda")
    if not triton_linear.on_hopper(n, rank, codes.device):
        pytest.skip("this GPU has one strategy")
    w = cases.weights(n, k, rank, device="cuda")
    z = torch.randn(m, rank, device="cuda").bfloat16() if rank else None
    return codes, scale, z, w.weight, w.row_scale / 100, w.low_rank, w.bias, kernels.CODEBOOK16, torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rank", [0, 64, 128])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(65, 64, 8), (200, 1152, 1152), (512, 3072, 9216), (512, 3072, 21504), (4608, 15360, 3072)],
)
def test_strategies_agree(m, k, n, rank, gelu, monkeypatch):
    from dirotq.kernels import hopper_packed, triton_linear

    arguments = *hopper_case(m, k, n, rank), gelu
    y = kernels.linear_a8(*arguments)
    monkeypatch.setattr(hopper_packed, "takes", lambda *_: False)
    assert torch.equal(y, kernels.linear_a8(*arguments))
    monkeypatch.setattr(triton_linear, "on_hopper", lambda *_: False)
    cases.assert_close(y, kernels.linear_a8(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [64, 128, 256])
@pytest.mark.parametrize(
    ("m", "k", "n", "rank"),
    [(1, 64, 8, 0), (65, 192, 264, 40), (300, 448, 256, 64), (200, 1152, 1152, 64), (512, 12288, 3072, 64),
     (1000, 15360, 3072, 128), (4608, 3072, 3072, 64), (4608, 3072, 21504, 64)],
)  # fmt: skip
def test_packed_tiles_agree(m, k, n, rank, tokens, shared, monkeypatch):
    """Integers are summed in any order, so tiles and their sharing change no bit, from run to run neither."""
    from dirotq.kernels import hopper_packed

    arguments = hopper_case(m, k, n, rank)
    monkeypatch.setattr(hopper_packed, "choose", lambda *_: (tokens, shared))
    runs = [kernels.linear_a8(*arguments) for _ in range(3)]
    monkeypatch.setattr(hopper_packed, "choose", lambda *_: None)
    y = kernels.linear_a8(*arguments)
    if m < 65:  # by the kernel that adds z Lᵀ after the rest
        cases.assert_close(runs[0], y)
        y = runs[0]
    assert all(torch.equal(y, run) for run in runs)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [64, 128, 256])
@pytest.mark.parametrize(
    ("m", "k", "ns", "rank"),
    [(65, 192, (128, 264), 40), (300, 448, (256, 128, 8), 64), (700, 192, (128,) * 6, 64), (1000, 1152, (1152,) * 3, 0),
     (512, 3072, (3072, 3072, 3072, 12288), 64)],
)  # fmt: skip
def test_packed_tiles_of_siblings_agree(m, k, ns, rank, tokens, shared, monkeypatch):
    """With the unpacked product of each linear alone, and from run to run."""
    from dirotq.kernels import hopper_packed

    codes, scale, z, *_, table, dtype = hopper_case(m, k, ns[0], rank)
    own = [cases.weights(n, k, rank, device="cuda", seed=i) for i, n in enumerate(ns)]
    columns = [[w.weight for w in own], [w.row_scale / 100 for w in own]]
    columns += [[w.low_rank for w in own] if rank else [], [w.bias for w in own]]
    gelu = [i % 2 == 0 for i in range(len(ns))]
    monkeypatch.setattr(hopper_packed, "choose", lambda *_: (tokens, shared))
    runs = [kernels.linear_a8_siblings(codes, scale, z, *columns, table, dtype, gelu) for _ in range(3)]
    monkeypatch.setattr(hopper_packed, "choose", lambda *_: None)
    for i, (w, curved) in enumerate(zip(own, gelu, strict=True)):
        alone = kernels.linear_a8(
            codes, scale, z, w.weight, w.row_scale / 100, w.low_rank, w.bias, table, dtype, curved
        )  # fmt: skip
        assert all(torch.equal(alone, run.split(ns, 1)[i]) for run in runs)


def test_packed_tile_choice():
    from dirotq.kernels import hopper_costs

    assert hopper_costs.choose(1, 3072, (3072,), 132) == (64, False)
    assert hopper_costs.choose(512, 12288, (3072,), 132) == (128, True)
    assert hopper_costs.choose(4096, 3072, (3072,), 132) == (256, False)
    assert hopper_costs.choose(4096, 12288, (3072,), 132) == (256, False)
    assert hopper_costs.choose(4608, 15360, (3072,), 132) is None
    for m in (1, 65, 512, 4608):  # whatever the multiprocessors
        for processors in (1, 78, 114, 132):
            hopper_costs.choose(m, 64, (8, 3072), processors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(
    ("m", "k", "n", "device"),
    on(
        SMALL,
        [(m, k, n) for k, n in (*cases.PIXART, (3072, 9216), (192, 33), (1152, 1153)) for m in (1, 2, 7, 16, 17, 512)]
        + [(m, 3072, 18432) for m in cases.TOKENS],
    ),
)
def test_linear_a16(m, k, n, device, grouped, dtype):
    x = cases.site(m, k, dtype=dtype, device=device, signs=False).x
    w = cases.weights(n, k, 5, dtype=dtype, device=device)
    z = torch.randn(m, 5, generator=torch.Generator().manual_seed(4)).bfloat16().to(device)
    scale = w.group_scale if grouped else w.row_scale[:, None]
    for arguments in (
        (x, z, w.weight, scale, w.low_rank, w.bias, kernels.INT4),
        (x, None, w.weight, scale, None, None, kernels.CODEBOOK16),
    ):
        cases.assert_close(kernels.linear_a16(*arguments), by_reference(kernels.linear_a16, *arguments))


ONE_TOKEN = ("usual", "one large", "another table", "tiny", "zero", "nan", "inf", "fp16")


@pytest.mark.parametrize(
    ("what", "k", "n", "device"),
    on(
        [*((what, 64, 3) for what in ONE_TOKEN), *((what, 1088, 45) for what in ONE_TOKEN[:3])],
        [(what, k, n) for what in ONE_TOKEN for k, n in ((64, 3), (1088, 41), (3072, 18432), (4096, 77), (4160, 33))],
    ),
)
def test_one_token_against_float64(what, k, n, device):
    """x in bf16 keeps 16 bits beside the largest of 32 neighbours."""
    dtype = torch.float16 if what == "fp16" else torch.bfloat16
    table = tuple(range(-7, 9)) if what == "another table" else kernels.CODEBOOK16
    make = torch.Generator().manual_seed(6)
    x = torch.randn(1, k, generator=make)
    if what == "one large":
        x[0, k // 2] = 3000.0
    if what in ("tiny", "zero"):
        x *= 0 if what == "zero" else 2.0**-110
    if what in ("nan", "inf"):
        x[0, -1] = float(what)
    x = x.to(dtype)
    w = cases.weights(n, k, 5)
    scale = w.group_scale * (2.0**100 if what == "tiny" else 1)
    z = torch.randn(1, 5, generator=make).bfloat16() if what != "tiny" else torch.zeros(1, 5).bfloat16()
    y = kernels.linear_a16(
        *(t.to(device) for t in (x, z, w.weight, scale, w.low_rank, torch.zeros(n).to(dtype))), table
    ).double().cpu()  # fmt: skip
    if what in ("nan", "inf"):
        assert not y.isfinite().any()
        return
    dense = kernels.decode(w.weight, table).double() * scale.double().repeat_interleave(64, 1)
    expected = x.double() @ dense.T + z.double() @ w.low_rank.double().T
    lost = x.double().abs().unflatten(1, (-1, 32)).amax(2).repeat_interleave(32, 1) * 2**-15 @ dense.abs().T
    lost += 1e-6 * expected.abs().max() + 1e-12
    assert ((y - expected).abs() <= cases.ULP[dtype] * expected.abs() + lost).all()


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(("m", "k", "n", "device"), on(SMALL, [(m, 3072, 9216) for m in cases.TOKENS]))
def test_linear_is_its_two_ops_and_repeats(m, k, n, device, mode):
    case = cases.site(m, k, 8, block=block_of(k), device=device)
    w = cases.weights(n, k, 8, device=device)
    rest = (w.weight, w.row_scale, w.low_rank, w.bias, kernels.CODEBOOK16)
    y = kernels.linear(*case.arguments, mode, *rest)
    codes, scale, z = kernels.rotate_quantize(*case.arguments, mode)
    assert torch.equal(y, kernels.linear_a8(codes, scale, z, *rest, case.x.dtype))
    assert torch.equal(y, kernels.linear(*case.arguments, mode, *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", cases.MODES)
def test_compiled_without_graph_breaks(mode):
    case = cases.site(77, 3072, 64, device="cuda")
    w = cases.weights(3072, 3072, 64, device="cuda")

    def block(x):
        y = kernels.linear(x, *case.arguments[1:], mode, w.weight, w.row_scale, w.low_rank, w.bias, kernels.CODEBOOK16)
        return torch.nn.functional.gelu(y) * 2

    compiled = torch.compile(block, fullgraph=True)
    cases.assert_close(compiled(case.x), block(case.x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "k", "n", "device"), shapes())
def test_linear_nvfp4(m, k, n, device, dtype):
    """On Blackwell with its own instruction, elsewhere with values decoded to bfloat16: the same exact products."""
    generator = torch.Generator().manual_seed(m)
    a = torch.randn(m, k, generator=generator) * torch.logspace(-2, 2, k)
    a[m // 2] = 0
    w = torch.randn(n, k, generator=generator)
    w[0, :16] = 0
    a, w = (kernels.quantize_nvfp4(t.to(device)) for t in (a, w))
    rest = cases.weights(n, k, 8, device=device)
    z = torch.randn(m, 8, generator=generator).bfloat16().to(device)
    for z_or_none, low_rank, bias in ((z, rest.low_rank, rest.bias), (None, None, None)):
        arguments = (*a, z_or_none, *w, low_rank, bias, dtype)
        cases.assert_close(kernels.linear_nvfp4(*arguments), by_reference(kernels.linear_nvfp4, *arguments))


def e4m3_scales(handle, _compute_type):
    """What the interpreter lacks: it takes every block scale for a power of two."""
    return torch.from_numpy(handle.data.copy()).view(torch.float8_e4m3fn).float().numpy()


if SMALL:

    @pytest.mark.parametrize(("m", "k", "n"), [(7, 192, 65), (77, 256, 33)])
    def test_dot_scaled_on_a_cpu(monkeypatch, m, k, n):
        """The branch for FP4 units: operands, their packing and the layout of their scales."""
        from triton.runtime import interpreter

        from dirotq.kernels import triton_fp4

        if not hasattr(interpreter, "_dot_scaled_scale_to_f32"):
            pytest.skip("this Triton interprets dot_scaled in another way")
        monkeypatch.setattr(interpreter, "_dot_scaled_scale_to_f32", e4m3_scales)
        monkeypatch.setattr(triton_fp4, "has_native", lambda *_: True)
        generator = torch.Generator().manual_seed(m)
        a, w = (kernels.quantize_nvfp4(torch.randn(rows, k, generator=generator)) for rows in (m, n))
        arguments = (*a, None, *w, None, None, torch.float32)
        cases.assert_close(kernels.linear_nvfp4(*arguments), by_reference(kernels.linear_nvfp4, *arguments))


@pytest.mark.gpu
def test_offsets_past_31_bits():
    # M · N = 2.2e9 output elements and M · K codes of the same number of bytes.
    m, k, n = 34000, 64, 64000
    codes, scale = cases.lattice(m, k, "cuda")
    w = cases.weights(n, k, device="cuda")
    arguments = (w.weight, w.row_scale, None, None, kernels.INT4, torch.bfloat16)
    y = kernels.linear_a8(codes, scale, None, *arguments)
    last = slice(m - 100, m)
    expected = by_reference(kernels.linear_a8, codes[last], scale[last], None, *arguments)
    assert torch.equal(y[last], expected)


@pytest.mark.parametrize(("n", "k", "device"), on([(5, 64), (17, 24)], [(3072, 128), (33, 64), (21504, 128)]))
@pytest.mark.parametrize("table", ["codebook", "int4", "two bits"])
def test_round_columns(n, k, device, table):
    """GPTQ's inner loop: no operation of it may be rounded differently."""
    generator = torch.Generator().manual_seed(n)
    work = torch.randn(n, 2 * k, generator=generator).to(device)[:, k // 2 : k // 2 + k]
    h = torch.randn(3 * k, k, generator=generator, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(h.T @ h / len(h)), upper=True).float().to(device)
    scale = torch.rand(n, k, generator=generator).to(device) * 0.1
    scale[2] = 0
    tables = {"codebook": kernels.CODEBOOK16, "int4": kernels.INT4, "two bits": (-120, -36, 36, 120)}
    values = torch.tensor(tables[table], dtype=torch.float32)
    values = values.sort().values.to(device)
    midpoints = (values[1:] + values[:-1]) / 2
    entries, errors = kernels.round_columns(work, factor, scale, midpoints, values)
    expected, error = by_reference(kernels.round_columns, work.clone(), factor, scale, midpoints, values)
    assert torch.equal(entries, expected)
    torch.testing.assert_close(errors, error, rtol=0, atol=0)
