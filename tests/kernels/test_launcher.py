"""A direct launch hands the driver what Triton's own launcher hands it: `triton_launcher` against Triton, no GPU."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton does not compile while it interprets", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.compiler import compiler  # noqa: E402
from triton.knobs import HookChain  # noqa: E402

from dirotq.kernels import hopper, triton_launcher, triton_unpack  # noqa: E402
from dirotq.kernels.launched import Place  # noqa: E402

from .offline import TARGETS, compile_for, compile_gluon, descriptor, needs_gluon  # noqa: E402

FUNCTION, STREAM, GRID = 4321, 99, (5, 3, 1)


class Driver:
    """Stands in for the GPU's: notes what the launch function of the driver is given."""

    def __init__(self):
        self.launches = []
        self.filled = 0
        self.utils = self
        self.launcher_cls = nvidia.CudaLauncher

    def launch(self, *arguments):
        self.launches.append(arguments)

    def fill_tma_descriptor_tiled(self, *arguments):
        self.filled += 1
        return ("map", *(tuple(a) if isinstance(a, list | torch.Size) else a for a in arguments))

    def build_signature_metadata(self, signature):
        return tuple(signature)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return STREAM

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def get_current_target(self):
        return TARGETS["sm_90"][0]

    def load_binary(self, *arguments):
        return object(), FUNCTION, 0, 0, 1024


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    if not hasattr(nvidia, "annotate_arguments"):
        pytest.skip("the launcher of this Triton is compiled for each kernel")
    for name, value in {"ARG_CONSTEXPR": 0, "ARG_KERNEL": 1, "ARG_TUPLE": 2}.items():
        monkeypatch.setattr(nvidia, name, value, raising=False)
    monkeypatch.setattr(nvidia, "PyKernelArg", lambda nested_tuple, type: (nested_tuple, type), raising=False)
    monkeypatch.setattr(compiler, "max_shared_mem", lambda device: 227 * 1024)
    before = triton.runtime.driver.active if triton.runtime.driver._active is not None else None
    triton.runtime.driver.set_active(made)
    yield made
    if before is None:
        triton.runtime.driver._active = None
    else:
        triton.runtime.driver.set_active(before)


