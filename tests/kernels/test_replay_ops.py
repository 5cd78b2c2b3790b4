"""Every op repeated launches what the op itself launches, on other memory: as far as Python sees, and on a GPU."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from dirotq import kernels
from dirotq.kernels import backend, observers, replay
from dirotq.kernels import launch as launching
from dirotq.kernels.launched import Place

from .offline import needs_gluon


class Tensors:
    """Random arguments of all ops, others for each seed."""

    def __init__(self, m, seed, k=1152, n=2304):
        make = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(2, m // 2, k, generator=make).bfloat16()
        self.wide = torch.randn(2, m // 2, n, generator=make).bfloat16()
        self.basis = torch.randn(k, 64, generator=make).bfloat16()
        self.signs = torch.ones(k, dtype=torch.int8)
        self.weights = [torch.randint(0, 256, (n, k // 2), generator=make).byte() for _ in range(3)]
        self.scales = [torch.rand(n, generator=make) for _ in range(3)]
        self.groups = torch.rand(n, k // 64, generator=make).bfloat16()
        self.low_ranks = [torch.randn(n, 64, generator=make).bfloat16() for _ in range(3)]
        self.biases = [torch.randn(n, generator=make).bfloat16() for _ in range(3)]
        self.codes = torch.randint(-127, 128, (m, k), generator=make).to(torch.int8)
        self.scale, self.z = torch.rand(m, generator=make), torch.randn(m, 64, generator=make).bfloat16()
        self.modulation = torch.randn(2, 6, n, generator=make).bfloat16()
        self.heads = torch.randn(2, m // 2, 3, 16, 72, generator=make).bfloat16()
        self.even = torch.randn(2, m // 2, 3, 8, 64, generator=make).bfloat16()
        self.angles = torch.randn(2, m, 64, generator=make)

    def call(self, op):
        table = list(kernels.CODEBOOK16)
        x = self.rows.flatten(0, 1)
        product = self.codes, self.scale, self.z, self.weights[0], self.scales[0], self.low_ranks[0], self.biases[0]
        return {
            "rotate_quantize": (x, self.basis, self.signs, 128, "int4"),
            "rotate_quantize, 256 columns": (x[:, :1024], self.basis[:1024], self.signs[:1024], 128, "int4"),
            "rotate_quantize, bare": (x, None, self.signs, 128, "int8"),
            "rotate_quantize_parts": ([x[:, :384], x[:, 384:]], self.basis, self.signs, 128, "int4"),
            "rotate_quantize_parts, 256 columns": (
                [x[:, :256], x[:, 256:1024]], self.basis[:1024], self.signs[:1024], 128, "int4",
            ),
            "linear_a8": (*product, table, torch.bfloat16, True),
            "linear_a8, bare": (self.codes, self.scale, None, *product[3:5], None, None, table, torch.float32),
            "linear_a8_add": (*product, table, [self.wide], self.modulation[:, 2]),
            "linear_a8_add, parts": (*product, table, list(self.wide.split([1, len(x) // 2 - 1], 1)), None),
            "linear_a8_siblings": (
                *product[:3], self.weights, self.scales, self.low_ranks, self.biases, table, torch.bfloat16, [],
            ),
            "linear_a16": (x[:1].clone(), None, self.weights[0], self.groups, None, self.biases[0], table),
            "norm_modulate": ([self.wide], self.modulation[:, 0], self.modulation[:, 1], 1e-6),
            "attend": self.heads.unbind(2),
            "attend, wide": (
                *(x.flatten(2).unflatten(2, (9, 128)) for x in self.heads.unbind(2)), None, kernels.POWERS_OF_TWO,
            ),
            "attend, biased": (*self.heads.unbind(2), self.rows[:, :, 5].contiguous()),
            "qk_norm_rope": (
                [self.even[:, :, 0]], [self.even[:, :, 1]], [], [self.rows[0, 0, :64]], [self.rows[0, 1, :64]],
                self.angles[0, : len(x) // 2], self.angles[1, : len(x) // 2], 1e-6,
            ),
            "qk_norm_rope, parts": (
                *(list(self.even[:, :, i].split([1, len(x) // 2 - 1], 1)) for i in range(3)),
                list(self.rows[0, 0].split(64)[:2]), list(self.rows[0, 1].split(64)[:2]),
                self.angles[0, : len(x) // 2], self.angles[1, : len(x) // 2], 1e-6,
            ),
        }[op]  # fmt: skip


OPS = [
    "rotate_quantize", "rotate_quantize, 256 columns", "rotate_quantize, bare", "rotate_quantize_parts",
    "rotate_quantize_parts, 256 columns", "linear_a8", "linear_a8, bare",
    "linear_a8_add", "linear_a8_add, parts", "linear_a8_siblings", "linear_a16", "norm_modulate", "attend",
    "attend, wide", "attend, biased", "qk_norm_rope", "qk_norm_rope, parts",
]  # fmt: skip


class Seen:
    """In place of `Direct`: notes launches, and those repeated, with descriptors as they are."""

    def __init__(self, launched, kernel, rest):
        self.launched, self.kernel, self.rest = launched, kernel, rest

    def __call__(self, grid, stream, values):
        self.launched.append((self.kernel, grid, self.rest, values))

    def again(self, grid, values):
        def argument(value, at):
            if not isinstance(value, Place):
                return value
            address = at[value.tensor] + value.offset
            if value.tile is None:
                return address
            shape, strides = value.tile
            return SimpleNamespace(base=SimpleNamespace(data_ptr=lambda: address), shape=shape, strides=strides)

        return lambda stream, at: self(grid, stream, [argument(value, at) for value in values])


@pytest.fixture
def hopper(on_gpu, monkeypatch):
    """Every kernel for Hopper is compiled and launched, as far as Python sees; a list of what is launched."""
    from triton.runtime.jit import JITFunction

    launched = []
    monkeypatch.setattr(backend, "_obstacle", lambda *arguments: None)
    monkeypatch.setattr(launching, "_is_hopper", lambda *arguments: True)
    monkeypatch.setattr(launching, "_multiprocessors", lambda *arguments: 132)

    def first(kernel, grid):
        return lambda *args, **constants: SimpleNamespace(kernel=kernel)

    monkeypatch.setattr(JITFunction, "__getitem__", first)

    monkeypatch.setattr(launching, "direct", lambda compiled, rest: Seen(launched, compiled.kernel, rest))
    monkeypatch.setattr(replay, "_same_bits", lambda a, b: True)  # nothing has been computed
    return launched


def moved(tensor, device):
    """A copy of the tensor's storage."""
    storage = tensor.untyped_storage().to(device=device)
    return torch.empty(0, dtype=tensor.dtype, device=device).set_(storage)


