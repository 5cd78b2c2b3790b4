"""What a forward pass must not do: copy constants from the host, wait for the device.

Both break CUDA graphs and cost time on every GPU. Without one they show on the device `meta`, which has no values: what
is made on the CPU there is a copy to come, and reading a value an error.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dirotq.dirotq_core.input_site import InputSite, SiteMemo
from dirotq.dirotq_core.layout import SitePlan
from dirotq.dirotq_core.linear import DiRotQLinear
from dirotq.dirotq_core.methods import METHODS
from dirotq.kernels import decode, ops

WIDTH = 256
CASES = [(name, bits) for name, row in METHODS.items() for bits in (16, *row.activations)]


class Seen(TorchDispatchMode):
    """Records every operation that copies between devices or reads a value."""

    def __init__(self, constants):
        super().__init__()
        self.constants = constants

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        moved = name == "aten::_to_copy" and args[0].device != out.device
        if moved or name.startswith(("aten::lift", "aten::_local_scalar_dense")):
            self.constants.append(name)
        return out


@pytest.fixture
def seen(monkeypatch):
    """`Seen`, which also knows of tensors made of host values."""
    constants = []
    for name in ("tensor", "as_tensor", "from_numpy"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _f=original, _n=name, **k: constants.append(_n) or _f(*a, **k))
    return Seen(constants)


def linear(name, bits, device):
    """A linear of the method with two siblings' worth of site tensors, not initialized."""
    row = METHODS[name]
    rank = 64 if row.high_fraction else row.rank or 0
    plan = SitePlan(("q", "k"), WIDTH, (128, 128), rank, True, name, 0)
    site = InputSite(plan, row.activations.get(bits), SiteMemo(), device)
    first = DiRotQLinear(plan, 0, site, True, torch.bfloat16, device)
    DiRotQLinear(plan, 1, site, True, torch.bfloat16, device)
    return first


@torch.no_grad()
def fill(module):
    """Values that every format takes."""
    g = torch.Generator().manual_seed(0)
    for p in module.parameters():
        if p.is_floating_point():
            p.copy_(torch.rand(p.shape, generator=g) + 0.5)
        elif p.dtype == torch.int32:
            p.copy_(torch.randperm(p.numel(), generator=g))
        else:
            p.copy_(torch.ones(p.shape) if p.dtype == torch.int8 else torch.randint(0, 120, p.shape, generator=g))


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_traced_forward_copies_nothing(name, bits, seen, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    module = linear(name, bits, "meta")
    with torch.no_grad(), seen:
        y = module(torch.empty(8, WIDTH, dtype=torch.bfloat16, device="meta"))
    assert y.shape == (8, 128) and y.is_meta and not seen.constants


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_second_forward_makes_no_table(name, bits, seen):
    module = linear(name, bits, "cpu")
    fill(module)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        first = module(x.clone())
        seen.constants.clear()
        with seen:
            again = module(x.clone())
    assert torch.equal(again, first) and torch.isfinite(first).all() and not seen.constants


@pytest.mark.parametrize(("name", "bits"), [c for c in CASES if METHODS[c[0]].input_transform.identity])
def test_a_method_without_a_transform_rotates_nothing(name, bits, monkeypatch):
    """The op `rotate` would read and write x for nothing; without it every bit is the same, of strided rows as well."""
    rotate, module = ops.rotate, linear(name, bits, "cpu")
    fill(module)
    x = torch.randn(6, 2 * WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()[::2, WIDTH:]
    plain = module.site.transform
    monkeypatch.setattr(module.site, "transform", lambda x: rotate(x, None, None, 1))
    expected = module(x)
    monkeypatch.setattr(ops, "rotate", None)
    monkeypatch.setattr(module.site, "transform", plain)
    assert torch.equal(module(x), expected) and torch.isfinite(expected).all()
    assert module(x.detach().requires_grad_()).requires_grad


def test_codes_are_decoded_without_a_copy(seen):
    """What `dequantize` does in the backward pass, and the reference in every product."""
    with seen:
        assert decode(torch.empty(4, 32, dtype=torch.uint8, device="meta"), range(16)).is_meta
    assert not seen.constants
