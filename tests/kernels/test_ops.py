"""The registered ops: torch's checks, gradients, errors, tracing, the choice of backend, two copies in a process."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dirotq import kernels
from dirotq.kernels import backend

from . import cases

ROOT = Path(kernels.__file__).parents[1]
OPS = torch.ops.dirotq


def run_python(code, **options):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def samples():
    case, w = cases.site(5, 192, 3, block=64), cases.weights(33, 192, 3)
    single = cases.site(5, 192, 3, block=64, dtype=torch.float32)
    x = single.x.clone().requires_grad_()
    codes, scale, z = kernels.rotate_quantize(*case.arguments, "int4")
    table = list(kernels.CODEBOOK16)
    heads = torch.rand(1, 5, 2, 16)
    rest = (w.weight, w.row_scale, w.low_rank, w.bias, table)
    nvfp4 = [kernels.quantize_nvfp4(torch.randn(rows, 192)) for rows in (5, 33)]
    z_leaf = z.clone().requires_grad_()
    return {
        "rotate_quantize": (*case.arguments, "codebook"),
        "rotate_quantize, bare": (case.x, None, None, 1, "int8"),
        "rotate_quantize_parts": (case.x.split([100, 92], 1), *case.arguments[1:], "codebook"),
        "rotate_quantize_parts, bare": ([case.x], None, None, 1, "int8"),
        "rotate": (x, *single.arguments[1:]),
        "linear_a8": (codes, scale, z, *rest, torch.bfloat16),
        "linear_a8, bare": (codes, scale, None, w.weight, w.row_scale, None, None, table, torch.float32),
        "linear_a16": (x, z_leaf, w.weight, w.group_scale, w.low_rank, w.bias, table),
        "linear_a16, bare": (x, None, w.weight, w.row_scale[:, None], None, None, table),
        "linear": (x, *single.arguments[1:], "int4", *rest),
        "linear, bare": (x, None, None, 1, "int8", w.weight, w.row_scale, None, None, table),
        "linear_nvfp4": (*nvfp4[0], z, *nvfp4[1], w.low_rank, w.bias, torch.bfloat16),
        "linear_nvfp4, bare": (*nvfp4[0], None, *nvfp4[1], None, None, torch.float32),
        "dequantize": (w.weight, w.group_scale, table, torch.bfloat16),
        "qk_norm_rope": (*[[heads]] * 3, [heads[0, 0, 0]], [heads[0, 0, 1]], heads[0, :, 0], heads[0, :, 1], 1e-6),
        "qk_norm_rope, no values": (
            [heads],
            [heads],
            [],
            [heads[0, 0, 0]],
            [heads[0, 0, 1]],
            heads[0, :, 0],
            heads[0, :, 1],
            1e-6,
        ),
        "attend": (heads, heads[:, 1:], heads[:, :4]),
        "attend, biased": (heads, heads, heads, heads[:, :, 0, 0]),
        "modulation_rows": (heads[0, 0], heads[0, :, 0].repeat(1, 2)),
        "norm_modulate": ([heads[0], heads[0, :, 1:]], heads[0, :, 0], heads[0, :, 1], 1e-6),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name.split(",")[0]).default, samples()[name])


def float_formula(x, case, w, basis, weight):
    """The linear without any quantization but that of its weights."""
    z = x @ basis
    v = kernels.block_hadamard((x - z @ basis.T) * case.signs, case.block)
    return v @ weight.T + z @ w.low_rank.double().T + w.bias.double()


@pytest.mark.parametrize("rank", [0, 5])
def test_gradient_of_linear_is_that_of_the_float_formula(rank):
    case, w = cases.site(6, 192, rank, block=64, dtype=torch.float32), cases.weights(33, 192, rank)
    weight = kernels.dequantize(w.weight, w.row_scale, kernels.CODEBOOK16, torch.float32).double()
    dy = torch.randn(6, 33, generator=torch.Generator().manual_seed(5))

    x = case.x.double().requires_grad_()
    if rank:
        float_formula(x, case, w, case.basis.double(), weight).backward(dy.double())
    else:
        (kernels.block_hadamard(x * case.signs, case.block) @ weight.T).backward(dy.double())

    for mode in cases.MODES:
        leaf = case.x.clone().requires_grad_()
        rest = (w.weight, w.row_scale, w.low_rank, w.bias, kernels.CODEBOOK16)
        kernels.linear(leaf, *case.arguments[1:], mode, *rest).backward(dy)
        torch.testing.assert_close(leaf.grad, x.grad.float(), rtol=1e-4, atol=1e-5)

    leaf = case.x.clone().requires_grad_()
    v, z = kernels.rotate(leaf, *case.arguments[1:])
    z = z if rank else None
    y = kernels.linear_a16(v, z, w.weight, w.row_scale[:, None], w.low_rank, w.bias, kernels.CODEBOOK16)
    y.backward(dy)
    # z and its gradient are bf16 here.
    torch.testing.assert_close(leaf.grad, x.grad.float(), rtol=1e-2, atol=1e-2 * float(x.grad.abs().max()))


def test_linear_is_its_two_ops():
    case, w = cases.site(7, 1152, 64), cases.weights(1153, 1152, 64)
    rest = (w.weight, w.row_scale, w.low_rank, w.bias, kernels.CODEBOOK16)
    for mode in cases.MODES:
        codes, scale, z = kernels.rotate_quantize(*case.arguments, mode)
        expected = kernels.linear_a8(codes, scale, z, *rest, torch.bfloat16)
        assert torch.equal(kernels.linear(*case.arguments, mode, *rest), expected)


@pytest.mark.untraced
@pytest.mark.parametrize("mode", cases.MODES)
def test_compiles_without_graph_breaks(mode):
    case, w = cases.site(5, 192, 3, block=64, dtype=torch.float32), cases.weights(33, 192, 3)

    def block(x):
        rest = (w.weight, w.row_scale, w.low_rank, w.bias, kernels.CODEBOOK16)
        y = kernels.linear(x, *case.arguments[1:], mode, *rest)
        v, z = kernels.rotate(x, *case.arguments[1:])
        return y + kernels.linear_a16(v, z, w.weight, w.group_scale, w.low_rank, w.bias, kernels.INT4)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (5, 3):
        leaf, other = case.x[:m].clone().requires_grad_(), case.x[:m].clone().requires_grad_()
        y, expected = compiled(leaf), block(other)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad)


def bad(**changes):
    """The arguments of `linear` with some replaced."""
    case, w = cases.site(5, 192, 3, block=64), cases.weights(33, 192, 3)
    arguments = {
        "x": case.x, "basis": case.basis, "signs": case.signs, "block": 64, "mode": "int4", "weight": w.weight,
        "weight_scale": w.row_scale, "low_rank": w.low_rank, "bias": w.bias, "table": kernels.INT4,
    }  # fmt: skip
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 192)}, r"x has shape \[2, 3, 192\]"),
        ({"x": torch.zeros(5, 100)}, "x has 100 columns; a positive multiple of 64"),
        ({"x": torch.zeros(5, 192, dtype=torch.float64)}, "x has dtype torch.float64"),
        ({"basis": torch.zeros(128, 3, dtype=torch.bfloat16)}, r"basis has shape \[128, 3\]; expected \[192, r\]"),
        ({"basis": torch.zeros(192, 3)}, "basis has dtype torch.float32"),
        ({"signs": torch.ones(64, dtype=torch.int8)}, r"signs has shape \[64\]"),
        ({"block": 128}, "block is 128; a power of two that divides the 192 columns"),
        ({"block": 96}, "block is 96; a power of two"),
        ({"mode": "fp4"}, "mode is 'fp4'; one of codebook, int4, int8"),
        ({"weight": torch.zeros(33, 64, dtype=torch.uint8)}, r"weight has shape \[33, 64\]; expected \[N, 96\]"),
        ({"weight_scale": torch.zeros(33, 3)}, r"weight_scale has shape \[33, 3\]; expected \[33\]"),
        ({"weight_scale": torch.zeros(33).bfloat16()}, "weight_scale has dtype torch.bfloat16"),
        ({"low_rank": None}, "low_rank is missing; the basis has 3 columns"),
        ({"low_rank": torch.zeros(33, 4).bfloat16()}, r"low_rank is of shape \[33, 4\]; the basis has 3 columns"),
        ({"bias": torch.zeros(32)}, r"bias has shape \[32\]; expected \[33\]"),
        ({"table": [0] * 15}, r"16 integers in \[-127, 127\]"),
        ({"table": [-128] * 16}, r"16 integers in \[-127, 127\]"),
        ({"weight": torch.zeros(33, 96, dtype=torch.uint8, device="meta")}, "weight is on meta, x on cpu"),
    ],
)
def test_errors_name_the_value_and_the_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        kernels.linear(**bad(**changes))


def test_low_rank_needs_z():
    w = cases.weights(33, 192, 3)
    with pytest.raises(ValueError, match="low_rank is given without z"):
        kernels.linear_a16(torch.zeros(2, 192), None, w.weight, w.group_scale, w.low_rank, None, kernels.INT4)
    with pytest.raises(ValueError, match=r"expected \[33, 1\] or \[33, 3\]"):
        kernels.linear_a16(torch.zeros(2, 192), None, w.weight, torch.ones(33, 2), None, None, kernels.INT4)


def test_backend_choice(monkeypatch):
    case = cases.site(3, 128)
    monkeypatch.setenv("DIROTQ_BACKEND", "cuda")
    with pytest.raises(ValueError, match="DIROTQ_BACKEND is 'cuda'"):
        kernels.rotate(*case.arguments)
    monkeypatch.setenv("DIROTQ_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend._obstacle.cache_clear()
    with pytest.raises(RuntimeError, match=r"rotate on cpu: .*TRITON_INTERPRET=1"):
        kernels.rotate(*case.arguments)
    backend._obstacle.cache_clear()


@pytest.mark.parametrize(("platform", "package"), [("linux", "triton"), ("win32", "triton-windows")])
def test_missing_triton_is_named_once(monkeypatch, platform, package):
    monkeypatch.setenv("DIROTQ_BACKEND", "auto")
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.sys, "platform", platform)
    for cached in (backend._obstacle, backend._say_once):
        cached.cache_clear()
    with pytest.warns(RuntimeWarning, match=rf"pip install {package}\)") as said:
        for _ in range(2):
            backend.implementation("linear_a8", torch.device("cuda", 0))
    assert len(said) == 1
    backend._obstacle.cache_clear()


def test_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert backend._unsupported_gpu(0) == "Tesla T4 is sm_75; the kernels need sm_80 or newer"


def test_import_is_light():
    code = "import sys, dirotq.kernels; print([m for m in ('triton', 'transformers') if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def copy_of_kernels(folder):
    """A second copy of the package, as cloned into ComfyUI's custom_nodes."""
    package = folder / "cloned"
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    return package


USE_BOTH = """
import gc, sys, torch, dirotq.kernels as first
registered = torch.ops.dirotq._library
import cloned.kernels as second
assert second is not first and torch.ops.dirotq._library is registered
x = torch.ones(2, 64)
assert torch.equal(first.rotate(x, None, None, 1)[0], second.rotate(x, None, None, 1)[0])
for name in [n for n in sys.modules if n.startswith("dirotq")]:
    del sys.modules[name]
del first
gc.collect()
second.rotate(x, None, None, 1)
"""


def test_two_copies_share_the_ops(tmp_path):
    copy_of_kernels(tmp_path)
    run_python(USE_BOTH, cwd=tmp_path)


def test_a_copy_of_another_version_is_refused(tmp_path):
    ops = copy_of_kernels(tmp_path) / "kernels" / "ops.py"
    ops.write_text(ops.read_text().replace("API_VERSION = 9\n", "API_VERSION = 10\n"))
    code = "import dirotq.kernels\ntry:\n    import cloned.kernels\nexcept ImportError as error:\n    print(error)"
    said = run_python(code, cwd=tmp_path)
    assert "API version 10" in said and "version 9" in said and str(ops) in said