def on_device(argument, device):
    """As it lies: a copy of the storage, seen as before."""
    if isinstance(argument, list | tuple):
        parts = [a for a in argument if isinstance(a, torch.Tensor)]
        wholes = {a.untyped_storage().data_ptr(): a for a in parts}
        if len(parts) > 1 and len(wholes) == 1:  # parts of one tensor
            whole = moved(parts[0], device)
            return [whole.as_strided(a.shape, a.stride(), a.storage_offset()) for a in parts]
        return [on_device(a, device) for a in argument]
    if not isinstance(argument, torch.Tensor):
        return argument
    return moved(argument, device).as_strided(argument.shape, argument.stride(), argument.storage_offset())


def flat(args):
    return [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, torch.Tensor)]


def readable(launched, args):
    """Addresses as places in arguments, or numbered in the order they come in."""
    named, others = flat(args), {}

    def name(address):
        for i, tensor in enumerate(named):
            if tensor.numel() and address == tensor.data_ptr():
                return "argument", i
        for i, tensor in enumerate(named):
            storage = tensor.untyped_storage()
            if tensor.data_ptr() < address < storage.data_ptr() + storage.nbytes():
                return "inside", i, address - tensor.data_ptr()
        return "own", others.setdefault(address, len(others))

    lines = []
    for kernel, grid, rest, values in launched:
        line = [kernel, grid, tuple(map(str, rest))]
        for parameter, value in zip(kernel.arg_names, values, strict=False):  # the rest are constants
            if hasattr(value, "base"):
                line.append((name(value.base.data_ptr()), tuple(value.shape), tuple(value.strides)))
            elif parameter.endswith("_ptr"):
                line.append(name(value))
            else:
                line.append(value)
        lines.append(line)
    return lines


