"""Siblings share one rotation and quantization of their input."""

import copy
import itertools

import pytest
import torch

from dirotq import set_activation_bits
from dirotq.dirotq_core.build import quantized_linears
from dirotq.dirotq_core.input_site import SiteMemo
from dirotq.kernels import ops


@pytest.fixture
def calls(monkeypatch):
    """A list that gets one entry per call of the op `rotate_quantize`, of parts or not."""
    made = []
    for name in ("rotate_quantize", "rotate_quantize_parts"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, run=original: made.append(a[0]) or run(*a))
    return made


@pytest.fixture
def siblings(quantized):
    """q, k, v of a PixArt block."""
    model, _ = quantized("pixart")
    attention = model.transformer_blocks[0].attn1
    return attention.to_q, attention.to_k, attention.to_v


def memo_of(linear):
    return linear.site.memo


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_every_site_is_quantized_once_per_forward(quantized, run, calls, family):
    model, plans = quantized(family)
    sites = sum(p.quantize_input for p in plans)
    for forward in (1, 2):
        run(model, seed=forward)
        assert len(calls) == sites * forward
    memos = {id(memo_of(m)) for m in quantized_linears(model).values()}
    assert len(memos) == 1
    assert memo_of(next(iter(quantized_linears(model).values()))).entry is None


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
@pytest.mark.parametrize("curved", [(), (0,), (2,), (0, 1)])
def test_gelu_of_a_sibling_in_any_order(siblings, order, curved, monkeypatch):
    """One product at most for each that wants GELU, and one more; nothing is kept when all have asked."""
    x = torch.randn(3, 64)
    apart = [separately(m, x) for m in siblings]
    made, original = [], ops.linear_a8_siblings
    monkeypatch.setattr(ops, "linear_a8_siblings", lambda *a: made.append(a) or original(*a))
    for i in order:
        y = siblings[i](x, gelu=i in curved)
        expected = torch.nn.functional.gelu(apart[i], approximate="tanh") if i in curved else apart[i]
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert len(made) == 1 and memo_of(siblings[0]).entry is None


def test_sharing_changes_no_result(quantized, run):
    model, _ = quantized("flux")
    shared = run(model)
    for linear in quantized_linears(model).values():
        linear.site.stacks = lambda x: False
        linear.site.forward = linear.site.compute
    assert torch.equal(run(model), shared)


def test_siblings_are_one_product(siblings, monkeypatch):
    x = torch.randn(3, 64)
    apart = [separately(m, x) for m in siblings]
    made, original = [], ops.linear_a8_siblings
    monkeypatch.setattr(ops, "linear_a8_siblings", lambda *a: made.append(len(a[3])) or original(*a))
    assert all(torch.equal(m(x), y) for m, y in zip(siblings, apart, strict=True))
    assert made == [3]


def separately(linear, x):
    linear.site.stacks, kept = (lambda x: False), linear.site.stacks
    try:
        return linear(x)
    finally:
        linear.site.stacks = kept
        linear.site.memo.entry = None


@pytest.mark.parametrize("hook", ["_hf_hook", "_diffusers_hook"])
def test_a_sibling_with_a_hook_of_its_own_is_multiplied_alone(siblings, monkeypatch, hook):
    """Offloading brings its weights in when it is called, not before."""
    x = torch.randn(3, 64)
    expected = [m(x) for m in siblings]
    setattr(siblings[1], hook, object())
    monkeypatch.setattr(ops, "linear_a8_siblings", None)
    assert all(torch.equal(m(x), y) for m, y in zip(siblings, expected, strict=True))


def test_the_memo_is_released_after_the_last_sibling(siblings, calls):
    q, k, v = siblings
    x = torch.randn(3, 64)
    for linear, left in ((q, 2), (k, 1)):
        linear(x)
        assert memo_of(linear).entry[0] is linear.site
        assert memo_of(linear).entry[-1] == left
    v(x)
    assert memo_of(v).entry is None
    assert len(calls) == 1


def test_the_order_of_siblings_does_not_matter(siblings, calls):
    q, k, v = siblings
    x = torch.randn(3, 64)
    outputs = [m(x) for m in (v, q, k)]
    assert len(calls) == 1
    assert all(torch.equal(m(x), y) for m, y in zip((v, q, k), outputs, strict=True))


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: x[0].zero_(), lambda x: x.view(-1)[3:].add_(1)])
def test_an_input_changed_in_place_is_noticed(siblings, calls, change):
    q, k, _ = siblings
    x = torch.randn(3, 64)
    q(x)
    change(x)
    y = k(x)
    assert len(calls) == 2
    assert torch.equal(y, k(x.clone()))