def plain(value):
    """What a launch is given, a pointer for a tensor, and None for no hooks and what only hooks read."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, list | tuple):
        return tuple(plain(v) for v in value)
    return None if isinstance(value, HookChain | compiler.LazyDict) else value


def same_as_triton(compiled, driver, args, constants):
    compiled[GRID](*args, *constants)
    compiled.module = None  # it has none, and would have the driver unload it
    direct = triton_launcher.direct(compiled, constants)
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
    filled = driver.filled
    for _ in range(3):
        direct(GRID, STREAM, list(values))
    expected, *launches = driver.launches
    assert len(launches) == 3 and all(plain(given) == plain(expected) for given in launches)
    assert expected[:5] == (*GRID, STREAM, FUNCTION)
    return driver.filled - filled


def test_pointers_and_numbers(driver):
    values = {"ASM": True, "BLOCK": 1024, "OVERLAP": False}
    launched = {"num_warps": 4, "num_stages": 2}
    pointers = {"packed_ptr": "i32", "out_ptr": "i32"}
    compiled = compile_for(TARGETS["sm_90"][0], triton_unpack.unpack_kernel, pointers, {**values, **launched})
    args = [torch.zeros(8, dtype=torch.int32), torch.zeros(16, dtype=torch.int32), 8, 1, 2, 3, 4]
    assert same_as_triton(compiled, driver, args, list(values.values())) == 0


def memory():
    x, y, basis = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((80, 256), (80, 128), (384, 64)))
    return x, y, basis, torch.zeros(80)


def projection(tmp_path, parts):
    """A kernel with descriptors compiled for `parts` of x, what makes its arguments, and its constants."""
    from dirotq.kernels.gluon_site import site_project_hopper_kernel as kernel

    types = {name: descriptor("bf16", 64, 64) for name in ("x_desc", "x1_desc", "basis_desc")[: 1 + parts]}
    types["basis_desc"] = descriptor("bf16", 64, 64)
    types |= {"z_ptr": "*bf16", "factor": "fp32", **dict.fromkeys(("partial_ptr", "squares_ptr", "scale_ptr"), "*fp32")}
    values = {"PROJECT": True, "ALONE": False, "ROWS": 64, "WIDTH": 2, "STAGES": 3}
    if parts == 1:
        values["x1_desc"] = None

    def args(x, y, basis, fp32):
        tiles = [hopper.descriptor(t, 64, 64) for t in (x, y, basis)]
        if parts == 1:
            tiles[1] = None
        return [*tiles[:2], 256, tiles[2], fp32, fp32, y, fp32, 80, 384, 64, 0.5]

    return compile_gluon(kernel, types, values, tmp_path), args, list(values.values())[:5]


@needs_gluon
@pytest.mark.parametrize("parts", [1, 2])
def test_descriptors(driver, tmp_path, parts):
    """Made once for an address and a shape, and again for another."""
    compiled, args, constants = projection(tmp_path, parts)
    x, *others = memory()
    assert same_as_triton(compiled, driver, args(x, *others), constants) == 1 + parts
    driver.launches.clear()
    direct = triton_launcher.direct(compiled, constants)
    for tensor, made in ((x, 1 + parts), (x, 0), (x[1:], 1), (x[:, 64:], 1), (x, 0)):
        filled = driver.filled
        direct(GRID, STREAM, args(tensor, *others))
        assert driver.filled - filled == made


@needs_gluon
@pytest.mark.parametrize("parts", [1, 2])
def test_again_on_other_memory(driver, tmp_path, parts):
    """A launch that is repeated elsewhere hands the driver what a launch there does."""
    compiled, args, constants = projection(tmp_path, parts)
    compiled[GRID](*args(*memory()), *constants)
    compiled.module = None
    direct = triton_launcher.direct(compiled, constants)
    first = args(*memory())
    tensors = [a.base if hasattr(a, "base") else a for a in first]
    placed = [
        Place(i, 0, (list(a.shape), list(a.strides)) if hasattr(a, "base") else None)
        if isinstance(tensors[i], torch.Tensor) else a
        for i, a in enumerate(first)
    ]  # fmt: skip
    again = direct.again(GRID, placed)
    for _ in range(3):
        others = args(*memory())
        bases = [a.base if hasattr(a, "base") else a for a in others]
        driver.launches.clear()
        direct(GRID, STREAM, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in others])
        filled = driver.filled
        again(STREAM, [a.data_ptr() if isinstance(a, torch.Tensor) else None for a in bases])
        assert driver.filled == filled  # descriptors are kept for both
        expected, given = driver.launches
        assert plain(given) == plain(expected)


def test_descriptors_are_not_kept_without_end(monkeypatch):
    meta = dict.fromkeys(("swizzle", "elem_size", "block_size"), 0)
    filled = []
    maps = triton_launcher._Maps(meta, lambda address, *rest: filled.append(address) or ("map", address), 0)
    monkeypatch.setattr(triton_launcher, "_MOST_MAPS", 10)
    known, make = maps.for_tile([8, 8], [8, 1])
    for i in range(95):
        assert maps.of(i, [8, 8], [8, 1]) == ("map", i) == known[i]
        assert sum(map(len, maps.known.values())) <= 10
    assert filled == list(range(95))
    assert make(7) == maps.of(7, [8, 8], [8, 1]) == ("map", 7) and len(filled) == 96
    for i in range(95):  # shapes, too
        assert maps.of(1, [i, 8], [8, 1]) == ("map", 1)
        assert len(maps.known) <= 11 and sum(map(len, maps.known.values())) <= 10
    assert make(3) == known[3] == maps.of(3, [8, 8], [8, 1])


def test_descriptors_in_threads(monkeypatch):
    """One forgets them while others add shapes."""
    meta = dict.fromkeys(("swizzle", "elem_size", "block_size"), 0)
    maps = triton_launcher._Maps(meta, lambda address, *rest: ("map", address), 0)
    monkeypatch.setattr(triton_launcher, "_MOST_MAPS", 20)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            work = [pool.submit(lambda j=j: [maps.of(i, [i % 50, j], [1]) for i in range(20_000)]) for j in range(4)]
            assert all(one.result()[-1] == ("map", 19_999) for one in work)
    finally:
        sys.setswitchinterval(interval)


def test_hooks_are_seen(monkeypatch):
    assert not triton_launcher.hooked()
    triton.knobs.runtime.launch_enter_hook.add(print)
    assert triton_launcher.hooked()
    triton.knobs.runtime.launch_enter_hook.remove(print)
    triton.knobs.runtime.launch_exit_hook.add(print)
    assert triton_launcher.hooked()
    triton.knobs.runtime.launch_exit_hook.remove(print)


@pytest.mark.parametrize(
    "change", [{"global_scratch_size": 64}, {"profile_scratch_size": 8}, {"gsan_enabled": True}, {"launch": None}]
)
def test_unknown_launchers_are_left_alone(change):
    launcher = type("CudaLauncher", (), {"__call__": lambda self, gridX, gridY, gridZ, stream, function, *args: None})()
    fields = {"global_scratch_size": 0, "profile_scratch_size": 0, "launch": print, "launch_pdl": False}
    vars(launcher).update(fields, launch_cooperative_grid=False)
    compiled = SimpleNamespace(run=launcher, function=1, packed_metadata=(4, 1, 0), metadata=None)
    assert triton_launcher.direct(compiled, []) is not None
    vars(launcher).update(change)
    assert triton_launcher.direct(compiled, []) is None
    assert triton_launcher.direct(SimpleNamespace(run=object()), []) is None