@needs_gluon
@pytest.mark.parametrize(
    ("op", "m"),
    [(op, m) for op in OPS for m in (8, 512)]
    + [(op, 8192) for op in ("rotate_quantize", "linear_a8_siblings")]
    + [(op, 10_240) for op in OPS if "256 columns" in op],
)
def test_ops_launch_the_same(hopper, op, m):
    run = getattr(torch.ops.dirotq, op.split(",")[0]).default
    args, others = Tensors(m, 0).call(op), Tensors(m, 1).call(op)
    replay.enable(False)
    for _ in range(2):  # the first compiles
        hopper.clear()
        with replay._Watch():  # keeps what the op makes, so that no address stands for two tensors
            expected = run(*others)
    lines = readable(hopper, others)
    assert lines
    replay.enable(True)
    for _ in range(3):
        run(*args)
    known = list(replay._known.values())
    assert known and all(type(one) is replay.Recording and one.proven for one in known)
    hopper.clear()
    results = run(*others)
    assert readable(hopper, others) == lines
    assert all(
        (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        for a, b in zip(flat([expected]), flat([results]), strict=True)
    )


@needs_gluon
@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_a_repetition_takes_no_dispatcher(hopper, op, monkeypatch):
    """What PyTorch's dispatcher makes of arguments, and the functions of the package themselves, are of one kind."""
    run = getattr(kernels, op.split(",")[0])
    args, others = Tensors(64, 0).call(op), Tensors(64, 1).call(op)
    replay.enable(True)
    for _ in range(4):
        hopper.clear()
        run(*args)
    lines = readable(hopper, args)
    monkeypatch.setattr(replay, "call", lambda *arguments: pytest.fail("by the dispatcher"))
    hopper.clear()
    run(*others)
    assert readable(hopper, others) == lines


class Other(torch.Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@needs_gluon
@torch.no_grad()
def test_who_looks_sees_the_op(hopper, monkeypatch):
    """Modes, a profiler, gradients and subclasses of tensors."""
    args = list(Tensors(64, 0).call("linear_a8"))
    calls = []
    original = replay.call

    def count(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(replay, "call", count)
    replay.enable(True)
    for _ in range(5):
        kernels.linear_a8(*args)
    assert len(calls) == 3
    looking = [
        Mode(), Functions(), torch.enable_grad(), torch.autograd.profiler.profile(), torch.device("meta"),
        torch.inference_mode(False),
    ]  # fmt: skip
    for i, context in enumerate(looking[:-1]):
        with context:
            kernels.linear_a8(*args)
        assert len(calls) == 4 + i, context
    calls.clear()
    with looking[-1], torch.no_grad():
        kernels.linear_a8(*args)
    assert not calls
    for i in (0, 3):
        kernels.linear_a8(*args[:i], args[i].as_subclass(Other), *args[i + 1 :])
    kernels.linear_a8(*args[:4], torch._neg_view(args[4]), *args[5:])
    assert len(calls) == 3
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
    assert kernels.linear_a8(*fake).shape == (64, 2304) and len(calls) == 3
    graph = torch.fx.symbolic_trace(lambda codes: kernels.linear_a8(codes, *args[1:]))
    assert any("linear_a8" in str(node.target) for node in graph.graph.nodes)


@torch.no_grad()
def test_questions_of_pytorch():
    """Each is asked in the version installed here, and answered."""
    for path in observers._QUESTIONS:
        assert observers._question(path) is not None, path
    assert not observers.observed()
    seen = []

    def look(x):
        seen.append(observers.observed())
        return x + 1

    x = torch.ones(2)
    torch.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    make_fx(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    with FakeTensorMode():
        look(torch.ones(2))
    assert seen == [True] * 5 and not observers.observed()


@needs_gluon
@torch.no_grad()
def test_what_is_wrong_is_for_the_op(hopper):
    args = list(Tensors(64, 0).call("linear_a8"))
    replay.enable(True)
    for _ in range(4):
        kernels.linear_a8(*args)
    for place, wrong in ((7, [[1]] * 16), (7, 3), (0, []), (3, "weight"), (4, torch.ones(3))):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=r"linear_a8|weight_scale"):
            kernels.linear_a8(*args[:place], wrong, *args[place + 1 :])
    siblings = list(Tensors(64, 0).call("linear_a8_siblings"))
    for wrong in ([], [None], [siblings[3][0], 3]):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=r"linear_a8_siblings|weights"):
            kernels.linear_a8_siblings(*siblings[:3], wrong, *siblings[4:])


@needs_gluon
@torch.no_grad()
def test_another_backend_from_now_on(hopper, monkeypatch):
    args = Tensors(64, 0).call("norm_modulate")
    replay.enable(True)
    for _ in range(4):
        kernels.norm_modulate(*args)
    hopper.clear()
    monkeypatch.setenv("DIROTQ_BACKEND", "reference")
    result = kernels.norm_modulate(*args)
    assert not hopper
    torch.testing.assert_close(result, backend.implementation("norm_modulate", result.device)(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [8, 512, 8192, 10_240])
@pytest.mark.parametrize("op", OPS)
def test_same_bits_on_a_gpu(op, m):
    run = getattr(torch.ops.dirotq, op.split(",")[0]).default
    sets = [[on_device(a, "cuda") for a in Tensors(m, seed).call(op)] for seed in range(3)]
    replay.enable(False)
    expected = [flat([run(*args)]) for args in sets]
    replay.enable(True)
    try:
        for _ in range(3):
            for args, wanted in zip(sets, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(flat([run(*args)]), wanted, strict=True))
        known = list(replay._known.values())
        if launching.is_hopper(torch.device("cuda")):
            assert known and all(type(one) is replay.Recording and one.proven for one in known)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = flat([run(*sets[1])])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, expected[1], strict=True))
    finally:
        replay.enable(False)


@needs_gluon
def test_parts_apart_are_not_parts_together(hopper):
    """The residual's parts are read as they lie if one tensor was split into them, and put together if not."""
    tensors = Tensors(512, 0)
    args = list(tensors.call("linear_a8_add, parts"))
    run = torch.ops.dirotq.linear_a8_add.default
    for _ in range(4):
        run(*args)
    hopper.clear()
    args[8] = [torch.empty_like(tensors.wide)[:, :1], torch.empty_like(tensors.wide)[:, 1:]]
    run(*args)
    values = hopper[-1][3]
    addresses = {value.base.data_ptr() if hasattr(value, "base") else value for value in values}
    assert not addresses & {part.data_ptr() for part in args[8]}  # but of what they were put together in
