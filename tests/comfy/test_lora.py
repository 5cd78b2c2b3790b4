"""LoRAs on quantized weights, through ComfyUI's own loader and ours: their effect, and that nothing of them stays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .core import relative, run
from .loras import WIDTH, lora, with_core_loras


@pytest.mark.parametrize(("mode", "tolerance"), [("side branch", 0.01), ("requantize", 0.2)])
@pytest.mark.parametrize("strengths", [(1.0,), (1.0, 0.7), (-0.5, 1.5)])
def test_core_lora_loader(core, make, dense, mode, tolerance, strengths):
    """The effect equals the dense model's, and what is removed leaves no bit behind."""
    model = make(lora=mode)
    before = {n: t.clone() for n, t in model.model.state_dict().items()}
    plain, plain_dense = run(core, model), run(core, dense)
    effect = run(core, with_core_loras(core, model, *strengths)) - plain
    expected = run(core, with_core_loras(core, dense, *strengths)) - plain_dense
    assert float(expected.norm() / plain_dense.norm()) > 0.05  # a LoRA that does something
    assert relative(effect, expected) < tolerance
    assert torch.equal(run(core, model), plain)
    after = model.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize("strengths", [(1.0,), (1.0, 0.7)])
def test_our_lora_node(core, make, dense, strengths):
    model = make()
    before = {n: t.clone() for n, t in model.model.state_dict().items()}
    plain, plain_dense = run(core, model), run(core, dense)
    stacked = model
    for seed, strength in enumerate(strengths):
        stacked = core.branches.apply_lora(stacked, lora(seed), strength)
    effect = run(core, stacked) - plain
    assert relative(effect, run(core, with_core_loras(core, dense, *strengths)) - plain_dense) < 0.01
    assert torch.equal(run(core, model), plain)
    assert torch.equal(run(core, stacked) - plain, effect)
    assert all(torch.equal(model.model.state_dict()[n], t) for n, t in before.items())


def test_loras_of_both_kinds_add_up(core, make, dense):
    model = make()
    both = core.branches.apply_lora(with_core_loras(core, model, 1.0), lora(1), 0.7)
    effect = run(core, both) - run(core, model)
    expected = run(core, with_core_loras(core, dense, 1.0, 0.7)) - run(core, dense)
    assert relative(effect, expected) < 0.01


def test_clones_do_not_leak(core, make):
    model = make(bits="4")
    plain = run(core, model)
    one, two = core.branches.apply_lora(model, lora(0), 1.0), core.branches.apply_lora(model, lora(1), 1.0)
    first, second = run(core, one), run(core, two)
    assert not torch.equal(first, second) and not torch.equal(first, plain)
    assert torch.equal(run(core, one), first) and torch.equal(run(core, two.clone()), second)
    assert torch.equal(run(core, model), plain)


def test_a_foreign_lora_is_refused(core, make):
    model = make()
    with pytest.raises(ValueError, match="no key of this LoRA belongs to this model"):
        core.branches.apply_lora(model, {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(4, 4)}, 1.0)
    wrong = lora(0)
    name = "transformer.single_transformer_blocks.0.proj_out.lora_A.weight"
    wrong[name] = wrong[name][:, :-64]
    with pytest.raises(ValueError, match=r"linear2.*made for another model"):
        core.branches.apply_lora(model, wrong, 1.0)


def test_requantizing_keeps_untouched_rows(core, make):
    """A LoRA on v of a fused linear leaves the codes of q, k and the MLP as they are."""
    model = make(lora="requantize")
    old = model.model.diffusion_model.single_blocks[1].linear1.weight
    codes = old._qdata.clone()
    only_v = {n: t for n, t in lora(0).items() if "single_transformer_blocks.1.attn.to_v" in n}
    run(core, core.comfy.sd.load_lora_for_models(model, None, only_v, 1.0, 0)[0])
    new = model.model.diffusion_model.single_blocks[1].linear1.weight
    rows = (new._qdata != codes).any(1)
    assert rows[2 * WIDTH : 3 * WIDTH].any() and not rows[: 2 * WIDTH].any() and not rows[3 * WIDTH :].any()


@given(n=st.integers(130, 300), k=st.integers(130, 300), rank=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_side_branch_finds_low_ranks(core, n, k, rank, seed):
    g = torch.Generator().manual_seed(seed)
    difference = torch.randn(n, rank, generator=g) @ torch.randn(rank, k, generator=g)
    down, up = core.side_branch.side_branch(difference)
    assert down.shape == (rank, k) and up.shape == (n, rank) and down.dtype == up.dtype == torch.bfloat16
    assert relative(up.float() @ down.float(), difference) < 0.006


def test_side_branch_refuses_full_rank(core):
    assert core.side_branch.side_branch(torch.randn(200, 200)) is None
    assert core.side_branch.side_branch(torch.zeros(200, 200)) is None


def test_rounding_to_16_bit_changes_no_codes(core, make):
    """A patch of some rows, on a weight that ComfyUI has unpacked to bfloat16."""
    weight = make().model.diffusion_model.single_blocks[1].linear1.weight
    patched = core.layout.DiRotQLayout.dequantize32(weight._qdata, weight._params)
    patched[10:20] += torch.randn(10, patched.shape[1], generator=torch.Generator().manual_seed(1)) * patched.std()
    codes, _ = core.layout.DiRotQLayout.quantize(patched.bfloat16(), like=(weight._qdata, weight._params))
    rows = (codes != weight._qdata).any(1)
    assert rows[10:20].all() and not rows[:10].any() and not rows[20:].any()