def test_inference_mode_shares_too(siblings, calls):
    with torch.inference_mode():
        x = torch.randn(3, 64)
        for linear in siblings:
            linear(x)
    assert len(calls) == 1
    assert memo_of(siblings[0]).entry is None


def test_a_format_chosen_between_siblings_is_noticed(quantized):
    model, _ = quantized("pixart")
    attention = model.transformer_blocks[0].attn1
    x = torch.randn(3, 64)
    set_activation_bits(model, 8)
    first = attention.to_q(x)
    set_activation_bits(model, 4)
    assert torch.equal(attention.to_q(x), attention.to_q(x.clone()))
    assert not torch.equal(attention.to_q(x), first)


def test_a_gradient_is_not_lost_to_a_result_without(siblings):
    q, k, _ = siblings
    q.site.activation = None
    x = torch.randn(3, 64, requires_grad=True)
    with torch.no_grad():
        q(x)
    assert k(x).requires_grad


def test_a_copy_between_siblings_starts_afresh(quantized):
    model, _ = quantized("pixart")
    set_activation_bits(model, 16)
    attention = model.transformer_blocks[0].attn1
    attention.to_q(torch.randn(3, 64, requires_grad=True))
    assert copy.deepcopy(model).transformer_blocks[0].attn1.to_q.site.memo.entry is None


def test_another_tensor_of_equal_values_is_computed_again(siblings, calls):
    q, k, _ = siblings
    x = torch.randn(3, 64)
    assert torch.equal(q(x), q(x.clone()))
    k(x.clone())
    assert len(calls) == 3


def test_a_skipped_sibling_does_not_leak_into_the_next_forward(quantized, run):
    model, _ = quantized("pixart")
    expected = run(model, seed=1)
    model.transformer_blocks[0].attn1.to_q(torch.randn(3, 64))  # k and v never follow
    assert torch.equal(run(model, seed=1), expected)


def test_one_slot_serves_all_sites(quantized):
    """A site that interrupts its siblings costs a second computation, and nothing else."""
    model, _ = quantized("pixart")
    one, two = model.transformer_blocks[0].attn1, model.transformer_blocks[1].attn1
    x = torch.randn(3, 64)
    order = (one.to_q, two.to_q, one.to_k, two.to_k)
    expected = [linear(x.clone()) for linear in order]
    assert all(torch.equal(linear(x), y) for linear, y in zip(order, expected, strict=True))


def test_a_deep_copy_shares_inside_itself(quantized, run, calls):
    model, plans = quantized("flux")
    twin = copy.deepcopy(model)
    ours, theirs = quantized_linears(model), quantized_linears(twin)
    for plan in plans:
        sites = {id(theirs[n].site) for n in plan.linears}
        assert len(sites) == 1
        assert sites.isdisjoint({id(ours[n].site) for n in plan.linears})
    assert len({id(memo_of(m)) for m in theirs.values()}) == 1
    assert memo_of(next(iter(theirs.values()))) is not memo_of(next(iter(ours.values())))
    expected = run(model)
    calls.clear()
    assert torch.equal(run(twin), expected)
    assert len(calls) == sum(p.quantize_input for p in plans)
    with torch.no_grad():
        for m in theirs.values():
            m.weight_scale.mul_(2)
            for p in m.site.parameters():
                p.neg_()
    assert torch.equal(run(model), expected)


def test_only_the_owner_stores_the_site(quantized):
    model, plans = quantized("flux")
    names = set(model.state_dict())
    for plan in plans:
        for n in plan.linears:
            assert {s for s in names if s.startswith(f"{n}.input_site.")} == {
                f"{n}.input_site.{t}" for t in (plan.site_spec() if n == plan.owner else ())
            }


def test_gradients_pass_through(siblings):
    """Straight-through: the gradient is that of the dense linear it stands for."""
    q = siblings[0]
    x = torch.randn(3, 64, requires_grad=True)
    q(x).sum().backward()
    dense = q.dequantized_weight().sum(0)
    torch.testing.assert_close(x.grad, dense.expand(3, -1), rtol=1e-4, atol=1e-4)
    assert memo_of(q).entry is None


def test_leading_dimensions_and_empty_input(siblings):
    q = siblings[0]
    x = torch.randn(2, 3, 64)
    assert torch.equal(q(x), q(x.reshape(6, 64)).reshape(2, 3, -1))
    assert q(torch.randn(0, 64)).shape == (0, q.out_features)


def test_a_memo_starts_empty():
    assert SiteMemo().entry is None
