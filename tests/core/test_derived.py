"""LRQ's rotations are made once, and never outlive the tensors they were made from."""

import copy
import pickle

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading

from dirotq.dirotq_core import adaptive
from dirotq.dirotq_core.input_site import InputSite, SiteMemo
from dirotq.dirotq_core.layout import SitePlan
from dirotq.dirotq_core.linear import DiRotQLinear
from dirotq.dirotq_core.transforms import SiteStatistics

from ..backend.versions import groups_on_cpu
from ..marks import thorough

WIDTH = 256
CPU = torch.device("cpu")


@pytest.fixture
def made(monkeypatch):
    """A list that gets the width of every rotation that is made of steps."""
    widths, original = [], adaptive.block_rotation
    monkeypatch.setattr(adaptive, "block_rotation", lambda *a: widths.append(len(a[1])) or original(*a))
    return widths


@torch.no_grad()
def layers(outliers, count=2):
    """Linears of sites with and without outliers, as one model."""
    memo, out = SiteMemo(), torch.nn.ModuleList()
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        plan = SitePlan((f"q{i}",), WIDTH, (64,), 0, True, "lrq", i)
        x = torch.randn(500, WIDTH, generator=g, dtype=torch.float64) * 0.5
        if outliers:
            x[:, [3, 77, 200]] *= 40
        t = adaptive.ADAPTIVE_ROTATION.prepare(SiteStatistics(WIDTH, [], i, 0, "pca", x.T @ x / len(x)))
        site = InputSite(plan, "asym_token_8", memo, CPU)
        linear = DiRotQLinear(plan, 0, site, False, torch.float32, CPU)
        for name, p in site.named_parameters():
            p.copy_(t[name])
        linear.weight.copy_(torch.randint(0, 256, linear.weight.shape, generator=g))
        linear.weight_scale.copy_(torch.rand(linear.weight_scale.shape, generator=g) + 0.5)
        out.append(linear)
    return out


def run(model, dtype=torch.float32):
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)
    return [m(x) for m in model]


def kept(model):
    return [sorted(m.site.derived.tensors) for m in model]


def test_rotations_are_made_once(made):
    model = layers(outliers=True)
    made.clear()
    first = run(model)
    assert len(made) == 4 and kept(model) == [["first", "second"]] * 2
    assert all(torch.equal(a, b) for a, b in zip(run(model), first, strict=True)) and len(made) == 4
    for m in model:
        m.site.derived.forget()
        m.site.derived.moves = True  # each call for itself
    assert all(torch.equal(a, b) for a, b in zip(run(model), first, strict=True)) and len(made) == 8


def test_a_plain_hadamard_keeps_one_block(made):
    model = layers(outliers=False)
    made.clear()
    first = run(model)
    assert not made and kept(model) == [["hadamard"]] * 2
    assert sum(t.numel() for m in model for t in m.site.derived.tensors.values()) == 2 * 128**2
    for m in model:
        m.site.derived.forget()
        m.site.derived.moves = True
    again = run(model)
    assert len(made) == 4
    for a, b in zip(again, first, strict=True):  # sums in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_checkpoints_and_copies_hold_none_of_it():
    model = layers(outliers=True)
    names = set(model.state_dict())
    expected = run(model)
    assert set(model.state_dict()) == names and not list(model.buffers())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept(twin) == [[]] * 2 and all(torch.equal(a, b) for a, b in zip(run(twin), expected, strict=True))
    assert kept(model) == [["first", "second"]] * 2


@pytest.mark.parametrize("how", ["move", "load", "in place", "data"])
def test_it_follows_the_tensors(how, made):
    model, other = layers(outliers=True), layers(outliers=True, count=3)[1:]
    expected = run(other)
    run(model)
    made.clear()
    if how == "move":
        model.to("meta")
        assert kept(model) == [[], []]
        model.to_empty(device="cpu")
    if how in ("move", "load"):
        model.load_state_dict(dict(zip(model.state_dict(), other.state_dict().values(), strict=True)))
    else:
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            if how == "data":
                ours.data = theirs.data.clone()
            else:
                with torch.no_grad():
                    ours.copy_(theirs)
    assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True)) and len(made) == 4


def test_inference_mode_does_not_spoil_training():
    model = layers(outliers=True)
    with torch.inference_mode():
        expected = run(model)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9)).requires_grad_()
    y = model[0](x)
    y.sum().backward()
    assert torch.equal(y, expected[0]) and torch.isfinite(x.grad).all()


@groups_on_cpu
@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offload_leaves_nothing_behind(tmp_path, level, disk):
    """From the second pass on. On the CPU tensors in memory stay where they are, and so does what was derived."""
    model = layers(outliers=True, count=3)
    expected = run(model)
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    options |= {"offload_to_disk_path": str(tmp_path)} if disk else {}
    holder = torch.nn.Module()
    holder.blocks = model
    apply_group_offloading(holder, CPU, CPU, level, **options)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))
    if disk:
        assert sum(map(bool, kept(model))) <= 1


def test_sequential_offload_leaves_nothing_behind(tmp_path):
    model = layers(outliers=True, count=3)
    expected = run(model)
    accelerate.disk_offload(model, tmp_path, CPU)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))
    assert sum(map(bool, kept(model))) <= 1


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("outliers", "warm"),
    [
        (False, False), (True, True), thorough(False, True), thorough(True, False),
    ],
)  # fmt: skip
def test_one_graph(outliers, warm, made):
    """What was kept before goes into the graph; it cannot keep anything itself."""
    model = layers(outliers)
    expected = run(model, torch.bfloat16)
    if not warm:
        for m in model:
            m.site.derived.forget()
    made.clear()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: [m(x) for m in model], backend="aot_eager", fullgraph=True)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9)).bfloat16()
    for y, z in zip(compiled(x), expected, strict=True):
        torch.testing.assert_close(y, z, rtol=0.02, atol=0.5)
    assert bool(made) != warm
